"""Which backend and precision embeds: asked for, or probed on this machine with real rows against float32.

A verdict of the probe is kept in the user's cache, by machine, model and versions.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.encoders import openvino
from pipeline.encoders.batches import Encoder, encode_rows
from pipeline.encoders.openvino import Graph, OpenVINOEncoder
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.static import StaticEncoder
from pipeline.errors import PipelineError, SpecError
from pipeline.spec import Model
from pipeline.vectors import Matrix, unit

log = logging.getLogger(__name__)

PROBE_ROWS = {"cpu": 256, "cuda": 4_096}
"""Real rows that the probe looks at, at most."""
PROBE_SECONDS = 4.0
"""What float32 may take for them: a slow model is probed on fewer rows."""
WARM_ROWS = 16
COMPILED_ROWS = 1_000_000
"""A compiled model is probed from so many on: it costs 4 to 8 s of each worker's start for about 12 % (an H100)."""
WORTH_IT = 1.15
"""`auto` leaves float32 only for at least this speed-up, so that noise does not decide (assumed)."""
INT8_HOPE = 0.999
"""`auto` tries int8 only where `min_cosine` is at most this: MiniLM reaches 0.9975 (measured)."""


@dataclass(frozen=True)
class Choice:
    """One way to run a model."""

    backend: str
    precision: str
    attention: str = "padded"
    compiled: bool = False

    @property
    def name(self) -> str:
        """What logs call it."""
        extras = [self.attention] * (self.attention == "packed") + ["compiled"] * self.compiled
        return "/".join([self.backend, self.precision, *extras])


REFERENCE = Choice("torch", "float32")


@dataclass(frozen=True)
class Chosen:
    """The choice, its encoder, the figures it rests on, and the graph where others cannot make it themselves."""

    choice: Choice
    encoder: Encoder
    figures: Mapping[str, Any] = field(default_factory=dict)
    graph: Graph | None = None


def build(base: SentenceEncoder, choice: Choice, prompt: str, graph: Graph | None = None) -> Encoder:
    """The encoder of a choice that was made, maybe on another machine. PipelineError where this one cannot run it."""
    if choice == REFERENCE:
        return StaticEncoder.of(base) or base
    if choice.backend == "torch":
        return base.variant(choice.precision, choice.attention, choice.compiled)
    if not openvino.is_installed():
        raise PipelineError(
            "the job runs on openvino, which this worker lacks; install the extra [openvino] everywhere"
        )
    return OpenVINOEncoder(base, prompt, choice.precision, graph or openvino.converted(base, prompt))


def choose(
    base: SentenceEncoder, wanted: Model, texts: Sequence[str], prompt: str, budget: int, rows: int = 0
) -> Chosen:
    """What the spec asks for, else the fastest that keeps `min_cosine` to float32 on the texts.

    `rows`: of the whole corpus, for what must first pay for its start. SpecError where what it asks for cannot be.
    """
    is_large = rows >= COMPILED_ROWS
    open_ = list(_candidates(base, wanted, is_large))
    if wanted.backend == "openvino" and not openvino.is_installed():
        raise SpecError("model.backend: openvino is not installed; pip install 'matryoshka-pipeline[openvino]'")
    if not open_ or not texts:
        return Chosen(REFERENCE, build(base, REFERENCE, prompt))
    maker = _Maker(base, prompt, texts, budget)
    if len(open_) == 1 and "auto" not in (wanted.backend, wanted.precision):
        encoder, graph = maker(open_[0])
        return Chosen(open_[0], encoder, {}, graph)
    known = _Verdicts(base, wanted, is_large)
    standing = known.read()
    if standing is not None and standing["choice"]["precision"] != "int8":
        choice = Choice(**standing["choice"])
        try:
            return Chosen(choice, maker(choice)[0], {**standing["figures"], "cached": standing["date"]})
        except (SpecError, PipelineError) as error:
            log.warning("a kept verdict does not hold any more (%s); probing again", error)
    chosen = _Probe(base, texts, prompt, budget, maker, wanted).run(open_)
    known.write(chosen)
    return chosen


def _candidates(base: SentenceEncoder, wanted: Model, is_large: bool) -> Iterator[Choice]:
    """What the spec admits, but for the reference; the likely fastest first."""
    if not base.has_transformer:
        if wanted.precision not in ("auto", "float32") or wanted.backend == "openvino":
            what, given = ("backend", "openvino") if wanted.backend == "openvino" else ("precision", wanted.precision)
            raise SpecError(f"model.{what}: this model has no transformer to run on or in {given}; use auto")
        return
    cuda = base.device.startswith("cuda")
    if wanted.backend in ("auto", "openvino") and not cuda and openvino.is_installed():
        admitted: list[str] = [*openvino.precisions()] if wanted.precision == "auto" else [wanted.precision]
        if wanted.precision == "auto" and wanted.min_cosine <= INT8_HOPE:
            admitted = ["int8", *admitted]
        yield from (Choice("openvino", precision) for precision in admitted if precision in openvino.HINTS)
    if wanted.backend in ("auto", "torch"):
        halves = ["bfloat16", "float16"] if cuda else ["bfloat16"]
        admitted = halves if wanted.precision == "auto" else [wanted.precision]
        for precision in admitted:
            if cuda and is_large and precision != "float32":
                yield Choice("torch", precision, "packed", compiled=True)
            if cuda:
                yield Choice("torch", precision, "packed")
            if (precision, wanted.precision) != ("float32", "float32") and precision != "int8":
                yield Choice("torch", precision)


