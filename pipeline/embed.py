"""The embed stage: every usable row through the model once, at full dimension, into `documents`.

Comes in: a scan and its shards. Workers write their shard's fragment (and Parquet file) and leave a record; the
driver publishes all of them in shard order with one commit. Vectors never pass through the driver.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import ledger, rows, store
from pipeline.embedder import (
    COUNTERS,
    Embedder,
    Facts,
    Resolve,
    Work,
    documents_columns,
    documents_info,
    parquet_bytes,
)
from pipeline.encoders.models import ModelFolder
from pipeline.errors import DataError, SpecError
from pipeline.ledger import Ledger, Record
from pipeline.sources import Shard
from pipeline.spec import JobSpec
from pipeline.tables import DOCUMENTS, FORMAT, TableInfo, combined_digest
from pipeline.workers import OnProgress, Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Full:
    """The finished `documents` table."""

    uri: str
    version: int
    digest: str
    rows: int
    facts: Facts
    info: TableInfo
    counters: Mapping[str, Any]


def run(
    spec: JobSpec,
    folder: ModelFolder,
    shards: Sequence[Shard],
    corpus_fields: Mapping[str, Any],
    types: Mapping[str, pa.DataType],
    root: Path,
    pool: Pool,
    on_progress: OnProgress | None = None,
) -> Full:
    """Embed what is missing and publish `documents`.

    `corpus_fields` are the corpus' part of the fingerprint. Raises StaleError where the root was begun
    otherwise, SpecError where a prefix is longer than the model's vectors, DataError where the budget is spent.
    """
    fixed = {**corpus_fields, **_fixed_fields(spec, folder)}
    standing = ledger.begun(root)
    if standing is not None:
        ledger.refuse_changes(root, standing, {**fixed, **_insisted(spec, standing)})
        check_dims(spec, standing["facts"]["full_dim"])
        sealed = Ledger(root, "embed").get("sealed")
        if sealed is not None:
            return _full(root, spec, types, Facts(**standing["facts"]), sealed)
    done = Ledger(root, "embed").names()
    todo = [shard for shard in shards if shard.name not in done]
    if todo:
        with pool.team(partial(Embedder, spec, folder, root, types), on_progress, gpus=True) as team:
            if standing is None:
                facts: Facts = team.call(Resolve(shards[0]))
                check_dims(spec, facts.full_dim)
                log.info(
                    "embed model=%s dim=%d precision=%s probe=%s",
                    folder.name,
                    facts.full_dim,
                    facts.precision,
                    facts.probe,
                )
                begun = {**fixed, **_resolved_fields(facts), "asked": _asked(spec), "facts": asdict(facts)}
                standing = ledger.begin(root, begun)
            facts = Facts(**standing["facts"])
            for record in team.map([Work(shard, facts) for shard in todo]):
                _log(record)
    assert standing is not None
    return _publish(spec, shards, types, Facts(**standing["facts"]), root)


def _fixed_fields(spec: JobSpec, folder: ModelFolder) -> dict[str, Any]:
    """Fingerprint fields known before a model is loaded."""
    return {
        "format": FORMAT,
        "model.digest": folder.digest,
        "embed.vectors": spec.embed.vectors,
        "embed.parquet": spec.embed.parquet,
    }


def _asked(spec: JobSpec) -> dict[str, Any]:
    """Fields where null stands for the model's own value."""
    model = spec.model
    return {
        "model.max_tokens": model.max_tokens,
        "model.prompts.document": model.prompts.document,
        "model.prompts.query": model.prompts.query,
    }


def _insisted(spec: JobSpec, standing: Record) -> dict[str, Any]:
    """What this spec says of fields that were resolved when the root was begun; `auto` takes what there is."""
    model, asked = spec.model, _asked(spec)
    automatic = {
        "model.backend": model.backend,
        "model.precision": model.precision,
        "model.batch_tokens": model.batch_tokens,
    }
    insisted = {field: value for field, value in automatic.items() if value != "auto"}
    same = [field for field, value in asked.items() if value is None and standing["asked"][field] is None]
    return insisted | {field: value for field, value in asked.items() if field not in same}


