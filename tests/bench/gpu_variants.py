"""The ways of running one model that the GPU benchmark compares: compiled, as CUDA graphs, in several processes."""

import multiprocessing
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.gpu_models import LONGEST_OF, encoders_alone, texts


@dataclass(frozen=True)
class Way:
    """How ours runs: `compiled` and `graph` need batches of one shape, which only packed ones have."""

    attention: str = "packed"
    precision: str = "bfloat16"
    budget: int = 65_536
    compiled: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        extras = " compiled" * self.compiled + " graph" * self.graph
        return f"ours {self.attention}{extras}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer (main thread)."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def loaded(folder: Path) -> Any:
    """The project's encoder of a folder, float32 and padded."""
    encoders_alone()
    import torch

    from pipeline.encoders.models import resolve
    from pipeline.encoders.sentence import SentenceEncoder

    return SentenceEncoder(resolve(str(folder)), None, None, None if torch.cuda.is_available() else 1)


def made(encoder: Any, way: Way, longest: int, most: int, backend: str) -> Any:
    """The encoder of a way; `longest` tokens and `most` texts are the largest a batch has."""
    if way.attention == "padded":
        return encoder.variant(way.precision, "padded")
    whole = encoder.variant(way.precision, "packed")
    return Fixedly(whole, way, longest, most, backend) if way.compiled or way.graph else whole


class Fixedly:
    """A packed encoder with batches of two shapes, filled up, compiled, replayed from CUDA graphs, or both.

    The smaller shape, a quarter, is for what remains at the end.
    """

    pads = False

    def __init__(self, encoder: Any, way: Way, longest: int, most: int, backend: str) -> None:
        """Compile and capture at once."""
        import torch

        from pipeline.encoders import packed

        self._torch, self._packed, self._encoder = torch, packed, encoder
        self.dim, self.max_tokens, self.tokenizer = encoder.dim, encoder.max_tokens, encoder.tokenizer
        self.in_flight = encoder.in_flight
        if encoder.device == "cpu":
            if way.graph:
                raise RuntimeError("CUDA graphs need CUDA")
            packed._plain = torch.compiler.disable(packed._plain)  # loops in Python, of which nothing is compiled
        if way.compiled:
            torch._dynamo.config.recompile_limit = 64  # two of each model, set and budget
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # else what follows would silently run as it is
            inner = encoder.model[0].model
            for part in (inner.embeddings, *inner.encoder.layer):
                part.compile(backend=backend, dynamic=False)
        self._shapes = []
        for share in (4, 1):
            budget = max(way.budget // share, 2 * longest)
            fixed = packed.Fixed(budget + 1, most // share + most // 4 + budget // longest + 10, longest)
            self._shapes.append((fixed, *self._captured(fixed, way.graph)))

    def _captured(self, fixed: Any, graph: bool) -> tuple[dict[str, Any], Any, Any]:
        """Inputs on the device, and the graph that reads them with what it writes."""
        torch = self._torch
        offsets = np.arange(0, fixed.longest, fixed.longest // 8)
        with torch.inference_mode():
            inputs = self._moved(self._features(np.full(offsets[-1], 7, np.int32), offsets, fixed))
            self._run(inputs)
            if not graph:
                return inputs, None, None
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run(inputs)
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                output = self._run(inputs)
            return inputs, captured, output

    def _features(self, ids: np.ndarray, offsets: np.ndarray, fixed: Any) -> dict[str, Any]:
        return self._packed.features(ids, offsets, ["token_type_ids"], fixed=fixed)

    def _moved(self, features: dict[str, Any]) -> dict[str, Any]:
        return {name: self._encoder._on_device(value) for name, value in features.items()}

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self._encoder.model(dict(inputs))["sentence_embedding"].float()

    def tokenize(self, texts: Sequence[str], prompt: str) -> Any:
        """As the encoder does."""
        return self._encoder.tokenize(texts, prompt)

    def begin(self, tokens: Any, role: str, prompt: str) -> Any:
        """One batch, under way when this returns on CUDA."""
        torch = self._torch
        size = int(tokens.offsets[-1] - tokens.offsets[0])
        room = self._shapes[0][0]
        small = size < room.tokens and len(tokens) + room.tokens // room.longest + 1 < room.texts
        fixed, inputs, graph, output = self._shapes[0 if small else 1]
        features = self._features(tokens.ids, tokens.offsets, fixed)
        with torch.inference_mode():
            if graph is None:
                vectors = self._run(self._moved(features))[: len(tokens)]
            else:
                for name, value in features.items():
                    if isinstance(value, torch.Tensor):
                        inputs[name].copy_(value.pin_memory(), non_blocking=True)
                graph.replay()
                vectors = output[: len(tokens)]
            if vectors.device.type == "cpu":
                return lambda: vectors.numpy()
            host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def ending() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return ending


def most_texts(lengths: np.ndarray, budget: int) -> int:
    """The most texts that one packed batch has."""
    encoders_alone()
    from pipeline.encoders.batches import plan

    return max(len(rows) for rows in plan(lengths, budget, False))


def work(
    seed: int, folder: str, way: Way, name: str, tokens: int, passes: int, backend: str, gate: Any, told: Any
) -> None:
    """One of several processes on a GPU: its own model, texts of its own, the passes begun together."""
    try:
        encoder = loaded(Path(folder))
        from pipeline.encoders.batches import encode, prepare

        some, _ = texts(name, tokens, seed=seed)
        prepared = prepare(encoder, some, "")
        lengths = prepared.tokens.lengths
        ours = made(encoder, way, LONGEST_OF[name], most_texts(lengths, way.budget), backend)
        encode(ours, prepared, "document", "", way.budget)
        gate.wait(120)
        start = time.monotonic()
        for _ in range(passes):
            encode(ours, prepared, "document", "", way.budget)
        told.put((start, time.monotonic(), int(lengths.sum()) * passes, len(some) * passes, ""))
    except Exception as error:  # told by the parent
        gate.abort()
        told.put((0.0, 0.0, 0, 0, f"{type(error).__name__}: {error}"[:300]))


def together(
    folder: Path, way: Way, name: str, tokens: int, count: int, passes: int, seconds: float, backend: str
) -> dict[str, Any]:
    """Tokens and texts per second of `count` processes on one device, from the first start to the last end."""
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(count), context.Queue()
    given = (str(folder), way, name, tokens // count, passes, backend, gate, told)
    processes = [context.Process(target=work, args=(seed, *given), daemon=True) for seed in range(count)]
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        parts = [told.get(timeout=max(0.1, end - time.monotonic())) for _ in processes]
    except queue.Empty:
        raise TimeoutError(f"{count} processes took longer than {seconds:.0f} s") from None
    finally:
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.terminate()
    failed = [part[4] for part in parts if part[4]]
    if failed:
        raise RuntimeError(failed[0])
    wall = max(part[1] for part in parts) - min(part[0] for part in parts)
    return {"tokens_per_second": sum(p[2] for p in parts) / wall, "texts_per_second": sum(p[3] for p in parts) / wall}
