"""Corpus files: which ones a source means, and their rows in batches, whatever the format.

A row that cannot be parsed is reported in place (`RawBatch.bad`) and costs its neighbours nothing; a file
that cannot be read is a DataError. Nothing here holds more than a batch.
"""

import csv
import glob
import hashlib
import io
import zlib
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from pipeline import cloud, docstrings, limits, lines, parquet, store
from pipeline.errors import DataError, SpecError, StaleError
from pipeline.parquet import BATCH_ROWS, Parquet

SUFFIXES = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl",
    ".csv": "csv", ".txt": "txt", ".lance": "lance",
}  # fmt: skip
STDLIB = "docstrings:stdlib"
PEEK_ROWS = 1000
"""JSON rows looked at for column names before the scan reads them all."""

Column: TypeAlias = Any
"""list[Any] from line formats, pa.Array from Arrow ones (pyarrow has no types to check)"""


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus; `stamp` changes when its content does (mtime, or version)."""

    path: str
    kind: str
    size: int
    stamp: str


@dataclass(frozen=True)
class RawBatch:
    """Rows start … start + count of a file; `bad` maps positions in the batch to why they did not parse."""

    start: int
    count: int
    columns: dict[str, Column]
    bad: dict[int, str]


def resolve(source: Sequence[str]) -> list[SourceFile]:
    """The files that a source means, in order of path within each entry, none twice.

    Raises SpecError where an entry matches nothing or names an unknown format.
    """
    found: dict[str, SourceFile] = {}
    for entry in source:
        for file in _resolve_one(entry):
            found.setdefault(file.path, file)
    return list(found.values())


def _resolve_one(entry: str) -> list[SourceFile]:
    if entry == STDLIB:
        return [SourceFile(STDLIB, "docstrings", 0, docstrings.stamp())]
    if entry.startswith("docstrings:"):
        raise SpecError(f"corpus.source: unknown corpus {entry!r}; there is {STDLIB}")
    filesystem, path, scheme = locate(entry)
    wrapper = ArrowFSWrapper(filesystem)
    try:
        literal = filesystem.get_file_info(path)
        if literal.type == fs.FileType.NotFound and any(character in entry for character in "*?["):
            paths = _globbed(entry) if not scheme and "://" not in entry else wrapper.glob(path)
            paths = [str(name).rstrip("/") for name in paths]
            paths = [name for name in paths if _kind(name) and not _hidden(name.rpartition("/")[2])]
        elif literal.type == fs.FileType.Directory and _kind(path) != "lance":
            below = fs.FileSelector(path, recursive=True)
            paths = [info.path for info in filesystem.get_file_info(below)]
            paths = [name for name in paths if _kind(name) and not _hidden(name.removeprefix(path))]
        else:
            paths = [path]
    except OSError as error:
        raise SpecError(f"corpus.source: cannot list {entry!r}: {error}") from None
    paths = sorted(name for name in paths if not _inside_lance(name))
    infos = filesystem.get_file_info(paths)
    files = [_file(info, scheme) for info in infos if info.type != fs.FileType.NotFound and _wanted(info)]
    if not files:
        raise SpecError(f"corpus.source: {entry!r} matches no file; formats: {' '.join(SUFFIXES)}")
    return files


def _globbed(entry: str) -> list[str]:
    """Local matches as full paths; a bracket in the working directory is no pattern."""
    found = glob.glob(str(Path(entry).expanduser()), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute one
    return [str(Path(name).absolute()) for name in found]


def _wanted(info: fs.FileInfo) -> bool:
    kind = _kind(info.path)
    if kind is None:
        raise SpecError(f"corpus.source: {info.path!r} has no known format; formats: {' '.join(SUFFIXES)}")
    return bool((kind == "lance") == (info.type == fs.FileType.Directory))


def _file(info: fs.FileInfo, scheme: str) -> SourceFile:
    kind, path = str(_kind(info.path)), scheme + info.path
    if kind == "lance":
        try:
            table = store.open_table(path)
        except StaleError as error:
            raise DataError(f"corpus.source: cannot read {path}: {error}") from None
        return SourceFile(path, kind, store.data_bytes(table), f"version {table.version} of {path}")
    return SourceFile(path, kind, int(info.size), str(info.mtime_ns))


def locate(entry: str) -> tuple[fs.FileSystem, str, str]:
    """File system, path on it, and what to put before a path to name the file again."""
    if "://" not in entry:
        path = str(Path(entry).expanduser().absolute())
        return fs.LocalFileSystem(), str(fs.LocalFileSystem().normalize_path(path)), ""
    if entry.startswith("s3://") and "?" not in entry and (found := cloud.arrow_s3()) is not None:
        return found, entry.removeprefix("s3://"), "s3://"
    try:
        filesystem, path = fs.FileSystem.from_uri(entry)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SpecError(f"corpus.source: cannot open {entry!r}: {error}") from None
    return filesystem, path, "" if entry.startswith("file://") else entry.split("://")[0] + "://"


def _kind(path: str) -> str | None:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.lower().endswith(suffix):
            return SUFFIXES[suffix]
    return None


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _inside_lance(path: str) -> bool:
    return ".lance/" in path


def column_names(file: SourceFile) -> list[str]:
    """Names of a file's columns; for JSON those of the first rows. DataError where it cannot be read."""
    with reading(file):
        names = _column_names(file)
    if len(names) > limits.MAX_COLUMNS:
        most = f"{limits.MAX_COLUMNS:,}"
        raise DataError(f"cannot read {file.path}: it has more than {most} columns; write those that are used")
    return names


