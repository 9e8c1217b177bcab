"""Tables as they lie below a root, opened by plain Lance and compared with what their generation says of them.

Comes in: a root's folder and a generation. Goes out: open tables, and problems that name table and row or part.
Shares no code with what writes, on purpose.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

BATCH_ROWS = 8_192
BUFFER_BYTES = 128_000_000
"""What Lance may read ahead of one scan."""
FORMAT, LANCE_FORMAT = 1, "2.2"
METADATA, METADATA_BYTES = b"matryoshka", 16_384
DOCUMENTS, PARAMETERS = "documents", "parameters"
PARAMETERS_COLUMNS = {
    "digest": pa.string(), "kind": pa.string(), "rows": pa.int64(), "cols": pa.int64(),
    "values": pa.list_(pa.float32()),
}  # fmt: skip

Values = NDArray[Any]


@dataclass
class Notes:
    """Problems found so far and what was checked; of a problem that many rows have, the first row is named."""

    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    _rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def say(self, sentence: str) -> None:
        """Add a problem."""
        self.problems.append(sentence)

    def rows(self, where: str, rows: Values, wrong: Values, what: str) -> None:
        """Add a problem of the rows that the mask `wrong` picks; the same one is told once, with its first row."""
        if wrong.any():
            known = self._rows.setdefault((where, what), [int(rows[wrong][0]), 0])
            known[1] += int(wrong.sum())

    def told(self) -> tuple[str, ...]:
        """All problems."""
        rows = [
            f"{where}: row {row} {what}" + (f" (and {count - 1:,} more rows)" if count > 1 else "")
            for (where, what), (row, count) in self._rows.items()
        ]
        return (*self.problems, *rows)

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Whatever reading raises becomes one problem, panics of Lance included."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = (str(error).splitlines() or [""])[0][:200]
            self.say(f"{what} cannot be checked: {type(error).__name__}: {reason}")


@dataclass(frozen=True)
class Table:
    """A table at the version of the generation; `entry` is what the generation says of it."""

    name: str
    data: Any
    entry: Mapping[str, Any]
    info: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Where it lies below the root."""
        return f"lancedb/{self.name}.lance"

    @property
    def vectors(self) -> list[str]:
        """Its vector columns: `vector`, or one per nested block."""
        ends = self.info.get("blocks") or []
        return [f"vector_{a}_{b}" for a, b in zip([0, *ends], ends, strict=False)] or ["vector"]


def table_of(prefix: Mapping[str, Any]) -> str:
    """The table that an entry of the spec's prefixes means."""
    return f"prefix_{prefix['dim']}_{prefix['precision']}" + ("_nested" if prefix.get("blocks") else "")


def opened(root: PurePath, name: str, generation: Mapping[str, Any], prefix: Any, notes: Notes) -> Table:
    """Open a table; compare its files, schema, metadata and indexes with the generation."""
    entry = generation["tables"][name]
    data = lance.dataset(str(root / f"lancedb/{name}.lance"), version=int(entry["version"]))
    raw = (data.schema.metadata or {}).get(METADATA, b"{}")
    table = Table(name, data, entry, json.loads(raw))
    for what in _differences(table, generation, prefix, len(raw)):
        notes.say(f"{table.folder}: {what}")
    files = [file for fragment in data.get_fragments() for file in fragment.metadata.files]
    named = [f"{table.folder}/data/{file.path}" for file in files]
    named += [f"{table.folder}/_indices/{part.uuid}/" for one in data.describe_indices() for part in one.segments]
    held = {path for file in generation["files"] for path in (file, file.rpartition("/")[0] + "/")}
    for missing in sorted(set(named) - held):
        notes.say(f"{missing} belongs to version {data.version} and the generation does not name it")
    if sum(file.file_size_bytes for file in files) != entry["bytes"]:
        notes.say(f"{table.folder}: its data files do not have the {entry['bytes']} bytes that the generation says")
    _check_indexes(table, generation["spec"]["index"].get("text", False), notes)
    notes.checked["tables"] += 1
    return table


def _differences(table: Table, generation: Mapping[str, Any], prefix: Any, metadata_bytes: int) -> Iterator[str]:
    """What differs between a table and what the spec, the model and the generation ask of it."""
    rows = table.data.count_rows()
    if rows != table.entry["rows"]:
        yield f"has {rows} rows where the generation says {table.entry['rows']}"
    if any(fragment.deletion_file() for fragment in table.data.get_fragments()):
        yield "has deleted rows"
    if table.data.data_storage_version != LANCE_FORMAT:
        yield f"has Lance format {table.data.data_storage_version}, not {LANCE_FORMAT}"
    if metadata_bytes > METADATA_BYTES:
        yield f"its metadata has {metadata_bytes} bytes, more than {METADATA_BYTES}"
    yield from _other_metadata(table, generation, prefix)
    columns = PARAMETERS_COLUMNS if table.name == PARAMETERS else _columns(generation, prefix)
    if table.data.schema.names != list(columns):
        yield f"has the columns {table.data.schema.names}, not {list(columns)}"
        return
    for name, kind in columns.items():
        if kind is not None and table.data.schema.field(name).type != kind:
            yield f"column {name} is {table.data.schema.field(name).type}, not {kind}"


