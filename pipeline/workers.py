"""Who does the work: Ray actors that pull items, or this process.

A worker that dies is replaced and its item tried again; one that is lost with its node is no fault of its item's.
Workers come and go: items wait here, and go only to actors that are alive.
"""

import itertools
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType
from typing import Any

from pipeline import logs, placement, stopping
from pipeline.actor import Actor, Labels, ping
from pipeline.errors import DeviceLost, PipelineError, StaleError
from pipeline.placement import Node, Plan
from pipeline.spec import Workers
from pipeline.storage import Root
from pipeline.teams import (
    MAX_TRIES,
    Died,
    Handler,
    LocalTeam,
    OnProgress,
    Progress,
    Setup,
    Team,
    called,
    give_back_memory,
    leave_packed_folder,
    peak_memory_bytes,
)
from pipeline.telemetry import Meters

__all__ = [
    "MAX_TRIES", "Died", "Handler", "OnProgress", "Pool", "Progress", "Setup", "Team", "give_back_memory",
    "peak_memory_bytes",
]  # fmt: skip

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TELL_SECONDS = 60.0
"""Between two lines of the log while no worker is alive."""
SOON_SECONDS = 20.0
"""In which a worker comes where its node has room."""
TRUTH_SECONDS = 30.0
"""In which Ray hears that a node is dead."""
SAVE_SECONDS = 2.0
"""That workers get to keep their logs before they are ended."""
MAX_STILLBORN = 3
"""Workers in a row that may end before they begin."""
MAX_NODES = 6
"""Nodes that an item may lose beside its tries, before it is held to end them itself (by memory, for one)."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Vectors never pass through the object store; receipts and samples fit."""
_numbers = itertools.count(1)
"""An actor's name is taken until Ray has forgotten it, so each has a number of its own in this process."""


class Pool:
    """Workers of one run; Ray starts when the first team is needed, and ends only if it was started here.

    `job` and `stage` are what Ray and its metrics call them; their logs are kept below `root`.
    """

    def __init__(self, settings: Workers, job: str = "job", root: Root | None = None) -> None:
        self._settings, self._job, self._root = settings, job, root
        self.stage = "work"
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
            made = self._start()
            if not self._settings.address and made.limit == 1 and self._settings.cpus == "auto":
                made = replace(made, shared=False)  # an environment of its own costs 0.7 s a worker (measured)
            self._plan = made
            more = f" most={made.limit}" if made.limit > made.count else ""
            more += f" memory_gb={made.memory / 1e9:g}" if made.memory else ""
            log.info("workers count=%d threads=%d gpus=%g%s", made.count, made.threads, made.gpus, more)
        return self._plan

    def _start(self) -> Plan:
        cores = len(os.sched_getaffinity(0))
        if self._settings.count == 0:
            return placement.plan(self._settings, [Node(cores, 0 if self._settings.gpus == "auto" else 1)])
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        leave_packed_folder()
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
        resources = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        nodes = [Node(int(one.get("CPU", 0)), int(one.get("GPU", 0)), int(one.get("memory", 0))) for one in resources]
        return placement.plan(self._settings, nodes)

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
            yield LocalTeam(setup, plan.threads, on_progress)
            return
        labels = Labels(self._job, self.stage, self._root)
        team = RayTeam(self._ray, setup, plan, on_progress, plan.gpus if gpus else 0, lookahead, labels)
        try:
            yield team
        finally:
            team.close()


@dataclass(frozen=True)
class _Try:
    """An item, and the nodes on which it has lost a worker."""

    item: Any
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Member:
    """An actor that is alive, its node, and its number in the team, which the next one takes over."""

    actor: Any
    node: str
    slot: int


