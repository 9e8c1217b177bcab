"""One table at its pinned version, opened to be read and scored; a nested one up to the dim that a level names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import nested, store
from pipeline.tables import TableInfo, vector_matrix
from pipeline.vectors import Codec, Matrix, Scoring, code_dtype, unit

READ_ROWS = 65_536


@dataclass(frozen=True)
class View:
    """One table at its pinned version, with what scores it; of a nested one the blocks after `start`, up to a dim."""

    name: str
    table: store.Table
    info: TableInfo
    codec: Codec
    ann: Mapping[str, Any] | None = None
    is_dense: bool = False
    """Whether every row's number is its position."""
    note: str = ""
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

    def at(self, how: str | int | None, start: int = 0) -> "View":
        """A nested table cut to the dim that a level names, without the blocks before `start`; others as they are."""
        if not self.info.blocks:
            return self
        dim = how if isinstance(how, int) else self.info.dim
        return replace(self, info=replace(self.info, dim=dim), start=start)

    @property
    def columns(self) -> list[str]:
        """The vector columns that are read."""
        return nested.columns(self.info.blocks, self.start, self.info.dim) if self.info.blocks else ["vector"]

    def codes_in(self, rows: pa.RecordBatch | pa.Table) -> Matrix:
        """Stored codes [n, …] of rows; of a nested table the numbers that they stand for, float32."""
        found = [vector_matrix(rows.column(name)) for name in self.columns]
        if not self.info.blocks:
            return found[0]
        scale = self.codec.scale
        return nested.numbers(found, None if scale is None else scale[self.start : self.info.dim])

    @cached_property
    def width(self) -> int:
        """Numbers per stored vector; bytes of packed bits."""
        return sum(int(self.table.schema.field(name).type.list_size) for name in self.columns)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of stored vectors."""
        return code_dtype(self.info.precision)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one stored vector."""
        return self.width * self.dtype.itemsize

    def codes(self) -> Matrix:
        """All codes [n, width]."""
        return self._column("vector", np.empty((self.table.count_rows(), self.width), self.dtype))

    def rows(self) -> NDArray[np.int64]:
        """All row numbers int64[n]."""
        return self._column("row", np.empty(self.table.count_rows(), np.int64))

    def _column(self, name: str, out: Matrix) -> Matrix:
        start = 0
        for batch in self.table.scanner(columns=[name], batch_size=READ_ROWS).to_batches():
            column = batch.column(name)
            out[start : start + len(column)] = column.to_numpy() if name == "row" else vector_matrix(column)
            start += len(column)
        return out
