"""The worker's half of embedding: texts of a shard through the model, its fragment, its record.

The model is loaded once. What was resolved on the first worker (`Facts`) holds for every shard.
"""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import merge, rows, store
from pipeline.encoders import choose, meters
from pipeline.encoders.batches import Encoded, Encoder, OnBatch, Prepared, encode, encode_rows, prepare
from pipeline.encoders.choose import Choice
from pipeline.encoders.models import ModelFolder
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.tokens import PLAIN
from pipeline.errors import DataError
from pipeline.ledger import Ledger, Record
from pipeline.merge import Merger
from pipeline.sources import Reader, Shard
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, TableInfo, documents_schema, logical_digest, vector_array
from pipeline.workers import Progress, give_back_memory, peak_memory_bytes

BATCH_TOKENS = {"cpu": 1_024, "cuda": 131_072}
"""Tokens per batch, padding included (measured: cpu on two Zen 4 cores, an H100, with MiniLM)."""
STATIC_TOKENS = 262_144
"""The same where nothing is padded."""
SAMPLED_TEXTS = 4_096
"""Texts from which a probe and a calibration take theirs, at least."""
COMPARED_TEXTS = 512
"""Texts on which a quick tokenizer must agree with the plain one."""
LOOKAHEAD = 3
"""Shards that a worker has in hand: one is read and tokenized, one embedded, one written."""


@dataclass(frozen=True)
class Facts:
    """What was resolved once, on a worker, and holds for the whole job.

    `graph`: sha256 of kept files that are the model for an engine. `flops`: operations per token and per squared
    token; `peak_flops`: what the machine of the first worker reaches in a matrix product, per second and worker.
    """

    name: str
    revision: str | None
    digest: str
    full_dim: int
    backend: str
    precision: str
    max_tokens: int | None
    batch_tokens: int
    prompts: Mapping[str, str]
    probe: Mapping[str, Any]
    attention: str = "padded"
    compiled: bool = False
    tokenizer: str = PLAIN
    graph: Sequence[str] | None = None
    flops: Sequence[float] = (0.0, 0.0)
    peak_flops: float = 0.0


@dataclass(frozen=True)
class Resolve:
    """Ask a worker for the facts, with rows of this shard as the probe; `rows` has the whole corpus."""

    shard: Shard
    rows: int = 0
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


Result = TypeVar("Result")


class _Stage:
    """A thread of its own, so that libraries keep one set of threads for it; what it is given is done in order."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._free = 0.0

    def __call__(self, work: Callable[..., Result], *values: Any, since: float = 0.0) -> "tuple[Result, float]":
        """The result, and how long the thread had stood idle before it began; `since` when the work was on its way."""
        return self._thread.submit(self._run, work, values, since).result()

    def _run(self, work: Callable[..., Result], values: Sequence[Any], since: float) -> "tuple[Result, float]":
        idle = time.perf_counter() - max(self._free, since)
        try:
            return work(*values), idle
        finally:
            self._free = time.perf_counter()


@dataclass(frozen=True)
class _Read:
    """A shard's rows, clean, and their tokens."""

    batches: Sequence[rows.Rows]
    prepared: Prepared
    seconds: float


