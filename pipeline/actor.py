"""A worker as Ray runs it: it measures its items, and keeps its log below the root."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from pipeline.logs import WorkerLog
from pipeline.storage import Root
from pipeline.teams import Worker, called, leave_packed_folder
from pipeline.telemetry import Meters, node

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """What the workers of a stage are called, and where they keep their logs."""

    job: str
    stage: str
    root: Root | None

    def log(self, slot: int) -> str:
        """The name of one's log."""
        return f"{self.stage}-{slot}"


class Actor(Worker):
    """A worker on Ray, which measures its items and keeps its log below the root."""

    def __init__(self, setup: bytes, threads: int, labels: Labels, slot: int) -> None:
        super().__init__(setup, threads)
        leave_packed_folder()
        self._labels, self._slot = labels, slot
        self._begin_lock = threading.Lock()
        self._meters: Meters | None = None
        self._log: WorkerLog | None = None

    def run(self, item: Any) -> Any:
        """Do one item."""
        with self._begin_lock:
            meters = self._meters = self._meters or Meters(self._labels.job, self._labels.stage)
            if self._labels.root is not None and self._log is None:
                self._log = WorkerLog(self._labels.root, self._labels.log(self._slot))
                self._log.attach()
        begun, name = time.perf_counter(), f"{self._labels.stage} {called(item)}"
        try:
            result = super().run(item)
        except BaseException:
            meters.failed()
            log.exception("%s failed", name)
            self.save()
            raise
        seconds = time.perf_counter() - begun
        meters.done(result, seconds)
        log.info("%s done seconds=%.2f", name, seconds)
        if self._log is not None:
            self._log.save()
        return result

    def save(self) -> None:
        """Keep what was logged."""
        if self._log is not None:
            self._log.save(now=True)

    def where(self) -> str:
        """The id of its node; answered once the actor is alive."""
        return node()


def ping() -> None:
    """Asked of a node, to know whether it lives."""
