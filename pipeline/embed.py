"""The embed stage: every usable row through the model once, at full dimension, into `documents`.

Comes in: a scan and its shards. Workers write their shard's fragment (and Parquet file) and leave a record; the
driver publishes all of them in shard order with one commit. Vectors never pass through the driver.
"""

import io
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import ledger, rows, store
from pipeline.encoders.batches import Encoded, encode_rows
from pipeline.encoders.models import ModelFolder
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.errors import DataError, SpecError
from pipeline.ledger import Ledger, Record
from pipeline.sources import Reader, Shard
from pipeline.spec import JobSpec
from pipeline.tables import (
    DOCUMENTS,
    FORMAT,
    TableInfo,
    combined_digest,
    documents_schema,
    logical_digest,
    vector_array,
)
from pipeline.workers import OnProgress, Pool, Progress, peak_memory_bytes

log = logging.getLogger(__name__)

PROBE_ROWS = 96
BATCH_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens per batch, padding included (measured: cpu on two Zen 4 cores with MiniLM; cuda assumed)."""


@dataclass(frozen=True)
class Facts:
    """What was resolved once, on a worker, and holds for the whole job."""

    name: str
    revision: str | None
    digest: str
    full_dim: int
    backend: str
    precision: str
    max_tokens: int | None
    batch_tokens: int
    prompts: Mapping[str, str]
    matryoshka_dims: Sequence[int] | None
    probe: Mapping[str, Any]


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
        ledger.refuse_changes(root, standing, {**fixed, **_insisted(spec)})
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
                standing = ledger.begin(root, {**fixed, **_resolved_fields(facts), "facts": asdict(facts)})
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


def _insisted(spec: JobSpec) -> dict[str, Any]:
    """Fields that a spec may leave to the job, where it does not."""
    model = spec.model
    asked = {
        "model.backend": None if model.backend == "auto" else model.backend,
        "model.precision": None if model.precision == "auto" else model.precision,
        "model.max_tokens": model.max_tokens,
        "model.batch_tokens": None if model.batch_tokens == "auto" else model.batch_tokens,
        "model.prompts.document": model.prompts.document,
        "model.prompts.query": model.prompts.query,
    }
    return {field: value for field, value in asked.items() if value is not None}


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


@dataclass(frozen=True)
class Resolve:
    """Ask a worker for the facts, with the first rows of this shard as the probe."""

    shard: Shard
    name: str = "probe"


@dataclass(frozen=True)
class Work:
    """One shard to embed as the facts say."""

    shard: Shard
    facts: Facts

    @property
    def name(self) -> str:
        """Name of the shard's record."""
        return self.shard.name


