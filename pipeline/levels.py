"""One level of a cascade: scan a table, ask its index, or score what an earlier level left.

Each takes unit query prefixes and gives `Hits`; a level knows nothing of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import cosines, nested, resident, store
from pipeline.cores import threads
from pipeline.margin import Line, Seen, marks
from pipeline.nested import Lengths
from pipeline.resident import Held
from pipeline.vectors import Matrix, Scoring, along, best as best_scores, sort_keys, top
from pipeline.views import READ_ROWS, View

SCAN_ROWS = 8_192
TOGETHER = 32
"""Shortlists of several queries are scored as one product while their union is at most this many times one of them."""


@dataclass(frozen=True)
class Hits:
    """Per query, best first: positions in the tables, row numbers, scores; -1 where there are fewer hits.

    `lengths` are there after a level on a nested table, so that the next one need not read its blocks again.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: Matrix
    lengths: Lengths | None = None

    def taken(self, picked: NDArray[np.int64]) -> "Hits":
        """Per query, the hits in these columns [q, …]."""
        offsets, rows, scores = (along(part, picked) for part in (self.offsets, self.rows, self.scores))
        lengths = self.lengths
        if lengths is not None:
            lengths = replace(lengths, squares=along(lengths.squares, picked))
        return Hits(offsets, rows, scores, lengths)

    @classmethod
    def none(cls, queries: int) -> "Hits":
        """No hit for any query."""
        empty = np.zeros((queries, 0), np.int64)
        return cls(empty, empty, np.zeros((queries, 0), np.float32))

    def first(self, k: int) -> "Hits":
        """The best k of each query."""
        return Hits(self.offsets[:, :k], self.rows[:, :k], self.scores[:, :k])


@dataclass
class Step:
    """One level: what is asked of it, and what it did."""

    table: str
    engine: str
    shortlist: int
    scoring: Scoring = "dot"
    rows: int = 0
    bytes: int = 0
    candidates: int = 0
    """Rows that were rescored, over all queries."""
    milliseconds: float = 0.0
    note: str = ""
    dim: int | None = None
    """Of a nested table: how far it is read."""

    @property
    def shown(self) -> str:
        """The table; of a nested one also the dim."""
        return self.table if self.dim is None else f"{self.table}[:{self.dim}]"

    @property
    def name(self) -> str:
        """The table and how its codes are scored."""
        return f"{self.shown} {self.scoring}"


