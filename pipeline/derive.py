"""The derive stage: prefix tables from the stored full vectors, on the workers; starts no model.

Comes in: `documents`, the transform, the codecs. A unit of consecutive fragments, about `store.FRAGMENT_ROWS` rows, is
read once for all tables that miss it and becomes one fragment of each; adding a prefix later touches no other table.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import store
from pipeline.ledger import Ledger, Record, Slot
from pipeline.spec import Prefix
from pipeline.storage import Root
from pipeline.tables import (
    DOCUMENTS,
    FORMAT,
    Fits,
    FittedPrefix,
    Parent,
    TableInfo,
    block_arrays,
    combined_digest,
    logical_digest,
    prefix_schema,
    vector_matrix,
)
from pipeline.vectors import Matrix, truncate
from pipeline.workers import OnProgress, Pool, Progress

log = logging.getLogger(__name__)

PART_ROWS = 131_072
"""Rows whose codes a worker holds at once, and of one digest; those of a larger unit are put by on disk."""
BATCH_ROWS = 8_192
BUFFER_BYTES = 128_000_000
"""What Lance may read ahead; by itself it takes 2 GB."""
MAX_CLIPPED = 0.001
"""Share of int8 numbers beyond the scale above which a warning is given."""


@dataclass(frozen=True)
class Table:
    """One prefix table to derive; `key` changes with everything that decides its content."""

    name: str
    key: str
    info: TableInfo
    fitted: FittedPrefix

    @property
    def transform(self) -> str | None:
        """Digest of its transform."""
        return self.info.transform.get("parameters")

    def schema(self, filters: Mapping[str, pa.DataType]) -> pa.Schema:
        """Its columns, without metadata."""
        return prefix_schema(self.info.dim, self.info.precision, filters, self.info.blocks)


@dataclass(frozen=True)
class Derived:
    """A published prefix table; `parts` are (rows, digest) of up to PART_ROWS rows, `files` sha256 of data files."""

    name: str
    version: int
    rows: int
    digest: str
    clipped_share: float
    parts: Sequence[tuple[int, str]]
    files: Mapping[str, str]
    fragments: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Unit:
    """Consecutive fragments of `documents`, and the tables that miss them with the slots of their records."""

    name: str
    fragments: tuple[int, ...]
    tables: tuple[tuple[Table, str], ...]


def run(
    prefixes: Sequence[Prefix],
    parent: Parent,
    fits: Fits,
    filters: Mapping[str, pa.DataType],
    root: Root,
    pool: Pool,
    on_progress: OnProgress | None = None,
    afresh: Collection[str] = (),
) -> list[Derived]:
    """Derive and publish every prefix table; what is there already is left alone.

    Tables named in `afresh` are published again, without their indexes.
    """
    tables = [_table(prefix, parent, fits) for prefix in prefixes]
    groups = _groups(parent)
    slots = [_slots(root, table, len(groups)) for table in tables]
    todo = []
    for number, group in enumerate(groups):
        places = [(table, of_table[number]) for table, of_table in zip(tables, slots, strict=True)]
        missing = tuple((table, slot.name) for table, slot in places if slot.record is None)
        if missing:
            todo.append(Unit(f"{number:06d}", group, missing))
    if todo:
        store.check_files(root, DOCUMENTS, parent.files)
        with pool.team(partial(_Deriver, parent, filters, root), on_progress) as team:
            for name, rows, seconds in team.map(todo):
                log.info("derive unit=%s rows=%d seconds=%.1f", name, rows, seconds)
    return [_publish(table, len(groups), filters, root, table.name in afresh) for table in tables]


def _table(prefix: Prefix, parent: Parent, fits: Fits) -> Table:
    fitted = fits.prefixes[prefix.table]
    codec, name = fitted.codec, fitted.transform.digest()
    scale = None if codec.scale is None else [float(str(step)) for step in codec.scale]
    rotation = fitted.rotation()
    shown = {"kind": prefix.precision}
    info = replace(
        parent.info,
        dim=prefix.dim,
        precision=prefix.precision,
        metric="cosine" if prefix.blocks else "hamming" if prefix.precision == "binary" else "dot",
        transform={"kind": fitted.transform.kind} | ({"parameters": name} if name else {}),
        codec=shown
        | ({"scale": scale} if scale else {})
        | ({"rotation": rotation} if prefix.precision == "binary" else {}),
        parent="documents",
        parent_version=parent.version,
        blocks=prefix.blocks,
    )
    named = f"{prefix.table} {list(prefix.blocks)}" if prefix.blocks else prefix.table
    key = f"{FORMAT} {parent.digest} {name} {named} {scale} {rotation} {store.FRAGMENT_ROWS} {PART_ROWS}"
    return Table(prefix.table, hashlib.sha256(key.encode()).hexdigest()[:16], info, fitted)


def _key(table: Table) -> str:
    return f"{table.name}-{table.key}"


def _slots(root: Root, table: Table, units: int) -> list[Slot]:
    """Where the units of a table are recorded; one is to be derived again where its files are gone."""
    names = [f"{unit:06d}" for unit in range(units)]
    return Ledger(root, "derive", _key(table)).slots(names, store.wholeness(root, table.name))


def _groups(parent: Parent) -> list[tuple[int, ...]]:
    """Consecutive fragments, about FRAGMENT_ROWS rows at a time."""
    groups: list[list[int]] = []
    rows = 0
    for fragment in store.open_table(parent.uri, parent.version).get_fragments():
        count = fragment.count_rows()
        if not groups or rows + count > store.FRAGMENT_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(fragment.fragment_id)
        rows += count
    return [tuple(group) for group in groups]


class _Deriver:
    """Reads a unit of `documents` and writes one fragment per table that misses it."""

    def __init__(self, parent: Parent, filters: Mapping[str, pa.DataType], root: Root, threads: int) -> None:
        self.progress = Progress()
        self._documents = store.open_table(parent.uri, parent.version)
        self._filters, self._root = filters, root

    def __call__(self, unit: Unit) -> tuple[str, int, float]:
        fragments = [self._documents.get_fragment(number) for number in unit.fragments]
        names = ["row", *self._filters]
        codes = [_Codes(table, self._filters, self._root) for table, _ in unit.tables]
        transforms = {table.transform: table.fitted.transform for table, _ in unit.tables}
        rows, start = 0, time.perf_counter()
        scanner = self._documents.scanner(
            columns=[*names, "vector"], fragments=fragments, batch_size=BATCH_ROWS, io_buffer_size=BUFFER_BYTES
        )
        for batch in scanner.to_batches():
            vectors = vector_matrix(batch.column("vector"))
            transformed = {name: transform.apply(vectors) for name, transform in transforms.items()}
            rows += batch.num_rows
            for one in codes:
                one.add([batch.column(name) for name in names], transformed[one.table.transform])
            self.progress = Progress(self.progress.rows + batch.num_rows)
        for one, (table, slot) in zip(codes, unit.tables, strict=True):
            record = one.write(f"derive/{_key(table)}/{slot}")
            Ledger(self._root, "derive", _key(table)).add(slot, record)
        return unit.name, rows, time.perf_counter() - start


class _Codes:
    """Codes of a unit for one table: at most PART_ROWS rows of them in memory, those before on disk as drafts."""

    def __init__(self, table: Table, filters: Mapping[str, pa.DataType], root: Root) -> None:
        self.table, self._root = table, root
        self._schema = table.info.to_schema(table.schema(filters))
        self._held: list[pa.RecordBatch] = []
        self._rows, self._clipped = 0, 0.0
        self._parts: list[tuple[int, str]] = []
        self._draft: Path | None = None
        self._files: list[Path] = []

    def add(self, columns: Sequence[pa.Array], transformed: Matrix) -> None:
        """Encode a batch; `columns` are those before the vector, `transformed` is float32[n, D]."""
        codec = self.table.fitted.codec
        prefix = truncate(transformed, self.table.info.dim)
        self._clipped += codec.clipped_share(prefix) * len(prefix)
        if self._rows + len(prefix) > PART_ROWS and self._held:
            self._put_by()
        codes = block_arrays(codec.encode(prefix), self.table.info.blocks)
        self._held.append(pa.RecordBatch.from_arrays([*columns, *codes], schema=self._schema))
        self._rows += len(prefix)

    def write(self, slot: str) -> Record:
        """One fragment of all rows; what its record says."""
        if self._draft is None:
            content: pa.Table | store.Stored = self._part()
        else:
            self._put_by()
            content = store.Stored(self._files, sum(rows for rows, _ in self._parts))
        written = store.write_fragments(self._root, self.table.name, content, self._schema, slot)
        if self._draft is not None:
            self._root.disk.remove_folder(self._draft)
        return {"rows": content.num_rows, **written.to_json(), "parts": self._parts, "clipped_rows": self._clipped}

    def _part(self) -> pa.Table:
        """The rows held, as one part."""
        part = pa.Table.from_batches(self._held, self._schema)
        self._parts.append((part.num_rows, logical_digest(part)))
        self._held, self._rows = [], 0
        return part

    def _put_by(self) -> None:
        self._draft = self._draft or self._root.draft_folder()
        self._files += store.draft_files(self._draft, self._part(), self._schema)


def _publish(table: Table, units: int, filters: Mapping[str, pa.DataType], root: Root, afresh: bool) -> Derived:
    """Commit a table's units in order."""
    records = [slot.done for slot in _slots(root, table, units)]
    schema = table.info.to_schema(table.schema(filters))
    fragments = [fragment for record in records for fragment in record["fragments"]]
    version = store.commit(root, table.name, schema, fragments, afresh)
    rows = sum(record["rows"] for record in records)
    parts = [(rows, digest) for record in records for rows, digest in record["parts"]]
    clipped = sum(record["clipped_rows"] for record in records) / max(rows, 1)
    if clipped > MAX_CLIPPED:
        log.warning(
            "derive table=%s clips %.3f %% of its numbers: its rows differ from the sample that its scales were "
            "fitted on; raise transform.sample_rows",
            table.name,
            100 * clipped,
        )
    return Derived(
        name=table.name,
        version=version,
        rows=rows,
        digest=combined_digest([digest for _, digest in parts]),
        clipped_share=clipped,
        parts=parts,
        files={path: digest for record in records for path, digest in record["files"].items()},
        fragments=fragments,
    )
