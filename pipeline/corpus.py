"""The corpus stage: one scan, on the workers, of everything that can be known before a model is loaded.

Comes in: `corpus` of the spec. Goes out: a `Scan` with row counts, a content digest, column types, ids checked
for duplicates, and what will be quarantined. A file whose size and time are unchanged is not read again.
"""

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import drift, ids, rows, sources, store
from pipeline.drift import digest_of
from pipeline.errors import DataError, SpecError
from pipeline.ledger import Ledger, Record, Slot
from pipeline.listing import Listing
from pipeline.sources import Part, Reader, Shard, SourceFile
from pipeline.spec import Corpus
from pipeline.storage import KEPT, Root, kept_name
from pipeline.tables import FORMAT
from pipeline.workers import OnProgress, Pool, Progress

UNIT_BYTES, UNIT_FILES = 64 * 2**20, 500


@dataclass(frozen=True)
class Scan:
    """What one look at the whole corpus found. `files` are in row order; `spills` and `repeated` are kept files."""

    key: str
    files: tuple[SourceFile, ...]
    counts: tuple[int, ...]
    digest: str
    types: dict[str, pa.DataType]
    reasons: dict[str, int]
    repaired: int
    spills: tuple[str, ...] = field(repr=False)
    repeated: str | None = None

    @property
    def rows(self) -> int:
        """All input rows, usable or not."""
        return sum(self.counts)


@dataclass(frozen=True)
class Unit:
    """Files scanned together."""

    name: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Todo:
    """A unit to scan; `name` is the slot of its record."""

    name: str
    unit: Unit


def _wholeness(root: Root) -> Callable[[Record], bool]:
    """Tells of records whether the file that each names is there."""
    there = Listing(root, KEPT)
    return lambda record: record["kept"] is None or there.has(record["kept"], record["bytes"])


def run(corpus: Corpus, root: Root, pool: Pool, on_progress: OnProgress | None = None) -> Scan:
    """Scan the corpus, or take the last scan where no file has changed.

    Raises SpecError for a source or column that is not there, DataError for files, ids or rows that are wrong.
    """
    files = check(corpus)
    ledger = Ledger(root, "corpus")
    units = _units(files, corpus)
    key = digest_of(*(unit.name for unit in units))
    standing = ledger.slot(key, _wholeness(root))
    if standing.record is None:
        slots = ledger.slots([unit.name for unit in units], _wholeness(root))
        todo = [Todo(slot.name, unit) for unit, slot in zip(units, slots, strict=True) if slot.record is None]
        if todo:
            with pool.team(partial(_Scanner, corpus, root), on_progress) as team:
                for _ in team.map(todo):
                    pass
            slots = ledger.slots([unit.name for unit in units])
        summary = _summary(corpus, root, units, [slot.done for slot in slots])
        standing = Slot(standing.name, ledger.add(standing.name, summary))
    scan = _load(key, standing.done, files)
    _check_usable(corpus, scan)
    return scan


def check(corpus: Corpus) -> list[SourceFile]:
    """Find the files and look at the first one's columns; reads no rows beyond that."""
    files = sources.resolve(corpus.source)
    check_columns(corpus, files[0], first=True)
    return files


def check_columns(corpus: Corpus, file: SourceFile, first: bool) -> None:
    """SpecError or DataError where a file lacks a column that the spec names, or has it twice."""
    names = sources.column_names(file)
    if first and not names:
        raise DataError(f"{file.path} has no column: it is empty, or none of its rows can be read; leave it out")
    wanted = {"corpus.id": [corpus.id] if corpus.id else [], "corpus.text": corpus.text}
    wanted |= {"corpus.keep": corpus.keep, "corpus.filter": corpus.filter}
    for place, columns in wanted.items():
        for column in columns:
            if column not in names and first:
                raise SpecError(
                    f"{place}: {file.path} has no column {column!r}; its columns: {', '.join(names) or 'none'}"
                )
            if column not in names and file.kind != "jsonl":  # a JSON row may leave a field out
                raise DataError(f"{file.path} has no column {column!r}, the first file has it; files must agree")
            if names.count(column) > 1:
                raise DataError(f"{file.path} has the column {column!r} twice; rename one")


