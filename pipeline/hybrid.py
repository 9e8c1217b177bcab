"""Hybrid search: the cascade's answer and the hits of the full-text index, fused by reciprocal rank.

Comes in: texts with their vectors, one open generation. Goes out: `Hits` in the fused order whose scores are cosines
of full vectors, and the fused scores beside them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline import store
from pipeline.cascade import Opened
from pipeline.cores import threads
from pipeline.errors import QueryError
from pipeline.levels import Hits, Step, joined
from pipeline.tables import DOCUMENTS
from pipeline.vectors import Matrix

DAMPING = 60
"""Cormack, Clarke and Büttcher (2009): a hit at rank r of a list is worth 1 / (60 + r)."""
LEAST_DEPTH, DEPTH_PER_HIT = 100, 10
"""Hits that each list hands over: max(100, 10 k)."""
QUERY_CHARACTERS = 10_000
"""Of a query that the text index is asked for; 6,300 took 34 ms, 634,000 took 5.5 s (measured, SQuAD dev)."""


def depth(k: int) -> int:
    """Hits of each list for a search of k."""
    return max(LEAST_DEPTH, DEPTH_PER_HIT * k)


def is_wanted(opened: Opened, queries: Any, hybrid: bool | None) -> bool:
    """Whether the text index is asked too.

    `hybrid` null follows the spec's `search.hybrid`, for texts. QueryError where hybrid is asked for and cannot be.
    """
    if hybrid is not None and not isinstance(hybrid, bool):
        raise QueryError(f"hybrid is true, false or null, not {hybrid!r}")
    is_text = not isinstance(queries, np.ndarray)
    if hybrid is False or (hybrid is None and not (is_text and opened.generation["spec"]["search"].get("hybrid"))):
        return False
    if not is_text:
        raise QueryError("hybrid search needs the query's text; for vectors leave hybrid out")
    if not has_text_index(opened):
        raise QueryError("hybrid search needs the full-text index; set index.text: true and run the job again")
    return True


def has_text_index(opened: Opened) -> bool:
    """Whether the generation was published with a full-text index."""
    return bool(opened.generation["spec"]["index"].get("text"))


def rank(
    opened: Opened,
    texts: Sequence[str],
    vectors: Matrix,
    k: int,
    clause: str | None,
    nearest: Callable[[int], tuple[Hits, list[Step]]],
) -> tuple[Hits, Matrix, list[Step]]:
    """The k best of both lists: hits [q, k], their fused scores float32[q, k], what each level did.

    `nearest` gives the vectors' list of a length; unit float32 `vectors` [q, full_dim] score what was fused.
    """
    length = depth(k)
    by_vector, steps = nearest(length)
    by_text, text_step = text_hits(opened, texts, length, clause)
    start = time.perf_counter()
    hits = fused([by_vector, by_text], k)
    cosines = opened.scores(DOCUMENTS, vectors, hits)
    count = int((hits.offsets >= 0).sum())
    fusion = Step(DOCUMENTS, "fusion", k, rows=count, bytes=count * opened.documents.row_bytes, candidates=count)
    fusion.note = "by reciprocal ranks; scores are cosines"
    fusion.milliseconds = (time.perf_counter() - start) * 1000
    return replace(hits, scores=cosines), hits.scores, [*steps, text_step, fusion]


def text_hits(opened: Opened, texts: Sequence[str], keep: int, clause: str | None) -> tuple[Hits, Step]:
    """The rows whose texts match best by BM25, ties by row; a row without a word of the query is no hit."""
    start = time.perf_counter()
    step = Step(DOCUMENTS, "fts", keep, note="by BM25; rows are those returned")
    if any(len(text) > QUERY_CHARACTERS for text in texts):
        step.note = f"only the first {QUERY_CHARACTERS:,} characters of a query are looked for"
    hits = joined(list(threads().map(lambda text: _ask(opened, text, keep, clause), texts)))
    step.rows = int((hits.offsets >= 0).sum())
    step.milliseconds = (time.perf_counter() - start) * 1000
    return hits, step


def _ask(opened: Opened, text: str, keep: int, clause: str | None) -> Hits:
    """Lance cuts ties as it likes, so more is asked for until none crosses the cut."""
    words = text[:QUERY_CHARACTERS].encode("utf-8", "replace").decode()
    limit = 2 * keep
    while True:
        found = store.matching(opened.documents.table, words, limit, clause).to_table()
        offsets = found["_rowoffset"].to_numpy().astype(np.int64)
        scores = found["_score"].to_numpy().astype(np.float32)
        order = np.lexsort((offsets, -scores))
        if len(order) < limit or scores[order[-1]] < scores[order[keep - 1]]:
            break
        limit *= 8
    best = order[:keep]
    return Hits(offsets[best][None], found["row"].to_numpy()[best][None], scores[best][None])


def fused(lists: Sequence[Hits], k: int) -> Hits:
    """The k best by reciprocal rank fusion, ties by row; scores are the sums of 1 / (60 + rank), float32."""
    return joined([_fused(lists, query, k) for query in range(len(lists[0].offsets))])


def _fused(lists: Sequence[Hits], query: int, k: int) -> Hits:
    """The same for one query."""
    offsets = np.concatenate([one.offsets[query] for one in lists])
    worth = np.concatenate([1 / (DAMPING + np.arange(1, one.offsets.shape[1] + 1)) for one in lists])
    rows, found = np.concatenate([one.rows[query] for one in lists]), offsets >= 0
    known, first, which = np.unique(offsets[found], return_index=True, return_inverse=True)
    sums = np.bincount(which, worth[found], len(known))
    best = np.argsort(-sums, kind="stable")[:k]
    return Hits(known[best][None], rows[found][first[best]][None], sums[best].astype(np.float32)[None])


def text_index_bytes(opened: Opened) -> int:
    """Bytes of the full-text index on disk."""
    return sum(
        int(one.total_size_bytes or 0)
        for one in opened.documents.table.describe_indices()
        if list(one.field_names) == ["text"]
    )
