"""Two processes go for one root at the same moment: exactly one may have it.

    python -m tests.faults.races --count 1000

Real processes and files. Both wait at a barrier, take the lock, hold it until both have tried, and give it back.
Every third race the lock's last holder is a dead process, which has to be taken over first.
"""

import argparse
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from pipeline import lock, storage
from pipeline.errors import LockedError
from pipeline.storage import Root

RACERS = 2
SECONDS = 60


def racer(folder: str, count: int, barrier: Barrier, results: Any) -> None:
    """Race on root after root; what happened to each: the fencing number that was won, or None."""
    logging.disable(logging.ERROR)
    won = []
    for number in range(count):
        root = Root(Path(folder) / str(number))
        storage.prepare(root)
        barrier.wait(SECONDS)
        try:
            with lock.lock(root, beat=None) as held:
                won.append(held.fence)
                barrier.wait(SECONDS)
        except LockedError:
            won.append(None)
            barrier.wait(SECONDS)
        barrier.wait(SECONDS)
    results.put(won)


def run(count: int) -> dict[str, Any]:
    """Figures of `count` races."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(RACERS), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        owner = replace(lock.Owner.me(), process=dead.pid, started=str(lock._started(dead.pid)))
        dead.wait()
        for number in range(0, count, 3):
            root = Root(Path(folder) / str(number))
            storage.prepare(root)
            lock.take(root, owner)
        racers = [context.Process(target=racer, args=(folder, count, barrier, results)) for _ in range(RACERS)]
        for one in racers:
            one.start()
        outcomes = list(zip(*(results.get(timeout=SECONDS + count) for _ in racers), strict=True))
        for one in racers:
            one.join(SECONDS)
    winners = [sum(fence is not None for fence in outcome) for outcome in outcomes]
    return {
        "suite": "races",
        "count": count,
        "single_winners": winners.count(1),
        "both": winners.count(2),
        "none": winners.count(0),
        "taken_over": len(range(0, count, 3)),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--count", type=int, default=1000)
    asked = options.parse_args()
    result = run(asked.count)
    print(json.dumps(result))
    sys.exit(result["single_winners"] != asked.count)


if __name__ == "__main__":
    main()