def _column_names(file: SourceFile) -> list[str]:
    if file.kind == "docstrings":
        return ["id", "title", "text", "module"]
    if file.kind == "txt":
        return ["text"]
    if file.kind == "parquet":
        return list(parquet_file(file).schema_arrow.names)
    if file.kind == "lance":
        return list(store.open_table(file.path).schema.names)
    if file.kind == "csv":
        with _open(file) as stream:
            return next(lines.csv_rows(stream), [])
    names: dict[str, None] = {}
    for number, row in enumerate(_records(file)):
        if number == PEEK_ROWS or len(names) > limits.MAX_COLUMNS:
            break
        if isinstance(row, dict):
            names.update(dict.fromkeys(row))
    return list(names)


class Reader:
    """Reads ranges of rows; a file is read onward where the next range begins behind the last one."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._at: tuple[str, int, Iterator[Any]] | None = None
        self._open: tuple[str, Parquet] | None = None

    def read(self, file: SourceFile, start: int = 0, stop: int | None = None) -> Iterator[RawBatch]:
        """Rows start … stop (None: to the end) in batches. DataError where the file cannot be read."""
        with reading(file):
            _check_unchanged(file)
            if file.kind == "parquet":
                yield from self._parquet(file, start, stop)
            elif file.kind == "lance":
                yield from self._lance(file, start, stop)
            else:
                yield from self._lines(file, start, stop)

    def _parquet(self, file: SourceFile, start: int, stop: int | None) -> Iterator[RawBatch]:
        if self._open is None or self._open[0] != file.path:
            self._open = (file.path, opened(file))
        source = self._open[1]
        ends = list(accumulate(source.groups))
        group = bisect_right(ends, start)
        first = ends[group - 1] if group else 0
        if self._at is None or self._at[0] != file.path or not first <= self._at[1] <= start:
            self._at = (file.path, first, source.batches(range(group, len(ends)), self._columns))
        _, position, batches = self._at
        self._at = None  # until this range is read to its end
        rest = yield from self._arrow(batches, file, position, start, stop)
        if stop is not None:
            if stop in ends:  # a row group ends with its check
                rest = [*rest, *islice(batches, 1)]
            self._at = (file.path, stop, chain(rest, batches))

    def _lance(self, file: SourceFile, start: int, stop: int | None) -> Iterator[RawBatch]:
        table = store.open_table(file.path)
        limit = None if stop is None else stop - start
        batches = table.scanner(columns=self._columns, offset=start, limit=limit, batch_size=BATCH_ROWS).to_batches()
        yield from self._arrow(batches, file, start, start, stop)

    def _arrow(
        self, batches: Iterator[pa.RecordBatch], file: SourceFile, position: int, start: int, stop: int | None
    ) -> Generator[RawBatch, None, list[pa.RecordBatch]]:
        """Rows start … stop of batches that begin at `position`; returns what is left of the last one."""
        unpacked = 0
        for batch in batches:
            low = max(start - position, 0)
            high = batch.num_rows if stop is None else min(stop - position, batch.num_rows)
            if high > low:
                part = batch.slice(low, high - low)
                columns = {name: _plain(part.column(name)) for name in self._columns}
                unpacked += sum(column.nbytes for column in columns.values())
                if unpacked > max(limits.FREE_UNPACKED, limits.MAX_PACKING * file.size):
                    most = f"{limits.MAX_PACKING:,} times its size"
                    raise DataError(f"cannot read {file.path}: its rows unpack to more than {most}; leave it out")
                bad = {row: why for column in columns.values() for row, why in parquet.too_long(column).items()}
                yield RawBatch(position + low, part.num_rows, columns, bad)
            position += batch.num_rows
            if stop is not None and position >= stop:
                return [batch.slice(high)] if high < batch.num_rows else []
        return []

    def _lines(self, file: SourceFile, start: int, stop: int | None) -> Iterator[RawBatch]:
        if self._at is None or self._at[0] != file.path or self._at[1] > start:
            self._at = (file.path, 0, _records(file))
        _, position, records = self._at
        self._at = None  # until this range is read to its end
        for _ in range(start - position):
            if next(records, None) is None:
                return
        position = start
        ended = False
        while not ended and (stop is None or position < stop):
            size = BATCH_ROWS if stop is None else min(BATCH_ROWS, stop - position)
            rows: list[Any] = []
            held = 0
            while len(rows) < size and held < limits.BATCH_BYTES:
                row = next(records, None)
                if row is None:
                    ended = True
                    break
                rows.append(row if isinstance(row, str) else [row.get(name) for name in self._columns])
                held += sum(len(value) for value in rows[-1] if isinstance(value, str))
            if rows:
                yield self._batch(position, rows)
            position += len(rows)
        if not ended:
            self._at = (file.path, position, records)

    def _batch(self, start: int, rows: list[Any]) -> RawBatch:
        bad = {number: row for number, row in enumerate(rows) if isinstance(row, str)}
        columns: dict[str, Column] = {
            name: [None if isinstance(row, str) else row[place] for row in rows]
            for place, name in enumerate(self._columns)
        }
        return RawBatch(start, len(rows), columns, bad)


BROKEN = (
    pa.ArrowException, OSError, EOFError, MemoryError, OverflowError, UnicodeError, KeyError, csv.Error, zlib.error,
)  # fmt: skip
"""What libraries raise for a file that is broken, or too large for this machine."""


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Turn whatever a broken file raises into one DataError that names it."""
    try:
        yield
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"cannot read {file.path}: {reason}; mend the file or leave it out") from None


