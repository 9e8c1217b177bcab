"""What the predictor of the shortlist learns from: seeded corpus rows, asked as queries of their own corpus.

A row is never counted against itself. Corpus rows are not users' queries (those are shorter, and often of another
kind): what is learned from them is calibrated on real queries where the evaluation has them.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import predictor
from pipeline.cascade import QUERIES_AT_ONCE, Level, Opened
from pipeline.levels import SCAN_ROWS
from pipeline.predictor import Predictor
from pipeline.tables import vector_matrix
from pipeline.vectors import Matrix, unit
from pipeline.views import View

log = logging.getLogger(__name__)

QUERIES = 4_096
"""Corpus rows that are asked, where there are so many."""
FEWEST = 400
"""With fewer there is too little to learn from (assumed)."""
FEWEST_ASKED = 50
"""Fewer real queries say nothing of the share that would be failed; then corpus rows set aside calibrate."""


def run(
    opened: Opened,
    tables: Sequence[tuple[str, str | int]],
    k: int,
    longest: int,
    seed: int,
    asked: Matrix | None,
    avoided: NDArray[np.int64],
) -> dict[str, Predictor]:
    """A predictor for each (table, scoring or dim), by the name of its level; none where the corpus is too small.

    It knows lists of up to `longest`. `asked` are unit vectors [q, full_dim] of real queries, or None: they calibrate.
    Rows `avoided` are not learned from, so that a measurement on them is one on unseen queries.
    """
    width = min(longest, opened.row_count - 1)
    rng = np.random.default_rng(seed)
    vectors, own = _drawn(opened.documents, rng, avoided)
    if len(own) < FEWEST or width <= 4 * k:
        return {}
    order = rng.permutation(len(own))
    learning, calibrating, source = order[len(own) // 4 :], order[: len(own) // 4], "corpus rows"
    if asked is not None and len(asked) >= FEWEST_ASKED:
        calibrating, source = np.arange(len(own), len(own) + len(asked)), "queries"
        vectors, own = np.concatenate([vectors, asked]), np.concatenate([own, np.full(len(asked), -1)])
    truth = _exact(opened.documents, vectors, own, k)
    found = {}
    for table, how in tables:
        name, curves, needed, held = _places(opened, (table, width, how), vectors, own, truth)
        wanted = np.where(held[learning], needed[learning], width + 1)
        layers = predictor.fit(vectors[learning], curves[learning], wanted, k, width, seed)
        found[name] = predictor.calibrated(
            layers, vectors[calibrating], curves[calibrating], needed[calibrating], k, width, source
        )
        log.info("predictor table=%s sees_vector=%s", name, layers[0].shape[0] > curves.shape[1])
    return found


def _drawn(documents: View, rng: np.random.Generator, avoided: NDArray[np.int64]) -> tuple[Matrix, NDArray[np.int64]]:
    """Unit vectors of up to `QUERIES` seeded rows, none of those avoided, and their row numbers."""
    total = documents.table.count_rows()
    chosen = rng.choice(total, min(QUERIES + len(avoided), total), replace=False)
    taken = documents.table.take(pa.array(chosen), columns=["row", "vector"])
    rows = taken.column("row").to_numpy()
    kept = np.flatnonzero(~np.isin(rows, avoided))[:QUERIES]
    return unit(vector_matrix(taken.column("vector"))[kept]), rows[kept]


def _exact(documents: View, vectors: Matrix, own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The k nearest rows of each query but its own, int64[q, k] in no order; the full vectors are read once."""
    best = np.full((len(vectors), k), -np.inf, np.float32)
    found = np.full((len(vectors), k), -1, np.int64)
    for batch in documents.table.scanner(columns=["row", "vector"], batch_size=SCAN_ROWS).to_batches():
        rows, codes = batch["row"].to_numpy(), unit(vector_matrix(batch.column("vector")))
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            scores = vectors[part] @ codes.T
            at = np.minimum(np.searchsorted(rows, own[part]), len(rows) - 1)
            mine = np.flatnonzero(rows[at] == own[part])
            scores[mine, at[mine]] = -np.inf
            both = np.concatenate([best[part], scores], axis=1)
            picked = np.argpartition(both, both.shape[1] - k, axis=1)[:, both.shape[1] - k :]
            best[part] = np.take_along_axis(both, picked, 1)
            earlier = np.take_along_axis(found[part], np.minimum(picked, k - 1), 1)
            found[part] = np.where(picked < k, earlier, rows[np.maximum(picked - k, 0)])
    return found


def _places(
    opened: Opened, level: Level, vectors: Matrix, own: NDArray[np.int64], truth: NDArray[np.int64]
) -> tuple[str, Matrix, NDArray[np.int64], NDArray[np.bool_]]:
    """Name of the level; of each query its curve, the place of the last true hit in its list (0: none), all are held.

    The list is the table's own ranking of all rows but the query's own.
    """
    (table, width, how), k = level, truth.shape[1]
    step = opened.steps(k, [(table, width + 1, how)], rescore=False)[0]
    curves, needed, held = [], [], []
    for start in range(0, len(vectors), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        hits = opened.level(step, vectors[part], None, width + 1, None)
        others = np.argsort(hits.rows == own[part, None], axis=1, kind="stable")[:, :width]
        rows, scores = (np.take_along_axis(column, others, 1) for column in (hits.rows, hits.scores))
        is_true = (rows[:, :, None] == truth[part, None]).any(axis=2)
        last = rows.shape[1] - is_true[:, ::-1].argmax(axis=1)
        needed.append(np.where(is_true.any(axis=1), last, 0))
        held.append(is_true.sum(axis=1) == k)
        curves.append(predictor.curve(scores, k, width))
    return step.name, np.concatenate(curves), np.concatenate(needed), np.concatenate(held)
