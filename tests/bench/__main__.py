"""The search benchmark: this project beside LanceDB, faiss, usearch and exact search, on one set, in one run.

    python -m tests.bench --rows 500000 --dim 768 --out output/bench-search
    python -m tests.bench --vectors FOLDER --contenders exact,faiss,ours-resident

Every contender is built, and then measured in each round, in a process of its own; rounds alternate their order.
Writes results.json (after each round) and pareto.svg to the folder, the whole sweep to stdout.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
Step = Callable[[str, str, int], dict[str, Any]]
"""`build` or `measure`, a contender, the round."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the set, build everyone, measure in rounds, tell."""
    asked = _options().parse_args(arguments)
    from tests.bench import report, roster
    from tests.bench.sets import Set, prepare

    taken, missing = roster.chosen([name for name in asked.contenders.split(",") if name], asked.slow)
    for name, why in missing.items():
        _say(f"{name} is left out: {why}")
    asked.out = asked.out.resolve()
    work = asked.out / "work"
    source = None if asked.vectors is None else _files(asked)
    prefix = asked.prefix or ("plain" if source is None else "pca")
    wanted = Set(
        str(work), "synthetic" if source is None else str(source[0]), asked.rows, asked.dim, asked.queries, prefix
    )
    if not (asked.keep and (work / "set.json").is_file()):
        shutil.rmtree(work, ignore_errors=True)
        _say(f"preparing {wanted.rows:,} x {wanted.dim}" if source is None else f"preparing {source[0]}")
        prepare(wanted, source)
    of = Set.load(work)
    if (of.source, of.prefix) != (wanted.source, wanted.prefix) or source is None and of.rows != asked.rows:
        raise SystemExit(
            f"{work} was made of {of.rows:,} rows of {of.source}; choose another --out, or leave out --keep"
        )
    of = replace(of, seconds=asked.seconds, threads=asked.threads, quick=asked.quick)
    (work / "set.json").write_text(json.dumps(asdict(of)))
    step = _here(work) if asked.quick else _apart(work, asked.threads)
    failed: dict[str, str] = {}
    builds = _built(taken, work, step, failed)
    taken = [one for one in taken if one.build in builds and one.settings(of)]
    rounds: dict[str, list[dict[str, Any]]] = {one.name: [] for one in taken}
    for turn in range(asked.rounds):
        for one in taken if turn % 2 == 0 else taken[::-1]:
            _say(f"round {turn + 1} of {asked.rounds}: {one.name}")
            figures = _try(partial(step, "measure", one.name, turn), one.name, failed)
            rounds[one.name] += [] if figures is None else [figures]
        results = report.results(of, taken, builds, rounds, {**missing, **failed})
        (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if not asked.keep:
        shutil.rmtree(work)
    (asked.out / "pareto.svg").write_text(report.pareto(results))
    print(report.text(results))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=500_000)
    options.add_argument("--dim", type=int, default=768)
    options.add_argument("--vectors", type=Path, help="a folder with unit corpus and query vectors, .npy")
    options.add_argument("--corpus", default="*corpus.npy", help="name of the corpus in that folder")
    options.add_argument("--query-file", default="*queries.npy", help="name of the queries in that folder")
    options.add_argument("--out", type=Path, default=Path("output/bench-search"))
    options.add_argument("--contenders", default="", help="beginnings of names, with commas; all but slow ones if none")
    options.add_argument("--slow", action="store_true", help="those too that take long to build")
    options.add_argument("--queries", type=int, default=200, help="asked one at a time, for each setting")
    options.add_argument("--seconds", type=float, default=10.0, help="the most for one setting in a round")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--prefix", choices=("plain", "pca"), help="how peers cut; plain for synthetic vectors")
    options.add_argument("--keep", action="store_true", help="leave what was built, and use what is there already")
    options.add_argument(
        "--quick", action="store_true", help="few settings, short, in this process: a check, no result"
    )
    return options


def _built(taken: Sequence[Any], work: Path, step: Step, failed: dict[str, str]) -> dict[str, Any]:
    """Figures of every build; one that an earlier run kept is not built again."""
    builds: dict[str, Any] = {}
    for one in taken:
        kept = work / "builds" / f"{one.build}.json"
        if one.build in builds or one.build in failed:
            continue
        if not kept.is_file():
            _say(f"build {one.build}")
            shutil.rmtree(work / "builds" / one.build, ignore_errors=True)
            figures = _try(partial(step, "build", one.name, 0), one.build, failed)
            if figures is not None:
                kept.write_text(json.dumps(figures))
        if kept.is_file():
            builds[one.build] = json.loads(kept.read_text())
    return builds


def _files(asked: argparse.Namespace) -> tuple[Path, Path]:
    found = []
    for pattern in (asked.corpus, asked.query_file):
        fitting = sorted(asked.vectors.glob(pattern))
        if len(fitting) != 1:
            raise SystemExit(f"{asked.vectors}: {len(fitting)} files fit {pattern!r}; name one")
        found += fitting
    return found[0], found[1]


def _here(work: Path) -> Step:
    from tests.bench import worker

    return lambda name, contender, turn: worker.step(name, work, contender, turn)


def _apart(work: Path, threads: int) -> Step:
    def step(name: str, contender: str, turn: int) -> dict[str, Any]:
        out = work / "figures.json"
        command = [sys.executable, "-m", "tests.bench.worker", name, work, contender, turn, threads, out]
        subprocess.run([str(part) for part in command], cwd=CHECKOUT, check=True)
        return dict(json.loads(out.read_text()))

    return step


def _try(do: Callable[[], dict[str, Any]], name: str, failed: dict[str, str]) -> dict[str, Any] | None:
    """The figures of a step; None where its process failed, which is told and costs only its own figures."""
    start = time.perf_counter()
    try:
        figures = do()
    except subprocess.CalledProcessError:
        failed[name] = "its process failed"
        return None
    _say(f"  {time.perf_counter() - start:.1f} s")
    return figures


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