class Embedder:
    """Holds one model on one device and turns shards of text into fragments of vectors."""

    def __init__(
        self, spec: JobSpec, folder: ModelFolder, root: Path, types: Mapping[str, pa.DataType], threads: int
    ) -> None:
        """Load the model."""
        self.progress = Progress()
        self._spec, self._folder, self._root, self._types = spec, folder, root, types
        self._reader = Reader(rows.columns(spec.corpus))
        self._encoder = SentenceEncoder(folder, spec.model.max_tokens, None, threads)

    def __call__(self, item: Resolve | Work) -> Any:
        """The facts, or the record of a shard."""
        return self._resolve(item.shard) if isinstance(item, Resolve) else self._embed(item.shard, item.facts)

    def _resolve(self, shard: Shard) -> Facts:
        model, encoder = self._spec.model, self._encoder
        prompts = {
            "document": encoder.prompts["document"] if model.prompts.document is None else model.prompts.document,
            "query": encoder.prompts["query"] if model.prompts.query is None else model.prompts.query,
        }
        budget = (
            BATCH_TOKENS.get(encoder.device.split(":")[0], 4_096)
            if model.batch_tokens == "auto"
            else model.batch_tokens
        )
        probe: dict[str, Any] = {}
        if model.precision != "auto":
            encoder.use(model.precision)
        else:
            probe = encoder.probe(self._first_texts(shard), prompts["document"], budget, model.min_cosine)
        return Facts(
            name=self._folder.name,
            revision=self._folder.revision,
            digest=self._folder.digest,
            full_dim=encoder.dim,
            backend=encoder.backend,
            precision=encoder.precision,
            max_tokens=encoder.max_tokens,
            batch_tokens=budget,
            prompts=prompts,
            matryoshka_dims=model.matryoshka_dims or self._folder.matryoshka_dims,
            probe=probe,
        )

    def _first_texts(self, shard: Shard) -> list[str]:
        texts: list[str] = []
        for part in self._read(shard):
            texts += part.texts
            if len(texts) >= PROBE_ROWS:
                break
        self._reader = Reader(rows.columns(self._spec.corpus))
        return texts[:PROBE_ROWS]

    def _read(self, shard: Shard) -> Iterator[rows.Rows]:
        for part in shard.parts:
            for raw in self._reader.read(part.file, part.start, part.stop):
                clean = rows.clean(raw, part.file.path, self._spec.corpus, self._types)
                clean.first_row = part.first_row - part.start
                clean.drop(shard.dropped)
                yield clean

    def _embed(self, shard: Shard, facts: Facts) -> Record:
        self._encoder.use(facts.precision)  # type: ignore[arg-type]
        start = time.perf_counter()
        batches = list(self._read(shard))
        seen = sum(len(batch.ids) + len(batch.rejected) for batch in batches)
        if seen != shard.rows:
            raise DataError(
                f"shard {shard.name} had {shard.rows} rows when it was scanned and has {seen} now; the corpus changed"
            )
        texts = [text for batch in batches for text in batch.texts]
        encoded = encode_rows(
            self._encoder, texts, "document", facts.prompts["document"], facts.batch_tokens, self._count
        )
        table, rejected = self._tables(shard, batches, encoded, facts)
        schema = _info(facts, self._spec).to_schema(table.schema)
        name = f"{shard.name}.quarantine.parquet"
        book = Ledger(self._root, "embed")
        store.write(book.file(name), _parquet_bytes(rejected))
        record = {
            "shard": shard.number,
            "rows": table.num_rows,
            "quarantined": dict(Counter(rejected["reason"].to_pylist())),
            "repaired": sum(batch.repaired for batch in batches),
            "fragments": store.write_fragments(store.table_uri(self._root, DOCUMENTS), table, schema),
            "digest": logical_digest(table),
            "parquet": self._parquet(shard, table) if self._spec.embed.parquet else None,
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            **{name: getattr(encoded, name) for name in COUNTERS},
        }
        return book.add(shard.name, record)

    def _count(self, rows: int, tokens: int) -> None:
        self.progress = Progress(self.progress.rows + rows, self.progress.tokens + tokens)

    def _tables(
        self, shard: Shard, batches: Sequence[rows.Rows], encoded: Encoded, facts: Facts
    ) -> tuple[pa.Table, pa.Table]:
        """The shard's rows of `documents`, and those set aside, each in row order."""
        corpus = self._spec.corpus
        schema = _schema(self._spec, self._types, facts)
        numbers = [batch.first_row + offset for batch in batches for offset in batch.offsets]
        columns: dict[str, Any] = {
            "row": pa.array(numbers, pa.int64()),
            "id": pa.array([one for batch in batches for one in batch.ids], pa.string()),
            "text": pa.array([one for batch in batches for one in batch.texts], pa.string())
            if corpus.keep_text
            else None,
            "text_digest": pa.array([one for batch in batches for one in batch.digests], pa.binary(16)),
            "vector": vector_array(encoded.vectors.astype(self._spec.embed.vectors)),
        }
        for name in [*corpus.keep, *corpus.filter]:
            columns[name] = pa.chunked_array([batch.extras[name] for batch in batches], schema.field(name).type)
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        failed = sorted(encoded.failed)
        places = [(batch, number) for batch in batches for number in range(len(batch.ids))]
        aside = [
            _aside(shard, batch, batch.offsets[at], batch.ids[at], *encoded.failed[number])
            for number in failed
            for batch, at in [places[number]]
        ]
        aside += [_aside(shard, batch, *one) for batch in batches for one in batch.rejected]
        kept = sorted(set(range(table.num_rows)) - set(failed))
        table = table.take(pa.array(kept, pa.int64())) if failed else table
        return table, pa.Table.from_pylist(sorted(aside, key=lambda one: one["row"]), rows.QUARANTINE_SCHEMA)

    def _parquet(self, shard: Shard, table: pa.Table) -> Record:
        """`parquet/documents/`: zstd, byte-stream-split vectors, no dictionary; one file per shard."""
        path = Path("parquet") / DOCUMENTS / f"part-{shard.name}.parquet"
        data = _parquet_bytes(
            table, use_dictionary=False, use_byte_stream_split=["vector.list.element"], row_group_size=8192
        )
        store.write(self._root / path, data)
        return {"path": path.as_posix(), "sha256": store.sha256(self._root / path)}


