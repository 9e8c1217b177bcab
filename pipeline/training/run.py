"""The list of steps is the training: check, read and hold out, measure before, train, measure after, probe, publish.

What a killed run finished is found again in `<output>.work`; a finished output is left as it is.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from pipeline import lock
from pipeline.cores import has
from pipeline.errors import DataError, FloorError, PipelineError, SpecError, StaleError
from pipeline.storage import Root, not_writable, read_signed, signed, to_json
from pipeline.training import bases, data, distributed, engine, heads, measure, output, teacher
from pipeline.training.spec import TrainSpec
from pipeline.workers import Progress

log = logging.getLogger(__name__)

FORMAT = 1
BEGUN, BEFORE = "training.json", "before.json"
NEEDED = ("accelerate", "datasets")
NEEDED_BY_RAY = ("pandas",)
OnProgress = Callable[[str, int | None, Progress], None]


def check(spec: TrainSpec) -> Any:
    """Everything that can be seen to be wrong without reading rows or starting a model; the base's files."""
    import torch

    missing = [name for name in (*NEEDED, *(NEEDED_BY_RAY if spec.workers.spread else ())) if not has(name)]
    if missing:
        raise SpecError(
            f"training needs {' and '.join(missing)}, which come with the extra [train]; "
            "pip install 'matryoshka-pipeline[train]'"
        )
    if spec.workers.spread and (spec.objective.kind == "distill" or spec.objective.gate):
        raise SpecError("workers: distillation and gates are trained in one process only; leave workers out")
    folder = bases.resolve(spec.base)
    if spec.objective.cached and bases.kind(spec.base, folder) == "static":
        raise SpecError("objective.cached: a static model needs no parts, its batches take little memory; leave it out")
    if spec.precision != "float32" and bases.kind(spec.base, folder) == "static":
        raise SpecError("precision: a static model only adds vectors up, in float32; leave it out")
    if spec.precision == "float16" and not spec.workers.spread and not torch.cuda.is_available():
        raise SpecError(engine.NO_FLOAT16)
    if (full_dim := spec.project or folder.dim) is not None:
        check_dims(spec, full_dim)
    if spec.objective.teacher is not None:
        teacher.resolve(spec.objective.teacher)
    data.check(spec.data, spec.held_out)
    return folder


def check_dims(spec: TrainSpec, full_dim: int) -> None:
    """SpecError where the dims do not fit a model of that dimension."""
    whose = spec.base.model if spec.project is None else "project"
    if spec.dims and max(spec.dims) != full_dim:
        raise SpecError(
            f"dims: {whose} has {full_dim} dimensions, and {max(spec.dims)} is the largest here; "
            "make them equal (project sets another width)"
        )
    for field, asked in (("measure.dims", spec.measure.dims), ("stop.dim", [spec.stop.dim] if spec.stop else [])):
        if max(asked, default=0) > full_dim:
            raise SpecError(f"{field}: {whose} has {full_dim} dimensions, {max(asked)} was asked for")


def run(spec: TrainSpec, on_progress: OnProgress | None = None) -> tuple[dict[str, Any], bool]:
    """Train, or go on, or do nothing where it is done: the record of the output, and whether it is new.

    Raises SpecError, DataError, StaleError for an output of another training, LockedError, FloorError where the probe
    says that prefixes were not trained.
    """
    target = Path(spec.output).expanduser().absolute()
    finished = output.read(target)
    if target.is_symlink() or os.path.ismount(target):
        raise SpecError(f"output: {target} is a link or a mount point, which no folder can replace; name one in it")
    if finished is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StaleError(f"output: {target} exists and is no training of this project; choose another folder")
    folder = check(spec)
    work = Root(target.with_name(target.name + ".work"))
    if finished is not None:
        _refuse_changes(target, finished["fingerprint"], _asked(spec, folder))
    try:
        work.disk.make_folder(work.path)
    except OSError as error:
        raise not_writable(work, error) from None
    with lock.lock(work) as held:
        return _Run(spec, folder, held, target, on_progress).go()


