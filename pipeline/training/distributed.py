"""The same trainer in several workers, by Ray Train; what they do together is what one would do.

Files of a folder that all nodes see go in (the model, the pairs) and come back (what was trained, told by rank 0).
"""

import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import PipelineError, SpecError
from pipeline.placement import Plan
from pipeline.training import engine
from pipeline.training.spec import TrainSpec
from pipeline.workers import Pool

log = logging.getLogger(__name__)

SHARED = "workers-"
MODEL, PAIRS, TRAINED, HISTORY, TOLD = "model.pt", "pairs.parquet", "trained.pt", "history.json", "told.jsonl"
POLL_SECONDS = 0.5
"""Between two looks at what rank 0 tells."""


def run(
    model: Any, spec: TrainSpec, kind: str, pairs: pl.DataFrame, folder: Path, watch: engine.OnCheckpoint,
    on_step: engine.OnStep,
) -> list[dict[str, Any]]:  # fmt: skip
    """As `engine.run`, in the workers of the spec. PipelineError where one of them fails; checkpoints are kept."""
    import torch

    for left in folder.parent.glob(f"{SHARED}*"):  # workers that outlive a killed driver end when theirs is gone
        shutil.rmtree(left, ignore_errors=True)
    shared = folder.with_name(SHARED + secrets.token_hex(4))
    shared.mkdir(parents=True)
    try:
        torch.save(model, shared / MODEL)
        pairs.write_parquet(shared / PAIRS)
        (shared / TOLD).touch()
        given = {"spec": spec, "kind": kind, "shared": str(shared), "checkpoints": str(folder), "watch": watch}
        with Pool(spec.workers, spec.name) as pool:
            _fit(pool, given, shared, on_step)
        model.load_state_dict(torch.load(shared / TRAINED, map_location=model.device, weights_only=True))
        history: list[dict[str, Any]] = json.loads((shared / HISTORY).read_bytes())
        return history
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _fit(pool: Pool, given: Mapping[str, Any], shared: Path, on_step: engine.OnStep) -> None:
    """Start the workers and tell what rank 0 tells until all have ended."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths of the spec are those of this folder
    plan = pool.plan
    _check_room(plan, given["spec"].workers.address)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    each: dict[str, float] = {"CPU": plan.threads, **({"GPU": plan.gpus} if plan.gpus else {})}
    trainer = TorchTrainer(
        work,
        train_loop_config={**given, "threads": plan.threads},
        torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=plan.count, use_gpu=plan.gpus > 0, resources_per_worker=each),
        run_config=RunConfig(
            name="ray", storage_path=str(shared), worker_runtime_env={"env_vars": plan.environment}
        ),
    )  # fmt: skip
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    # Not here: fit puts a handler of its own in place of this process' for SIGINT where it runs in the main thread.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    told = _told(shared / TOLD)
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        for entry in iter(lambda: next(told), None):
            if "text" in entry:
                log.log(entry["level"], "%s", entry["text"])
            else:
                on_step(entry["rows"], entry["of"])
    if errors:
        raise _mendable(errors[0])


def _check_room(plan: Plan, address: str | None) -> None:
    """All workers of a training must be there at once: SpecError where they never will."""
    import ray

    cores = int(ray.cluster_resources().get("CPU", 0))
    if plan.count * plan.threads <= cores:
        return
    if address is None:
        raise SpecError(
            f"workers: {plan.count} with {plan.threads} cores each need more than the {cores} of this machine"
        )
    log.warning("workers waiting for nodes: %d with %d cores each, %d are there", plan.count, plan.threads, cores)


def _told(path: Path) -> Iterator[Any]:
    """Whole lines as they come; None where there is none for now."""
    with path.open() as file:
        rest = ""
        while True:
            rest += file.readline()
            if rest.endswith("\n"):
                yield json.loads(rest)
                rest = ""
            else:
                yield None


def _mendable(error: Exception) -> PipelineError:
    """What a user can do about it."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    # Those left tell that a peer is gone; the one that went first tells why.
    rank, cause = min(failures.items(), default=(0, error), key=lambda item: ("by peer" in str(item[1]), item[0]))
    found = getattr(cause, "cause", None) or cause
    if isinstance(found, PipelineError):
        return found
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    reason = (lines or [type(found).__name__])[-1][:300].rstrip(".")
    return PipelineError(f"worker {rank} failed: {reason}; run again to go on from the last checkpoint")


def work(given: Mapping[str, Any]) -> None:
    """What each worker does; rank 0 writes."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    torch.set_num_threads(given["threads"])
    shared, spec = Path(given["shared"]), given["spec"]
    is_first = get_context().get_world_rank() == 0
    teller = _Teller(shared / TOLD) if is_first else None
    if teller is not None:
        logging.getLogger("pipeline").addHandler(teller)
        logging.getLogger("pipeline").setLevel(logging.INFO)
    device = get_device()
    model = torch.load(shared / MODEL, map_location=device, weights_only=False).to(device)  # this job's driver made it
    history = engine.run(
        model, spec, given["kind"], pl.read_parquet(shared / PAIRS), Path(given["checkpoints"]), given["watch"],
        (lambda rows, of: None) if teller is None else teller.step,
    )  # fmt: skip
    if teller is not None:
        logging.getLogger("pipeline").removeHandler(teller)
        torch.save(model.state_dict(), shared / TRAINED)
        (shared / HISTORY).write_text(json.dumps(history))


class _Teller(logging.Handler):
    """Writes what is logged, and progress, where the driver reads it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Add an event."""
        self._add({"level": record.levelno, "text": record.getMessage()})

    def step(self, rows: int, of: int) -> None:
        """Add a step."""
        self._add({"rows": rows, "of": of})

    def _add(self, entry: Mapping[str, Any]) -> None:
        if not self._path.exists():
            raise PipelineError("another run of this training has begun")
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
