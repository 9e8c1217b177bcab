"""Lance tables: fragments written by workers, commits that are made once, versions opened for readers.

Lance writes its own files, in a draft folder; they are on disk and in the table's folder before `write_fragments`
returns, and no reader sees them before `commit`. Lance itself neither deduplicates commits nor checks their files.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import lance
import numpy as np
import pyarrow as pa
from lance.file import LanceFileReader, LanceFileSession
from lance.fragment import FragmentMetadata, write_fragments as lance_write_fragments
from lance.query import MatchQuery

from pipeline.bucket import insisting
from pipeline.errors import DamageError, StaleError
from pipeline.listing import Listing
from pipeline.storage import STATE, Root, read_signed, signed, to_json

Table: TypeAlias = lance.LanceDataset
LANCE_FORMAT = "2.2"
"""Newer formats that pylance can write are unreadable in lancedb 0.40."""
FRAGMENT_ROWS = 1_048_576
"""Rows of a published fragment, about: a `take` from 244 fragments costs four times one from a single one (measured).
Another number is another grouping of shards: then raise `embed.STATE_FORMAT`."""
READ_ROWS = 8_192
MOVES = f"{STATE}/moves"
"""One note per data file that is moved into a table, naming the record that will hold it."""


@dataclass(frozen=True)
class Written:
    """Fragments that no reader sees yet: their descriptions as JSON values, and sha256 by name of each data file."""

    fragments: Sequence[dict[str, Any]]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {"fragments": list(self.fragments), "files": dict(self.files)}


@dataclass(frozen=True)
class Stored:
    """Rows that lie in data files which no version need hold, in order; they are streamed, never all in memory."""

    files: Sequence[PurePath]
    num_rows: int

    def reader(self, schema: pa.Schema) -> pa.RecordBatchReader:
        """The rows in batches, under this schema, which has to have the files' columns."""
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema))

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for path in self.files:
            for batch in LanceFileReader(str(path)).read_all(batch_size=READ_ROWS).to_batches():
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)


def table_name(table: str) -> str:
    """A table's folder, as a name below the root."""
    return f"lancedb/{table}.lance"


def table_uri(root: Root, table: str) -> str:
    """Where a LanceDB table lies."""
    return str(root / table_name(table))


def data_name(table: str, path: str) -> str:
    """A data file, as a name below the root."""
    return f"{table_name(table)}/data/{path}"


def npy(array: Any) -> bytes:
    """A NumPy array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> Any:
    """The array of `npy`."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def draft_fragments(folder: Path, data: pa.Table | Stored, schema: pa.Schema) -> list[FragmentMetadata]:
    """Rows as the fragments of a table that is never committed; OSError where not all were written."""
    if isinstance(data, Stored):
        source: pa.Table | pa.RecordBatchReader = data.reader(schema)
    else:
        source = data.cast(schema) if data.schema != schema else data
    fragments = lance_write_fragments(
        source,
        str(folder),
        schema=schema,
        mode="create",
        max_rows_per_file=2**31,
        data_storage_version=LANCE_FORMAT,
    )
    written = sum(fragment.physical_rows for fragment in fragments)
    if written != data.num_rows:
        raise OSError(f"{folder}: Lance wrote {written} of {data.num_rows} rows")
    return list(fragments)


def draft_files(folder: Path, data: pa.Table, schema: pa.Schema) -> list[Path]:
    """Rows put by in a draft folder, to be joined with others; the data files."""
    return [folder / "data" / file.path for one in draft_fragments(folder, data, schema) for file in one.files]


def write_fragments(root: Root, table: str, data: pa.Table | Stored, schema: pa.Schema, record: str) -> Written:
    """Write rows that no reader sees until `commit`, durable when this returns; `record` will name their files.

    A note tells first where the files will lie, so that `drop_leftovers` finds those that no record came to hold.
    """
    if not data.num_rows:
        return Written([], {})
    draft = root.draft_folder()
    fragments = draft_fragments(draft, data, schema)
    paths = [file.path for fragment in fragments for file in fragment.files]
    files = {path: str(root.disk.digest(draft / "data" / path)) for path in paths}
    note = {"table": table, "files": list(files), "record": record}
    root.create(f"{MOVES}/{root.fence}-{root.disk.unique()}.json", to_json(signed(note)))
    for path in files:
        root.disk.sync(draft / "data" / path)
        root.adopt(draft / "data" / path, data_name(table, path))
    root.disk.remove_folder(draft)
    return Written([fragment.to_json() for fragment in fragments], files)


def drop_leftovers(root: Root) -> None:
    """Delete data files of work whose record names others; what has no record yet is left alone.

    A note stays while its file is not there: a worker that was given up may still move it in, and a later run sees it.
    """
    noted = []
    for name in root.names(MOVES):
        note = read_signed(root, f"{MOVES}/{name}")
        record = None if note is None else read_signed(root, f"{STATE}/{note['record']}.json")
        if note is None or record is None:
            continue
        noted.append((name, note, set(note["files"]) - set(record["files"])))
    for folder in {(root / f"{STATE}/{note['record']}.json").parent for _, note, _ in noted}:
        root.disk.sync_folder(folder)  # the record outlives the note
    for name, note, others in noted:
        leftover = [data_name(note["table"], path) for path in others]
        there = [path for path in leftover if root.size(path) is not None]
        for path in there:
            root.delete(path)
        if there:  # the note may only go when its files are gone for sure
            root.disk.sync_folder(root / f"{table_name(note['table'])}/data")
        if len(there) == len(leftover):
            root.delete(f"{MOVES}/{name}")


