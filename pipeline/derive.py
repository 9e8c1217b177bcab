"""The derive stage: prefix tables from the stored full vectors, on the workers; starts no model.

Comes in: `documents`, the transform, the codecs. A unit of consecutive fragments is read once for all tables that
miss it; adding a prefix later touches no other table.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from pipeline.vectors import truncate
from pipeline.workers import OnProgress, Pool, Progress

log = logging.getLogger(__name__)

UNIT_ROWS = 131_072
BATCH_ROWS = 8_192
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
    """A published prefix table; `parts` are (rows, digest) of each unit, `files` sha256 of each data file."""

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
    todo = []
    for number, group in enumerate(groups):
        slots = [(table, _slot(root, table, number)) for table in tables]
        missing = tuple((table, slot.name) for table, slot in slots if slot.record is None)
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
    key = f"{FORMAT} {parent.digest} {name} {named} {scale} {rotation} {UNIT_ROWS}"
    return Table(prefix.table, hashlib.sha256(key.encode()).hexdigest()[:16], info, fitted)


def _key(table: Table) -> str:
    return f"{table.name}-{table.key}"


def _slot(root: Root, table: Table, unit: int) -> Slot:
    """Where a unit of a table is recorded; it is to be derived again where its files are gone."""
    book = Ledger(root, "derive", _key(table))
    return book.slot(f"{unit:06d}", lambda record: store.is_whole(root, table.name, record["fragments"]))


def _groups(parent: Parent) -> list[tuple[int, ...]]:
    """Consecutive fragments, about UNIT_ROWS rows at a time."""
    groups: list[list[int]] = []
    rows = 0
    for fragment in store.open_table(parent.uri, parent.version).get_fragments():
        if not groups or rows + fragment.count_rows() > UNIT_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(fragment.fragment_id)
        rows += fragment.count_rows()
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
        tables = [table for table, _ in unit.tables]
        parts: dict[str, list[pa.RecordBatch]] = {table.name: [] for table in tables}
        transforms = {table.transform: table.fitted.transform for table in tables}
        clipped = dict.fromkeys(parts, 0.0)
        rows, start = 0, time.perf_counter()
        scanner = self._documents.scanner(columns=[*names, "vector"], fragments=fragments, batch_size=BATCH_ROWS)
        for batch in scanner.to_batches():
            vectors = vector_matrix(batch.column("vector"))
            transformed = {name: transform.apply(vectors) for name, transform in transforms.items()}
            rows += batch.num_rows
            for table in tables:
                prefix = truncate(transformed[table.transform], table.info.dim)
                clipped[table.name] += table.fitted.codec.clipped_share(prefix) * batch.num_rows
                codes = block_arrays(table.fitted.codec.encode(prefix), table.info.blocks)
                columns = [*(batch.column(name) for name in names), *codes]
                parts[table.name].append(pa.RecordBatch.from_arrays(columns, schema=table.schema(self._filters)))
            self.progress = Progress(self.progress.rows + batch.num_rows)
        for table, slot in unit.tables:
            self._write(slot, table, parts[table.name], clipped[table.name])
        return unit.name, rows, time.perf_counter() - start

    def _write(self, slot: str, table: Table, parts: list[pa.RecordBatch], clipped_rows: float) -> None:
        content = pa.Table.from_batches(parts)
        schema = table.info.to_schema(content.schema)
        written = store.write_fragments(self._root, table.name, content, schema, f"derive/{_key(table)}/{slot}")
        record: Record = {
            "rows": content.num_rows,
            **written.to_json(),
            "digest": logical_digest(content),
            "clipped_rows": clipped_rows,
        }
        Ledger(self._root, "derive", _key(table)).add(slot, record)


def _publish(table: Table, units: int, filters: Mapping[str, pa.DataType], root: Root, afresh: bool) -> Derived:
    """Commit a table's units in order."""
    records = [_slot(root, table, number).done for number in range(units)]
    schema = table.info.to_schema(table.schema(filters))
    fragments = [fragment for record in records for fragment in record["fragments"]]
    version = store.commit(root, table.name, schema, fragments, afresh)
    rows = sum(record["rows"] for record in records)
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
        digest=combined_digest([record["digest"] for record in records]),
        clipped_share=clipped,
        parts=[(record["rows"], record["digest"]) for record in records],
        files={path: digest for record in records for path, digest in record["files"].items()},
        fragments=fragments,
    )
