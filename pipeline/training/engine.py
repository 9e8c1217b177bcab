"""The training loop of sentence-transformers: steps, checkpoints, going on from the last whole one, early stopping."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.encoders.sentence import prompts
from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.training import objectives, teacher
from pipeline.training.spec import TrainSpec

log = logging.getLogger(__name__)

RATES = {"static": 0.02, "transformer": 2e-5}
"""Learning rates."""
WARMUP = 0.1
"""Share of all steps in which the learning rate rises."""
CHECKPOINTS = 10
"""In a whole training, where the spec does not say."""
TOLD = 50
"""How often the loss is told in a whole training."""
NO_FLOAT16 = "precision: float16 needs a GPU; use bfloat16 or float32"
FULL_BYTES = 16 * 2**20
"""Of a disk, what is left where a checkpoint did not fit (assumed)."""
STATE = "trainer_state.json"
"""Written last into a checkpoint."""
OnCheckpoint = Callable[[Any], Mapping[str, float]]
"""Gives the watched metrics of a model, by name."""
OnStep = Callable[[int, int], None]
"""Told of rows trained on since this process began, and how many those will be in all."""


def steps(spec: TrainSpec, pairs: int) -> int:
    """Optimiser steps of the whole training."""
    return max(1, math.ceil(spec.epochs * max(1, pairs // spec.batch_size)))


def rate(spec: TrainSpec, kind: str) -> float:
    """The learning rate."""
    return RATES[kind] if spec.learning_rate == "auto" else spec.learning_rate


def run(
    model: Any, spec: TrainSpec, kind: str, pairs: pl.DataFrame, folder: Path, watch: OnCheckpoint, on_step: OnStep
) -> list[dict[str, Any]]:
    """Train `model` in place, from the newest checkpoint in `folder` where there is one; what was told on the way.

    Called in each of several processes that torch.distributed joins, it takes the same batches as in one: each process
    has its part of a batch, and its losses see the texts of all.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback

    built = objectives.build(model, spec, folder.parent)
    if spec.workers.spread:
        see_all(built.loss)
    trainer = _trainer_class()(
        model=model,
        args=_arguments(model, spec, kind, len(pairs), folder),
        train_dataset=Dataset(pairs.to_arrow()),
        loss=built.loss,
        evaluator=_evaluator(watch),
        callbacks=[_reporter(built, spec, on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    if spec.stop is not None:
        trainer.add_callback(EarlyStoppingCallback(spec.stop.patience))
    last = newest(folder)
    if last is not None:
        log.info("train going on from %s", last.name)
        if (state := _ended(last, spec)) is not None:  # the loop would take a step more
            best = state["best_model_checkpoint"] if spec.stop is not None else None
            trainer._load_from_checkpoint(str(folder / Path(best).name if best else last))
            return list(state["log_history"])
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except Exception as error:  # each writer of a checkpoint has one of its own
        if shutil.disk_usage(folder.parent).free > FULL_BYTES:
            raise
        raise PipelineError(
            f"{folder}: the disk is full; make room, and run again to go on from the last whole checkpoint"
        ) from error
    if trainer.state.global_step == 0:
        raise DataError(
            f"data: too few distinct texts for a batch of {spec.batch_size}, which holds none twice; "
            "lower batch_size, or give more pairs"
        )
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # from here on in float32 again
    return list(trainer.state.log_history)


def see_all(loss: Any) -> None:
    """Have every loss that looks at the other texts of a batch look at those of all processes, with gradients.

    Their mean over processes, which torch's data parallelism takes, is then the loss of the whole batch.
    """
    for module in loss.modules():
        if "gather_across_devices" in vars(module):
            module.gather_across_devices = True


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = {path: _step(path) for path in folder.glob("checkpoint-*")}
    return max((path for path in found if found[path] >= 0), key=lambda path: found[path], default=None)


def mend(folder: Path) -> None:
    """Remove checkpoints that a killed process left half written."""
    for path in folder.glob("checkpoint-*"):
        if _step(path) < 0:
            log.warning("train leaving %s out: it is not whole", path.name)
            shutil.rmtree(path)


def _ended(checkpoint: Path, spec: TrainSpec) -> Mapping[str, Any] | None:
    """The trainer's state where the training had come to its end there, by steps or by patience."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
    stopper = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    waited = stopper.get("attributes", {}).get("early_stopping_patience_counter", 0)
    is_spent = spec.stop is not None and waited >= spec.stop.patience
    return state if is_spent or state["global_step"] >= state["max_steps"] else None


def _step(checkpoint: Path) -> int:
    """Of a whole checkpoint; -1 of another."""
    try:
        return int(json.loads((checkpoint / STATE).read_bytes())["global_step"])
    except (OSError, ValueError, KeyError):
        return -1


def _arguments(model: Any, spec: TrainSpec, kind: str, pairs: int, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers

    count = steps(spec, pairs)
    every = max(1, math.ceil(count / CHECKPOINTS)) if spec.checkpoint_steps == "auto" else spec.checkpoint_steps
    on_gpu = model.device.type == "cuda"
    if spec.precision == "float16" and not on_gpu:
        raise SpecError(NO_FLOAT16)
    said = {name: prompts(model)[role] for name, role in teacher.ROLES.items()}
    best: dict[str, Any] = {}
    if spec.stop is not None:
        best = {"metric_for_best_model": f"eval_ndcg_{spec.stop.dim}", "load_best_model_at_end": True}
    workers = spec.workers.count if spec.workers.spread else 1
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=count,
        per_device_train_batch_size=min(spec.batch_size, pairs // workers * workers),
        accelerator_config={"split_batches": True},  # a batch is that of all workers together
        ddp_backend=("nccl" if on_gpu else "gloo") if spec.workers.spread else None,
        learning_rate=rate(spec, kind),
        warmup_steps=math.ceil(WARMUP * count),
        bf16=spec.precision == "bfloat16",
        fp16=spec.precision == "float16",
        use_cpu=not on_gpu,
        seed=spec.seed,
        data_seed=spec.seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        prompts={name: text for name, text in said.items() if text} or None,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, count // TOLD),
        disable_tqdm=True,
        report_to="none",
        **best,
    )
    arguments._n_gpu = 1  # else each of this machine's takes a whole batch
    return arguments


def _trainer_class() -> type[Any]:
    from sentence_transformers import SentenceTransformerTrainer

    class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
        """Writes no model cards: ours is written once, at the end."""

        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            self.model._create_model_card = lambda *given, **named: None

    return Trainer


def _evaluator(watch: OnCheckpoint) -> Any:
    from sentence_transformers.base.evaluation import BaseEvaluator

    class Watched(BaseEvaluator):  # type: ignore[misc]
        """Held-out nDCG at each prefix."""

        def __call__(self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1) -> Any:
            return dict(watch(model))

    return Watched()


def _reporter(built: objectives.Built, spec: TrainSpec, on_step: OnStep) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        """Begins each step at its stage; puts the loss of each dim beside the loss, where checkpoints keep it.

        Tells both, and the progress.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            self._began = state.global_step

        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            built.begin(spec.epochs * state.global_step / state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if state.is_world_process_zero:
                rows = args.train_batch_size
                on_step((state.global_step - self._began) * rows, (state.max_steps - self._began) * rows)

        def on_log(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            entry = state.log_history[-1]
            if "loss" in entry and built.told is not None:
                entry.update(_mean_of_all(built.told.taken()))
            shown = [name for name in entry if name == "loss" or name.startswith("eval_ndcg")]
            if shown and state.is_world_process_zero:
                figures = " ".join(f"{name.removeprefix('eval_')}={entry[name]:.4f}" for name in shown)
                log.info("train step=%d of %d %s", state.global_step, state.max_steps, figures)

    return Reporter()


def _mean_of_all(values: dict[str, float]) -> dict[str, float]:
    """The mean over processes; each has seen its part of every batch."""
    from torch import distributed

    if not distributed.is_initialized():
        return values
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, values)
    return {name: round(sum(one[name] for one in found) / len(found), 6) for name in values}


def curve(history: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """`step, name, value`: losses and watched metrics over the steps."""
    rows = [
        {"step": int(entry["step"]), "name": name.removeprefix("eval_"), "value": float(value)}
        for entry in history
        for name, value in entry.items()
        if name == "learning_rate" or name.startswith(("loss", "eval_ndcg"))
    ]
    return pl.DataFrame(rows, {"step": pl.Int64, "name": pl.String, "value": pl.Float64}).sort("step", "name")