def _asked(spec: TrainSpec, folder: Any) -> dict[str, Any]:
    """The fingerprint but for the data's: what must be equal for a training to go on."""
    settings = spec.model_dump(mode="json", exclude={"name", "output", "workers"})
    taught = spec.objective.teacher
    digests = {} if taught is None else {"teacher_digest": teacher.resolve(taught).digest}
    return {"format": FORMAT, "base_digest": folder.digest, **digests, **settings}


class _Run:
    """One training in its work folder."""

    def __init__(self, spec: TrainSpec, folder: Any, work: Root, target: Path, on_progress: OnProgress | None) -> None:
        self.spec, self.folder, self.work, self.target = spec, folder, work, target
        self.on_progress = on_progress
        self.kind = bases.kind(spec.base, folder)
        self.seconds: dict[str, float] = {}
        self.place = Path(str(work.path))
        self.checkpoints = self.place / "checkpoints"

    def go(self) -> tuple[dict[str, Any], bool]:
        """All steps, those that are done left out."""
        spec = self.spec
        start = time.perf_counter()
        prepared = data.prepare(spec)
        watched, measured = measure.split(prepared.held_out, self.kind, spec.seed)
        measured = measured.among(spec.measure.documents, spec.seed)
        counts = {"measured_queries": len(measured.queries), "measured_documents": len(measured.documents)}
        fingerprint = {**_asked(spec, self.folder), "content": {**prepared.fingerprint, **counts}}
        finished = output.read(self.target)
        if finished is not None:
            _refuse_changes(self.target, finished["fingerprint"], fingerprint)
            self._tidy()
            return finished, False
        self._begin(fingerprint)
        self.seconds["data"] = round(time.perf_counter() - start, 3)
        texts = [*prepared.pairs["anchor"], *prepared.pairs["positive"]]
        model = bases.build(spec.base, self.folder, texts)
        if not _is_finite(model):
            raise DataError(f"base.model: {self.folder.name} holds weights that are no numbers; choose another")
        heads.add(model, spec, texts, self.kind, engine.rate(spec, self.kind))
        full_dim = bases.width(model)
        check_dims(spec, full_dim)
        stop = [spec.stop.dim] if spec.stop else []
        dims = sorted({full_dim, *spec.dims, *spec.measure.dims, *stop}, reverse=True)
        before, _ = self._measured("before", model, measured, dims)
        history = self._train(model, self._taught(prepared.pairs), watched, dims)
        after, vectors = self._measured("after", model, measured, dims)
        probed = measure.verdict(*vectors, spec.dims, spec.seed).figures()
        record = {
            "format": FORMAT,
            "name": spec.name,
            "kind": self.kind,
            "full_dim": full_dim,
            "dims": list(spec.dims),
            "base": {"name": self.folder.name, "revision": self.folder.revision, "digest": self.folder.digest},
            "spec": spec.model_dump(mode="json"),
            "fingerprint": fingerprint,
            "steps": max((int(entry["step"]) for entry in history), default=0),
            "probe": probed,
            "seconds": self.seconds,
        }
        draft = self.place / "model"
        output.write(
            model,
            spec,
            self.folder,
            pl.concat([before.select(after.columns), after]),
            engine.curve(history),
            record,
            draft,
        )
        self._judge(probed, draft)
        from pipeline.training import page  # late: altair and vl-convert take a while to load

        page.write(draft, self.target)
        output.publish(draft, self.target)
        self._tidy()
        log.info("train done output=%s seconds=%.1f", self.target, time.perf_counter() - start)
        found = output.read(self.target)
        assert found is not None
        return found, True

    def _tidy(self) -> None:
        for path in (self.checkpoints, self.place / teacher.FOLDER):
            shutil.rmtree(path, ignore_errors=True)

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        """Begin the work folder, or go on with it; StaleError where it was begun otherwise."""
        wanted = json.loads(to_json(fingerprint))
        standing = read_signed(self.work, BEGUN)
        if standing is None:
            self.work.create(BEGUN, to_json(signed({"fingerprint": wanted})))
        elif standing["fingerprint"] != wanted and engine.newest(self.checkpoints) is None:
            self._tidy()  # nothing was trained yet
            (self.place / BEFORE).unlink(missing_ok=True)
            self.work.write(BEGUN, to_json(signed({"fingerprint": wanted})))
        else:
            _refuse_changes(self.work.path, standing["fingerprint"], wanted)

    def _measured(
        self, when: str, model: Any, measured: data.Judged, dims: list[int]
    ) -> tuple[pl.DataFrame, tuple[Any, Any]]:
        """The evaluation's rows, and the vectors of queries and documents (none where it was kept)."""
        spec, name = self.spec, f"{when}.json"
        kept = read_signed(self.work, name) if when == "before" else None
        if kept is not None:
            return pl.DataFrame(kept["rows"]), (None, None)
        start = time.perf_counter()
        vectors = measure.encode(model, measured, self.kind)
        ways = {when: vectors}
        if when == "before":
            ways["pca"] = measure.turned(*vectors)
        k = spec.measure.k
        table = pl.concat(
            measure.table(way, measure.per_query(*one, measured, dims, k), k, spec.seed) for way, one in ways.items()
        )
        self.seconds[when] = round(time.perf_counter() - start, 3)
        for row in table.iter_rows(named=True):
            log.info("measured when=%s dim=%d ndcg=%.4f kept=%.4f", row["when"], row["dim"], row["ndcg"], row["kept"])
        if when == "before":
            self.work.write(name, to_json(signed({"rows": table.to_dicts()})))
        return table, vectors

    def _taught(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The pairs with what a teacher says of them, where there is one."""
        taught = self.spec.objective.teacher
        if taught is None:
            return pairs
        start = time.perf_counter()
        pairs = teacher.labelled(taught, teacher.resolve(taught), pairs, self.place)
        self.seconds["teacher"] = round(time.perf_counter() - start, 3)
        return pairs

    def _train(self, model: Any, pairs: pl.DataFrame, watched: data.Judged, dims: list[int]) -> list[dict[str, Any]]:
        watch = measure.Watch(watched, self.kind, dims, self.spec.measure.k)
        start = time.perf_counter()
        engine.mend(self.checkpoints)
        train = distributed.run if self.spec.workers.spread else engine.run
        history = train(model, self.spec, self.kind, pairs, self.checkpoints, watch, self._tell)
        heads.bake(model)
        self.seconds["train"] = round(time.perf_counter() - start, 3)
        if not _is_finite(model):
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # so that another rate may begin anew
            raise PipelineError("training came to weights that are no numbers; lower learning_rate, or set precision")
        return history

    def _tell(self, rows: int, of: int) -> None:
        """Progress since this process began."""
        if self.on_progress is not None:
            self.on_progress("train", of, Progress(rows))

    def _judge(self, verdict: Mapping[str, Any], draft: Path) -> None:
        """FloorError where the prefixes that were asked for are not there; the model stays in the work folder."""
        log.info("probe says=%s because=%s", str(verdict["says"]).replace(" ", "_"), verdict["because"])
        if not self.spec.dims:
            return
        if verdict["says"] == "not trained":
            raise FloorError(
                f"the trained model's prefixes do not hold: {verdict['because']}; train longer, give more pairs or "
                f"weigh short dims more, with another output (the model is in {draft})"
            )
        if verdict["says"] == "unsure":
            log.warning("probe is unsure whether prefixes hold: %s", verdict["because"])


def _is_finite(model: Any) -> bool:
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def _refuse_changes(place: Any, standing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """StaleError with the first field that differs; fields not wanted are not compared."""
    before, now = (output.flat(one) for one in (standing, json.loads(to_json(dict(wanted)))))
    known = {field.split(".")[0] for field in now}
    fields = [field for field in {**now, **before} if field.split(".")[0] in known]
    changed = [field for field in fields if before.get(field) != now.get(field)]
    changed.sort(key=lambda field: field.endswith("digest"))  # says the least
    if changed:
        others = f" (also {', '.join(changed[1:4])})" if changed[1:] else ""
        raise StaleError(
            f"{place} was begun with another {changed[0]}: {before.get(changed[0])!r} then, {now.get(changed[0])!r} "
            f"now{others}; set it back, or choose another output"
        )