def scanned(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Score every row that passes the filter, a batch at a time."""
    columns = ["row", *([] if where is None else ["_rowoffset"]), *view.columns]
    best, position = Hits.none(len(prefixes)), 0
    step.engine = "scan"
    is_code = not view.is_full and not view.info.blocks
    batches = view.table.scanner(columns=columns, filter=where, batch_size=READ_ROWS if is_code else SCAN_ROWS)
    for batch in batches.to_batches():
        codes = view.codes_in(batch)
        offsets = np.arange(position, position + len(codes)) if where is None else batch["_rowoffset"].to_numpy()
        offsets, rows = offsets.astype(np.int64), batch["row"].to_numpy()
        position += len(codes)
        if view.info.blocks:
            lengths = Lengths(view.name, view.info.dim, nested.squares(codes))
            scores = nested.scores(view.scores(prefixes, codes, step.scoring), lengths.squares)
            best = _best(best, offsets, rows, scores, keep, lengths)
        else:
            best = _merged(best, offsets, rows, *_of_batch(view, prefixes, codes, best, keep, step.scoring), keep)
        step.rows, step.bytes = step.rows + len(codes), step.bytes + len(codes) * view.row_bytes
    return best


def _of_batch(
    view: View, prefixes: Matrix, codes: Matrix, before: Hits, keep: int, scoring: Scoring
) -> tuple[NDArray[np.int64], Matrix]:
    """Places in the batch and scores of the best of it; -1 and -inf where there are fewer."""
    if view.is_full:
        return cosines.nearest_full(prefixes, codes, keep, before.scores)
    if resident.available():
        return best_scores(view.scores(prefixes, codes, scoring), np.arange(len(codes)), keep)
    return Held(codes, view.codec, view.info.dim).nearest(prefixes, keep, scoring)


def _merged(
    best: Hits,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    scores: Matrix,
    keep: int,
) -> Hits:
    """The best so far and the best of a batch, together."""
    known = places >= 0
    both = Hits(
        np.concatenate([best.offsets, np.where(known, offsets[places], -1)], axis=1),
        np.concatenate([best.rows, np.where(known, rows[places], -1)], axis=1),
        np.concatenate([best.scores, scores], axis=1),
    )
    return best_of(both, both.scores, keep)


def _best(
    best: Hits,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    scores: Matrix,
    keep: int,
    lengths: Lengths,
) -> Hits:
    """Merge a batch of a nested table, whose squared lengths are [n], into the best so far; ties go to the lower row:
    earlier rows come first.
    """
    both = np.concatenate([best.scores, scores], axis=1)
    picked = top(both, keep)

    def pick(old: Matrix, new: Matrix) -> Matrix:
        held = old.shape[1]
        from_new: Matrix = new[np.maximum(picked - held, 0)]
        if not held:
            return from_new
        return np.where(picked < held, np.take_along_axis(old, np.minimum(picked, held - 1), 1), from_new)

    squares = best.scores[:, :0] if best.lengths is None else best.lengths.squares
    lengths = replace(lengths, squares=pick(squares, lengths.squares))
    return Hits(pick(best.offsets, offsets), pick(best.rows, rows), along(both, picked), lengths)


def allowed(view: View, where: str) -> NDArray[np.int64]:
    """Ascending positions of the rows that pass a filter, int64."""
    found = view.table.scanner(columns=["_rowoffset"], filter=where).to_table().column("_rowoffset")
    return np.sort(found.to_numpy().astype(np.int64))


def plan_misses(view: View) -> str:
    """Why searches would not use the table's ANN index; empty where the plan has it."""
    assert view.ann is not None
    query = np.zeros(view.width, np.uint8) if view.codec.kind == "binary" else np.ones(view.width, np.float32)
    plan = store.nearest(view.table, query, 1, view.ann["nprobes"], None).explain_plan(True)
    return "" if "ANN" in plan else f"its {view.ann['kind']} index is gone or not used; scanned"


def uncovered(view: View) -> int:
    """Rows of fragments that the table's ANN index does not know; Lance scans them beside it."""
    indexes = [one for one in view.table.describe_indices() if list(one.field_names) == ["vector"]]
    return int(view.table.count_rows()) - sum(int(one.num_rows_indexed) for one in indexes)


def from_index(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Ask the table's ANN index, queries side by side; its own distances order the shortlist."""
    assert view.ann is not None
    step.engine, step.note = str(view.ann["kind"]), step.note or "rows are those returned"
    columns = ["_rowoffset"] if view.is_dense else ["row", "_rowoffset"]

    def ask(query: Matrix) -> Hits:
        assert view.ann is not None
        table = store.nearest(view.table, query, keep, view.ann["nprobes"], where, columns).to_table()
        offsets = table["_rowoffset"].to_numpy().astype(np.int64)
        distances = table["_distance"].to_numpy().astype(np.float32)
        scores = 1 - 2 * distances / view.info.dim if view.codec.kind == "binary" else 1 - distances
        rows = offsets if view.is_dense else table["row"].to_numpy()
        order = np.lexsort((offsets, -scores))
        return Hits(offsets[order][None], rows[order][None], scores[order][None])

    queries = list(view.codec.encode(prefixes) if view.codec.kind == "binary" else prefixes)
    found = [ask(queries[0])] if len(queries) == 1 else list(threads().map(ask, queries))
    step.rows += sum(hits.rows.size for hits in found)
    return joined(found)


def rescored(view: View, prefixes: Matrix, hits: Hits, keep: int, step: Step, held: Held | None) -> Hits:
    """Score the hits with this table's codes and keep the best."""
    if view.info.blocks:
        deeper = _deeper(view, prefixes, hits, step)
        return deeper.taken(ranked_columns(deeper, deeper.scores, keep))
    if not view.is_full:
        return best_of(hits, scores_of(view, prefixes, hits, step, held), keep)
    vectors, at = _read(view, hits, step, held)
    found = hits.offsets >= 0
    step.candidates += int(found.sum())
    rough = cosines.cosines(prefixes, vectors, at)
    # only those that rounding could bring into the best are scored exactly
    floor = top_score(rough, keep) - cosines.ROUNDING
    query, column = np.nonzero(found & (rough >= floor[:, None]))
    scores = np.full(hits.offsets.shape, -np.inf, np.float32)
    scores[query, column] = cosines.exact_cosines(prefixes[query], vectors[at[query, column]])
    return best_of(hits, scores, keep)


def _deeper(view: View, prefixes: Matrix, hits: Hits, step: Step) -> Hits:
    """The hits where they stand, scored by a nested table; blocks that the level before read are not read again."""
    known = hits.lengths
    if known is None or known.table != view.name or known.dim >= view.info.dim:
        known = None
    else:
        view = view.at(view.info.dim, known.dim)
    numbers, at = _read(view, hits, step, None)
    found = hits.offsets >= 0
    products = _scored(view, prefixes, numbers, at, step, None)
    squares = np.zeros(at.shape, np.float32)
    squares[found] = nested.squares(numbers)[at[found]]
    if known is not None:
        products = products + nested.products(np.where(found, hits.scores, 0), known.squares, prefixes, known.dim)
        squares = squares + known.squares
    return Hits(hits.offsets, hits.rows, nested.scores(products, squares), Lengths(view.name, view.info.dim, squares))


def beginnings(hits: Hits, lengths: NDArray[np.int64]) -> Hits:
    """The first hits of each query, as many as `lengths` int64[q] say; the others become -1."""
    width = min(int(lengths.max(initial=0)), hits.offsets.shape[1])
    gone = np.arange(width) >= lengths[:, None]
    return Hits(
        np.where(gone, -1, hits.offsets[:, :width]),
        np.where(gone, -1, hits.rows[:, :width]),
        np.where(gone, -np.inf, hits.scores[:, :width]),
    )


def stopped(
    view: View, prefixes: Matrix, hits: Hits, keep: int, step: Step, held: Held | None, rule: tuple[Line, float]
) -> Hits:
    """The same, candidates in order until the margin over those left passes the rule's threshold."""
    line, threshold = rule
    queries, width = hits.offsets.shape
    rough = np.full((queries, width), -np.inf, np.float32)
    seen, going, start = Seen.nothing(line, queries, keep), np.ones(queries, bool), 0
    for mark in marks(width, keep):
        part = Hits(hits.offsets[going, start:mark], hits.rows[going, start:mark], hits.scores[going, start:mark])
        rough[going, start:mark] = cosines.cosines(prefixes[going], *_read(view, part, step, held))
        seen.add(going, part.scores, rough[going, start:mark])
        if mark == width:
            break
        going = going & (seen.margin(hits.scores[:, mark]) <= threshold)
        start = mark
        if not going.any():
            break
    step.candidates += int(np.isfinite(rough).sum())
    contenders = rough >= (top_score(rough, keep) - cosines.ROUNDING)[:, None]
    picked = top(rough, max(int((contenders & np.isfinite(rough)).sum(axis=1).max(initial=0)), 1))
    left = hits.taken(picked)
    scored = np.isfinite(along(rough, picked))
    left = Hits(np.where(scored, left.offsets, -1), np.where(scored, left.rows, -1), left.scores)
    return best_of(left, scores_of(view, prefixes, left, step, held), keep)


def top_score(scores: Matrix, k: int) -> Matrix:
    """The k-th highest score of each row, -inf where there are no more than k."""
    if scores.shape[1] <= k:
        return np.full(len(scores), -np.inf, np.float32)
    return np.asarray(np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k])


def scores_of(view: View, prefixes: Matrix, hits: Hits, step: Step, held: Held | None) -> Matrix:
    """Scores of the hits by this table's codes, float32 in the hits' shape, -inf for none; reads each row once."""
    if view.info.blocks:
        return _deeper(view, prefixes, hits, step).scores
    codes, at = _read(view, hits, step, held)
    return _scored(view, prefixes, codes, np.where(hits.offsets < 0, -1, at), step, held)


def _scored(
    view: View, prefixes: Matrix, codes: Matrix, at: NDArray[np.int64], step: Step, held: Held | None
) -> Matrix:
    """Scores of the codes at places [q, n], -inf where the place is -1."""
    found = at >= 0
    scores = np.full(at.shape, -np.inf, np.float32)
    if not found.any():
        return scores
    if held is None and len(codes) <= TOGETHER * at.shape[1]:
        everything = view.scores(prefixes, codes, step.scoring)
        scores[found] = np.take_along_axis(everything, np.maximum(at, 0), 1)[found]
    elif view.is_full or view.info.blocks:
        for query, mine in enumerate(found):
            scores[query, mine] = view.scores(prefixes[query][None], codes[at[query, mine]], step.scoring)[0]
    else:
        scores[found] = view.codec.scores_each(prefixes, codes[np.where(found, at, 0)], step.scoring)[found]
    return scores


def _read(view: View, hits: Hits, step: Step, held: Held | None) -> tuple[Matrix, NDArray[np.int64]]:
    """Codes that hold those of the hits, and where each hit's are among them: -1 for none."""
    found = hits.offsets >= 0
    if held is not None:
        step.engine = step.engine or "resident"
        step.rows, step.bytes = step.rows + int(found.sum()), step.bytes + int(found.sum()) * view.row_bytes
        return held.codes, hits.offsets
    step.engine = step.engine or "take"
    offsets, inverse = np.unique(hits.offsets[found], return_inverse=True)
    codes = view.codes_in(view.table.take(pa.array(offsets), columns=view.columns))
    step.rows, step.bytes = step.rows + len(codes), step.bytes + len(codes) * view.row_bytes
    at = np.full(hits.offsets.shape, -1, np.int64)
    at[found] = inverse
    return codes, at


def best_of(hits: Hits, scores: Matrix, keep: int) -> Hits:
    """The best hits by other scores, ties by lower row."""
    picked = ranked_columns(hits, scores, keep)
    return Hits(hits.offsets, hits.rows, scores).taken(picked)


def ranked_columns(hits: Hits, scores: Matrix, keep: int) -> NDArray[np.int64]:
    """Per query, the columns of the best hits by other scores, ties by lower row."""
    worst_first = sort_keys(scores, hits.offsets)
    keep, width = min(keep, scores.shape[1]), scores.shape[1]
    if keep * 4 > width:
        return np.argsort(worst_first, axis=1)[:, ::-1][:, :keep]
    picked = np.argpartition(worst_first, width - keep, axis=1)[:, width - keep :]
    return np.asarray(along(picked, np.argsort(along(worst_first, picked), axis=1)[:, ::-1]))


def joined(blocks: Sequence[Hits]) -> Hits:
    """Hits of several queries under one another, padded with -1 to one width."""
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return Hits.none(0)
    width = max(block.offsets.shape[1] for block in blocks)

    def pad(part: Matrix, value: float) -> Matrix:
        return np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=value)

    return Hits(
        np.concatenate([pad(block.offsets, -1) for block in blocks]),
        np.concatenate([pad(block.rows, -1) for block in blocks]),
        np.concatenate([pad(block.scores, -np.inf) for block in blocks]),
    )
