"""What a team of workers is, and the one of this process.

A handler is built once per worker by `setup(threads)` and called with one item at a time; what it returns
is small (a receipt).
"""

import ctypes
import os
import pickle
import resource
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline import stopping
from pipeline.errors import PipelineError

MAX_TRIES = 3
SUBMITTED = "MATRYOSHKA_SUBMITTED"
"""Stands in the environment of a job that was sent to a cluster, and of its workers."""


@dataclass
class Progress:
    """What a worker has finished since it began; workers add up."""

    rows: int = 0
    tokens: int = 0


def peak_memory_bytes() -> int:
    """The most memory this process has held at once (resident)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps it: a worker held 1.3 GB where 0.9 were in use (measured)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def leave_packed_folder() -> None:
    """Go elsewhere from the folder that Ray unpacked for a submitted job, in which no path of the job begins.

    Ray unpacks it anew under the same name where another node begins on this machine; MKL ends a process whose
    folder is gone (Ray 2.60, torch 2.13, measured).
    """
    if SUBMITTED in os.environ:
        os.chdir(tempfile.gettempdir())


class Handler(Protocol):
    """What a worker runs. `progress`, where present, counts within an item."""

    def __call__(self, item: Any, /) -> Any:
        """Do one item."""


Setup = Callable[[int], Handler]
OnProgress = Callable[[Progress], None]


class Worker:
    """Builds its handler at the first item, so that errors there reach the driver as they are."""

    def __init__(self, setup: bytes, threads: int) -> None:
        self._setup, self._threads = setup, threads
        self._handler: Handler | None = None
        self._lock = threading.Lock()

    def run(self, item: Any) -> Any:
        """Do one item."""
        with self._lock:
            if self._handler is None:
                setup: Setup = pickle.loads(self._setup)  # noqa: S301 - made by this job's driver
                self._handler = setup(self._threads)
        return self._handler(item)

    def progress(self) -> Progress:
        """How far it is."""
        return getattr(self._handler, "progress", Progress())


@dataclass(frozen=True)
class Died:
    """An item whose workers all died on it."""

    item: Any
    tries: int
    reason: str

    @property
    def sentence(self) -> str:
        """The beginning of what to tell."""
        return f"a worker died {self.tries} times on {called(self.item)} ({self.reason})"


def called(item: Any) -> str:
    """An item's name."""
    return str(getattr(item, "name", item))


class Team(ABC):
    """Workers that hold the same kind of handler."""

    @abstractmethod
    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        """Do every item; results as they come, `Died` for an item that `tries` workers died on.

        Raises Stopped after a signal: items at work may finish for `stopping.GRACE` seconds, no other begins.
        """

    def map(self, items: Sequence[Any]) -> Iterator[Any]:
        """Do every item; results as they come. PipelineError where workers die on one."""
        for outcome in self.outcomes(items):
            if isinstance(outcome, Died):
                raise PipelineError(f"{outcome.sentence}; run again to go on from what is finished")
            yield outcome

    def call(self, item: Any) -> Any:
        """Do one item."""
        return next(iter(self.map([item])))


class LocalTeam(Team):
    """The work in this process, without Ray (`workers.count: 0`)."""

    def __init__(self, setup: Setup, threads: int, on_progress: OnProgress | None) -> None:
        self._worker, self._on_progress = Worker(pickle.dumps(setup), threads), on_progress

    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        """Do every item, in order."""
        for item in items:
            with stopping.patience():
                result = self._worker.run(item)
            if self._on_progress:
                self._on_progress(self._worker.progress())
            yield result
