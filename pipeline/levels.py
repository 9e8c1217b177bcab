"""One level of a cascade: scan a table, ask its index, or score what an earlier level left.

Each takes unit query prefixes and gives `Hits`; a level knows nothing of the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import nested, store
from pipeline.errors import DamageError
from pipeline.nested import Lengths
from pipeline.tables import TableInfo, vector_matrix
from pipeline.vectors import Codec, Matrix, Scoring, top, unit

SCAN_ROWS = 8_192
TOGETHER = 32
"""Shortlists of several queries are scored as one product while their union is at most this many times one of them."""


@dataclass(frozen=True)
class View:
    """One table at its pinned version, with what scores it; of a nested one the blocks after `start`, up to a dim."""

    name: str
    table: store.Table
    info: TableInfo
    codec: Codec
    ann: Mapping[str, Any] | None = None
    start: int = 0

    @property
    def is_full(self) -> bool:
        """Whether these are the full vectors."""
        return self.info.parent is None

    def scores(self, queries: Matrix, codes: Matrix, scoring: Scoring) -> Matrix:
        """Similarity of unit query prefixes [q, dim] to stored codes [n, …], float32[q, n].

        Full vectors are brought back to unit length (half precision lost some) and multiplied in float64: float32
        products differ in the last bit by where a row stands, and then equal rows would not tie. Of a nested table
        these are products, not yet divided by lengths.
        """
        if self.info.blocks:
            return np.asarray(queries[:, self.start :] @ codes.T)
        if not self.is_full:
            return self.codec.scores(queries, codes, scoring)
        return np.asarray(queries.astype(np.float64) @ unit(codes).astype(np.float64).T, dtype=np.float32)

    @property
    def hows(self) -> Sequence[str | int]:
        """The ways to read it that are worth comparing: how bits are scored, at which dims blocks end."""
        if self.codec.kind == "binary":
            return "asymmetric", "hamming"
        return self.info.blocks or ("auto",)

    def at(self, how: str | int, start: int = 0) -> "View":
        """A nested table cut to the dim that a level names, without the blocks before `start`; others as they are."""
        if not self.info.blocks:
            return self
        dim = how if isinstance(how, int) else self.info.dim
        return replace(self, info=replace(self.info, dim=dim), start=start)

    @property
    def columns(self) -> list[str]:
        """The vector columns that are read."""
        return nested.columns(self.info.blocks, self.start, self.info.dim) if self.info.blocks else ["vector"]

    def codes(self, rows: pa.RecordBatch | pa.Table) -> Matrix:
        """Stored codes [n, …] of rows; of a nested table the numbers that they stand for, float32."""
        found = [vector_matrix(rows.column(name)) for name in self.columns]
        if not self.info.blocks:
            return found[0]
        scale = self.codec.scale
        return nested.numbers(found, None if scale is None else scale[self.start : self.info.dim])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's codes."""
        kinds = [self.table.schema.field(name).type for name in self.columns]
        return sum(int(kind.list_size * kind.value_type.bit_width // 8) for kind in kinds)


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
        offsets, rows, scores = (np.take_along_axis(part, picked, 1) for part in (self.offsets, self.rows, self.scores))
        lengths = self.lengths
        if lengths is not None:
            lengths = replace(lengths, squares=np.take_along_axis(lengths.squares, picked, 1))
        return Hits(offsets, rows, scores, lengths)

    @classmethod
    def none(cls, queries: int) -> "Hits":
        """No hit for any query."""
        empty = np.zeros((queries, 0), np.int64)
        return cls(empty, empty, np.zeros((queries, 0), np.float32))


@dataclass
class Step:
    """One level: what is asked of it, and what it did."""

    table: str
    engine: str
    shortlist: int
    scoring: Scoring = "dot"
    rows: int = 0
    bytes: int = 0
    milliseconds: float = 0.0
    note: str = ""
    dim: int = 0
    """Numbers of a vector that it compares."""


def scanned(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Score every row that passes the filter, a batch at a time."""
    columns = ["row", *([] if where is None else ["_rowoffset"]), *view.columns]
    best, position = Hits.none(len(prefixes)), 0
    step.engine = "scan"
    for batch in view.table.scanner(columns=columns, filter=where, batch_size=SCAN_ROWS).to_batches():
        codes = view.codes(batch)
        offsets = np.arange(position, position + len(codes)) if where is None else batch["_rowoffset"].to_numpy()
        position += len(codes)
        scores, lengths = view.scores(prefixes, codes, step.scoring), None
        if view.info.blocks:
            lengths = Lengths(view.name, view.info.dim, nested.squares(codes))
            scores = nested.scores(scores, lengths.squares)
        best = _best(best, offsets.astype(np.int64), batch["row"].to_numpy(), scores, keep, lengths)
        step.rows, step.bytes = step.rows + len(codes), step.bytes + len(codes) * view.row_bytes
    return best


def _best(
    best: Hits,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    scores: Matrix,
    keep: int,
    lengths: Lengths | None = None,
) -> Hits:
    """Merge a batch, whose squared lengths are [n], into the best so far; earlier rows come first, so ties go to the
    lower row.
    """
    both = np.concatenate([best.scores, scores], axis=1)
    picked = top(both, keep)

    def pick(old: Matrix, new: Matrix) -> Matrix:
        held = old.shape[1]
        from_new: Matrix = new[np.maximum(picked - held, 0)]
        if not held:
            return from_new
        return np.where(picked < held, np.take_along_axis(old, np.minimum(picked, held - 1), 1), from_new)

    if lengths is not None:
        squares = best.scores[:, :0] if best.lengths is None else best.lengths.squares
        lengths = replace(lengths, squares=pick(squares, lengths.squares))
    return Hits(pick(best.offsets, offsets), pick(best.rows, rows), np.take_along_axis(both, picked, 1), lengths)


def from_index(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Ask the table's ANN index, one query at a time; its own distances order the shortlist."""
    assert view.ann is not None
    step.engine, step.note = str(view.ann["kind"]), step.note or "rows are those returned"
    queries = view.codec.encode(prefixes) if view.codec.kind == "binary" else prefixes
    found = []
    for query in queries:
        scanner = store.nearest(view.table, query, keep, view.ann["nprobes"], where, ("row", "_rowoffset"))
        table = scanner.to_table()
        step.rows += table.num_rows
        distances = table["_distance"].to_numpy().astype(np.float32)
        scores = 1 - 2 * distances / view.info.dim if view.codec.kind == "binary" else 1 - distances
        rows = table["row"].to_numpy()
        order = np.lexsort((rows, -scores))
        offsets = table["_rowoffset"].to_numpy().astype(np.int64)
        found.append(Hits(offsets[order][None], rows[order][None], scores[order][None]))
    return joined(found)


def rescored(view: View, prefixes: Matrix, hits: Hits, keep: int, step: Step) -> Hits:
    """Score the hits with this table's codes and keep the best."""
    found = _rescored(view, prefixes, hits, step)
    return best_of(found, found.scores, keep)


def scores_of(view: View, prefixes: Matrix, hits: Hits, step: Step) -> Matrix:
    """Scores of the hits by this table's codes, float32 in the hits' shape, -inf for none; reads each row once.

    DamageError where the table holds another row at a hit's position.
    """
    return _rescored(view, prefixes, hits, step).scores


def _rescored(view: View, prefixes: Matrix, hits: Hits, step: Step) -> Hits:
    """The hits where they stand, with other scores; of a nested table, blocks that the level before read are not."""
    known = hits.lengths
    if known is not None and known.table == view.name and known.dim < view.info.dim:
        view = view.at(view.info.dim, known.dim)
    step.engine = step.engine or "take"
    wanted, where = np.unique(hits.offsets, return_inverse=True)
    where = where.reshape(hits.offsets.shape)
    none = int(len(wanted) > 0 and wanted[0] < 0)
    scores = np.full(hits.offsets.shape, -np.inf, np.float32)
    if len(wanted) == none:
        return Hits(hits.offsets, hits.rows, scores)
    taken = view.table.take(pa.array(wanted[none:]), columns=["row", *view.columns])
    codes, rows = view.codes(taken), taken.column("row").to_numpy()
    step.rows, step.bytes = step.rows + len(codes), step.bytes + len(codes) * view.row_bytes
    found, at = hits.offsets >= 0, where - none
    if not np.array_equal(rows[at[found]], hits.rows[found]):
        raise DamageError(f"{view.name} holds other rows than the tables before it; run `verify`, then the job again")
    if len(codes) <= TOGETHER * hits.offsets.shape[1]:
        everything = view.scores(prefixes, codes, step.scoring)
        scores[found] = np.take_along_axis(everything, np.maximum(at, 0), 1)[found]
    else:
        for query, mine in enumerate(found):
            scores[query, mine] = view.scores(prefixes[query][None], codes[at[query, mine]], step.scoring)[0]
    if not view.info.blocks:
        return Hits(hits.offsets, hits.rows, scores)
    return _divided(view, prefixes, hits, scores, np.where(found, nested.squares(codes)[at], 0))


def _divided(view: View, prefixes: Matrix, hits: Hits, products: Matrix, squares: Matrix) -> Hits:
    """The hits with the scores of a nested table, from what its blocks gave and what was known of those before them."""
    if view.start and hits.lengths is not None:
        before = np.where(hits.offsets < 0, 0, hits.scores)
        products = products + nested.products(before, hits.lengths.squares, prefixes, view.start)
        squares = squares + hits.lengths.squares
    lengths = Lengths(view.name, view.info.dim, np.asarray(squares, np.float32))
    return Hits(hits.offsets, hits.rows, nested.scores(products, lengths.squares), lengths)


def best_of(hits: Hits, scores: Matrix, keep: int) -> Hits:
    """The best hits by other scores, ties by lower row."""
    picked = ranked_columns(hits, scores, keep)
    return replace(hits, scores=scores).taken(picked)


def ranked_columns(hits: Hits, scores: Matrix, keep: int) -> NDArray[np.int64]:
    """Per query, the columns of the best hits by other scores, ties by lower row."""
    ordered = np.argsort(hits.offsets, axis=1, kind="stable")
    picked: NDArray[np.int64] = np.take_along_axis(ordered, top(np.take_along_axis(scores, ordered, 1), keep), 1)
    return picked


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
