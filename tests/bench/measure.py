"""One contender in one process: build it, or open it and time its settings one after another."""

import importlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.vectors import Matrix
from tests.bench.sets import K, Set

Setting = Mapping[str, Any]
Search = Callable[[Matrix, Setting], Matrix]
"""Unit float32 queries [q, D] and a setting to rows int64[q, 10], best first, -1 for none."""
BATCH, SMALL_BATCH = 64, 8
"""Queries of one batch; the small one where the large one would take longer than a setting may."""
MIN_QUERIES = 10


@dataclass(frozen=True)
class Contender:
    """One way to search. `build` names what it is built as, which several may share; `make` gives seconds of each step.

    `slow` ones run only when they are named, or with --slow. `coarse` settings give a shortlist, which has no recall.
    """

    name: str
    group: str
    build: str
    make: Callable[[Set, Path], dict[str, float]]
    start: Callable[[Set, Path], Search]
    settings: Callable[[Set], Sequence[Setting]]
    packages: tuple[str, ...] = ()
    slow: bool = False
    needs: Callable[[], str] = field(default=lambda: "")
    """Why it cannot run here; empty where it can."""

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        for package in self.packages:
            with suppress(ImportError):
                importlib.import_module(package)
                continue
            return f"{package} is not installed"
        return self.needs()


def build(contender: Contender, of: Set, folder: Path) -> dict[str, Any]:
    """Seconds of each step, the most memory held (bytes over imports) and bytes on disk."""
    contender.missing()
    folder.mkdir(parents=True)
    before = memory()["now"]
    start = time.perf_counter()
    steps = contender.make(of, folder)
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "steps": steps,
        "peak_bytes": max(0, memory()["peak"] - before),
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def measure(contender: Contender, of: Set, folder: Path, turn: int) -> dict[str, Any]:
    """Memory before and after opening, and the figures of each setting; odd turns take them from the last one on."""
    contender.missing()
    queries, truth = of.all_queries, of.truth
    before = memory()
    imported = before["now"]
    reset_peak()
    start = time.perf_counter()
    search = contender.start(of, folder)
    opened_seconds, opened = time.perf_counter() - start, memory()["now"]
    settings = list(enumerate(contender.settings(of)))
    rows = {}
    for number, setting in settings if turn % 2 == 0 else settings[::-1]:
        rows[number] = _timed(search, setting, of, queries, truth)
    held = memory()
    return {
        "memory": {
            "imports_bytes": imported,
            "opened_bytes": max(0, opened - imported),
            "serving_bytes": max(0, held["now"] - imported),
            "mapped_bytes": max(0, held["mapped"] - before["mapped"]),
            "peak_bytes": max(0, held["peak"] - imported),
        },
        "open_seconds": round(opened_seconds, 3),
        "settings": [rows[number] for number, _ in settings],
    }


def _timed(search: Search, setting: Setting, of: Set, queries: Matrix, truth: Matrix) -> dict[str, Any]:
    """Single queries until all are done or the time is up, then batches."""
    warm = queries[of.queries :] if len(queries) > of.queries else queries[:MIN_QUERIES]
    begun = time.perf_counter()
    for query in warm:
        search(query[None], setting)
        if time.perf_counter() - begun > of.seconds / 4:
            break
    milliseconds, found, begun = [], [], time.perf_counter()
    for number in range(of.queries):
        query = queries[number][None]
        start = time.perf_counter()
        found.append(search(query, setting))
        milliseconds.append((time.perf_counter() - start) * 1000)
        if number + 1 >= MIN_QUERIES and time.perf_counter() - begun > of.seconds:
            break
    median = float(np.median(milliseconds))
    small = median / 1000 * BATCH > of.seconds
    size, rate = _batches(search, setting, queries, SMALL_BATCH if small else BATCH, of.seconds)
    coarse = bool(setting.get("coarse"))
    return {
        "setting": dict(setting),
        "queries": len(milliseconds),
        "recall": None if coarse else recall(np.concatenate(found), truth[: len(found)]),
        "median_ms": median,
        "p95_ms": float(np.percentile(milliseconds, 95)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "batch": size,
        "batch_qps": rate,
    }


def _batches(search: Search, setting: Setting, queries: Matrix, size: int, seconds: float) -> tuple[int, float]:
    """Queries of a batch, and queries per second: the median of some batches after a first one."""
    batch = queries[np.arange(size) % len(queries)]
    begun, times = time.perf_counter(), []
    while len(times) < 2 or (len(times) < 6 and time.perf_counter() - begun < seconds / 4):
        start = time.perf_counter()
        search(batch, setting)
        times.append(time.perf_counter() - start)
    return size, size / float(np.median(times[1:]))


def recall(found: Matrix, truth: Matrix) -> float:
    """Share of the true ten that were found, mean over queries."""
    return float((found[:, :K, None] == truth[:, None, :]).any(axis=1).mean())


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, those of mapped files among them, at most since `reset_peak`."""
    keys = (("now", "VmRSS"), ("mapped", "RssFile"), ("peak", "VmHWM"))
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(lines[key].split()[0]) * 1024 for name, key in keys}
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"now": most, "mapped": 0, "peak": most}


def reset_peak() -> None:
    """Forget the most that was held; where the system refuses, imports count too."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