def _other_metadata(table: Table, generation: Mapping[str, Any], prefix: Any) -> Iterator[str]:
    wanted = {"format": FORMAT, "model": generation["model"]["name"], "model_digest": generation["model"]["digest"]}
    if table.name != PARAMETERS:
        wanted |= _metadata(generation, prefix)
    for name, value in wanted.items():
        if table.info.get(name) != value:
            yield f"its metadata says {name} {table.info.get(name)!r}, not {value!r}"
    version = table.info.get("parent_version")
    if prefix is not None and not 1 <= (version or 0) <= generation["tables"][DOCUMENTS]["version"]:
        yield f"its metadata says parent_version {version}, which is no version of documents"


def _metadata(generation: Mapping[str, Any], prefix: Any) -> dict[str, Any]:
    """What the metadata of `documents` (prefix None) or of a prefix table must say."""
    model = generation["model"]
    precision = generation["spec"]["embed"]["vectors"] if prefix is None else prefix["precision"]
    own = {"dim": model["full_dim"], "parent": None, "parent_version": None, "transform": {"kind": "none"}}
    own = own if prefix is None else {"dim": prefix["dim"], "parent": DOCUMENTS}
    blocks = (prefix or {}).get("blocks") or None
    metric = "hamming" if precision == "binary" else "cosine" if blocks else "dot"
    named = {name: model[name] for name in ("revision", "max_tokens", "prompts", "full_dim")}
    return {**named, **own, "precision": precision, "metric": metric, "blocks": blocks}


def _columns(generation: Mapping[str, Any], prefix: Any) -> dict[str, Any]:
    """Columns in order and their types; None where the corpus decides the type."""
    corpus, filters = generation["spec"]["corpus"], dict.fromkeys(generation["spec"]["corpus"]["filter"])
    if prefix is not None:
        number = pa.from_numpy_dtype("uint8" if prefix["precision"] == "binary" else prefix["precision"])
        width = prefix["dim"] // (8 if prefix["precision"] == "binary" else 1)
        ends = prefix.get("blocks") or []
        blocks = {f"vector_{a}_{b}": pa.list_(number, b - a) for a, b in zip([0, *ends], ends, strict=False)}
        return {"row": pa.int64(), **filters, **(blocks or {"vector": pa.list_(number, width)})}
    text = {"text": pa.string()} if corpus["keep_text"] else {}
    carried = {**dict.fromkeys(corpus["keep"]), **filters}
    vector = pa.list_(pa.from_numpy_dtype(generation["spec"]["embed"]["vectors"]), generation["model"]["full_dim"])
    named = {"row": pa.int64(), "id": pa.string(), **text, **carried}
    return {**named, "text_digest": pa.binary(16), "vector": vector}


def _check_indexes(table: Table, text: bool, notes: Notes) -> None:
    """Every index the generation promises is there and holds every row."""
    indexes = table.data.describe_indices()
    found = {tuple(one.field_names): one.index_type.lower().replace("_", "") for one in indexes}
    wanted = {("row",): "btree", ("id",): "btree"} if table.name == DOCUMENTS else {}
    if table.name == DOCUMENTS and text:
        wanted[("text",)] = "inverted"
    if table.entry.get("index"):
        wanted[("vector",)] = table.entry["index"]["kind"].replace("_", "")
    for columns, kind in wanted.items():
        if not found.get(columns, "").endswith(kind):
            notes.say(f"{table.folder}: column {columns[0]} has no {kind} index, which the generation promises")
    for one in indexes:
        if one.num_rows_indexed != table.entry["rows"]:
            left = table.entry["rows"] - one.num_rows_indexed
            notes.say(f"{table.folder}: index {one.name} misses {left} rows")
        notes.checked["indexes"] += 1


def artefacts(table: Table, notes: Notes) -> dict[str, tuple[str, Values]]:
    """Kind and float64[rows, cols] of every fitted artefact by digest, each compared with its name."""
    found = {}
    for batch in _batches(table, ["digest", "kind", "rows", "cols", "values"]):
        for number in range(batch.num_rows):
            name, kind, *shape = (batch.column(column)[number].as_py() for column in range(4))
            values = batch.column(4)[number].values.to_numpy().astype("<f4")
            digest = hashlib.sha256(f"{kind} {tuple(shape)}\n".encode() + values.tobytes()).hexdigest()
            if digest != name or len(values) != math.prod(shape) or not np.isfinite(values).all():
                notes.say(f"{table.folder}: artefact {name} ({kind}) does not hold the values that it is named by")
                continue
            found[name] = (kind, values.reshape(shape).astype(np.float64))
    notes.checked["artefacts"] += len(found)
    if hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() != table.entry["digest"]:
        notes.say(f"{table.folder}: its artefacts are not those that the generation's digest names")
    return found


