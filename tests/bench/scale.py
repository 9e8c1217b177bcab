"""What 100,000 shards cost the driver: `python -m tests.bench.scale --shards 1000 10000 100000` (`make bench-scale`).

Nothing is embedded. Records are those that workers would leave (the description of a real Lance fragment in each), data
files are holes of the right size; the ledger, its files and the commits are real. Each step runs in a process of its
own, so that its peak of memory is its own; of a step that workers take part in, their share of the time is left out.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from pipeline import corpus, embed, merge, repair, standing, storage, store
from pipeline.drift import digest_of
from pipeline.embedder import COUNTERS, METERS, Facts
from pipeline.encoders.models import ModelFolder
from pipeline.ledger import Ledger
from pipeline.spec import JobSpec
from pipeline.storage import Disk, Root
from pipeline.tables import vector_array
from pipeline.workers import MAX_TRIES, Team, peak_memory_bytes

SHARD_ROWS, FILE_SHARDS, DIM = 8_192, 10, 384
FACTS = Facts("stub", None, "sha256:0", DIM, "torch", "float32", None, 64, {"document": "", "query": ""}, {})
FOLDER = ModelFolder("stub", None, "stub", "sha256:0", DIM, None, None)
CALLS = ("put", "replace", "link", "get", "digest", "size", "delete", "names", "sizes", "sync", "sync_folder")
PAGE = 1_000
"""Names that an object store lists in one answer."""


class Counting(Disk):
    """Counts calls, and the requests that the listings among them would be to an object store."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()


def _counted(name: str) -> Callable[..., Any]:
    real = getattr(Disk, name)

    def call(self: Counting, *arguments: Any) -> Any:
        result = real(self, *arguments)
        self.calls[name] += 1
        if name in ("names", "sizes"):
            self.calls["pages"] += 1 + len(result) // PAGE
            self.calls["listed"] += len(result)
        return result

    return call


for one in CALLS:
    if hasattr(Disk, one):
        setattr(Counting, one, _counted(one))


class Planned(Exception):
    """All is known that workers have to do."""


class Crew(Team):
    """In place of workers: shards are never embedded, merges are written down."""

    def __init__(self, root: Root) -> None:
        self.root, self.seconds, self.items = Root(root.path, root.fence), 0.0, 0

    def team(self, *arguments: Any, **options: Any) -> Any:
        """As a pool has it."""
        return _entered(self)

    def outcomes(self, items: Any, tries: int = MAX_TRIES) -> Iterator[Any]:
        """A record for each merge."""
        self.items = len(items)
        for item in items:
            if not isinstance(item, merge.Work):
                raise Planned
            start = time.perf_counter()
            record = merged(self.root, item)
            self.seconds += time.perf_counter() - start
            yield record


@contextmanager
def _entered(crew: Crew) -> Iterator[Crew]:
    yield crew


def spec_of(folder: Path, root: Path) -> JobSpec:
    """The job; its corpus is one file for ten shards."""
    return JobSpec.of(
        {
            "name": "scale",
            "root": str(root),
            "corpus": {"source": str(folder / "corpus"), "id": "_id", "text": "text", "shard_rows": SHARD_ROWS},
            "model": {"name": "stub"},
            "prefixes": [{"dim": 64, "precision": "binary"}],
            "workers": {"count": 0},
        }
    )


def fields(scan: corpus.Scan) -> dict[str, Any]:
    """The corpus' part of the fingerprint, as far as it is read here."""
    return {
        "scan": scan.key, "corpus.rows": scan.rows, "corpus.digest": scan.digest, "corpus.shard_rows": SHARD_ROWS,
    }  # fmt: skip


def template(root: Root) -> dict[str, Any]:
    """The description of a real fragment of `documents`."""
    rows = pa.table(
        {
            "row": pa.array([0]),
            "id": pa.array(["a"]),
            "text": pa.array(["a"]),
            "text_digest": pa.array([bytes(16)], pa.binary(16)),
            "vector": vector_array(np.zeros((1, DIM), np.float16)),
        }
    )
    (fragment,) = store.draft_fragments(root.draft_folder(), rows, rows.schema)
    return dict(fragment.to_json())