def told(figures: Mapping[str, Any]) -> str:
    """A probe's figures in one line."""
    if not figures:
        return "nothing, there was no choice"
    found = [
        f"{name} refused ({one['refused']})"
        if "refused" in one
        else f"{name} {one['rows_per_second']:.0f} rows/s at cosine {one['cosine']:.5f}"
        for name, one in figures["candidates"].items()
    ]
    when = f", on {figures['cached']}" if "cached" in figures else ""
    return f"{'; '.join(found)} ({figures['rows']} rows{when})"


class _Maker:
    """Makes the encoder of a choice; the OpenVINO graph is made once."""

    def __init__(self, base: SentenceEncoder, prompt: str, texts: Sequence[str], budget: int) -> None:
        self._base, self._prompt, self._texts, self._budget = base, prompt, texts, budget
        self._graph: Any = None

    def __call__(self, choice: Choice) -> tuple[Encoder, Graph | None]:
        if choice.backend != "openvino":
            return build(self._base, choice, self._prompt), None
        if self._graph is None:
            self._graph = openvino.converted(self._base, self._prompt)
        graph = self._graph
        if choice.precision == "int8":
            graph = openvino.quantized(self._base, self._prompt, graph, self._texts, self._budget)
        encoder = OpenVINOEncoder(self._base, self._prompt, choice.precision, graph)
        return encoder, graph if choice.precision == "int8" else None


class _Probe:
    """Times the reference and the candidates on the same rows."""

    def __init__(
        self, base: SentenceEncoder, texts: Sequence[str], prompt: str, budget: int, maker: _Maker, wanted: Model
    ) -> None:
        self._prompt, self._budget, self._maker, self._wanted, self._base = prompt, budget, maker, wanted, base
        self._texts = texts[: PROBE_ROWS["cuda" if base.device.startswith("cuda") else "cpu"]]

    def run(self, candidates: Sequence[Choice]) -> Chosen:
        some = self._texts[:WARM_ROWS]
        self._timed(self._base, some)
        seconds = len(some) / self._timed(self._base, some)[1]
        rows = int(np.clip(len(some) * PROBE_SECONDS / max(seconds, 1e-9), len(some), len(self._texts)))
        self._texts = self._texts[:rows]
        reference, rate = self._timed(self._base, self._texts)
        figures: dict[str, Any] = {REFERENCE.name: {"rows_per_second": rate, "cosine": 1.0}}
        best, best_rate = Chosen(REFERENCE, self._base), rate * WORTH_IT
        for choice in candidates:
            if choice.precision == "float32" and best.choice.backend == choice.backend:
                continue  # half precision holds there, and costs half
            try:
                encoder, made = self._maker(choice)
                self._timed(encoder, some)
                vectors, rate = self._timed(encoder, self._texts)
            except Exception as error:  # whatever an engine raises: it is no candidate then
                figures[choice.name] = {"refused": (str(error).splitlines() or [type(error).__name__])[0][:200]}
                continue
            cosines = np.sum(unit(reference) * unit(vectors), axis=1)
            figures[choice.name] = {
                "rows_per_second": rate, "cosine": float(cosines.mean()), "least_cosine": float(cosines.min()),
            }  # fmt: skip
            if cosines.mean() >= self._wanted.min_cosine and rate > best_rate:
                best, best_rate = Chosen(choice, encoder, {}, made), rate
        return replace(best, figures={"rows": rows, "candidates": figures})

    def _timed(self, encoder: Encoder, texts: Sequence[str]) -> tuple[Matrix, float]:
        start = time.perf_counter()
        vectors = encode_rows(encoder, texts, "document", self._prompt, self._budget).vectors
        return vectors, len(texts) / (time.perf_counter() - start)


class _Verdicts:
    """Verdicts of earlier probes: one small file each below the user's cache folder."""

    def __init__(self, base: SentenceEncoder, wanted: Model, is_large: bool) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        what = {
            "machine": [platform.machine(), _processor(base), base.threads],
            "model": base.folder.digest,
            "asked": wanted.model_dump(mode="json", include={"backend", "precision", "min_cosine", "max_tokens"}),
            "large": is_large,
            "versions": [_version(name) for name in ("torch", "transformers", "sentence-transformers", "openvino")],
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        self.path = home / "matryoshka-pipeline" / "probe" / f"{key}.json"

    def read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text())
            Choice(**found["choice"])
            return {"choice": found["choice"], "figures": dict(found["figures"]), "date": str(found["date"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there is none, or none that can be read: it is made anew

    def write(self, chosen: Chosen) -> None:
        found = {"choice": asdict(chosen.choice), "figures": chosen.figures, "date": time.strftime("%Y-%m-%d")}
        draft = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(found, indent=1))
            draft.replace(self.path)
        except OSError as error:
            log.info("the verdict of the probe is not kept: %s", error)


def _processor(base: SentenceEncoder) -> str:
    if base.device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
