"""The worker's half of embedding: texts of a shard through the model, its fragment, its record.

The model is loaded once. What was resolved on the first worker (`Facts`) holds for every shard.
"""

import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import rows, store
from pipeline.encoders.batches import Encoded, encode_rows
from pipeline.encoders.models import ModelFolder
from pipeline.encoders.sentence import SentenceEncoder, TorchPrecision
from pipeline.errors import DataError
from pipeline.ledger import Ledger, Record
from pipeline.sources import Reader, Shard
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, TableInfo, documents_schema, logical_digest, vector_array
from pipeline.workers import Progress, give_back_memory, peak_memory_bytes

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
    precision: TorchPrecision
    max_tokens: int | None
    batch_tokens: int
    prompts: Mapping[str, str]
    probe: Mapping[str, Any]


@dataclass(frozen=True)
class Resolve:
    """Ask a worker for the facts, with the first rows of this shard as the probe."""

    shard: Shard
    name: str = "probe"


@dataclass(frozen=True)
class Work:
    """One shard to embed as the facts say; `name` is the slot of its record, `poison` rows that end a worker."""

    shard: Shard
    facts: Facts
    name: str
    poison: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """Whether a worker lives through usable texts start … stop of a shard; nothing is kept."""

    shard: Shard
    facts: Facts
    start: int
    stop: int

    @property
    def name(self) -> str:
        """What a log calls it."""
        return f"{self.shard.name}[{self.start}:{self.stop}]"


class Embedder:
    """Holds one model on one device and turns shards of text into fragments of vectors."""

    def __init__(
        self, spec: JobSpec, folder: ModelFolder, root: Root, types: Mapping[str, pa.DataType], threads: int
    ) -> None:
        """Load the model."""
        self.progress = Progress()
        self._spec, self._folder, self._root, self._types = spec, folder, root, types
        self._reader = Reader(rows.columns(spec.corpus))
        self.encoder = SentenceEncoder(folder, spec.model.max_tokens, None, threads)

    def __call__(self, item: Resolve | Work | Trial) -> Any:
        """The facts, the record of a shard, or how many texts it has."""
        if isinstance(item, Resolve):
            return self._resolve(item.shard)
        return self._try(item) if isinstance(item, Trial) else self._work(item)

    def _resolve(self, shard: Shard) -> Facts:
        model, encoder = self._spec.model, self.encoder
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

    def _work(self, work: Work) -> Record:
        book = Ledger(self._root, "embed")
        standing = book.read(work.name)
        return book.add(work.name, self._embed(work)) if standing is None else standing

    def _try(self, trial: Trial) -> int:
        self.encoder.use(trial.facts.precision)
        texts = [text for batch in self._read(trial.shard) for text in batch.texts]
        self._encode(texts[trial.start : trial.stop] or ["a"], trial.facts)
        return len(texts)

    def _encode(self, texts: Sequence[str], facts: Facts) -> Encoded:
        return encode_rows(self.encoder, texts, "document", facts.prompts["document"], facts.batch_tokens, self._count)

    def _embed(self, work: Work) -> Record:
        shard, facts = work.shard, work.facts
        self.encoder.use(facts.precision)
        start = time.perf_counter()
        batches = list(self._read(shard))
        seen = sum(len(batch.ids) + len(batch.rejected) for batch in batches)
        if seen != shard.rows:
            raise DataError(
                f"shard {shard.name} had {shard.rows} rows when it was scanned and has {seen} now; the corpus changed"
            )
        places = 0
        for batch in batches:
            here = {at - places: why for at, why in work.poison.items() if 0 <= at - places < len(batch.ids)}
            places += len(batch.ids)
            batch.set_aside(here, "model_error")
        encoded = self._encode([text for batch in batches for text in batch.texts], facts)
        table, rejected = self._tables(shard, batches, encoded, facts)
        schema = documents_info(facts, self._spec).to_schema(table.schema)
        written = store.write_fragments(self._root, DOCUMENTS, table, schema, f"embed/{work.name}")
        record = {
            "shard": shard.number,
            "rows": table.num_rows,
            "set_aside": rejected,
            "quarantined": dict(Counter(row["reason"] for row in rejected)),
            "repaired": sum(batch.repaired for batch in batches),
            **written.to_json(),
            "digest": logical_digest(table),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            **{name: getattr(encoded, name) for name in COUNTERS},
        }
        give_back_memory()
        return record

    def _count(self, rows: int, tokens: int) -> None:
        self.progress = Progress(self.progress.rows + rows, self.progress.tokens + tokens)

    def _tables(
        self, shard: Shard, batches: Sequence[rows.Rows], encoded: Encoded, facts: Facts
    ) -> tuple[pa.Table, list[Record]]:
        """The shard's rows of `documents`, and those set aside, each in row order."""
        corpus = self._spec.corpus
        schema = documents_columns(self._spec, self._types, facts)
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
        return table, sorted(aside, key=lambda one: one["row"])


COUNTERS = ("tokens", "padded_tokens", "cut_rows", "cut_tokens", "halvings", "renormalised")


def _aside(shard: Shard, batch: rows.Rows, offset: int, name: str | None, reason: str, detail: str) -> Record:
    row = batch.first_row + offset
    return {
        "row": row, "id": name, "file": batch.file, "shard": shard.number, "offset": offset,
        "reason": reason, "detail": detail,
    }  # fmt: skip


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A zstd Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def documents_info(facts: Facts, spec: JobSpec) -> TableInfo:
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


def documents_columns(spec: JobSpec, types: Mapping[str, pa.DataType], facts: Facts) -> pa.Schema:
    """Columns of `documents` for this job."""
    corpus = spec.corpus
    keep, filters = ({name: types[name] for name in names} for names in (corpus.keep, corpus.filter))
    return documents_schema(facts.full_dim, spec.embed.vectors, keep, filters, corpus.keep_text)