def commit(
    root: Root, table: str, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]], afresh: bool = False
) -> int:
    """Publish fragments as the table's whole content, in order; the version that holds them.

    Compares data files first: a commit that has landed is not made again, also where its own reply was an error.
    `afresh` makes it anyway, without the indexes. DamageError where data files are gone.
    """
    return insisting(root, lambda: _commit(root, table, schema, fragments, afresh))


def _commit(root: Root, table: str, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]], afresh: bool) -> int:
    uri = table_uri(root, table)
    version = None if afresh else _landed(uri, fragments)
    if version is None:
        if not is_whole(root, table, fragments):
            raise DamageError(f"{uri}: data files are gone or cut short; run the job again to repair it")
        root.disk.make_folder(root / table_name(table))
        try:
            version = _overwrite(uri, schema, fragments)
        except (OSError, RuntimeError):
            version = _landed(uri, fragments)  # the reply may be lost where the commit is not
            if version is None:
                raise
    sync_table(root, table)
    return version


def _overwrite(uri: str, schema: pa.Schema, fragments: Sequence[Mapping[str, Any]]) -> int:
    parsed = [FragmentMetadata.from_json(json.dumps(fragment)) for fragment in fragments]
    return int(lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, parsed)).version)


def _landed(uri: str, wanted: Sequence[Mapping[str, Any]]) -> int | None:
    """The newest version, if it holds just these data files."""
    if not table_exists(uri):
        return None
    current = open_table(uri)
    return int(current.version) if _is_just(current, wanted) else None


def _is_just(table: Table, wanted: Sequence[Mapping[str, Any]]) -> bool:
    held = [fragment.metadata for fragment in table.get_fragments()]
    paths = [file["path"] for fragment in wanted for file in fragment["files"]]
    return not any(one.deletion_file for one in held) and [file.path for one in held for file in one.files] == paths


def holds(root: Root, table: str, version: int, fragments: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a version's content is just these fragments."""
    return _is_just(open_table(table_uri(root, table), version), fragments)


def sync_table(root: Root, table: str) -> None:
    """Bring to disk what Lance wrote beside the data files: versions, transactions, indexes; a store has them there."""
    folder = root / table_name(table)
    for below, folders, files in os.walk(folder):
        if Path(below) == folder:
            folders[:] = [name for name in folders if name != "data"]
        for name in files:
            root.disk.sync(Path(below, name))
        root.disk.sync_folder(Path(below))


def is_whole(root: Root, table: str, fragments: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every data file of the fragments is there with its size."""
    return wholeness(root, table)({"fragments": fragments})


def wholeness(root: Root, table: str) -> Callable[[Mapping[str, Any]], bool]:
    """The same of any number of records, which have `fragments`: one look at the folder is enough for all."""
    there = Listing(root, f"{table_name(table)}/data")

    def is_whole(record: Mapping[str, Any]) -> bool:
        files = [file for fragment in record["fragments"] for file in fragment["files"]]
        return all(there.has(file["path"], file["file_size_bytes"]) for file in files)

    return is_whole


def check_files(root: Root, table: str, files: Mapping[str, str]) -> None:
    """Compare data files with their sha256; a damaged one is set aside and DamageError raised."""
    for path, digest in files.items():
        name = data_name(table, path)
        found = root.disk.digest(root / name)
        if found is None:
            raise DamageError(f"{root / name} is gone; run again to redo its rows")
        if found != digest:
            root.set_aside(name)
            raise DamageError(f"{root / name} is not what was written; it was set aside, run again to redo its rows")


def table_exists(uri: str) -> bool:
    """Whether a version of the table was ever committed."""
    if "://" in uri:
        return bool(LanceFileSession(f"{uri}/_versions").list())
    return (Path(uri) / "_versions").is_dir() and any((Path(uri) / "_versions").iterdir())


def open_table(uri: str, version: int | None = None) -> lance.LanceDataset:
    """A table at a version (null: the newest); StaleError where it is gone."""
    try:
        return lance.dataset(uri, version=version)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise StaleError(
            f"{uri}: version {version or 'newest'} cannot be opened ({reason}); run the job again"
        ) from None


def data_bytes(table: lance.LanceDataset) -> int:
    """Bytes of a table's data files, without indexes and old versions."""
    return sum(file.file_size_bytes or 0 for f in table.get_fragments() for file in f.metadata.files)


def nearest(
    table: lance.LanceDataset,
    query: Any,
    limit: int,
    probes: int | None,
    where: str | None,
    columns: Sequence[str] = ("row",),
) -> Any:
    """A Lance scanner over the ANN index: dot for floats, hamming for packed bits (uint8).

    At least `probes` partitions are looked at, more while a filter leaves fewer than `limit` rows; None: all rows
    are, without the index.
    """
    metric = "hamming" if str(query.dtype) == "uint8" else "dot"
    how: dict[str, Any] = {"use_index": False} if probes is None else {"minimum_nprobes": probes}
    target = {"column": "vector", "q": query, "k": limit, "metric": metric, **how}
    return table.scanner(columns=[*columns, "_distance"], nearest=target, filter=where, prefilter=where is not None)


def matching(table: lance.LanceDataset, words: str, limit: int, where: str | None) -> Any:
    """A Lance scanner over the full-text index: row, _rowoffset and the BM25 `_score` of rows with any of the words.

    The words are data: no quote, operator or field name in them means anything.
    """
    return table.scanner(
        columns=["row", "_rowoffset", "_score"],
        full_text_query=MatchQuery(words, "text"),
        filter=where,
        prefilter=where is not None,
        limit=limit,
    )
