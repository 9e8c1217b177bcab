"""SIGKILL of a real job's driver or worker at random instants, run again until it ends; killed again while it resumes.

    python -m tests.faults.random_kills --seed 0 --count 200

Real processes, Ray and Lance, the stand-in model, one Ray cluster that every driver joins by address. A kill strikes
the driver or one of the job's own workers, found by their process numbers. After the last run: the same tables as an
undisturbed one, every row once, in one fragment, and `verify` finds nothing.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults import kills

SHARDS = 60
SECONDS = 120


def job(folder: Path, root: Path, address: str) -> Path:
    """A spec on disk: sixty small shards on Ray."""
    values = kills.job(folder, root).model_dump(mode="json", exclude_defaults=True)
    values["corpus"] |= {"source": [str(folder / "c.parquet")], "shard_rows": 4}
    values["workers"] = {"count": 2, "address": address}
    path = folder / f"{root.name}.yaml"
    path.write_text(json.dumps(values))
    return path


def start(path: Path, log: Path) -> subprocess.Popen[bytes]:
    """The job as a process."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=out,
            cwd=kills.CHECKOUT,
            start_new_session=True,
        )


OTHERS = (b"ray::IDLE", b"ray::DashboardAgent", b"ray::RuntimeEnv")
"""Titles of Ray's processes that hold no actor; one with an actor bears what it does."""


def workers(root: Path) -> list[int]:
    """Processes that hold an actor of some job on this cluster; only this suite's cluster has them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                environment = (entry / "environ").read_bytes()
                title = (entry / "cmdline").read_bytes()
                if title.startswith(b"ray::") and not title.startswith(OTHERS) and MARK.encode() in environment:
                    found.append(int(entry.name))
    return found


MARK = "MATRYOSHKA_RANDOM_KILLS"


def chain(folder: Path, number: int, address: str, rng: random.Random, left: int) -> dict[str, Any]:
    """One root: kills until the job came through or `left` kills are spent, then one undisturbed run."""
    root, log = folder / f"root{number}", folder / f"root{number}.log"
    path, struck = job(folder, root, address), {"driver": 0, "worker": 0}
    most = rng.randrange(1, 6)
    while sum(struck.values()) < min(most, left):
        process = start(path, log)
        until = time.monotonic() + rng.uniform(1.5, 9.0)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        victims = workers(root)
        if victims and rng.random() < 0.5:
            struck["worker"] += 1
            with suppress(ProcessLookupError):
                os.kill(rng.choice(victims), signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 3))
        if process.poll() is None:
            struck["driver"] += 1
            process.kill()
        process.wait()
    process = start(path, log)
    code = process.wait(SECONDS)
    embedded = re.findall(r"embed shard=(\d+) ", log.read_text())
    return {"code": code, "root": root, "struck": struck, "told": len(embedded)}


def run(seed: int, count: int, minutes: float) -> dict[str, Any]:
    """Figures of `count` kills."""
    import ray

    began = time.monotonic()
    os.environ[MARK] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(kills.CHECKOUT)
    rng = random.Random(seed)
    failed, kills_done, chains = [], {"driver": 0, "worker": 0}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, "-m", "tests.faults.random_kills", "--prepare", name]
        subprocess.run(prepare, check=True, cwd=kills.CHECKOUT)
        golden = folder / "golden"
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        address = context.address_info["address"]
        try:
            assert start(job(folder, golden, address), folder / "golden.log").wait(SECONDS) == 0
            while sum(kills_done.values()) < count and time.monotonic() < began + 60 * minutes:
                one = chain(folder, chains, address, rng, count - sum(kills_done.values()))
                chains += 1
                for what, times in one["struck"].items():
                    kills_done[what] += times
                files = len(list((one["root"] / "lancedb/documents.lance/data").glob("*.lance")))
                check = [sys.executable, "-m", "tests.faults.random_kills", "--check", str(one["root"]), str(golden)]
                checked = subprocess.run(check, cwd=kills.CHECKOUT, capture_output=True, text=True, check=False)
                if one["code"] or checked.returncode or files != 1:
                    failed.append(
                        {"chain": chains - 1, "code": one["code"], "files": files, "why": checked.stderr[-300:]}
                    )
                shutil.rmtree(one["root"])
        finally:
            ray.shutdown()
    return {
        "suite": "random kills",
        "seed": seed,
        "count": sum(kills_done.values()),
        **kills_done,
        "chains": chains,
        "rows_lost_or_doubled": 0 if not failed else "see failed",
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=200)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--prepare")
    options.add_argument("--check", nargs=2)
    asked = options.parse_args()
    if asked.prepare:
        kills.prepared(Path(asked.prepare), 4 * SHARDS)
        return
    if asked.check:
        kills.check(*(Path(one) for one in asked.check))
        return
    result = run(asked.seed, asked.count, asked.minutes)
    print(json.dumps(result))
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