COUNTERS = ("tokens", "padded_tokens", "cut_rows", "cut_tokens", "halvings", "renormalised")


def _aside(shard: Shard, batch: rows.Rows, offset: int, name: str | None, reason: str, detail: str) -> Record:
    row = batch.first_row + offset
    return {
        "row": row, "id": name, "file": batch.file, "shard": shard.number, "offset": offset,
        "reason": reason, "detail": detail,
    }  # fmt: skip


def _parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def _info(facts: Facts, spec: JobSpec) -> TableInfo:
    """The metadata of `documents`."""
    return TableInfo(
        model=facts.name,
        revision=facts.revision,
        model_digest=facts.digest,
        max_tokens=facts.max_tokens,
        prompts=facts.prompts,
        full_dim=facts.full_dim,
        dim=facts.full_dim,
        precision=spec.embed.vectors,
    )


def _publish(
    spec: JobSpec, shards: Sequence[Shard], types: Mapping[str, pa.DataType], facts: Facts, root: Path
) -> Full:
    """Check the budget, write quarantine.parquet, seal the stage, and commit every shard in order."""
    book = Ledger(root, "embed")
    records = [_required(book, shard) for shard in shards]
    reasons = sum((Counter(record["quarantined"]) for record in records), Counter[str]())
    rows.check_budget(spec.corpus, sum(shard.rows for shard in shards), reasons)
    total = sum(record["rows"] for record in records)
    if not total:
        raise DataError(f"no row could be embedded: {dict(reasons)}")
    parts = [pq.read_table(book.file(f"{shard.name}.quarantine.parquet")) for shard in shards]
    store.write(root / "quarantine.parquet", _parquet_bytes(pa.concat_tables(parts)))
    sealed = {
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


def _required(book: Ledger, shard: Shard) -> Record:
    record = book.get(shard.name)
    assert record is not None, f"shard {shard.name} has no record after all work was done"
    return record


def _full(root: Path, spec: JobSpec, types: Mapping[str, pa.DataType], facts: Facts, sealed: Record) -> Full:
    """Publish what is sealed, unless the table holds just that already."""
    uri, info = store.table_uri(root, DOCUMENTS), _info(facts, spec)
    version = store.commit(uri, info.to_schema(_schema(spec, types, facts)), sealed["fragments"])
    return Full(uri, version, sealed["digest"], sealed["rows"], facts, info, sealed)


def _schema(spec: JobSpec, types: Mapping[str, pa.DataType], facts: Facts) -> pa.Schema:
    """Columns of `documents` for this job."""
    corpus = spec.corpus
    keep, filters = ({name: types[name] for name in names} for names in (corpus.keep, corpus.filter))
    return documents_schema(facts.full_dim, spec.embed.vectors, keep, filters, corpus.keep_text)


def _log(record: Record) -> None:
    rate = record["rows"] / record["seconds"] if record["seconds"] else 0.0
    log.info(
        "embed shard=%07d rows=%d tokens=%d quarantined=%d seconds=%.1f rows_per_second=%.0f",
        record["shard"], record["rows"], record["tokens"], sum(record["quarantined"].values()), record["seconds"], rate,
    )  # fmt: skip