class RayTeam(Team):
    """Ray actors, up to `lookahead` items in flight on each.

    An item whose worker died is tried again alone, so that no neighbour is blamed for what it does.
    """

    def __init__(
        self,
        ray: ModuleType,
        setup: Setup,
        plan: Plan,
        on_progress: OnProgress | None,
        gpus: float,
        lookahead: int,
        labels: Labels,
    ) -> None:
        self._ray, self._plan, self._on_progress, self._lookahead = ray, plan, on_progress, lookahead
        self._setup: bytes = ray.cloudpickle.dumps(setup)
        self._labels, self._meters = labels, Meters(labels.job, labels.stage)
        options: dict[str, Any] = {
            "num_cpus": plan.threads,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_concurrency": lookahead + 1,  # one call more: questions about its progress
        }
        if plan.environment:
            options["runtime_env"] = {"env_vars": plan.environment}
        if plan.memory:
            options["memory"] = plan.memory
        self._remote = ray.remote(**options)(Actor)
        self._members: list[_Member] = []
        self._coming = dict[Any, tuple[Any, int]]()  # actor and slot, by what it answers once it is alive
        self._waiting = 0
        self._stillborn = 0
        self._polled = self._alive = self._asked = time.monotonic()

    def close(self) -> None:
        """Free the actors' resources; their logs are kept first."""
        saved = [member.actor.save.remote() for member in self._members]
        if saved:
            self._ray.wait(saved, num_returns=len(saved), timeout=SAVE_SECONDS)
        for member in self._members:
            self._ray.kill(member.actor)
        self._call_off()
        self._members = []
        self._meters.queue(0, 0)

    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        """Do every item; results as they come."""
        waiting = deque(_Try(item) for item in items)
        busy = dict[Any, tuple[_Member, _Try]]()
        while waiting or busy:
            self._ask_for(min(self._plan.limit, len(items), max(self._plan.count, len(waiting))) if waiting else 0)
            while waiting and (member := self._free(busy.values(), waiting)) is not None:
                one = waiting.popleft()
                run = member.actor.run.options(name=f"{self._labels.stage} {called(one.item)}")
                busy[run.remote(one.item)] = (member, one)
            if not waiting:
                self._call_off()
            self._waiting = len(waiting)
            for reference in self._ready(list(busy)):
                member, one = busy.pop(reference)
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    lost = self._bury(member, one, error)
                    if not self._is_to_blame(lost, tries):
                        waiting.appendleft(lost)
                        continue
                    result = Died(one.item, len(lost.lost), _reason(error))
                yield result

    def _ask_for(self, count: int) -> None:
        """Have so many actors alive or asked for."""
        while len(self._members) + len(self._coming) < count:
            taken = {member.slot for member in self._members} | {slot for _, slot in self._coming.values()}
            slot = next(number for number in itertools.count(1) if number not in taken)
            name = f"{self._labels.job} {self._labels.stage} {slot} #{next(_numbers)}"
            actor = self._remote.options(name=name).remote(self._setup, self._plan.threads, self._labels, slot)
            self._coming[actor.where.remote()] = (actor, slot)
            self._asked = time.monotonic()

    def _call_off(self) -> None:
        """Those that have not come are not needed any more."""
        for actor, _ in self._coming.values():
            self._ray.kill(actor)
        self._coming = {}

    def _arrived(self, reference: Any) -> None:
        """An actor is alive, or ended before it began; PipelineError where that goes on."""
        actor, slot = self._coming.pop(reference)
        try:
            self._members.append(_Member(actor, self._ray.get(reference), slot))
            self._stillborn = 0
            log.info("worker began number=%d node=%s", slot, self._members[-1].node[:8])
        except self._ray.exceptions.RayError as error:
            self._stillborn += 1
            log.warning("worker did not start because=%s", _reason(error))
            if self._stillborn >= MAX_STILLBORN:
                raise PipelineError(
                    f"no worker starts ({_reason(error)}); run again when the cluster is mended"
                ) from None

    def _free(self, busy: Collection[tuple[_Member, _Try]], waiting: Sequence[_Try]) -> _Member | None:
        """The worker with the least to do that may have the next item; some are left for those about to come."""
        loads = {member.actor: 0 for member in self._members}
        for member, one in busy:
            if member.actor in loads:
                loads[member.actor] += self._lookahead if one.lost else 1
        least = min(self._members, key=lambda member: loads[member.actor], default=None)
        soon = len(self._coming) if time.monotonic() - self._asked < SOON_SECONDS else 0
        share = math.ceil((len(waiting) + len(busy)) / max(1, len(self._members) + soon))
        most = 1 if waiting[0].lost else min(share, self._lookahead)
        return least if least and loads[least.actor] < most else None

    def _bury(self, member: _Member, one: _Try, error: Exception) -> _Try:
        """Give up a worker that died, its item with one loss more; what is no death is raised."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause = getattr(error, "cause", None)
            if not isinstance(cause, DeviceLost):
                raise cause if isinstance(cause, PipelineError) else error from None
        where = member.node
        if isinstance(error, self._ray.exceptions.ActorUnavailableError):  # why is known a little later
            found = self._what_is_wrong(member.actor.where.remote())
            error, where = (error, "") if found is None else (found, where)
        log.warning("worker died try=%d item=%s because=%s", len(one.lost) + 1, called(one.item), _reason(error))
        if member in self._members:  # with several items it dies only once
            self._members.remove(member)
            self._ray.kill(member.actor)  # it may be out of reach only, or hold a device that answers nothing
            self._meters.failed()
            if self._labels.root is not None:
                told = f"died with {called(one.item)} in hand: {_reason(error)}"
                logs.note(self._labels.root, self._labels.log(member.slot), told)
        return _Try(one.item, (*one.lost, where))

    def _is_to_blame(self, one: _Try, tries: int) -> bool:
        """Whether workers died of this item: so many on nodes that live on, or with too many nodes."""
        if len(one.lost) < tries:
            return False
        if len(one.lost) >= tries + MAX_NODES:
            return True
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return sum(node in alive for node in one.lost) >= tries and self._lives(one.lost[-1])

    def _lives(self, node: str) -> bool:
        """Whether a node does what it is asked; that it is dead Ray hears only after a while."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not node:
            return False
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ask = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(ping)
        return self._what_is_wrong(ask.remote()) is None

    def _what_is_wrong(self, reference: Any) -> Exception | None:
        """The error of a question, or that no answer came in time."""
        try:
            self._ray.get(reference, timeout=TRUTH_SECONDS)
        except self._ray.exceptions.RayError as error:
            return error  # type: ignore[no-any-return]
        return None

    def _ready(self, busy: list[Any]) -> list[Any]:
        """Items that are finished; after a signal those at work get a while to end."""
        with stopping.patience():  # raises Stopped at its end, after a signal
            while True:
                ready, _ = self._ray.wait([*busy, *self._coming], num_returns=1, timeout=POLL_SECONDS)
                if stopping.asked():
                    if busy:
                        self._ray.wait(busy, num_returns=len(busy), timeout=stopping.left())
                    return []
                for reference in [one for one in ready if one in self._coming]:
                    self._arrived(reference)
                self._poll()
                if ready:
                    return [one for one in ready if one in busy]

    def _poll(self) -> None:
        """Ask the workers how far they are, at most once in a while; tell where there are none."""
        now = time.monotonic()
        self._meters.queue(self._waiting, len(self._members))
        if self._members:
            self._alive = now
        elif now - self._alive > TELL_SECONDS:
            self._alive = now
            log.warning("workers none is alive, %d asked for: the cluster has no room for them now", len(self._coming))
        if self._on_progress is None or not self._members or now - self._polled < POLL_SECONDS / 2:
            return
        self._polled = now
        answers = [member.actor.progress.remote() for member in self._members]
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
    told = [line for line in lines if line.lower().startswith(("the actor is dead because", "the actor died because"))]
    return (told or lines or [type(error).__name__])[0][:200]
