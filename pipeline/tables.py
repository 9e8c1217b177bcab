"""What the tables look like: Arrow schemas, the `matryoshka` metadata, vectors as fixed-size lists."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DamageError
from pipeline.transform import Transform, digest
from pipeline.vectors import Codec, Matrix, Precision, code_dtype, code_width, vector_columns

FORMAT = 1
"""Version of everything written; another one is refused."""
METADATA_KEY = b"matryoshka"
DOCUMENTS = "documents"
PARAMETERS = "parameters"
PARAMETERS_SCHEMA = pa.schema(
    [
        ("digest", pa.string()),
        ("kind", pa.string()),
        ("rows", pa.int64()),
        ("cols", pa.int64()),
        ("values", pa.list_(pa.float32())),
    ]
)

ROW_BY_ROW = {"lance-encoding:structural-encoding": "fullzip"}
"""Lance packs vectors of at most 128 bytes into chunks of about 4 KB, and reads a chunk for a row (measured: 1,000 of
200,000 rows of 64 half-precision numbers read 3.8 MB, this way 0.4)."""


@dataclass(frozen=True)
class TableInfo:
    """A table's `matryoshka` metadata: enough, with `parameters`, to turn a query into its prefix."""

    model: str
    revision: str | None
    model_digest: str
    max_tokens: int | None
    prompts: Mapping[str, str]
    full_dim: int
    dim: int
    precision: Precision
    metric: str = "dot"
    transform: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    codec: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    parent_version: int | None = None
    blocks: Sequence[int] = ()
    """Ends of nested blocks; empty, and not written, for a table with one vector column."""
    format: int = FORMAT

    def to_schema(self, schema: pa.Schema) -> pa.Schema:
        """The schema with this metadata."""
        written = {name: value for name, value in asdict(self).items() if name != "blocks" or value}
        return schema.with_metadata({METADATA_KEY: json.dumps(written, separators=(",", ":")).encode()})

    @classmethod
    def of(cls, schema: pa.Schema) -> "TableInfo":
        """Read the metadata back; DamageError where it is missing or from another format."""
        raw = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
        if raw.get("format") != FORMAT:
            raise DamageError(f"a table's metadata has format {raw.get('format')}, this version reads {FORMAT}")
        return cls(**raw)

    def codec_with(self, rotation: Matrix | None = None) -> Codec:
        """The codec that wrote the table's vectors; `rotation` comes from `parameters`."""
        scale = self.codec.get("scale")
        return Codec(self.precision, None if scale is None else np.array(scale, np.float32), rotation)


@dataclass(frozen=True)
class Parent:
    """The `documents` table that everything below is fitted on and derived from."""

    uri: str
    version: int
    digest: str
    rows: int
    info: TableInfo
    files: Mapping[str, str]
    """sha256 of each data file, to be compared before anything is learned or derived from it."""


@dataclass(frozen=True)
class FittedPrefix:
    """What was learned for one prefix table."""

    transform: Transform
    codec: Codec

    def rotation(self) -> str | None:
        """Name of the codec's rotation in `parameters`; None for the identity."""
        return None if self.codec.rotation is None else digest("rotation", self.codec.rotation)

    def artefacts(self) -> dict[str, tuple[str, Matrix]]:
        """Kind and matrix of all that has to stand in `parameters`, by digest."""
        found: dict[str, tuple[str, Matrix]] = {}
        name, turned = self.transform.digest(), self.rotation()
        if name is not None:
            found[name] = (self.transform.kind, self.transform.stacked())
        if turned is not None and self.codec.rotation is not None:
            found[turned] = ("rotation", self.codec.rotation)
        return found


@dataclass(frozen=True)
class Fits:
    """What was learned for every prefix table; the version and names of `parameters`; figures for the manifest."""

    prefixes: Mapping[str, FittedPrefix]
    parameters_version: int
    artefacts: Sequence[str]
    decision: Mapping[str, Any]
    record: Mapping[str, Any]
    """Of the data files of `parameters`."""


def documents_schema(
    full_dim: int, vectors: Precision, keep: Mapping[str, pa.DataType], filters: Mapping[str, pa.DataType], text: bool
) -> pa.Schema:
    """Columns of `documents`, in order."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            *([("text", pa.string())] if text else []),
            *keep.items(),
            *filters.items(),
            ("text_digest", pa.binary(16)),
            ("vector", vector_type(full_dim, vectors)),
        ]
    )


def parameters_schema(documents: TableInfo) -> pa.Schema:
    """Columns of `parameters`; its metadata names the model only."""
    named = {"format": FORMAT, "model": documents.model, "model_digest": documents.model_digest}
    return PARAMETERS_SCHEMA.with_metadata({METADATA_KEY: json.dumps(named).encode()})


def prefix_schema(
    dim: int, precision: Precision, filters: Mapping[str, pa.DataType], blocks: Sequence[int] = ()
) -> pa.Schema:
    """Columns of a prefix table, in order; one vector column, or one per nested block."""
    cut = [
        pa.field(name, vector_type(end - start, precision), metadata=ROW_BY_ROW)
        for name, (start, end) in vector_columns(blocks).items()
    ]
    return pa.schema([("row", pa.int64()), *filters.items(), *(cut or [("vector", vector_type(dim, precision))])])


def vector_type(dim: int, precision: Precision) -> pa.DataType:
    """Arrow type of stored codes."""
    return pa.list_(pa.from_numpy_dtype(code_dtype(precision)), code_width(dim, precision))


def vector_array(codes: Matrix) -> pa.FixedSizeListArray:
    """Codes [n, width] as an Arrow array over the same memory."""
    flat = pa.array(np.ascontiguousarray(codes).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])


def block_arrays(codes: Matrix, blocks: Sequence[int] = ()) -> list[pa.FixedSizeListArray]:
    """Codes [n, width] as the vector columns of a prefix table."""
    spans = list(vector_columns(blocks).values()) or [(0, codes.shape[1])]
    return [vector_array(codes[:, start:end]) for start, end in spans]


def vector_matrix(column: pa.Array | pa.ChunkedArray) -> Matrix:
    """An Arrow vector column as codes [n, width]; a single chunk is not copied."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), array.type.list_size)


def matrices(parameters: pa.Table) -> dict[str, Matrix]:
    """The fitted artefacts in `parameters`: float32[rows, cols] by digest."""
    named = zip(*(parameters.column(name).to_pylist() for name in ("digest", "rows", "cols")), strict=True)
    values = parameters.column("values")
    return {
        digest: values[number].values.to_numpy().reshape(rows, cols)
        for number, (digest, rows, cols) in enumerate(named)
    }


def logical_digest(table: pa.Table) -> str:
    """sha256 over every column's values in order, whatever the chunking; nulls count as nulls."""
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name} {column.type}\n".encode())
        _update(digest, column.combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps an empty chunked array chunked
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_fixed_size_list(array.type):
        _update(digest, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        values = [b"" if value is None else value for value in array.cast(pa.binary()).to_pylist()]
        digest.update(np.array([len(value) for value in values], "<i8").tobytes())
        digest.update(b"".join(values))
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(np.ascontiguousarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False)).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def combined_digest(digests: Sequence[str]) -> str:
    """A table's digest from its shards' digests, so that appending costs only the new shards."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
