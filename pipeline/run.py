"""The list of stages is the program: corpus, embed, fit, derive, index, evaluate, then one generation is published.

A finished stage is skipped; a rerun with nothing to do does nothing and says so.
"""

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from pipeline import corpus, derive, embed, evaluate, fit, index, ledger, store
from pipeline.embedder import COUNTERS
from pipeline.encoders import models
from pipeline.errors import DataError, SpecError
from pipeline.search import Index
from pipeline.spec import JobSpec
from pipeline.tables import DOCUMENTS, FORMAT, PARAMETERS, Parent
from pipeline.workers import Pool, Progress, peak_memory_bytes

log = logging.getLogger(__name__)

Stage = Literal["corpus", "embed", "fit", "derive", "index", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
OnStage = Callable[[str, int | None, Progress], None]
"""Told the stage, its rows in all (None: not known yet) and what is finished of them."""


def ignore(stage: str, rows: int | None, progress: Progress) -> None:
    """Tell nobody."""


def check(spec: JobSpec) -> models.ModelFolder:
    """Everything that can be seen to be wrong without reading the corpus or starting a model."""
    corpus.check(spec.corpus)
    evaluate.check_files(spec.evaluate)
    folder = models.resolve(spec.model.name, spec.model.revision)
    if folder.dim is not None:
        embed.check_dims(spec, folder.dim)
    return folder


def run(spec: JobSpec, first: Stage = "corpus", last: Stage = "evaluate", on_stage: OnStage = ignore) -> dict[str, Any]:
    """Run the job from stage `first` to stage `last`; the generation, or {} where the run stops before the end.

    Stages before `first` must be finished (StaleError). Raises PipelineError and its kinds.
    """
    if STAGES.index(first) > STAGES.index(last):
        raise SpecError(f"--from {first} comes after --until {last}; the order is {', '.join(STAGES)}")
    root = Path(spec.root)
    folder = check(spec)
    store.prepare_root(root)
    with store.lock(root), Pool(spec.workers) as pool:
        return _Run(spec, root, folder, pool, on_stage).go(first, last)


class _Run:
    """One run: the stages share the spec, the root and the workers, and pass finished datasets on."""

    def __init__(self, spec: JobSpec, root: Path, folder: models.ModelFolder, pool: Pool, on_stage: OnStage) -> None:
        self.spec, self.root, self.folder, self.pool, self.on_stage = spec, root, folder, pool, on_stage
        self.first: Stage = "corpus"

    @contextmanager
    def stage(self, name: Stage, rows: int | None) -> Iterator[Callable[[Progress], None]]:
        """Time a stage and report its progress; one before the first gets no workers."""
        asked_for = STAGES.index(name) >= STAGES.index(self.first)
        self.pool.closed = (
            "" if asked_for else f"{self.root}: stage {name} is not finished; run without --from {self.first}"
        )
        start = time.perf_counter()
        self.on_stage(name, rows, Progress())
        yield lambda progress: self.on_stage(name, rows, progress)
        log.info("%s done seconds=%.1f", name, time.perf_counter() - start)

    def go(self, first: Stage, last: Stage) -> dict[str, Any]:
        self.first = first
        spec, root = self.spec, self.root
        with self.stage("corpus", None) as tell:
            scan = corpus.run(spec.corpus, root, self.pool, tell)
            names = evaluate.judged_ids(spec.evaluate)
            evaluate.check_judged(
                spec.evaluate, names, corpus.known_ids(root, scan, spec.corpus, names) if names else []
            )
        log.info(
            "corpus rows=%d set_aside=%s repaired=%d digest=%s",
            scan.rows,
            scan.reasons,
            scan.repaired,
            scan.digest[:12],
        )
        if last == "corpus":
            return {}
        with self.stage("embed", scan.rows) as tell:
            shards = corpus.shards(scan, spec.corpus, root)
            full = embed.run(spec, self.folder, shards, self._corpus_fields(scan), scan.types, root, self.pool, tell)
        counters = full.counters
        log.info(
            "embed rows=%d tokens=%d cut_rows=%d cut_tokens=%d peak_worker_mb=%d peak_driver_mb=%d",
            full.rows,
            counters["tokens"],
            counters["cut_rows"],
            counters["cut_tokens"],
            counters["peak_memory_bytes"] / 1e6,
            peak_memory_bytes() / 1e6,
        )
        if counters["renormalised"]:
            log.warning(
                "embed %d vectors were not of length 1 and are now; dot-product scores are lost",
                counters["renormalised"],
            )
        if last == "embed":
            return {}
        parent = Parent(full.uri, full.version, full.digest, full.rows, full.info)
        with self.stage("fit", None):
            fits = fit.run(spec, parent, spec.model.matryoshka_dims or self.folder.matryoshka_dims, root)
        if last == "fit":
            return {}
        filters = {name: scan.types[name] for name in spec.corpus.filter}
        with self.stage("derive", full.rows) as tell:
            derived = derive.run(spec.prefixes, parent, fits, filters, root, self.pool, tell)
        if last == "derive":
            return {}
        with self.stage("index", None):
            indexed = index.run(spec.index, spec.prefixes, full.rows, root)
        if last == "index":
            return {}
        candidate = self._candidate(scan, full, fits, derived, indexed)
        return self._evaluated(candidate)

    def _corpus_fields(self, scan: corpus.Scan) -> dict[str, Any]:
        """The corpus' part of the fingerprint."""
        settings = self.spec.corpus
        return {
            "corpus.rows": scan.rows,
            "corpus.digest": scan.digest,
            "corpus.id": settings.id,
            "corpus.text": list(settings.text),
            "corpus.keep": list(settings.keep),
            "corpus.filter": list(settings.filter),
            "corpus.keep_text": settings.keep_text,
            "corpus.shard_rows": corpus.shard_rows(scan.rows, settings),
        }

    def _candidate(
        self,
        scan: corpus.Scan,
        full: embed.Full,
        fits: Any,
        derived: list[derive.Derived],
        indexed: Mapping[str, index.Indexed],
    ) -> dict[str, Any]:
        """The generation as it would be published, without its number and evaluation."""
        tables = {
            DOCUMENTS: {"version": indexed[DOCUMENTS].version, "rows": full.rows, "digest": full.digest, "index": None},
            PARAMETERS: {"version": fits.parameters_version, "rows": int(fits.transform_digest is not None),
                         "digest": hashlib.sha256(str(fits.transform_digest).encode()).hexdigest(), "index": None},
        }  # fmt: skip
        for table in derived:
            at = indexed[table.name]
            tables[table.name] = {
                "version": at.version, "rows": table.rows, "digest": table.digest, "index": at.index,
                "clipped_share": table.clipped_share,
            }  # fmt: skip
        for name, entry in tables.items():
            entry["bytes"] = store.data_bytes(store.open_table(store.table_uri(self.root, name), entry["version"]))
            if entry["rows"] != full.rows and name != PARAMETERS:
                raise DataError(f"{name} has {entry['rows']} rows where documents has {full.rows}; delete the root")
        facts = full.facts
        counters = {name: full.counters[name] for name in (*COUNTERS, "seconds", "peak_memory_bytes")}
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "corpus": {
                "rows": scan.rows,
                "quarantined": sum(full.counters["quarantined"].values()),
                "reasons": full.counters["quarantined"],
                "repaired": full.counters["repaired"],
                "digest": scan.digest,
            },
            "model": {
                "name": facts.name, "revision": facts.revision, "digest": facts.digest, "full_dim": facts.full_dim,
                "backend": facts.backend, "precision": facts.precision, "max_tokens": facts.max_tokens,
                "batch_tokens": facts.batch_tokens, "prompts": dict(facts.prompts), "probe": dict(facts.probe),
            },
            "embed": counters,
            "transform": {"kind": fits.transform.kind, "explained": list(fits.explained)},
            "tables": tables,
            "files": {"quarantine.parquet": store.sha256(self.root / "quarantine.parquet"), **full.counters["parquet"]},
        }  # fmt: skip

    def _evaluated(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Evaluate and publish, unless the newest generation is just that already."""
        path = self.root / "evaluation.parquet"
        newest = ledger.newest_generation(self.root)
        key = self._evaluation_key(candidate)
        current = newest is not None and newest["evaluation_key"] == key and _is_whole(path, newest)
        with self.stage("evaluate", None):
            if not current or self.first == "evaluate":
                measured = evaluate.run(self.spec.evaluate, Index(self.root, candidate), self.spec.seed)
                buffer = io.BytesIO()
                measured.write_parquet(buffer)
                self._keep_measured(buffer.getvalue(), measured, newest)
            else:
                evaluate.check_floor(self.spec.evaluate, pl.read_parquet(path, glob=False))
        candidate["evaluation_key"] = key
        candidate["files"]["evaluation.parquet"] = store.sha256(path)
        if newest is not None and _same(newest, candidate):
            log.info("run nothing to do generation=%d", newest["generation"])
            ledger.copy_to_manifest(self.root, newest)
            return newest
        published = ledger.publish(self.root, candidate)
        log.info(
            "run published generation=%d root=%s peak_driver_mb=%d",
            published["generation"],
            self.root,
            peak_memory_bytes() / 1e6,
        )
        return published

    def _keep_measured(self, data: bytes, measured: pl.DataFrame, newest: Mapping[str, Any] | None) -> None:
        """evaluation.parquet belongs to the newest generation: a miss replaces it only where there is none."""
        path = self.root / "evaluation.parquet"
        if newest is None:
            store.write(path, data)
        evaluate.check_floor(self.spec.evaluate, measured)
        store.write(path, data)

    def _evaluation_key(self, candidate: Mapping[str, Any]) -> str:
        """Changes with everything the measurement depends on."""
        settings = self.spec.evaluate
        files = [store.sha256(Path(name)) for name in (settings.queries, settings.qrels) if name]
        tables = {name: (entry["version"], entry["digest"]) for name, entry in candidate["tables"].items()}
        search = self.spec.search.model_dump(mode="json")["cascade"]
        basis = [tables, search, settings.k, files, self.spec.seed, FORMAT]
        return hashlib.sha256(store.to_json(basis)).hexdigest()


def _is_whole(path: Path, generation: Mapping[str, Any]) -> bool:
    """Whether a file of a generation is there as it was published."""
    return path.is_file() and store.sha256(path) == generation["files"][path.name]


def _same(newest: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether a generation says what the candidate would; who did the work does not count."""
    specs = [{**one["spec"], "workers": None} for one in (newest, candidate)]
    return specs[0] == specs[1] and all(newest.get(name) == candidate[name] for name in candidate if name != "spec")