def _units(files: Sequence[SourceFile], corpus: Corpus) -> list[Unit]:
    """Consecutive files, some megabytes at a time, named by their state and by the columns read."""
    rule = f"{FORMAT} {corpus.id} {corpus.text} {corpus.keep} {corpus.filter}"
    groups: list[list[SourceFile]] = []
    size = 0
    for file in files:
        if not groups or size + file.size > UNIT_BYTES or len(groups[-1]) == UNIT_FILES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    names = [digest_of(rule, *(f"{file.path} {file.size} {file.stamp}" for file in group)) for group in groups]
    return [Unit(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


class _Scanner:
    """Reads units of files; leaves a record and a spill of id hashes."""

    def __init__(self, corpus: Corpus, root: Root, threads: int) -> None:
        self.progress = Progress()
        self._corpus, self._root = corpus, root

    def __call__(self, todo: Todo) -> None:
        ledger, unit = Ledger(self._root, "corpus"), todo.unit
        if ledger.read(todo.name) is not None:
            return
        draft = self._root.draft_folder() / "ids"
        spill = ids.Spill(draft)
        files: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        repaired, first_row = 0, 0
        types: dict[str, pa.DataType] = {}
        for file in unit.files:
            check_columns(self._corpus, file, first=False)
            count = 0
            observed = self._observe(file)
            types = _merged(types, observed, file)
            for raw in Reader(rows.columns(self._corpus)).read(file):
                clean = rows.clean(raw, file.path, _without_extras(self._corpus), {})
                count += raw.count
                reasons.update(clean.reasons)
                repaired += clean.repaired
                self.progress.rows += raw.count
                if self._corpus.id:
                    named = [*zip(clean.offsets, clean.ids, strict=True)]
                    named += [(offset, name) for offset, name, _, _ in clean.rejected if name is not None]
                    spill.add([ids.of_id(name) for _, name in named], [first_row + offset for offset, _ in named])
                else:
                    spill.add(clean.digests, [first_row + offset for offset in clean.offsets])
            files.append({"path": file.path, "rows": count, "sha256": drift.content_digest(file)})
            first_row += count
        spill.close()
        size = draft.stat().st_size
        record = {
            "files": files,
            "reasons": dict(reasons),
            "repaired": repaired,
            "types": _types_out(types),
            "kept": self._root.keep_file(draft),
            "bytes": size,
        }
        ledger.add(todo.name, record)

    def _observe(self, file: SourceFile) -> dict[str, pa.DataType]:
        """Types of the carried columns over the whole file."""
        carried = [*self._corpus.keep, *self._corpus.filter]
        types: dict[str, pa.DataType] = {}
        for raw in Reader(carried).read(file) if carried else ():
            for name in carried:
                column = raw.columns[name]
                if file.kind == "csv":
                    seen = rows.csv_type(column)
                    joined = rows.unify(types.get(name, seen), seen)
                    types[name] = pa.string() if joined is None else joined
                else:
                    types = _merged(types, {name: rows.observed_type(column, name, file.path)}, file)
            if isinstance(next(iter(raw.columns.values())), pa.Array):
                break  # a typed file has one type per column
        return types


def _rows(record: dict[str, Any]) -> int:
    return sum(file["rows"] for file in record["files"])


def _without_extras(corpus: Corpus) -> Corpus:
    """The text rule alone: while types are still being found, carried columns cannot be built."""
    return corpus.model_copy(update={"keep": (), "filter": ()})


def _merged(types: dict[str, pa.DataType], seen: dict[str, pa.DataType], file: SourceFile) -> dict[str, pa.DataType]:
    merged = dict(types)
    for name, kind in seen.items():
        joined = rows.unify(types.get(name, kind), kind)
        if joined is None and file.kind == "csv":
            joined = pa.string()
        if joined is None:
            raise DataError(
                f"{file.path}: column {name!r} is {kind} here and {types[name]} in the rows before; files must agree"
            )
        merged[name] = joined
    return merged


def _types_out(types: dict[str, pa.DataType]) -> str:
    return base64.b64encode(pa.schema(list(types.items())).serialize().to_pybytes()).decode()


def _types_in(text: str) -> dict[str, pa.DataType]:
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
    return dict(zip(schema.names, schema.types, strict=True))


def _summary(corpus: Corpus, root: Root, units: Sequence[Unit], records: Sequence[Record]) -> Record:
    """Join the units' records: check ids and types over all of them."""
    counts = [file["rows"] for record in records for file in record["files"]]
    files = [file for unit in units for file in unit.files]
    types: dict[str, pa.DataType] = {}
    for unit, record in zip(units, records, strict=True):
        types = _merged(types, _types_in(record["types"]), unit.files[0])
    types = {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    _check_filter_types(corpus, types)
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    scratch = root.draft_folder()
    spills = [(root.local(kept_name(record["kept"])), _rows(record)) for record in records]
    repeated = ids.repeated(spills, scratch)
    root.disk.remove_folder(scratch)
    if len(repeated) and corpus.id:
        raise _duplicate_id(corpus, files, counts, repeated)
    rows_file = b""
    if len(repeated):
        reasons["duplicate_text"] = len(repeated)
        rows_file = store.npy(np.sort(repeated["row"].to_numpy()))
    return {
        "digest": digest_of(*(f"{file['sha256']} {file['rows']}" for record in records for file in record["files"])),
        "counts": counts,
        "types": _types_out(types),
        "reasons": dict(reasons),
        "repaired": sum(record["repaired"] for record in records),
        "files": [file for record in records for file in record["files"]],
        "spills": [record["kept"] for record in records],
        "kept": root.keep(rows_file) if rows_file else None,
        "bytes": len(rows_file),
    }


def _check_filter_types(corpus: Corpus, types: dict[str, pa.DataType]) -> None:
    for name in corpus.filter:
        kind = types.get(name, pa.string())
        if not (
            pa.types.is_string(kind)
            or pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_boolean(kind)
        ):
            raise DataError(
                f"corpus.filter: column {name!r} is {kind}; filters need strings, numbers or booleans (keep it instead)"
            )


def _duplicate_id(
    corpus: Corpus, files: Sequence[SourceFile], counts: Sequence[int], repeated: pl.DataFrame
) -> DataError:
    """Name the first id that stands twice, and where."""
    places: list[Part] = []
    for row in (repeated["first"][0], repeated["row"][0]):
        places += _parts(files, np.cumsum([0, *counts]), row, row + 1)
    raw = next(Reader(rows.columns(corpus)).read(places[1].file, places[1].start, places[1].stop))
    name = rows.clean(raw, places[1].file.path, _without_extras(corpus), {})
    shown = (name.ids or [str(rejected[1]) for rejected in name.rejected])[0]
    return DataError(
        f"duplicate id {shown!r}: {places[0].file.path} row {places[0].start} and {places[1].file.path} row "
        f"{places[1].start} ({len(repeated)} repeated in all); ids must be unique, or set corpus.id: null"
    )


def _load(key: str, record: Record, files: Sequence[SourceFile]) -> Scan:
    return Scan(
        key=key,
        files=tuple(files),
        counts=tuple(record["counts"]),
        digest=record["digest"],
        types=_types_in(record["types"]),
        reasons=record["reasons"],
        repaired=record["repaired"],
        spills=tuple(record["spills"]),
        repeated=record["kept"],
    )


def _check_usable(corpus: Corpus, scan: Scan) -> None:
    quarantined = sum(count for reason, count in scan.reasons.items() if reason != "duplicate_text")
    rows.check_budget(corpus, scan.rows, scan.reasons)
    if scan.rows - quarantined - scan.reasons.get("duplicate_text", 0) <= 0:
        raise DataError(f"the corpus has no usable row: {scan.rows} rows, {rows.listed(scan.reasons) or 'none read'}")


def shards(scan: Scan, corpus: Corpus, root: Root) -> list[Shard]:
    """Cut the corpus into units of work, the same ones every time."""
    size = shard_rows(scan.rows, corpus)
    repeated = store.from_npy(root.kept(scan.repeated)) if scan.repeated else np.array([], np.int64)
    starts = np.cumsum([0, *scan.counts])
    cut, total = [], scan.rows
    for number, start in enumerate(range(0, total, size)):
        stop = min(start + size, total)
        low, high = np.searchsorted(repeated, [start, stop])
        parts = tuple(_parts(scan.files, starts, start, stop))
        cut.append(Shard(number, start, stop - start, parts, frozenset(repeated[low:high].tolist())))
    return cut


def shard_rows(total: int, corpus: Corpus) -> int:
    """Rows of a shard: 8,192 up to a million rows, else the power of two nearest rows / 2,000, at most 262,144."""
    if corpus.shard_rows != "auto":
        return corpus.shard_rows
    if total <= 1_000_000:
        return 8_192
    return int(min(2 ** round(np.log2(total / 2_000)), 262_144))


def _parts(files: Sequence[SourceFile], starts: NDArray[np.int64], start: int, stop: int) -> Iterator[Part]:
    """The pieces of files that rows start … stop lie in; `starts` are the files' first rows, and the end."""
    number = int(np.searchsorted(starts, start, side="right")) - 1
    while number < len(files) and starts[number] < stop:
        first, end = int(starts[number]), int(starts[number + 1])
        low, high = max(start, first), min(stop, end)
        if low < high:
            yield Part(files[number], low - first, high - first, low)
        number += 1


def known_ids(root: Root, scan: Scan, corpus: Corpus, names: Sequence[str]) -> list[bool]:
    """Which of these ids the corpus holds, by the spilled hashes."""
    hashes = [ids.of_id(name) if corpus.id else ids.of_text_id(name) for name in names]
    return ids.known([root.local(kept_name(spill)) for spill in scan.spills], hashes)


def known_rows(files: Sequence[SourceFile]) -> int | None:
    """Rows as far as footers tell; None where a file must be read to count them."""
    counts = [sources.footer_rows(file) for file in files]
    return None if None in counts else sum(count for count in counts if count is not None)
