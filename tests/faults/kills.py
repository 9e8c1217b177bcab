"""A real job killed before and after each of its numbered steps, then run again.

    python -m tests.faults.kills --seed 0 --count 500

Real Lance, LanceDB and files, the stand-in model, everything in one process without Ray, so that every step of driver
and worker has a number. Each point is a fork of one process that has imported everything and started nothing. A step
is one call of the storage seam, or one write, commit or index build of Lance. After the second run the tables must
equal those of an undisturbed one, `verify` must find nothing, and no draft may be left.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import lancedb
import polars as pl
import sentence_transformers
import torch

from pipeline import JobSpec, index, run, store, verify
from pipeline.storage import Disk
from tests.conftest import corpus_frame, save_model

CHECKOUT = Path(__file__).parents[2]
IMPORTED = (lancedb, pl, sentence_transformers)
ROWS, SHARD_ROWS, FRAGMENT_ROWS = 24, 4, 20
"""Five shards are merged, the sixth stays as it is."""
SECONDS = 60
"""A run that takes longer is ended, and counts as failed."""


STEPS = ("put", "sync", "replace", "link", "sync_folder", "delete", "remove_folder")
AT: list[Callable[[str, str], None]] = [lambda step, when: None]
"""What is told each step, before and after."""


def spied(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a step."""

    def step(*arguments: Any, **options: Any) -> Any:
        name = what
        if what in STEPS:
            name = f"{what} {'/'.join(Path(arguments[2 if what in ('replace', 'link') else 1]).parts[-3:])}"
        AT[0](name, "before")
        result = function(*arguments, **options)
        AT[0](name, "after")
        return result

    return step


def install() -> None:
    """Number everything."""
    for name in STEPS:
        setattr(Disk, name, spied(name, getattr(Disk, name)))
    store.draft_fragments = spied("lance write", store.draft_fragments)
    store._overwrite = spied("lance commit", store._overwrite)
    store.FRAGMENT_ROWS = FRAGMENT_ROWS
    index._ann = spied("lance index", index._ann)


def job(folder: Path, root: Path) -> JobSpec:
    """Six shards, three prefix tables, an index, Parquet, a filter column and a row that cannot be used."""
    return JobSpec.of(
        {
            "name": "kills",
            "root": str(root),
            "corpus": {
                "source": str(folder / "c.parquet"),
                "id": "_id",
                "text": ["text"],
                "filter": ["lang"],
                "shard_rows": SHARD_ROWS,
            },
            "model": {"name": str(folder / "model"), "precision": "float32"},
            "embed": {"parquet": True},
            "prefixes": [
                {"dim": 8, "precision": "binary"},
                {"dim": 8, "precision": "int8"},
                {"dim": 16, "precision": "float16", "index": {"kind": "ivf_flat"}},
            ],
            "transform": {"kind": "pca"},
            "evaluate": {"shortlists": [], "k": 3},
            "workers": {"count": 0},
        }
    )


def prepared(folder: Path, rows: int = ROWS) -> None:
    """Corpus and model; a null text sits in a middle shard."""
    save_model(folder / "model")
    frame = corpus_frame(rows)
    texts = frame["text"].to_list()
    texts[9] = None
    frame.with_columns(pl.Series("text", texts)).write_parquet(folder / "c.parquet")


def prepare_elsewhere(folder: Path) -> None:
    """In a process of its own: threads that exist before a fork are dead after it."""
    command = [sys.executable, "-m", "tests.faults.kills", "--prepare", str(folder)]
    subprocess.run(command, check=True, cwd=CHECKOUT)


