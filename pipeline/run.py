"""The list of stages is the program: corpus, embed, fit, derive, index, evaluate, then one generation is published.

A finished stage is skipped; a rerun with nothing to do does nothing and says so.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from pipeline import (
    bucket,
    cache,
    corpus,
    derive,
    drift,
    embed,
    evaluate,
    export,
    fit,
    index,
    ledger,
    lock,
    merge,
    plan,
    predictor,
    queries,
    repair,
    storage,
    store,
)
from pipeline.embedder import COUNTERS, METERS
from pipeline.encoders import meters, models
from pipeline.encoders.queries import QueryEncoder
from pipeline.errors import DamageError, PipelineError, SpecError
from pipeline.search import Index
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, FORMAT, PARAMETERS, Fits, Parent, TableInfo
from pipeline.vectors import bytes_per_row
from pipeline.workers import Pool, Progress, peak_memory_bytes

log = logging.getLogger(__name__)

Stage = Literal["corpus", "embed", "fit", "derive", "index", "evaluate", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
QUARANTINE = "quarantine.parquet"
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
    root = bucket.located(spec.root)
    folder = check(spec)
    with bucket.reaching(root):
        bucket.prepare(root)
        with lock.lock(root) as held, Pool(spec.workers, spec.name, held) as pool:
            return _Run(spec, held, folder, pool, on_stage).go(first, last)


class _Run:
    """One run: the stages share the spec, the root and the workers, and pass finished datasets on."""

    def __init__(self, spec: JobSpec, root: Root, folder: models.ModelFolder, pool: Pool, on_stage: OnStage) -> None:
        self.spec, self.root, self.folder, self.pool, self.on_stage = spec, root, folder, pool, on_stage
        self.first: Stage = "corpus"
        self.seconds: dict[str, float] = {}
        self.data_files: dict[str, Mapping[str, str]] = {}

    @contextmanager
    def stage(self, name: Stage, rows: int | None) -> Iterator[Callable[[Progress], None]]:
        """Time a stage and report its progress; one before the first gets no workers."""
        asked_for = STAGES.index(name) >= STAGES.index(self.first)
        self.pool.closed = (
            "" if asked_for else f"{self.root.path}: stage {name} is not finished; run without --from {self.first}"
        )
        self.pool.stage = name
        start = time.perf_counter()
        self.on_stage(name, rows, Progress())
        yield lambda progress: self.on_stage(name, rows, progress)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        log.info("%s done seconds=%.1f", name, self.seconds[name])

    def go(self, first: Stage, last: Stage) -> dict[str, Any]:
        self.first = first
        spec, root = self.spec, self.root
        afresh = repair.run(root)
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
        self._refuse_other_corpus(scan)
        self._refuse_small_disk(scan)
        with self.stage("embed", scan.rows) as tell:
            shards = corpus.shards(scan, spec.corpus, root)
            full = embed.run(
                spec,
                self.folder,
                shards,
                self._corpus_fields(scan),
                scan.types,
                root,
                self.pool,
                tell,
                DOCUMENTS in afresh,
                lambda: drift.check(root, scan.key, scan.files),
            )
            parent = Parent(
                store.table_uri(root, DOCUMENTS), full.version, full.digest, full.rows, full.info, full.files
            )
            exported = export.run(parent, root, self.pool) if spec.embed.parquet else {}
        counters = full.counters
        log.info("embed rows=%d %s peak_driver_mb=%d", full.rows, _told(full), peak_memory_bytes() / 1e6)
        if counters["renormalised"]:
            log.warning(
                "embed %d vectors were not of length 1 and are now; dot-product scores are lost",
                counters["renormalised"],
            )
        if last == "embed":
            return {}
        with self.stage("fit", None):
            declared = spec.model.matryoshka_dims or self.folder.matryoshka_dims
            fits = fit.run(spec, parent, declared, root, lambda: self._probe_queries(full.info), PARAMETERS in afresh)
        if last == "fit":
            return {}
        filters = {name: scan.types[name] for name in spec.corpus.filter}
        with self.stage("derive", full.rows) as tell:
            derived = derive.run(spec.prefixes, parent, fits, filters, root, self.pool, tell, afresh)
        if last == "derive":
            return {}
        with self.stage("index", None):
            indexed = bucket.insisting(root, lambda: index.run(spec.index, spec.prefixes, full.rows, root, self.pool))
        if last == "index":
            return {}
        store.drop_leftovers(root)
        generation = self._evaluated(self._candidate(scan, full, fits, derived, indexed, exported))
        if last == "report":
            self._report(generation)
        return generation

    def _report(self, generation: Mapping[str, Any]) -> None:
        """Make the page, unless it shows this generation already."""
        from pipeline import report  # what it draws with takes half a second, which workers need not spend

        shown = ledger.Ledger(self.root, "report")
        name = str(generation["generation"])
        if self.first != "report" and shown.get(name) is not None and self.root.size(report.FILE):
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
            "scan": scan.key,
            "corpus.rows": scan.rows,
            "corpus.digest": scan.digest,
            "corpus.id": settings.id,
            "corpus.text": list(settings.text),
            "corpus.keep": list(settings.keep),
            "corpus.filter": list(settings.filter),
            "corpus.keep_text": settings.keep_text,
            "corpus.shard_rows": corpus.shard_rows(scan.rows, settings),
        }

    def _refuse_other_corpus(self, scan: corpus.Scan) -> None:
        """StaleError with what changed, where the root was begun with another corpus."""
        begun = ledger.begun(self.root)
        if begun is not None and begun["corpus.digest"] != scan.digest:
            wanted = {"corpus.rows": scan.rows, "corpus.digest": scan.digest}
            ledger.refuse_changes(self.root, begun, wanted, drift.changes(self.root, begun, scan.key))

    def _refuse_small_disk(self, scan: corpus.Scan) -> None:
        """PipelineError where not even the numbers of the vectors fit, which no codec makes smaller."""
        spec, newest, begun = self.spec, ledger.newest_generation(self.root), ledger.begun(self.root)
        known = set() if newest is None else set(newest["tables"])
        full_dim = begun["facts"]["full_dim"] if begun else self.folder.dim or max(one.dim for one in spec.prefixes)
        each = sum(one.bytes_per_row for one in spec.prefixes if one.table not in known)
        rows = scan.rows - sum(scan.reasons.values())
        shard_rows = corpus.shard_rows(scan.rows, spec.corpus)
        done = len(embed.finished(self.root)) * shard_rows
        twice = merge.room(self.root, scan.rows, shard_rows)
        width = bytes_per_row(full_dim, spec.embed.vectors)
        needed = rows * each + (max(0, rows - done) + twice) * width
        if spec.search.cache and (newest is None or not newest.get("cache")):
            needed += rows * (sum(one.bytes_per_row for one in spec.prefixes) + width)
        free = self.root.disk.free(self.root.path)
        if needed > free:
            merging = f", {twice * width / 1e9:.3f} GB of it while fragments are merged" if twice else ""
            raise PipelineError(
                f"{self.root.path} has {free / 1e9:.3f} GB left, the job needs at least {needed / 1e9:.3f} GB for the "
                f"vectors of {rows:,} rows alone{merging}; make room, or choose another root"
            )

    def _candidate(
        self,
        scan: corpus.Scan,
        full: embed.Full,
        fits: Fits,
        derived: list[derive.Derived],
        indexed: Mapping[str, index.Indexed],
        exported: Mapping[str, str],
    ) -> dict[str, Any]:
        """The generation as it would be published, without its number, evaluation and table files."""
        tables: dict[str, dict[str, Any]] = {
            DOCUMENTS: {"rows": full.rows, "digest": full.digest, "parts": full.parts},
            PARAMETERS: {
                "rows": len(fits.artefacts), "parts": [(fits.record["rows"], fits.record["digest"])],
                "digest": hashlib.sha256("\n".join(fits.artefacts).encode()).hexdigest(),
            },
        }  # fmt: skip
        fragments = {DOCUMENTS: full.fragments, PARAMETERS: fits.record["fragments"]}
        committed = {DOCUMENTS: full.version, PARAMETERS: fits.parameters_version}
        for table in derived:
            tables[table.name] = {
                "rows": table.rows, "digest": table.digest, "parts": table.parts, "clipped_share": table.clipped_share,
            }  # fmt: skip
            fragments[table.name], committed[table.name] = table.fragments, table.version
        for name, entry in tables.items():
            at = indexed.get(name, index.Indexed(fits.parameters_version, None))
            entry |= {"version": at.version, "index": at.index}
            if at.version != committed[name] and not store.holds(self.root, name, at.version, fragments[name]):
                raise DamageError(f"{name}: another job changed it meanwhile; run again")
            if entry["rows"] != full.rows and name != PARAMETERS:
                raise DamageError(f"{name} has {entry['rows']} rows where documents has {full.rows}; delete the root")
            entry["bytes"] = sum(file["file_size_bytes"] for one in fragments[name] for file in one["files"])
        cached = {name: (entry["version"], entry["digest"]) for name, entry in tables.items() if name != PARAMETERS}
        self.data_files = {DOCUMENTS: full.files, PARAMETERS: fits.record["files"]}
        self.data_files |= {table.name: table.files for table in derived}
        facts = full.facts
        counters = {name: full.counters[name] for name in (*COUNTERS, *METERS, *merge.COUNTERS, "peak_memory_bytes")}
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
                "backend": facts.backend, "precision": facts.precision, "attention": facts.attention,
                "compiled": facts.compiled, "tokenizer": facts.tokenizer, "max_tokens": facts.max_tokens,
                "batch_tokens": facts.batch_tokens,
                "prompts": dict(facts.prompts), "probe": dict(facts.probe), "flops": list(facts.flops),
                "peak_flops": facts.peak_flops,
            },
            "embed": counters,
            "transform": dict(fits.decision),
            "tables": tables,
            "cache": cache.run(cached, self.root) if self.spec.search.cache else {},
            "files": {QUARANTINE: full.quarantine, **exported},
        }  # fmt: skip

    def _evaluated(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Evaluate and publish, unless the newest generation is just that already."""
        newest = ledger.newest_generation(self.root)
        key = self._evaluation_key(candidate)
        current = newest is not None and newest["evaluation_key"] == key and self._has_measured(newest)
        with self.stage("evaluate", None):
            if newest is None or not current or self.first == "evaluate":
                opened = Index(self.root, candidate)
                measured = evaluate.run(self.spec.evaluate, opened, self.spec.seed, self.root)
                candidate["files"] |= self._keep(measured, newest)
                candidate["stopping"] = {name: asdict(learned) for name, learned in measured.stopping.items()}
                candidate["predictor"] = predictor.described(measured.predictors)
            else:
                candidate["files"] |= {name: newest["files"][name] for name in _measured(newest)}
                candidate["stopping"] = newest.get("stopping", {})
                candidate["predictor"] = newest.get("predictor", {})
                kept = self.root.kept(newest["files"]["evaluation.parquet"])
                evaluate.check_floor(self.spec.evaluate, pl.read_parquet(kept))
        candidate["copies"] = [QUARANTINE, *_measured(candidate)]
        candidate["evaluation_key"] = key
        candidate["files"] |= repair.table_files(self.root, self.data_files, newest)
        before = {} if newest is None else newest.get("seconds", {})
        candidate["seconds"] = {name: max(spent, before.get(name, 0.0)) for name, spent in self.seconds.items()}
        lock.check(self.root)
        if newest is None or not _same(newest, candidate) or lock.took_from_elsewhere(self.root):
            newest = ledger.publish(self.root, candidate)
            log.info(
                "run published generation=%d root=%s peak_driver_mb=%d",
                newest["generation"],
                self.root.path,
                peak_memory_bytes() / 1e6,
            )
        else:
            log.info("run nothing to do generation=%d", newest["generation"])
        ledger.settle(self.root)
        repair.remember(self.root)
        return newest

    def _keep(self, measured: evaluate.Measured, newest: Mapping[str, Any] | None) -> dict[str, str]:
        """Keep a measurement; one that misses the floor is shown where there is no generation yet."""
        data = {}
        for name in MEASURED:
            buffer = io.BytesIO()
            getattr(measured, Path(name).stem).write_parquet(buffer)
            data[name] = buffer.getvalue()
        if measured.predictors:
            data[predictor.FILE] = predictor.to_bytes(measured.predictors)
        if newest is None:
            for name, content in data.items():
                self.root.write(name, content)
        evaluate.check_floor(self.spec.evaluate, measured.evaluation)
        return {name: self.root.keep(content) for name, content in data.items()}

    def _has_measured(self, generation: Mapping[str, Any]) -> bool:
        """Whether the measurement of a generation is there as it was published."""
        return all(self.root.has(generation["files"][name]) for name in _measured(generation))

    def _evaluation_key(self, candidate: Mapping[str, Any]) -> str:
        """Changes with everything the measurement depends on."""
        settings = self.spec.evaluate
        files = [storage.sha256(Path(name)) for name in (settings.queries, settings.qrels) if name]
        tables = {name: (entry["version"], entry["digest"]) for name, entry in candidate["tables"].items()}
        chosen = self.spec.search.model_dump(mode="json")
        search = [chosen[name] for name in ("cascade", "stop", "confidence")]
        basis = [tables, search, settings.k, list(settings.shortlists), files, self.spec.seed, FORMAT]
        return hashlib.sha256(storage.to_json(basis)).hexdigest()


