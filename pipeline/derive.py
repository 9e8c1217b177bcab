"""The derive stage: prefix tables from the stored full vectors, on the workers; starts no model.

Comes in: `documents`, the transform, the codecs. A unit of consecutive fragments is read once for all tables that
miss it; adding a prefix later touches no other table.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline import store
from pipeline.ledger import Ledger, Record
from pipeline.spec import Prefix
from pipeline.tables import (
    FORMAT,
    Fits,
    FittedPrefix,
    Parent,
    TableInfo,
    combined_digest,
    logical_digest,
    prefix_schema,
    vector_array,
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


@dataclass(frozen=True)
class Derived:
    """A published prefix table."""

    name: str
    version: int
    rows: int
    digest: str
    clipped_share: float


@dataclass(frozen=True)
class Unit:
    """Consecutive fragments of `documents`, and the tables that miss them."""

    number: int
    fragments: tuple[int, ...]
    tables: tuple[Table, ...]

    @property
    def name(self) -> str:
        """Name of its records."""
        return f"{self.number:06d}"


def run(
    prefixes: Sequence[Prefix],
    parent: Parent,
    fits: Fits,
    filters: Mapping[str, pa.DataType],
    root: Path,
    pool: Pool,
    on_progress: OnProgress | None = None,
) -> list[Derived]:
    """Derive and publish every prefix table; what is there already is left alone."""
    tables = [_table(prefix, parent, fits) for prefix in prefixes]
    groups = _groups(parent)
    todo = []
    for number, group in enumerate(groups):
        missing = tuple(table for table in tables if not _is_there(root, table, f"{number:06d}"))
        if missing:
            todo.append(Unit(number, group, missing))
    if todo:
        with pool.team(partial(_Deriver, parent, filters, root), on_progress) as team:
            for name, rows, seconds in team.map(todo):
                log.info("derive unit=%s rows=%d seconds=%.1f", name, rows, seconds)
    return [_publish(table, len(groups), filters, root) for table in tables]


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
        metric="hamming" if prefix.precision == "binary" else "dot",
        transform={"kind": fitted.transform.kind} | ({"parameters": name} if name else {}),
        codec=shown
        | ({"scale": scale} if scale else {})
        | ({"rotation": rotation} if prefix.precision == "binary" else {}),
        parent="documents",
        parent_version=parent.version,
    )
    key = f"{FORMAT} {parent.digest} {name} {prefix.table} {scale} {rotation} {UNIT_ROWS}"
    return Table(prefix.table, hashlib.sha256(key.encode()).hexdigest()[:16], info, fitted)


def _ledger(root: Path, table: Table) -> Ledger:
    return Ledger(root, "derive", f"{table.name}-{table.key}")


def _is_there(root: Path, table: Table, unit: str) -> bool:
    """Whether a unit of a table is done; a record whose files are gone is dropped, so that it is derived again."""
    ledger = _ledger(root, table)
    record = ledger.get(unit)
    if record is not None and store.lost_files(store.table_uri(root, table.name), record["fragments"]):
        ledger.drop(unit)
        return False
    return record is not None


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

    def __init__(self, parent: Parent, filters: Mapping[str, pa.DataType], root: Path, threads: int) -> None:
        self.progress = Progress()
        self._documents = store.open_table(parent.uri, parent.version)
        self._filters, self._root = filters, root

    def __call__(self, unit: Unit) -> tuple[str, int, float]:
        fragments = [self._documents.get_fragment(number) for number in unit.fragments]
        names = ["row", *self._filters]
        parts: dict[str, list[pa.RecordBatch]] = {table.name: [] for table in unit.tables}
        transforms = {table.transform: table.fitted.transform for table in unit.tables}
        clipped = dict.fromkeys(parts, 0.0)
        rows, start = 0, time.perf_counter()
        scanner = self._documents.scanner(columns=[*names, "vector"], fragments=fragments, batch_size=BATCH_ROWS)
        for batch in scanner.to_batches():
            vectors = vector_matrix(batch.column("vector"))
            transformed = {name: transform.apply(vectors) for name, transform in transforms.items()}
            rows += batch.num_rows
            for table in unit.tables:
                prefix = truncate(transformed[table.transform], table.info.dim)
                clipped[table.name] += table.fitted.codec.clipped_share(prefix) * batch.num_rows
                columns = [*(batch.column(name) for name in names), vector_array(table.fitted.codec.encode(prefix))]
                schema = prefix_schema(table.info.dim, table.info.precision, self._filters)
                parts[table.name].append(pa.RecordBatch.from_arrays(columns, schema=schema))
            self.progress = Progress(self.progress.rows + batch.num_rows)
        for table in unit.tables:
            self._write(unit, table, parts[table.name], clipped[table.name])
        return unit.name, rows, time.perf_counter() - start

    def _write(self, unit: Unit, table: Table, parts: list[pa.RecordBatch], clipped_rows: float) -> None:
        content = pa.Table.from_batches(parts)
        schema = table.info.to_schema(content.schema)
        record: Record = {
            "rows": content.num_rows,
            "fragments": store.write_fragments(store.table_uri(self._root, table.name), content, schema),
            "digest": logical_digest(content),
            "clipped_rows": clipped_rows,
        }
        _ledger(self._root, table).add(unit.name, record)


def _publish(table: Table, units: int, filters: Mapping[str, pa.DataType], root: Path) -> Derived:
    """Commit a table's units in order."""
    ledger = _ledger(root, table)
    records = [ledger.get(f"{number:06d}") or {} for number in range(units)]
    schema = table.info.to_schema(prefix_schema(table.info.dim, table.info.precision, filters))
    fragments = [fragment for record in records for fragment in record["fragments"]]
    version = store.commit(store.table_uri(root, table.name), schema, fragments)
    rows = sum(record["rows"] for record in records)
    clipped = sum(record["clipped_rows"] for record in records) / max(rows, 1)
    if clipped > MAX_CLIPPED:
        log.warning(
            "derive table=%s clips %.3f %% of its numbers: its rows differ from the sample that its scales were "
            "fitted on; raise transform.sample_rows",
            table.name,
            100 * clipped,
        )
    return Derived(table.name, version, rows, combined_digest([record["digest"] for record in records]), clipped)