def _resolved_fields(facts: Facts) -> dict[str, Any]:
    return {
        "model.backend": facts.backend,
        "model.precision": facts.precision,
        "model.max_tokens": facts.max_tokens,
        "model.batch_tokens": facts.batch_tokens,
        "model.prompts.document": facts.prompts["document"],
        "model.prompts.query": facts.prompts["query"],
    }


def check_dims(spec: JobSpec, full_dim: int) -> None:
    """SpecError where a prefix is longer than the model's own dimension."""
    for number, prefix in enumerate(spec.prefixes):
        if prefix.dim > full_dim:
            raise SpecError(
                f"prefixes[{number}].dim: {prefix.dim} is more than the {full_dim} dimensions of {spec.model.name}; "
                f"use {full_dim} or less"
            )


def _publish(
    spec: JobSpec, shards: Sequence[Shard], types: Mapping[str, pa.DataType], facts: Facts, root: Path
) -> Full:
    """Check the budget, seal the stage, and publish it."""
    book = Ledger(root, "embed")
    records = [_required(book, shard) for shard in shards]
    reasons = sum((Counter(record["quarantined"]) for record in records), Counter[str]())
    rows.check_budget(spec.corpus, sum(shard.rows for shard in shards), reasons)
    total = sum(record["rows"] for record in records)
    if not total:
        raise DataError(f"no row could be embedded: {dict(reasons)}")
    sealed = {
        "shards": [shard.name for shard in shards],
        "quarantine": hashlib.sha256(_quarantine(root, [shard.name for shard in shards])).hexdigest(),
        "fragments": [fragment for record in records for fragment in record["fragments"]],
        "rows": total,
        "digest": combined_digest([record["digest"] for record in records]),
        "quarantined": dict(reasons),
        "repaired": sum(record["repaired"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "parquet": {record["parquet"]["path"]: record["parquet"]["sha256"] for record in records if record["parquet"]},
        **{name: sum(record[name] for record in records) for name in COUNTERS},
    }
    return _full(root, spec, types, facts, book.add("sealed", sealed))


def _quarantine(root: Path, shards: Sequence[str]) -> bytes:
    """quarantine.parquet: what the shards set aside, in order."""
    book = Ledger(root, "embed")
    parts = [pq.read_table(book.file(f"{name}.quarantine.parquet")) for name in shards]
    return parquet_bytes(pa.concat_tables(parts))


def _required(book: Ledger, shard: Shard) -> Record:
    record = book.get(shard.name)
    assert record is not None, f"shard {shard.name} has no record after all work was done"
    return record


def _full(root: Path, spec: JobSpec, types: Mapping[str, pa.DataType], facts: Facts, sealed: Record) -> Full:
    """Publish what is sealed, `documents` and quarantine.parquet, unless they hold just that already."""
    aside = root / "quarantine.parquet"
    if not aside.is_file() or store.sha256(aside) != sealed["quarantine"]:
        store.write(aside, _quarantine(root, sealed["shards"]))
    uri, info = store.table_uri(root, DOCUMENTS), documents_info(facts, spec)
    version = store.commit(uri, info.to_schema(documents_columns(spec, types, facts)), sealed["fragments"])
    return Full(uri, version, sealed["digest"], sealed["rows"], facts, info, sealed)


def _log(record: Record) -> None:
    rate = record["rows"] / record["seconds"] if record["seconds"] else 0.0
    log.info(
        "embed shard=%07d rows=%d tokens=%d quarantined=%d seconds=%.1f rows_per_second=%.0f",
        record["shard"], record["rows"], record["tokens"], sum(record["quarantined"].values()), record["seconds"], rate,
    )  # fmt: skip