def _told(full: embed.Full) -> str:
    """The embed stage in one line of the log."""
    counted = full.counters
    speed = meters.speed(counted, full.facts.flops, full.facts.peak_flops)
    used = "" if speed.utilisation is None else f" mfu={speed.utilisation:.2f}"
    spent = " ".join(f"{name}={counted[name]:.1f}" for name in METERS)
    return (
        f"tokens={counted['tokens']} tokens_per_second={speed.tokens_per_second:.0f}{used} padding={speed.padding:.4f} "
        f"waiting={speed.waiting:.4f} repeats={counted['repeats']} cut_rows={counted['cut_rows']} "
        f"cut_tokens={counted['cut_tokens']} {spent} merge_seconds={counted['merge_seconds']:.1f} "
        f"merged_mb={counted['merged_bytes'] / 1e6:.0f} peak_worker_mb={counted['peak_memory_bytes'] / 1e6:.0f}"
    )


def _measured(generation: Mapping[str, Any]) -> list[str]:
    """The files that an evaluation made."""
    return [*MEASURED, *([predictor.FILE] if generation.get("predictor") else [])]


def _same(newest: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether a generation says what the candidate would; who did the work, and how fast, does not count."""
    specs = [{**one["spec"], "workers": None} for one in (newest, candidate)]
    compared = json.loads(storage.to_json({name: candidate[name] for name in set(candidate) - {"spec", "seconds"}}))
    return specs[0] == specs[1] and all(newest.get(name) == value for name, value in compared.items())