def content_digest(file: SourceFile) -> str:
    """sha256 of a file's bytes."""
    filesystem, path, _ = locate(file.path)
    with reading(file), filesystem.open_input_stream(path, compression=None) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(file: SourceFile) -> IO[bytes]:
    filesystem, path, _ = locate(file.path)
    compression = {".gz": "gzip", ".zst": "zstd"}.get("." + path.lower().rpartition(".")[2])
    stream = filesystem.open_input_stream(path, compression=compression)
    return io.BufferedReader(lines.Unpacked(stream, file.path, file.size) if compression else stream, 1 << 20)


def opened(file: SourceFile) -> Parquet:
    """An open Parquet file, wherever it lies, whose footer keeps within the limits."""
    filesystem, path, _ = locate(file.path)
    return Parquet(filesystem.open_input_file(path), file.path)


def parquet_file(file: SourceFile) -> pq.ParquetFile:
    """The same as pyarrow's own."""
    return opened(file).file


def _check_unchanged(file: SourceFile) -> None:
    """DataError where a file is not as it was when the source was resolved; a file without a stamp passes."""
    if not file.stamp or file.kind == "docstrings":
        return
    filesystem, path, scheme = locate(file.path)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound or _file(info, scheme) != file:
        raise DataError(f"{file.path} has changed while it was in use; run the job again when it is at rest")


def _plain(column: pa.Array) -> pa.Array:
    """Dictionaries and wide or view strings as plain ones, checked."""
    parquet.check(column)
    return column.cast(plain_type(column.type)) if column.type != plain_type(column.type) else column


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that a column of `kind` is read as."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def _records(file: SourceFile) -> Iterator[Any]:
    """Rows of a line format as dictionaries; a string in place of one says why it did not parse."""
    if file.kind == "docstrings":
        yield from docstrings.stdlib()
        return
    with _open(file) as stream:
        yield from lines.records(stream, file.kind)


@dataclass(frozen=True)
class Part:
    """Rows start … stop of a file; `first_row` is the row number of the first of them."""

    file: SourceFile
    start: int
    stop: int
    first_row: int


@dataclass(frozen=True)
class Shard:
    """A unit of work: a range of the corpus. `dropped` are rows that repeat an earlier text."""

    number: int
    first_row: int
    rows: int
    parts: tuple[Part, ...]
    dropped: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """Name of its record."""
        return f"{self.number:07d}"


def footer_rows(file: SourceFile) -> int | None:
    """Rows of a file where its footer tells them."""
    with reading(file):
        if file.kind == "parquet":
            return int(parquet_file(file).metadata.num_rows)
        return int(store.open_table(file.path).count_rows()) if file.kind == "lance" else None
    return None
