"""What a job will take and give, before anything is spent: seeded rows, embedded here, and arithmetic in the open.

Comes in: a spec. Goes out: a `Plan` of figures, each measured, estimated by a named formula, or assumed. Nothing is
written to the root, which need not exist.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import (
    corpus as corpus_stage,
    embed,
    probe,
    queries,
)
from pipeline.embedder import Embedder, Facts, Resolve
from pipeline.encoders import models
from pipeline.encoders.batches import Role, encode_rows
from pipeline.errors import SpecError
from pipeline.figures import (
    Embedded,
    Plan,
    advice,
    byte_figures,
    histogram,
    index_figures,
    memory_figures,
    row_figures,
    time_figures,
    token_figures,
    transform_kind,
)
from pipeline.sample import draw, positions, stored
from pipeline.sources import Part, Shard, SourceFile
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.transform import Moments, pca
from pipeline.vectors import Matrix

EMBED_SECONDS = 10.0
"""After the first 256 rows, embedding stops about here."""
FIRST_ROWS = probe.MIN_ROWS
QUERIES = 200
PROBED_ROWS = 256
"""Rows of the corpus' beginning on which the backend is chosen."""


def check(spec: JobSpec) -> tuple[list[SourceFile], models.ModelFolder]:
    """Everything that can be seen to be wrong without reading the corpus or starting a model."""
    files = corpus_stage.check(spec.corpus)
    queries.check_files(spec.evaluate)
    folder = models.resolve(spec.model.name, spec.model.revision)
    if folder.dim is not None:
        embed.check_dims(spec, folder.dim)
    return files, folder


def run(spec: JobSpec, price: float | None = None) -> Plan:
    """Sample, embed and reckon; `price` is money per hour of a machine like this one (None: no money).

    Raises what `check` raises, and DataError where no sampled row can be used.
    """
    if price is not None and not 0 <= price < float("inf"):
        raise SpecError(f"price: {price} per machine-hour; give a number that is not negative")
    files, folder = check(spec)
    with tempfile.TemporaryDirectory(prefix="matryoshka-plan-") as scratch:
        sample = draw(spec, files, Path(scratch))
        lines = {name: stored(getattr(sample, name), Path(scratch) / name) for name in ("documents", "filters")}
    done = _embedded(spec, folder, files, sample.texts)
    declared = tuple(spec.model.matryoshka_dims or folder.matryoshka_dims or ())
    kept, verdict = _probed(spec, done, declared)
    full_dim, limit = done.facts.full_dim, done.facts.max_tokens
    reasons = dict(Counter(sample.reasons) + Counter(done.reasons))
    found = row_figures(sample, reasons)
    usable = int(found[-1].value)
    found += token_figures(done.tokens, limit, usable) + time_figures(done, usable, price)
    kind = transform_kind(spec.transform.kind, verdict, usable)
    found += byte_figures(spec, usable, full_dim, lines["documents"], lines["filters"], kind)
    found += memory_figures(spec, usable, full_dim) + index_figures(spec, usable)
    plan = Plan(spec.name, tuple(found), histogram(done.tokens), verdict, tuple(kept), ())
    return replace(plan, advice=tuple(advice(spec, plan, full_dim)))


def _embedded(spec: JobSpec, folder: models.ModelFolder, files: Sequence[SourceFile], texts: Sequence[str]) -> Embedded:
    """Seeded texts through the model, resolved on the corpus' first rows as the job does it."""
    bare = spec.model_copy(update={"corpus": spec.corpus.model_copy(update={"keep": (), "filter": ()})})
    first = tuple(Part(file, 0, PROBED_ROWS, 0) for file in files[:PROBED_ROWS])
    with tempfile.TemporaryDirectory(prefix="matryoshka-plan-") as scratch:  # for a quantized model
        worker = Embedder(bare, folder, Root(Path(scratch)), {}, len(os.sched_getaffinity(0)))
        facts: Facts = worker(Resolve(Shard(0, 0, PROBED_ROWS, first)))
    embed.check_dims(spec, facts.full_dim)
    encoder = worker.encoder(facts)

    def encode(some: Sequence[str], role: Role) -> tuple[Matrix, dict[int, tuple[str, str]]]:
        by = worker.base if role == "query" else encoder  # as searches do
        out = encode_rows(by, some, role, facts.prompts[role], facts.batch_tokens)
        return np.delete(out.vectors, list(out.failed), axis=0), out.failed

    tokens = encoder.tokenize(texts, facts.prompts["document"]).counts
    mixed = [texts[at] for at in np.random.default_rng(spec.seed).permutation(len(texts))]
    done, rows, seconds = [], 0, 0.0
    reasons: Counter[str] = Counter()
    while rows < len(mixed) and (rows == 0 or (room := int(rows * (EMBED_SECONDS / seconds - 1))) > 0):
        part = mixed[rows : rows + (room if rows else FIRST_ROWS)]
        start = time.perf_counter()
        vectors, failed = encode(part, "document")
        seconds += time.perf_counter() - start
        rows += len(part)
        done.append(vectors)
        reasons.update(reason for reason, _ in failed.values())
    asked = _asked(spec, lambda some: encode(some, "query")[0])
    return Embedded(facts, worker.base.device, tokens, np.concatenate(done), asked, rows, seconds, dict(reasons))


def _asked(spec: JobSpec, encode: Callable[[Sequence[str]], Matrix]) -> Matrix | None:
    """Vectors of seeded queries of the evaluation, where there are any."""
    if spec.evaluate.queries is None:
        return None
    texts = queries.read_queries(spec.evaluate.queries)["text"].to_list()
    return encode([texts[at] for at in positions([len(texts)], QUERIES, spec.seed)[0]])


def _probed(spec: JobSpec, done: Embedded, declared: Sequence[int]) -> tuple[list[probe.Kept], probe.Verdict]:
    """The verdict on half of the vectors, with PCA from the other half."""
    vectors, full_dim = done.vectors, done.facts.full_dim
    wanted = sorted({dim for prefix in spec.prefixes for dim in prefix.dims})
    ladder = probe.ladder(full_dim, declared)
    kept: list[probe.Kept] = []
    if len(vectors) >= probe.MIN_ROWS:
        half, moments = vectors[::2], Moments(full_dim)
        moments.add(vectors[1::2])
        dims = sorted({*ladder, *(dim for dim in wanted if dim < full_dim)})
        kept = probe.compare(half, len(half), done.queries, pca(moments)[0], dims, spec.seed)
    return kept, probe.judge(kept, ladder, declared, wanted, len(vectors), full_dim)