def fragment_of(root: Root, like: dict[str, Any], name: str, rows: int) -> dict[str, Any]:
    """The record's part of a data file, which is made as a hole."""
    path, size = f"{digest_of(name)}{digest_of(name)[:8]}.lance", rows * 900
    target = root.path / "lancedb/documents.lance/data" / path
    with target.open("wb") as file:
        file.truncate(size)
    fragment = {**like, "physical_rows": rows, "files": [{**like["files"][0], "path": path, "file_size_bytes": size}]}
    return {"fragments": [fragment], "files": {path: digest_of(path) * 2}}


def embedded(root: Root, like: dict[str, Any], number: int) -> dict[str, Any]:
    """What a worker leaves of a shard."""
    return {
        "shard": number, "rows": SHARD_ROWS, "set_aside": [], "quarantined": {}, "repaired": 0,
        **fragment_of(root, like, f"shard {number}", SHARD_ROWS), "digest": digest_of(str(number)) * 2,
        "peak_memory_bytes": 1_234_567_890, **{name: 123_456 + number for name in COUNTERS},
        **{name: 12.345 + number for name in METERS}, "batch_tokens": 1024,
    }  # fmt: skip


def merged(root: Root, work: merge.Work) -> dict[str, Any]:
    """What a worker leaves of a merge."""
    book = Ledger(root, "embed")
    records = [book.read(name) for name in work.shards]
    rows = sum(record["rows"] for record in records)
    return Ledger(root, "merge").add(
        work.name,
        {
            "group": work.name,
            "rows": rows,
            "shards": [{name: value for name, value in one.items() if name != "fragments"} for one in records],
            **fragment_of(root, records[0]["fragments"][0], work.name, rows),
            "merged_bytes": rows * 900,
            "merge_seconds": 1.0,
        },
    )


# Steps; each gives its seconds, and calls where it has a root of its own


def build(folder: Path, shards: int) -> dict[str, Any]:
    """The corpus, its scan, and a root in which all shards are embedded; seconds are those of the records."""
    (folder / "corpus").mkdir(parents=True)
    files = -(-shards // FILE_SHARDS)
    for number in range(files):
        (folder / f"corpus/{number:07d}.jsonl").write_text('{"_id": "a", "text": "a"}\n')
    spec = spec_of(folder, folder / "fresh")
    found = corpus.check(spec.corpus)
    counts = [FILE_SHARDS * SHARD_ROWS] * (files - 1)
    counts.append(shards * SHARD_ROWS - sum(counts))
    names = [unit.name for unit in corpus._units(found, spec.corpus)]
    summary = {
        "digest": "d", "counts": counts, "types": corpus._types_out({}), "reasons": {}, "repaired": 0,
        "files": [
            {"path": file.path, "rows": rows, "sha256": digest_of(file.path) * 2}
            for file, rows in zip(found, counts, strict=True)
        ],
        "spills": [digest_of(name) * 2 for name in names], "kept": None, "bytes": 0,
    }  # fmt: skip
    for name in ("fresh", "root"):
        root = Root(folder / name, 1)
        storage.prepare(root)
        Ledger(root, "corpus").add(digest_of(*names), summary)
        scan = corpus.run(spec.corpus, root, Crew(root))
        embed._begin(spec, FACTS, {**fields(scan), **embed._fixed_fields(spec, FOLDER)}, root)
    (root.path / "lancedb/documents.lance/data").mkdir(parents=True)
    like, book, seconds = template(root), Ledger(root, "embed"), 0.0
    for number in range(shards):
        record = embedded(root, like, number)
        start = time.perf_counter()
        book.add(f"{number:07d}", record)
        seconds += time.perf_counter() - start
    shutil.copytree(root.path, folder / "wide", copy_function=os.link)
    return {"seconds": seconds}


def _embed(folder: Path, name: str) -> dict[str, Any]:
    root, crew = Root(folder / name, 1, Counting()), Crew(Root(folder / name, 1))
    spec, start, commits = spec_of(folder, root.path), time.perf_counter(), [0.0]
    real = store.commit

    def timed(*arguments: Any) -> int:
        begun = time.perf_counter()
        version = real(*arguments)
        commits[0] = time.perf_counter() - begun
        return version

    scan = corpus.run(spec.corpus, root, crew)
    shards = corpus.shards(scan, spec.corpus, root)
    with mock.patch.object(store, "commit", timed), suppress(Planned):
        embed.run(spec, FOLDER, shards, fields(scan), scan.types, root, crew)
    seconds = time.perf_counter() - start - crew.seconds
    return {"seconds": seconds - commits[0], "commit": commits[0], "calls": root.disk.calls}


def _repair(folder: Path, name: str) -> dict[str, Any]:
    root, start = Root(folder / name, 1, Counting()), time.perf_counter()
    assert repair.run(root) == set()
    repair.remember(root)
    return {"seconds": time.perf_counter() - start, "calls": root.disk.calls}


def _status(folder: Path, name: str) -> dict[str, Any]:
    root, start = Root(folder / name, 0, Counting()), time.perf_counter()
    told = standing.run(root)
    assert told["embed"] == "done" and told["shards"]["left"] == 0
    return {"seconds": time.perf_counter() - start, "calls": root.disk.calls}


def unmerged() -> None:
    """As if a shard filled a fragment."""
    store.FRAGMENT_ROWS = SHARD_ROWS


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "records written (by workers)": build,
    "plan: nothing done yet": lambda folder, shards: _embed(folder, "fresh"),
    "resume: all embedded, to merge and seal": lambda folder, shards: _embed(folder, "root"),
    "rerun: all done": lambda folder, shards: _embed(folder, "root"),
    "repair: first look": lambda folder, shards: _repair(folder, "root"),
    "repair: nothing changed": lambda folder, shards: _repair(folder, "root"),
    "status": lambda folder, shards: _status(folder, "root"),
    "unmerged: all embedded, to seal": lambda folder, shards: unmerged() or _embed(folder, "wide"),
    "unmerged: all done": lambda folder, shards: unmerged() or _embed(folder, "wide"),
    "unmerged: status": lambda folder, shards: unmerged() or _status(folder, "wide"),
}