def child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run something in a fork, killed after so many seconds; its exit status."""
    sys.stdout.flush()
    with warnings.catch_warnings():  # nothing was started before the fork, only imported
        warnings.simplefilter("ignore")
        process = os.fork()
    if process == 0:
        signal.alarm(SECONDS)
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)  # it is not reaped yet, so the number is its own
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def go(spec: JobSpec, until: int | None = None, steps: Path | None = None) -> None:
    """Run the job; SIGKILL at moment `until` (two a step), or write down all moments."""
    install()
    seen: list[str] = []

    def at(step: str, when: str) -> None:
        seen.append(f"{when} {step}")
        if len(seen) == until:
            os.kill(os.getpid(), signal.SIGKILL)

    AT[0] = at
    quiet()
    run(spec)
    if steps is not None:
        steps.write_text(json.dumps(seen))


def quiet() -> None:
    """Leave out what the suites do not look at."""
    brief()
    torch.set_num_threads(1)
    sys.modules["pipeline.run"]._Run._report = lambda self, generation: None
    logging.disable(logging.ERROR)


def brief() -> None:
    """Measure little; a killed process loses no written byte, so fsync may do nothing."""
    import pipeline.metrics as metrics
    import pipeline.sweep as sweep

    sweep.TIMED_QUERIES, metrics.RESAMPLES = 1, 50
    os.fsync = lambda handle: None


def tables(root: Path) -> dict[str, Any]:
    """What plain Lance reads, and what the job tells of it."""
    manifest = json.loads((root / "manifest.json").read_text())
    told = {name: (entry["rows"], entry["digest"]) for name, entry in manifest["tables"].items()}
    read = lance.dataset(str(root / "lancedb" / "documents.lance")).to_table().to_pydict()
    return {
        "told": told,
        "documents": read,
        "corpus": manifest["corpus"],
        "parquet": sorted(path.name for path in (root / "parquet/documents").iterdir()),
        "files": {name: len(list(root.glob(f"lancedb/{name}.lance/data/*"))) for name in manifest["tables"]},
    }


def check(root: Path, golden: Path) -> None:
    """AssertionError where something is not as after an undisturbed run."""
    a, b = tables(root), tables(golden)
    for name in a:
        assert a[name] == b[name], name
    assert not list((root / "_state").glob("drafts/*/*")), "drafts are left"
    found = verify.run(root)
    assert not found.problems, found.problems[:2]
    # What a kill leaves inside Lance (an index half built, the draft of a version) has no name that we could know.
    lances = ("/_indices/", "/_transactions/", "/_versions/.tmp")
    left = [name for name in found.unknown if not any(part in name for part in lances)]
    assert not left, left[:3]


def kill_points(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Figures of kills at `count` moments, spread evenly (all, where there are fewer)."""
    start = time.monotonic()
    prepare_elsewhere(folder)
    golden = folder / "golden"
    assert child(lambda: go(job(folder, golden), steps=folder / "steps.json")) == 0
    moments = json.loads((folder / "steps.json").read_text())
    chosen = (
        sorted({round(at * len(moments) / count) + 1 for at in range(count)})
        if count < len(moments)
        else range(1, len(moments) + 1)
    )
    failed, kinds, redone = [], Counter[str](), []
    for number in chosen:
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        spec = job(folder, root)
        ended = child(lambda: go(spec, until=number))
        before = set((root / "_state" / "embed").glob("[0-9]*.json")) | set((root / "_state/merge").glob("*.json"))
        files = len(list((root / "lancedb/documents.lance/data").glob("*.lance")))
        again = child(lambda: go(spec))
        checked = child(lambda: check(root, golden)) if again == 0 else 1
        redone.append(max(0, files - len(before)))
        kinds[moments[number - 1].split()[1]] += 1
        if ended != -signal.SIGKILL or again or checked:
            failed.append({"moment": number, "step": moments[number - 1], "exits": [ended, again, checked]})
    return {
        "suite": "kill points",
        "seed": seed,
        "moments": len(moments),
        "count": len(chosen),
        "identical": len(chosen) - len(failed),
        "kinds": dict(kinds),
        "most_shards_done_again": max(redone, default=0),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def random_instants(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Figures of SIGKILLs at instants drawn evenly from a run's time, up to five in a row on one root."""
    start, rng = time.monotonic(), random.Random(seed)
    prepare_elsewhere(folder)
    golden = folder / "golden"
    began = time.monotonic()
    assert child(lambda: go(job(folder, golden))) == 0
    length = time.monotonic() - began
    struck, finished, chains, failed = 0, 0, 0, []
    while struck < count:
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        spec = job(folder, root)
        for _ in range(rng.randrange(1, 6)):
            ended = child(lambda: go(spec), kill_after=rng.uniform(0.05, length))
            struck += ended == -signal.SIGKILL
            finished += ended == 0
            if ended not in (0, -signal.SIGKILL):
                failed.append({"chain": chains, "exit": ended})
            if ended == 0:
                break
        again = child(lambda: go(spec))
        checked = child(lambda: check(root, golden)) if again == 0 else 1
        if again or checked:
            failed.append({"chain": chains, "exits": [again, checked]})
        chains += 1
    return {
        "suite": "random instants",
        "seed": seed,
        "count": struck,
        "chains": chains,
        "came_through": finished,
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=500)
    options.add_argument("--random", action="store_true")
    options.add_argument("--prepare")
    asked = options.parse_args()
    if asked.prepare:
        prepared(Path(asked.prepare))
        return
    with tempfile.TemporaryDirectory() as folder:
        suite = random_instants if asked.random else kill_points
        result = suite(Path(folder), asked.count, asked.seed)
    text = json.dumps(result)
    print(text)
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
