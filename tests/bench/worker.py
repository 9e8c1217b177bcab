"""One step in a process of its own, on at most so many cores: `python -m tests.bench.worker STEP FOLDER … OUT`.

Threads are limited before NumPy and the engines are loaded, which read their limits then.
"""

import json
import os
import sys
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LANCE_CPU_THREADS", "RAYON_NUM_THREADS",
           "POLARS_MAX_THREADS", "TOKIO_WORKER_THREADS")  # fmt: skip


def limit(threads: int) -> None:
    """Let this process have only so many cores."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def step(name: str, work: Path, contender: str, turn: int) -> dict:
    """`build` or `measure` one contender; its figures."""
    from tests.bench import measure, roster
    from tests.bench.sets import Set

    one, of = roster.everyone()[contender], Set.load(work)
    folder = work / "builds" / one.build
    return measure.build(one, of, folder) if name == "build" else measure.measure(one, of, folder, turn)


def main() -> None:
    """Run a step and write its figures."""
    name, work, contender, turn, threads, out = sys.argv[1:]
    limit(int(threads))
    Path(out).write_text(json.dumps(step(name, Path(work), contender, int(turn))))


if __name__ == "__main__":
    main()
