"""Who does the work: Ray actors that pull items, or this process. The only importer of ray.

A handler is built once per worker by `setup(threads)` and called with one item at a time; what it returns
is small (a receipt). A worker that dies is replaced and its item tried again.
"""

import ctypes
import logging
import os
import pickle
import resource
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Protocol

from pipeline import stopping
from pipeline.errors import DeviceLost, PipelineError, SpecError, StaleError
from pipeline.spec import Workers

log = logging.getLogger(__name__)

CORES_PER_CPU_WORKER = 4
"""Threads of one CPU worker where the machine has them (assumed: transformers scale well to four)."""
MAX_TRIES = 3
POLL_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Vectors never pass through the object store; receipts and samples fit."""


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


class Handler(Protocol):
    """What a worker runs. `progress`, where present, counts within an item."""

    def __call__(self, item: Any, /) -> Any:
        """Do one item."""


Setup = Callable[[int], Handler]
OnProgress = Callable[[Progress], None]


class _Worker:
    """One actor: reads and calls `setup` at the first item, so that errors there reach the driver as they are."""

    def __init__(self, setup: bytes, threads: int) -> None:
        self._setup, self._threads = setup, threads
        self._handler: Handler | None = None
        self._lock = threading.Lock()

    def run(self, item: Any) -> Any:
        with self._lock:
            if self._handler is None:
                setup: Setup = pickle.loads(self._setup)  # noqa: S301 - made by this job's driver
                self._handler = setup(self._threads)
        return self._handler(item)

    def progress(self) -> Progress:
        return getattr(self._handler, "progress", Progress())


@dataclass(frozen=True)
class Plan:
    """How many workers, with how many threads and GPUs each."""

    count: int
    threads: int
    gpus: float


def plan(settings: Workers, cores: int, gpus: int) -> Plan:
    """Size the workers to a machine or cluster: one per GPU, else one per four cores."""
    each = (1.0 if gpus else 0.0) if settings.gpus == "auto" else float(settings.gpus)
    if each > 0 and gpus == 0:
        raise SpecError(f"workers.gpus: {each:g} per worker were asked for, no GPU is visible; use auto or 0")
    if settings.count != "auto":
        count = settings.count
    elif each > 0:
        count = max(1, int(gpus / each))
    else:
        count = max(1, cores // CORES_PER_CPU_WORKER)
    if count and each * count > gpus > 0:
        raise SpecError(f"workers: {count} workers with {each:g} GPUs each need more than the {gpus} visible")
    return Plan(count, max(1, cores // max(count, 1)), each)


class Pool:
    """Workers of one run; Ray starts when the first team is needed, and ends only if it was started here."""

    def __init__(self, settings: Workers) -> None:
        self._settings = settings
        self.closed = ""  # why no work may be done now
        self._ray: ModuleType | None = None
        self._started_here = False
        self._plan: Plan | None = None

    def __enter__(self) -> "Pool":
        """Nothing starts yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what was started here."""
        if self._ray is not None and self._started_here:
            self._ray.shutdown()

    @property
    def plan(self) -> Plan:
        """The sizes in force; starts Ray where it is used."""
        if self._plan is None:
            self._plan = self._start()
            log.info("workers count=%d threads=%d gpus=%g", self._plan.count, self._plan.threads, self._plan.gpus)
        return self._plan

    def _start(self) -> Plan:
        cores = len(os.sched_getaffinity(0))
        if self._settings.count == 0:
            return plan(self._settings, cores, 0 if self._settings.gpus == "auto" else 1)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        if not ray.is_initialized():
            address = self._settings.address
            sizes = {} if address else {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES}
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                with warnings.catch_warnings():  # Ray's children exec at once, so Lance's fork warnings do not apply
                    warnings.filterwarnings("ignore", message=".*fork")
                    ray.init(
                        address=address or "local",
                        include_dashboard=None if address else False,
                        logging_level=logging.ERROR,
                        log_to_driver=False,
                        **sizes,
                    )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise PipelineError(f"cannot reach a Ray cluster at {address or 'local'}: {error}") from None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray put its own in place
            self._started_here = True
        resources = ray.cluster_resources()
        return plan(self._settings, int(resources.get("CPU", 1)), int(resources.get("GPU", 0)))

    @contextmanager
    def team(
        self, setup: Setup, on_progress: OnProgress | None = None, gpus: bool = False, lookahead: int = 1
    ) -> "Iterator[Team]":
        """Workers with one handler each; `gpus`: they need the GPUs of the plan. StaleError where closed.

        `lookahead`: items that a handler is given at once, on threads; in this process it is one.
        """
        if self.closed:
            raise StaleError(self.closed)
        plan = self.plan
        if self._ray is None:
            yield LocalTeam(setup, plan, on_progress)
            return
        team = RayTeam(self._ray, setup, plan, on_progress, plan.gpus if gpus else 0, lookahead)
        try:
            yield team
        finally:
            team.close()


@dataclass(frozen=True)
class Died:
    """An item whose workers all died on it."""

    item: Any
    tries: int
    reason: str

    @property
    def sentence(self) -> str:
        """The beginning of what to tell."""
        return f"a worker died {self.tries} times on {_called(self.item)} ({self.reason})"


def _called(item: Any) -> str:
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
    """The same work in this process, without Ray (`workers.count: 0`)."""

    def __init__(self, setup: Setup, plan: Plan, on_progress: OnProgress | None) -> None:
        self._worker, self._on_progress = _Worker(pickle.dumps(setup), plan.threads), on_progress

    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        """Do every item, in order."""
        for item in items:
            with stopping.patience():
                result = self._worker.run(item)
            if self._on_progress:
                self._on_progress(self._worker.progress())
            yield result


@dataclass(frozen=True)
class _Task:
    """An item on a worker, for the `number`th time."""

    actor: Any
    item: Any
    number: int


class RayTeam(Team):
    """Ray actors, up to `lookahead` items in flight on each.

    An item whose worker died is tried again alone, so that no neighbour is blamed for what it does.
    """

    def __init__(
        self, ray: ModuleType, setup: Setup, plan: Plan, on_progress: OnProgress | None, gpus: float, lookahead: int
    ) -> None:
        self._ray, self._plan, self._on_progress, self._lookahead = ray, plan, on_progress, lookahead
        self._setup: bytes = ray.cloudpickle.dumps(setup)
        # One call more: questions about its progress.
        options = {"num_cpus": plan.threads, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": lookahead + 1}
        self._remote = ray.remote(**options)(_Worker)
        self._actors: list[Any] = []

    def close(self) -> None:
        """Free the actors' resources."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        """Do every item; results as they come."""
        waiting = deque((item, 1) for item in items)
        while len(self._actors) < min(self._plan.count, len(items)):
            self._actors.append(self._new())
        busy = dict[Any, _Task]()
        while waiting or busy:
            while waiting and (actor := self._free(busy.values(), alone=waiting[0][1] > 1)) is not None:
                item, number = waiting.popleft()
                busy[actor.run.remote(item)] = _Task(actor, item, number)
            for reference in self._ready(busy):
                task = busy.pop(reference)
                try:
                    result = self._ray.get(reference)
                except (self._ray.exceptions.RayTaskError, self._ray.exceptions.RayActorError) as error:
                    self._bury(task, error)
                    if task.number < tries:
                        waiting.appendleft((task.item, task.number + 1))
                        continue
                    result = Died(task.item, task.number, _reason(error))
                yield result

    def _new(self) -> Any:
        return self._remote.remote(self._setup, self._plan.threads)

    def _free(self, busy: Iterable[_Task], alone: bool) -> Any:
        """The worker with the least to do that may have an item more."""
        loads = {actor: 0 for actor in self._actors}
        for task in busy:
            if task.actor in loads:
                loads[task.actor] += self._lookahead if task.number > 1 else 1
        actor = min(self._actors, key=lambda one: loads[one])
        return actor if loads[actor] < (1 if alone else self._lookahead) else None

    def _bury(self, task: _Task, error: Exception) -> None:
        """Put another worker in the place of one that died; what is no death is raised."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause = getattr(error, "cause", None)
            if not isinstance(cause, DeviceLost):
                raise cause if isinstance(cause, PipelineError) else error from None
            self._ray.kill(task.actor)  # whose device answers nothing any more
        log.warning("worker died try=%d item=%s", task.number, _called(task.item))
        if task.actor in self._actors:  # with several items it dies only once
            self._actors.remove(task.actor)
            self._actors.append(self._new())

    def _ready(self, busy: Mapping[Any, Any]) -> list[Any]:
        """Items that are finished; after a signal those at work get a while to end."""
        with stopping.patience():  # raises Stopped at its end, after a signal
            while True:
                ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=POLL_SECONDS)
                if stopping.asked():
                    self._ray.wait(list(busy), num_returns=len(busy), timeout=stopping.left())
                    return []
                self._poll()
                if ready:
                    return list(ready)

    def _poll(self) -> None:
        """Ask the workers how far they are."""
        if self._on_progress is None:
            return
        answers = [actor.progress.remote() for actor in self._actors]
        done, _ = self._ray.wait(answers, num_returns=len(answers), timeout=POLL_SECONDS)
        total = Progress()
        for answer in done:
            try:
                part = self._ray.get(answer)
            except self._ray.exceptions.RayError:
                continue  # a dead worker is dealt with where its item is awaited
            total.rows, total.tokens = total.rows + part.rows, total.tokens + part.tokens
        if len(done) == len(answers):
            self._on_progress(total)


def _reason(error: Exception) -> str:
    """What Ray tells of a death, in short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.lower().startswith(("worker exit", "the actor died", "actor"))]
    return (told or lines or [type(error).__name__])[0][:200]
