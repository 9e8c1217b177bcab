"""Single flipped bits in committed files: does `verify` find each one, and name the file?

    python -m tests.faults.flips --seed 0 --count 2000

Makes one finished root with every kind of file, then flips bits, some files at a time, one bit in each; bytes and
times are put back. Prints {count, found, missed, files, kinds, seconds, seed} as JSON; exit code 1 for a missed one.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from pipeline import JobSpec, run, verify
from tests.conftest import corpus_frame, save_model
from tests.faults import kills

AT_ONCE = 20
NOT_COMMITTED = ("_state/locks/", "_state/drafts/", "_state/damaged/", "report.html", "query_log.parquet")
NO_TEXT = (7, 60)


def values(root: Path, corpus: Path, model: Path) -> dict[str, Any]:
    """A spec whose root has every kind of file: Parquet, indexes, quarantined rows, each codec, fitted artefacts."""
    return {
        "name": "flips",
        "root": str(root),
        "corpus": {
            "source": str(corpus), "id": "_id", "text": ["title", "text"], "keep": ["title"],
            "filter": ["lang", "year"], "shard_rows": 50,
        },
        "model": {"name": str(model)},
        "embed": {"parquet": True},
        "prefixes": [
            {"dim": 8, "precision": "binary"},
            {"dim": 16, "precision": "int8"},
            {"dim": 16, "precision": "float16", "index": {"kind": "ivf_flat"}},
            {"dim": 24, "precision": "float32"},
        ],
        "evaluate": {"shortlists": []},
        "workers": {"count": 0},
    }  # fmt: skip


def make(folder: Path, model: Path) -> JobSpec:
    """Run that spec on 120 rows, two of them without text."""
    without = pl.int_range(120).is_in(NO_TEXT)
    blanked = [pl.when(without).then(None).otherwise(pl.col(name)).alias(name) for name in ("title", "text")]
    corpus_frame().with_columns(blanked).write_parquet(folder / "corpus.parquet")
    spec = JobSpec.of(values(folder / "root", folder / "corpus.parquet", model))
    run(spec)
    return spec


def committed(root: Path) -> list[str]:
    """Every file that a record names or that is a record, by its name below the root."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return [name for name in names if not name.startswith(NOT_COMMITTED)]


def kind(name: str) -> str:
    """A file's name without numbers and hashes."""
    return re.sub(r"[0-9a-f]{8}[0-9a-f-]*|[0-9]+", "#", re.sub(r"[01]{24}[0-9a-f]+", "#", name))


@contextmanager
def flipped(root: Path, names: Sequence[str], chance: random.Random) -> Iterator[dict[str, tuple[int, int]]]:
    """One random bit of each file the other way round; gives (byte, bit) by name. Bytes and times are put back."""
    places, before = {}, {}
    for name in names:
        path = root / name
        data, stat = path.read_bytes(), path.stat()
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        places[name], before[name] = (at, bit), (data, stat)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    try:
        yield places
    finally:
        for name, (data, stat) in before.items():
            (root / name).write_bytes(data)
            os.utime(root / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rounds(names: Sequence[str], count: int, chance: random.Random) -> Iterator[list[str]]:
    """Groups of at most AT_ONCE different files, `count` in all; each file comes before any comes again.

    The generation and its copy never stand in one group: without both nothing is known of the rest.
    """
    ends = [name for name in names if name == "manifest.json" or name.startswith("generations/")]
    others = [name for name in names if name not in ends]
    while count > 0:
        chance.shuffle(others)
        order = [ends[0], *others, ends[-1]]
        for at in range(0, len(order), AT_ONCE):
            if count > 0:
                yield order[at : at + min(AT_ONCE, count)]
                count -= min(AT_ONCE, count, len(order) - at)


def measure(root: Path, seed: int, count: int) -> dict[str, Any]:
    """Flip `count` bits; what was found and what was missed."""
    chance, names, start = random.Random(seed), committed(root), time.perf_counter()
    missed, tried = [], 0
    assert verify.run(root).is_whole
    for group in rounds(names, count, chance):
        with flipped(root, group, chance) as places:
            found = verify.run(root)
        named = {name for name in group if name in found.damaged and any(name in one for one in found.problems)}
        missed += [
            {"file": name, "byte": places[name][0], "bit": places[name][1]} for name in group if name not in named
        ]
        tried += len(group)
    assert verify.run(root).is_whole
    seconds = round(time.perf_counter() - start, 1)
    kinds = sorted({kind(name) for name in names})
    return {
        "count": tried, "found": tried - len(missed), "missed": missed, "files": len(names), "kinds": kinds,
        "seconds": seconds, "seed": seed,
    }  # fmt: skip


def main() -> int:
    """Read the arguments, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    asked = parser.parse_args()
    kills.brief()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make(base, save_model(base / "model"))
        result = measure(base / "root", asked.seed, asked.count)
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
