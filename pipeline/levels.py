"""One level of a cascade: scan a table, ask its index, or score what an earlier level left.

Each takes unit query prefixes and gives `Hits`; a level knows nothing of the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import store
from pipeline.errors import DamageError
from pipeline.tables import TableInfo, vector_matrix
from pipeline.vectors import Codec, Matrix, Scoring, top, unit

SCAN_ROWS = 8_192
TOGETHER = 32
"""Shortlists of several queries are scored as one product while their union is at most this many times one of them."""


@dataclass(frozen=True)
class View:
    """One table at its pinned version, with what scores it."""

    name: str
    table: store.Table
    info: TableInfo
    codec: Codec
    ann: Mapping[str, Any] | None = None

    @property
    def is_full(self) -> bool:
        """Whether these are the full vectors."""
        return self.info.parent is None

    def scores(self, queries: Matrix, codes: Matrix, scoring: Scoring) -> Matrix:
        """Similarity of unit query prefixes [q, dim] to stored codes [n, …], float32[q, n].

        Full vectors are brought back to unit length (half precision lost some) and multiplied in float64: float32
        products differ in the last bit by where a row stands, and then equal rows would not tie.
        """
        if not self.is_full:
            return self.codec.scores(queries, codes, scoring)
        return np.asarray(queries.astype(np.float64) @ unit(codes).astype(np.float64).T, dtype=np.float32)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored vector."""
        kind = self.table.schema.field("vector").type
        return int(kind.list_size * kind.value_type.bit_width // 8)


@dataclass(frozen=True)
class Hits:
    """Per query, best first: positions in the tables, row numbers, scores; -1 where there are fewer hits."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: Matrix

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


def scanned(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Score every row that passes the filter, a batch at a time."""
    columns = ["row", "vector"] if where is None else ["row", "_rowoffset", "vector"]
    best, position = Hits.none(len(prefixes)), 0
    step.engine = "scan"
    for batch in view.table.scanner(columns=columns, filter=where, batch_size=SCAN_ROWS).to_batches():
        codes = vector_matrix(batch.column("vector"))
        offsets = np.arange(position, position + len(codes)) if where is None else batch["_rowoffset"].to_numpy()
        position += len(codes)
        scores = view.scores(prefixes, codes, step.scoring)
        best = _best(best, offsets.astype(np.int64), batch["row"].to_numpy(), scores, keep)
        step.rows, step.bytes = step.rows + len(codes), step.bytes + codes.nbytes
    return best


def _best(best: Hits, offsets: NDArray[np.int64], rows: NDArray[np.int64], scores: Matrix, keep: int) -> Hits:
    """Merge a batch into the best so far; earlier rows come first, so ties go to the lower row."""
    both = np.concatenate([best.scores, scores], axis=1)
    picked = top(both, keep)

    def pick(old: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
        held = old.shape[1]
        from_new: NDArray[np.int64] = new[np.maximum(picked - held, 0)]
        if not held:
            return from_new
        return np.where(picked < held, np.take_along_axis(old, np.minimum(picked, held - 1), 1), from_new)

    return Hits(pick(best.offsets, offsets), pick(best.rows, rows), np.take_along_axis(both, picked, 1))


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
    return best_of(hits, scores_of(view, prefixes, hits, step), keep)


def scores_of(view: View, prefixes: Matrix, hits: Hits, step: Step) -> Matrix:
    """Scores of the hits by this table's codes, float32 in the hits' shape, -inf for none; reads each row once.

    DamageError where the table holds another row at a hit's position.
    """
    step.engine = step.engine or "take"
    wanted, where = np.unique(hits.offsets, return_inverse=True)
    where = where.reshape(hits.offsets.shape)
    none = int(len(wanted) > 0 and wanted[0] < 0)
    scores = np.full(hits.offsets.shape, -np.inf, np.float32)
    if len(wanted) == none:
        return scores
    taken = view.table.take(pa.array(wanted[none:]), columns=["row", "vector"])
    codes, rows = vector_matrix(taken.column("vector")), taken.column("row").to_numpy()
    step.rows, step.bytes = step.rows + len(codes), step.bytes + taken.column("vector").nbytes
    found, at = hits.offsets >= 0, where - none
    if not np.array_equal(rows[at[found]], hits.rows[found]):
        raise DamageError(f"{view.name} holds other rows than the tables before it; run `verify`, then the job again")
    if len(codes) <= TOGETHER * hits.offsets.shape[1]:
        everything = view.scores(prefixes, codes, step.scoring)
        scores[found] = np.take_along_axis(everything, np.maximum(at, 0), 1)[found]
        return scores
    for query, mine in enumerate(found):
        scores[query, mine] = view.scores(prefixes[query][None], codes[at[query, mine]], step.scoring)[0]
    return scores


def best_of(hits: Hits, scores: Matrix, keep: int) -> Hits:
    """The best hits by other scores, ties by lower row."""
    picked = ranked_columns(hits, scores, keep)
    chosen = (np.take_along_axis(part, picked, 1) for part in (hits.offsets, hits.rows, scores))
    return Hits(*chosen)


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