def step(name: str, folder: Path, shards: int) -> dict[str, Any]:
    """One step here; its figures."""
    before = peak_memory_bytes()
    figures = STEPS[name](folder, shards)
    return {**figures, "peak_mb": peak_memory_bytes() / 1e6, "imports_mb": before / 1e6}


def measured(shards: int, out: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Every step, each in a process of its own."""
    folder, found = out / f"work-{shards}", {}
    shutil.rmtree(folder, ignore_errors=True)
    for name in STEPS:
        command = [sys.executable, "-m", "tests.bench.scale", "--step", name, "--shards", str(shards), "--out", folder]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
            found[name] = json.loads(ended.stdout) if ended.returncode == 0 else {"failed": ended.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": f"more than {seconds:.0f} s"}
        print(f"{shards:>7} {name}: {found[name]}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return found


def growth(results: dict[int, dict[str, dict[str, Any]]], name: str) -> str:
    """Exponent of seconds between the two largest sizes: 1 is linear, 2 is quadratic."""
    last = [(shards, one[name]) for shards, one in sorted(results.items()) if "seconds" in one.get(name, {})][-2:]
    if len(last) < 2:
        return ""
    (few, less), (many, more) = last
    times = [one["seconds"] + one.get("commit", 0) for one in (less, more)]
    return f"{math.log(times[1] / times[0]) / math.log(many / few):.2f}"


def main() -> None:
    """The table on stdout, all figures in `scale.json`."""
    options = argparse.ArgumentParser()
    options.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options.add_argument("--out", type=Path, default=Path("output/bench-scale"))
    options.add_argument("--seconds", type=float, default=900, help="after which a step is given up")
    options.add_argument("--step", choices=STEPS)
    asked = options.parse_args()
    if asked.step:
        print(json.dumps(step(asked.step, asked.out, asked.shards[0])))
        return
    results = {shards: measured(shards, asked.out, asked.seconds) for shards in asked.shards}
    (asked.out / "scale.json").write_text(json.dumps(results, indent=2) + "\n")
    print("| step | " + " | ".join(f"{shards:,} shards" for shards in results) + " | exponent |")
    print("|---|" + "---|" * (len(results) + 1))
    for name in STEPS:
        cells = []
        for one in results.values():
            it = one[name]
            commit = f" + commit {it['commit']:.2f}" if it.get("commit") else ""
            cells.append("failed" if "failed" in it else f"{it['seconds']:.2f}{commit} s, {it['peak_mb']:.0f} MB")
        print(f"| {name} | " + " | ".join(cells) + f" | {growth(results, name)} |")


if __name__ == "__main__":
    main()
