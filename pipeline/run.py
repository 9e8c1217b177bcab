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

from pipeline import corpus, derive, embed, evaluate, fit, index, ledger, plan, queries, report, store
from pipeline.embedder import COUNTERS
from pipeline.encoders import models
from pipeline.encoders.queries import QueryEncoder
from pipeline.errors import DataError, SpecError
from pipeline.search import Index
from pipeline.spec import JobSpec
from pipeline.tables import DOCUMENTS, FORMAT, PARAMETERS, Fits, Parent, TableInfo
from pipeline.workers import Pool, Progress, peak_memory_bytes

log = logging.getLogger(__name__)

Stage = Literal["corpus", "embed", "fit", "derive", "index", "evaluate", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
MEASURED = ("evaluation.parquet", "rankings.parquet", "examples.parquet")
OnStage = Callable[[str, int | None, Progress], None]
"""Told the stage, its rows in all (None: not known yet) and what is finished of them."""


def ignore(stage: str, rows: int | None, progress: Progress) -> None:
    """Tell nobody."""


def check(spec: JobSpec) -> models.ModelFolder:
    """Everything that can be seen to be wrong without reading the corpus or starting a model."""
    _, folder = plan.check(spec)
    return folder


def run(spec: JobSpec, first: Stage = "corpus", last: Stage = "report", on_stage: OnStage = ignore) -> dict[str, Any]:
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
        self.seconds: dict[str, float] = {}

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
        self.seconds[name] = round(time.perf_counter() - start, 3)
        log.info("%s done seconds=%.1f", name, self.seconds[name])

    def go(self, first: Stage, last: Stage) -> dict[str, Any]:
        self.first = first
        spec, root = self.spec, self.root
        with self.stage("corpus", None) as tell:
            scan = corpus.run(spec.corpus, root, self.pool, tell)
            names = queries.judged_ids(spec.evaluate)
            queries.check_judged(
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
            declared = spec.model.matryoshka_dims or self.folder.matryoshka_dims
            fits = fit.run(spec, parent, declared, root, lambda: self._probe_queries(full.info))
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
        generation = self._evaluated(candidate)
        if last == "report":
            self._report(generation)
        return generation

    def _report(self, generation: Mapping[str, Any]) -> None:
        """Make the page, unless it shows this generation already."""
        shown = ledger.Ledger(self.root, "report")
        name = str(generation["generation"])
        if self.first != "report" and shown.get(name) is not None and (self.root / report.FILE).is_file():
            return
        with self.stage("report", None):
            report.run(self.root)
            shown.add(name, {})

    def _probe_queries(self, info: TableInfo) -> Any:
        """Vectors of the evaluation's queries, where there are any."""
        path = self.spec.evaluate.queries
        if path is None:
            return None
        texts = queries.read_queries(path)["text"].to_list()
        return queries.embedded(f"evaluate.queries: {path}", texts, info, self.root, QueryEncoder(info))

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
        fits: Fits,
        derived: list[derive.Derived],
        indexed: Mapping[str, index.Indexed],
    ) -> dict[str, Any]:
        """The generation as it would be published, without its number and evaluation."""
        tables: dict[str, dict[str, Any]] = {
            DOCUMENTS: {"version": indexed[DOCUMENTS].version, "rows": full.rows, "digest": full.digest, "index": None},
            PARAMETERS: {"version": fits.parameters_version, "rows": len(fits.artefacts),
                         "digest": hashlib.sha256("\n".join(fits.artefacts).encode()).hexdigest(), "index": None},
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
            "transform": dict(fits.decision),
            "tables": tables,
            "files": {"quarantine.parquet": store.sha256(self.root / "quarantine.parquet"), **full.counters["parquet"]},
        }  # fmt: skip

    def _evaluated(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Evaluate and publish, unless the newest generation is just that already."""
        newest = ledger.newest_generation(self.root)
        key = self._evaluation_key(candidate)
        current = newest is not None and newest["evaluation_key"] == key and self._is_whole(newest)
        with self.stage("evaluate", None):
            if not current or self.first == "evaluate":
                opened = Index(self.root, candidate)
                self._keep(evaluate.run(self.spec.evaluate, opened, self.spec.seed, self.root), newest)
            else:
                measured = pl.read_parquet(self.root / "evaluation.parquet", glob=False)
                evaluate.check_floor(self.spec.evaluate, measured)
        candidate["evaluation_key"] = key
        candidate["files"] |= {name: store.sha256(self.root / name) for name in MEASURED}
        before = {} if newest is None else newest.get("seconds", {})
        candidate["seconds"] = {name: max(spent, before.get(name, 0.0)) for name, spent in self.seconds.items()}
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

    def _keep(self, measured: evaluate.Measured, newest: Mapping[str, Any] | None) -> None:
        """The measurement belongs to the newest generation: a miss replaces it only where there is none."""
        if newest is None:
            self._write(measured)
        evaluate.check_floor(self.spec.evaluate, measured.evaluation)
        self._write(measured)

    def _write(self, measured: evaluate.Measured) -> None:
        for name in MEASURED:
            buffer = io.BytesIO()
            getattr(measured, Path(name).stem).write_parquet(buffer)
            store.write(self.root / name, buffer.getvalue())

    def _is_whole(self, generation: Mapping[str, Any]) -> bool:
        """Whether the measurement of a generation is there as it was published."""
        paths = [self.root / name for name in MEASURED]
        return all(path.is_file() and store.sha256(path) == generation["files"].get(path.name) for path in paths)

    def _evaluation_key(self, candidate: Mapping[str, Any]) -> str:
        """Changes with everything the measurement depends on."""
        settings = self.spec.evaluate
        files = [store.sha256(Path(name)) for name in (settings.queries, settings.qrels) if name]
        tables = {name: (entry["version"], entry["digest"]) for name, entry in candidate["tables"].items()}
        search = self.spec.search.model_dump(mode="json")["cascade"]
        basis = [tables, search, settings.k, list(settings.shortlists), files, self.spec.seed, FORMAT]
        return hashlib.sha256(store.to_json(basis)).hexdigest()


def _same(newest: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether a generation says what the candidate would; who did the work, and how fast, does not count."""
    specs = [{**one["spec"], "workers": None} for one in (newest, candidate)]
    compared = set(candidate) - {"spec", "seconds"}
    return specs[0] == specs[1] and all(newest.get(name) == candidate[name] for name in compared)
