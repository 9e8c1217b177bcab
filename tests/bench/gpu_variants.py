"""The ways of running one model that the GPU benchmark compares, also in several processes at once."""

import multiprocessing
import queue
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.gpu_models import encoders_alone, texts


@dataclass(frozen=True)
class Way:
    """How ours runs; `compiled` is for packed attention."""

    attention: str = "packed"
    precision: str = "bfloat16"
    budget: int = 65_536
    compiled: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"ours {self.attention}" + " compiled" * self.compiled


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


def work(seed: int, folder: str, way: Way, name: str, tokens: int, passes: int, gate: Any, told: Any) -> None:
    """One of several processes on a GPU: its own model, texts of its own, the passes begun together."""
    try:
        encoder = loaded(Path(folder))
        from pipeline.encoders.batches import encode, prepare

        some, _ = texts(name, tokens, seed=seed)
        prepared = prepare(encoder, some, "")
        ours = encoder.variant(way.precision, way.attention, way.compiled)
        encode(ours, prepared, "document", "", way.budget)
        gate.wait(120)
        start = time.monotonic()
        for _ in range(passes):
            encode(ours, prepared, "document", "", way.budget)
        told.put((start, time.monotonic(), int(prepared.tokens.lengths.sum()) * passes, len(some) * passes, ""))
    except Exception as error:  # told by the parent
        gate.abort()
        told.put((0.0, 0.0, 0, 0, f"{type(error).__name__}: {error}"[:300]))


def together(folder: Path, way: Way, name: str, tokens: int, count: int, passes: int, seconds: float) -> dict[str, Any]:
    """Tokens and texts per second of `count` processes on one device, from the first start to the last end."""
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(count), context.Queue()
    given = (str(folder), way, name, tokens // count, passes, gate, told)
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