class Embedder:
    """Holds one model on one device and turns shards of text into fragments of vectors.

    Several threads may call it at once: each shard passes through the same three stages, each of which has one at a
    time, so that the device computes while the next shard is read and the last one is written.
    """

    def __init__(
        self, spec: JobSpec, folder: ModelFolder, root: Root, types: Mapping[str, pa.DataType], threads: int
    ) -> None:
        """Load the model."""
        self.progress = Progress()
        self._spec, self._folder, self._root, self._types, self._threads = spec, folder, root, types, threads
        self._reader = Reader(rows.columns(spec.corpus))
        self._reading, self._device, self._writing = (_Stage(name) for name in ("read", "device", "write"))
        self.base, _ = self._device(SentenceEncoder, folder, spec.model.max_tokens, None, threads)
        self._encoder: Encoder | None = None
        self._lock = threading.Lock()

    def __call__(self, item: Resolve | Work | Trial | merge.Work) -> Any:
        """The facts, the record of a shard, how many texts it has, or the record of a merge."""
        if isinstance(item, Resolve):
            return self._device(self._resolve, item)[0]
        if isinstance(item, merge.Work):
            return self._writing(Merger(self._root, self._threads), item)[0]
        return self._try(item) if isinstance(item, Trial) else self._work(item)

    def encoder(self, facts: Facts) -> Encoder:
        """The model as the facts say."""
        with self._lock:
            made = self._encoder or self._device(self._built, facts)[0]
            self._encoder = made
            return made

    def _built(self, facts: Facts) -> Encoder:
        choice = Choice(facts.backend, facts.precision, facts.attention, facts.compiled)
        graph = None if facts.graph is None else (self._root.kept(facts.graph[0]), self._root.kept(facts.graph[1]))
        encoder = choose.build(self.base, choice, facts.prompts["document"], graph)
        if facts.tokenizer == PLAIN and encoder.tokenizer is not None:
            encoder.tokenizer = encoder.tokenizer.plainly()
        return encoder

    def _resolve(self, asked: Resolve) -> Facts:
        model, base = self._spec.model, self.base
        prompts = {
            "document": base.prompts["document"] if model.prompts.document is None else model.prompts.document,
            "query": base.prompts["query"] if model.prompts.query is None else model.prompts.query,
        }
        budget = BATCH_TOKENS.get(base.device.split(":")[0], 4_096)
        if model.batch_tokens != "auto":
            budget = model.batch_tokens
        texts = self._some_texts(asked.shard)
        chosen = choose.choose(base, model, texts, prompts["document"], budget, asked.rows)
        encoder = self._encoder = chosen.encoder
        if encoder.tokenizer is not None:
            encoder.tokenizer = encoder.tokenizer.agreeing(texts[:COMPARED_TEXTS])
        flops = encoder.flops()
        if model.batch_tokens == "auto" and not encoder.pads and not any(flops):
            budget = STATIC_TOKENS
        return Facts(
            name=self._folder.name,
            revision=self._folder.revision,
            digest=self._folder.digest,
            full_dim=encoder.dim,
            **asdict(chosen.choice),
            tokenizer="transformers" if encoder.tokenizer is None else encoder.tokenizer.name,
            max_tokens=encoder.max_tokens,
            batch_tokens=budget,
            prompts=prompts,
            probe=chosen.figures,
            graph=None if chosen.graph is None else [self._root.keep(part) for part in chosen.graph],
            flops=flops,
            peak_flops=meters.peak_flops(base.device, chosen.choice.precision) if any(flops) else 0.0,
        )

    def _some_texts(self, shard: Shard) -> list[str]:
        """Texts of the shard's beginning in random order."""
        texts: list[str] = []
        for part in self._read(shard):
            texts += part.texts
            if len(texts) >= SAMPLED_TEXTS:
                break
        self._reader = Reader(rows.columns(self._spec.corpus))
        return [texts[at] for at in np.random.default_rng(self._spec.seed).permutation(len(texts))]

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
        facts, encoder = trial.facts, self.encoder(trial.facts)
        texts = [text for batch in self._read(trial.shard) for text in batch.texts]
        some = texts[trial.start : trial.stop] or ["a"]
        self._device(encode_rows, encoder, some, "document", facts.prompts["document"], facts.batch_tokens)
        return len(texts)

    def _embed(self, work: Work) -> Record:
        facts, encoder, start = work.facts, self.encoder(work.facts), time.perf_counter()
        read, _ = self._reading(self._tokens, work, encoder)
        encoded, waited = self._device(
            encode, encoder, read.prepared, "document", facts.prompts["document"], facts.batch_tokens,
            self._counter(read.prepared), self._spec.embed.vectors, since=start,
        )  # fmt: skip
        record, _ = self._writing(self._written, work, read, encoded)
        return record | {
            "seconds": round(time.perf_counter() - start, 3),
            "read_seconds": round(read.seconds, 3),
            "tokenize_seconds": round(read.prepared.seconds, 3),
            "waiting_seconds": round(waited, 3),
            "forward_seconds": round(encoded.forward_seconds, 3),
            "batch_tokens": encoded.batch_tokens,
        }

    def _tokens(self, work: Work, encoder: Encoder) -> _Read:
        start, shard = time.perf_counter(), work.shard
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
        seconds = time.perf_counter() - start
        texts = [text for batch in batches for text in batch.texts]
        return _Read(batches, prepare(encoder, texts, work.facts.prompts["document"]), seconds)

    def _written(self, work: Work, read: _Read, encoded: Encoded) -> Record:
        start, shard = time.perf_counter(), work.shard
        table, rejected = self._tables(shard, read.batches, encoded, work.facts)
        schema = documents_info(work.facts, self._spec).to_schema(table.schema)
        written = store.write_fragments(self._root, DOCUMENTS, table, schema, f"embed/{work.name}")
        record = {
            "shard": shard.number,
            "rows": table.num_rows,
            "set_aside": rejected,
            "quarantined": dict(Counter(row["reason"] for row in rejected)),
            "repaired": sum(batch.repaired for batch in read.batches),
            **written.to_json(),
            "digest": logical_digest(table),
            "peak_memory_bytes": peak_memory_bytes(),
            **{name: getattr(encoded, name) for name in COUNTERS},
        }
        give_back_memory()
        return record | {"write_seconds": round(time.perf_counter() - start, 3)}

    def _counter(self, prepared: Prepared) -> OnBatch:
        """Adds a shard to the progress by its tokens, since its longest texts come first."""
        total, shard_rows = max(1, int(prepared.tokens.offsets[-1])), len(prepared.places)
        before, done = Progress(), 0

        def count(rows: int, tokens: int) -> None:
            nonlocal before, done
            before = before if done else self.progress  # of the shard that the device had before
            done += tokens
            self.progress = Progress(before.rows + shard_rows * done // total, before.tokens + done)

        return count

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
            "vector": vector_array(encoded.vectors),
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


COUNTERS = (
    "tokens", "squared_tokens", "padded_tokens", "cut_rows", "cut_tokens", "halvings", "renormalised", "repeats",
)  # fmt: skip
METERS = ("read_seconds", "tokenize_seconds", "waiting_seconds", "forward_seconds", "write_seconds", "seconds")
"""Seconds of a shard: those of the stages overlap; `waiting` is the device's, for tokens."""


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