def _batches(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    scanner = table.data.scanner(
        columns=list(columns), batch_size=BATCH_ROWS, batch_readahead=2, io_buffer_size=BUFFER_BYTES
    )
    yield from scanner.to_batches()


class Reader:
    """Rows of a table in storage order, any number at a time."""

    def __init__(self, table: Table, columns: Sequence[str]) -> None:
        self._schema = pa.schema([table.data.schema.field(name) for name in columns])
        self._batches, self._left = _batches(table, columns), self._schema.empty_table()

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, fewer at the end."""
        parts = [self._left]
        have = self._left.num_rows
        while have < count and (batch := next(self._batches, None)) is not None:
            parts.append(pa.Table.from_batches([batch]).cast(self._schema))
            have += batch.num_rows
        joined = pa.concat_tables(parts)
        self._left = joined.slice(count)
        return joined.slice(0, count)


def check_digests(table: Table, notes: Notes) -> None:
    """Compare the digest of every part, and all of them joined, with what the generation says."""
    parts = table.entry["parts"]
    if sum(rows for rows, _ in parts) != table.data.count_rows():
        notes.say(f"{table.folder}: the rows of its parts are not its {table.data.count_rows()} rows")
        return
    hashes = [hashlib.sha256() for _ in parts]
    for column in table.data.schema:
        _add_column(hashes, [rows for rows, _ in parts], table, column)
    found = [one.hexdigest() for one in hashes]
    for number, (digest, (rows, wanted)) in enumerate(zip(found, parts, strict=True)):
        if digest != wanted:
            first = sum(rows for rows, _ in parts[:number])
            notes.say(f"{table.folder}: part {number} (its rows {first} to {first + rows - 1}) is not what was written")
    notes.checked["parts"] += len(parts)
    if table.name != PARAMETERS:
        joined = hashlib.sha256("\n".join(digest for _, digest in parts).encode()).hexdigest()
        if joined != table.entry["digest"]:
            notes.say(f"{table.folder}: the digests of its parts do not make the digest of the table")


def _add_column(hashes: Sequence[Any], sizes: Sequence[int], table: Table, column: pa.Field) -> None:
    """A column into the hash of each part: whether values are there, then the values, read in batches."""
    kind, first = column.type, Reader(table, [column.name])
    is_text = pa.types.is_string(kind) or pa.types.is_binary(kind)
    again = Reader(table, [column.name]) if is_text else first
    for digest, size in zip(hashes, sizes, strict=True):
        digest.update(f"{column.name} {kind}\n".encode())
        if column.name in table.vectors:  # without nulls, which are looked for elsewhere
            digest.update(_ones(size))
            digest.update(_ones(size * kind.list_size))
            for batch in _steps(first, size):
                digest.update(batch.flatten().to_numpy(zero_copy_only=False).tobytes())
            continue
        if not is_text:
            _add(digest, _joined(_steps(first, size), kind))
            continue
        valid, lengths = [np.zeros(0, bool)], [np.zeros(0, "<i8")]
        for batch in _steps(first, size):
            valid.append(batch.is_valid().to_numpy(zero_copy_only=False))
            lengths.append(pc.fill_null(pc.binary_length(batch), 0).to_numpy(zero_copy_only=False).astype("<i8"))
        digest.update(np.packbits(np.concatenate(valid)).tobytes())
        digest.update(np.concatenate(lengths).tobytes())
        for batch in _steps(again, size):
            digest.update(b"".join(value or b"" for value in batch.cast(pa.binary()).to_pylist()))


def _steps(reader: Reader, size: int) -> Iterator[pa.Array]:
    for start in range(0, size, BATCH_ROWS):
        yield _joined(reader.take(min(BATCH_ROWS, size - start)).column(0).chunks, None)


def _joined(arrays: Any, kind: Any) -> pa.Array:
    arrays = list(arrays)
    return pa.concat_arrays(arrays) if arrays else pa.array([], kind)


def _ones(bits: int) -> bytes:
    """That many set bits, packed."""
    return b"\xff" * (bits // 8) + (bytes([0xFF << (8 - bits % 8) & 0xFF]) if bits % 8 else b"")


def _add(digest: Any, array: pa.Array) -> None:
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_fixed_size_list(array.type):
        _add(digest, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        values = [value or b"" for value in array.cast(pa.binary()).to_pylist()]
        digest.update(np.array([len(value) for value in values], "<i8").tobytes())
        digest.update(b"".join(values))
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(b"[")
        for number, value in enumerate(array):  # one at a time: an artefact has millions of numbers
            digest.update((", " if number else "").encode() + repr(value.as_py()).encode())
        digest.update(b"]")
