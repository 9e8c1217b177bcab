"""Real jobs in any order of starts, crashes, races, changes and damage, against what must be true of their root.

    python -m tests.faults.machine --seed 0 --minutes 5

Every example is one root in this process, with real Lance and files and the stand-in model. A crash is an exception at
a numbered step of the storage seam, after which every further step raises too, so that nothing that ends a run can
change the disk; the lock's holder then counts as a dead process. Beside the root stands a dictionary of what must be
true. A failure is told with its steps, and its seed gives the same steps again.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import lance
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed as seeded, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test, initialize, precondition, rule

from pipeline import JobSpec, index, lock, open_index, run, store, verify
from pipeline.embedder import Embedder
from pipeline.errors import LockedError, StaleError
from pipeline.storage import Disk, Root
from tests.conftest import corpus_frame, save_model
from tests.faults import kills

ROWS, SHARD_ROWS = 24, 4
SHARDS = ROWS // SHARD_ROWS
TOGETHER = 2
"""Shards to a fragment."""
FRAGMENTS = SHARDS // TOGETHER
NULL_ROW = 9
KINDS = ("pca", "order", "none")
PREFIXES = {
    "prefix_8_binary": {"dim": 8, "precision": "binary"},
    "prefix_16_int8": {"dim": 16, "precision": "int8"},
    "prefix_16_float16": {"dim": 16, "precision": "float16", "index": {"kind": "ivf_flat"}},
}
FIRST: dict[str, Any] = {"kind": "pca", "tables": ["prefix_8_binary", "prefix_16_int8"], "parquet": False}
"""What every root is asked for at first."""
REFUSED = {
    "corpus.text": ["title", "text"],
    "corpus.id": None,
    "corpus.keep_text": False,
    "corpus.shard_rows": 5,
    "embed.vectors": "float32",
    "model.batch_tokens": 77,
    "model.prompts": {"document": "w001 "},
}
RECORDS = ("embed", "merge", "derive", "fit", "corpus", "parameters", "parquet", "kept")
"""Folders of `_state` whose files stand until something better stands in their place."""
MOMENTS = st.one_of(st.integers(1, 40), st.integers(1, 190), st.integers(1, 440), st.integers(1, 650))
"""Two a step: a job from nothing has some 650, one that derives again 440, one with nothing to do 190."""


class Crash(BaseException):
    """The process is gone; only the disk is left."""


def values(folder: Path, root: Path, kind: str, tables: Sequence[str], parquet: bool) -> dict[str, Any]:
    """A small job: six shards, a filter column, a row that cannot be used."""
    return {
        "name": "machine",
        "root": str(root),
        "corpus": {
            "source": str(folder / "c.parquet"),
            "id": "_id",
            "text": "text",
            "filter": ["lang"],
            "shard_rows": SHARD_ROWS,
        },
        "model": {"name": str(folder / "model"), "precision": "float32", "batch_tokens": 512},
        "embed": {"parquet": parquet},
        "prefixes": [PREFIXES[name] for name in tables],
        "transform": {"kind": kind, "accept_loss": True},
        "evaluate": {"shortlists": [], "k": 3},
        "workers": {"count": 0},
    }


@dataclass
class World:
    """What all examples share: corpus, model, what undisturbed runs gave, a finished root, and the spies."""

    folder: Path
    golden: dict[str, dict[str, Any]] = field(default_factory=dict)
    embedded: list[int] = field(default_factory=list)
    """Shards that went through the model, in order."""
    counts: Counter[str] = field(default_factory=Counter)
    script: list[str] = field(default_factory=list)
    """Steps of the example at work, or of the one that failed last."""

    @property
    def root(self) -> Path:
        """Where every example has its root: the same place, so that a finished one can be put back."""
        return self.folder / "root"

    @property
    def finished(self) -> Path:
        """A finished root, set aside."""
        return self.folder / "finished"

    def spec(self, **asked: Any) -> JobSpec:
        """The job as it is asked for."""
        return JobSpec.of(values(self.folder, self.root, **asked))


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Prepare everything; steps are numbered and embeddings counted until it ends."""
    made = World(folder)
    rows, store.FRAGMENT_ROWS = store.FRAGMENT_ROWS, TOGETHER * SHARD_ROWS
    save_model(folder / "model")
    frame = corpus_frame(ROWS)
    texts = [None if number == NULL_ROW else text for number, text in enumerate(frame["text"])]
    frame.with_columns(pl.Series("text", texts)).write_parquet(folder / "c.parquet")
    for kind in KINDS:
        run(JobSpec.of(values(folder, folder / kind, kind, list(PREFIXES), parquet=False)))
        made.golden[kind] = seen(folder / kind)
    run(made.spec(**FIRST))
    made.root.rename(made.finished)
    embed = Embedder._embed

    def counted(self: Embedder, work: Any) -> Any:
        made.embedded.append(work.shard.number)
        return embed(self, work)

    with pytest.MonkeyPatch.context() as patch:
        for name in kills.STEPS:
            patch.setattr(Disk, name, kills.spied(name, getattr(Disk, name)))
        patch.setattr(store, "draft_fragments", kills.spied("lance write", store.draft_fragments))
        patch.setattr(store, "_overwrite", kills.spied("lance commit", store._overwrite))
        patch.setattr(index, "_ann", kills.spied("lance index", index._ann))
        patch.setattr(Embedder, "_embed", counted)
        yield made
    store.FRAGMENT_ROWS = rows


def seen(root: Path) -> dict[str, Any]:
    """What readers get from the newest generation: rows, digests, and the answers to two queries from every table."""
    opened = open_index(root)
    tables = opened.generation["tables"]
    names = [name for name in tables if name.startswith("prefix_")]
    queries = np.random.default_rng(0).standard_normal((2, opened.documents.info.full_dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    answers = {name: opened.search(queries, k=5, cascade=[(name, ROWS)]).to_dicts() for name in names}
    version = tables["documents"]["version"]
    return {
        "number": opened.generation["generation"],
        "kind": opened.generation["spec"]["transform"]["kind"],
        "parquet": opened.generation["spec"]["embed"]["parquet"],
        "rows": lance.dataset(str(root / "lancedb/documents.lance"), version=version).to_table().to_pylist(),
        "documents": tables["documents"]["digest"],
        "tables": {name: tables[name]["digest"] for name in names},
        "exact": opened.exact(queries, k=5).to_dicts(),
        "answers": answers,
    }


@contextmanager
def crashing(moment: int) -> Iterator[list[str]]:
    """Raise Crash at a moment (two a step) and at every later one, in a process that counts as dead afterwards."""
    steps: list[str] = []
    me = lock.Owner.me()

    def at(step: str, when: str) -> None:
        if threading.current_thread() is threading.main_thread():  # beats of the lock are no steps
            steps.append(f"{when} {step}")
            if len(steps) >= moment:
                raise Crash(steps[moment - 1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.Owner, "me", classmethod(lambda kind: replace(me, started="before")))
        before, kills.AT[0] = kills.AT[0], at
        try:
            yield steps
        finally:
            kills.AT[0] = before


def stamps(root: Path, *folders: str) -> dict[str, tuple[int, int]]:
    """Size and time of every file in some folders, by name."""
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {
        path.relative_to(root).as_posix(): (stat.st_size, stat.st_mtime_ns) for path in found for stat in [path.stat()]
    }


PUBLISHED: tuple[str, ...] = (
    "lancedb",
    "generations",
    "parquet",
    "_state/embed",
    "_state/merge",
    "_state/derive",
    "_state/fit",
    "_state/parameters",
)


def is_finished(machine: "Machine") -> bool:
    """Whether the last run came to its end, and nothing was damaged since."""
    return bool(machine.must["done"]) and not machine.must["crashed"] and not machine.must["damaged"]


def is_begun(machine: "Machine") -> bool:
    """Whether the root keeps to what it was begun with, and nothing is damaged."""
    begun = any((machine.world.root / f"_state/{name}.json").exists() for name in ("job", "job.copy"))
    return begun and not machine.must["damaged"]


class Machine(RuleBasedStateMachine):
    """One root; `must` is what has to be true of it."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.script = []
        self.world.counts["examples"] += 1
        shutil.rmtree(self.world.root, ignore_errors=True)
        self.asked: dict[str, Any] = {**FIRST, "tables": list(FIRST["tables"])}
        self.must: dict[str, Any] = {
            "done": None,  # what the newest generation was asked for
            "tried": [],  # what runs that were cut short since were asked for
            "crashed": False,
            "damaged": None,
            "embedded": SHARDS,  # shards that went through the model when all is done, all runs together
            "records lost": 0,  # shards whose record, or merge, was damaged: they may be lost, and leave a file
        }
        self.world.embedded.clear()

    def say(self, step: str) -> None:
        """Note a step."""
        self.world.script.append(step)
        self.world.counts["steps"] += 1
        self.world.counts[step.partition(" ")[0]] += 1

    def run(self, **overrides: Any) -> dict[str, Any]:
        """Run the job as it is asked for now."""
        return run(self.world.spec(**{**self.asked, **overrides}))

    def finish(self) -> None:
        """Run to the end; everything must be as the dictionary says."""
        was_idle = is_finished(self) and self.must["done"] == self.asked
        before, calls = stamps(self.world.root, *PUBLISHED), len(self.world.embedded)
        generation = self.run()
        if was_idle:
            assert stamps(self.world.root, *PUBLISHED) == before
            assert len(self.world.embedded) == calls
        self.came_through(generation)

    def came_through(self, generation: dict[str, Any]) -> None:
        """Compare everything after a run that ended well."""
        root = self.world.root
        self.must |= {"done": {**self.asked}, "tried": [], "crashed": False, "damaged": None}
        self.same_as_undisturbed()
        assert sorted(set(generation["tables"]) - {"documents", "parameters"}) == sorted(self.asked["tables"])
        found = verify.run(root)
        assert found.is_whole, found.problems[:2]
        assert not list((root / "_state").glob("drafts/*/*")), "drafts are left"
        held = {name for name in generation["files"] if name.startswith("lancedb/documents.lance/data/")}
        there = set(stamps(root, "lancedb/documents.lance/data"))
        assert held <= there
        assert FRAGMENTS <= len(there) <= FRAGMENTS + self.must["records lost"], sorted(there)
        assert len(list(root.glob("parquet/documents/*.parquet"))) >= FRAGMENTS * self.asked["parquet"]

    def same_as_undisturbed(self) -> None:
        """What a reader sees is whole, and is one of the generations that can be there."""
        now = seen(self.world.root)
        golden = self.world.golden[now["kind"]]
        for name in ("rows", "documents", "exact"):
            assert now[name] == golden[name], name
        for name in now["tables"]:
            assert now["tables"][name] == golden["tables"][name], name
            assert now["answers"][name] == golden["answers"][name], name
        allowed = [self.must["done"], *self.must["tried"]]
        assert any(
            (now["kind"], sorted(now["tables"]), now["parquet"]) == (one["kind"], sorted(one["tables"]), one["parquet"])
            for one in allowed
        )

    def refused(self, spec: JobSpec, error: type[Exception], told: str) -> None:
        """A run that must change nothing that was published."""
        before, calls = stamps(self.world.root, *PUBLISHED), len(self.world.embedded)
        with pytest.raises(error, match=told):
            run(spec)
        assert stamps(self.world.root, *PUBLISHED) == before
        assert len(self.world.embedded) == calls

    @initialize(on_a_finished_root=st.booleans())
    def begin(self, on_a_finished_root: bool) -> None:
        self.say(f"begin on_a_finished_root={on_a_finished_root}")
        if on_a_finished_root:
            shutil.copytree(self.world.finished, self.world.root)
            self.world.embedded.extend(range(SHARDS))
            self.must["done"] = {**self.asked}

    @rule()
    def start(self) -> None:
        self.say("start")
        self.finish()
        self.embedded_once()

    @rule()
    def start_twice(self) -> None:
        self.say("start_twice")
        self.finish()
        number = seen(self.world.root)["number"]
        self.finish()
        assert seen(self.world.root)["number"] == number
        self.embedded_once()

    @rule(moment=MOMENTS)
    def crash(self, moment: int) -> None:
        self.cut_short(moment)

    @rule(kind=st.sampled_from(KINDS), moments=st.lists(MOMENTS, min_size=1, max_size=3))
    def crash_and_resume(self, kind: str, moments: list[int]) -> None:
        self.asked["kind"] = kind
        for moment in moments:
            self.cut_short(moment)
        self.say(f"start after crashes, kind={kind}")
        self.finish()
        self.embedded_once()

    def cut_short(self, moment: int) -> None:
        """Crash at a moment, where the run has as many."""
        root, calls = self.world.root, len(self.world.embedded)
        before = set(stamps(root, "_state/embed").items())
        with crashing(moment) as steps:
            try:
                generation = self.run()
            except Crash:
                generation = None
        self.say(f"{'crash' if generation is None else 'start'} moment={moment} {steps[moment - 1 : moment]}")
        if generation is not None:
            self.came_through(generation)
            self.embedded_once()
            return
        made = [name for name, _ in set(stamps(root, "_state/embed").items()) - before if "sealed" not in name]
        in_flight = len(self.world.embedded) - calls - len(made)
        assert 0 <= in_flight <= 1, "more than one shard was in flight"
        self.must["embedded"] += in_flight
        self.must["crashed"] = True
        self.must["tried"].append({**self.asked})

    def embedded_once(self) -> None:
        """No shard was embedded twice, but for those in flight at a crash and those damaged since."""
        least = self.must["embedded"]
        assert least <= len(self.world.embedded) <= least + self.must["records lost"], Counter(self.world.embedded)

    @rule()
    def race(self) -> None:
        self.say("race")
        Root(self.world.root).path.mkdir(exist_ok=True)
        with lock.lock(Root(self.world.root)):
            self.refused(self.world.spec(**self.asked), LockedError, "is held by another job")

    @precondition(lambda self: bool(self.must["done"]) and not self.must["damaged"])
    @rule()
    def read(self) -> None:
        self.say("read")
        self.same_as_undisturbed()

    @rule(kind=st.sampled_from(KINDS), at_once=st.booleans())
    def derive_otherwise(self, kind: str, at_once: bool) -> None:
        self.say(f"derive_otherwise kind={kind} at_once={at_once}")
        self.asked["kind"] = kind
        if at_once:
            self.finish()
            self.embedded_once()

    @rule(name=st.sampled_from(sorted(PREFIXES)), at_once=st.booleans())
    def add_or_remove_a_prefix(self, name: str, at_once: bool) -> None:
        tables = self.asked["tables"]
        others = [one for one in tables if one != name]
        self.asked["tables"] = [*tables, name] if name not in tables else others or tables
        self.say(f"add_or_remove_a_prefix {name} at_once={at_once}")
        if at_once:
            self.finish()
            self.embedded_once()

    @rule(parquet=st.booleans())
    def ask_for_parquet(self, parquet: bool) -> None:
        self.say(f"ask_for_parquet {parquet}")
        self.asked["parquet"] = parquet

    @precondition(is_begun)
    @rule(name=st.sampled_from(sorted(REFUSED)))
    def change_a_setting(self, name: str) -> None:
        self.say(f"change_a_setting {name}")
        changed = values(self.world.folder, self.world.root, **self.asked)
        section, _, last = name.partition(".")
        changed[section][last] = REFUSED[name]
        told = f"was begun with another {name}.*; set it back, or choose another root"
        self.refused(JobSpec.of(changed), StaleError, told)

    @precondition(is_begun)
    @rule(number=st.integers(0, ROWS - 1))
    def change_the_corpus(self, number: int) -> None:
        self.say(f"change_the_corpus row={number}")
        path = self.world.folder / "c.parquet"
        kept, frame = path.read_bytes(), pl.read_parquet(path)
        frame[number, "text"] = "w250 w251"
        try:
            frame.write_parquet(path)
            told = r"another corpus\.digest: .* 1 changed: \S*c\.parquet \(24 -> 24 rows\); set it back"
            self.refused(self.world.spec(**self.asked), StaleError, told)
        finally:
            path.write_bytes(kept)

    @precondition(is_finished)
    @rule(draw=st.integers(0, 10_000), how=st.sampled_from(["flip", "delete", "truncate"]))
    def damage(self, draw: int, how: str) -> None:
        root = self.world.root
        name = pick(self.committed(), draw)
        self.say(f"damage {how} {name}")
        self.must["embedded"] += TOGETHER * name.startswith("lancedb/documents.lance/data/")
        self.must["records lost"] += name.startswith("_state/embed/") and "sealed" not in name
        self.must["records lost"] += TOGETHER * name.startswith("_state/merge/")
        path = root / name
        data = bytearray(path.read_bytes())
        path.unlink()
        if how != "delete":
            data[draw % len(data)] ^= 1 + draw % 255
            path.write_bytes(data if how == "flip" else data[: draw % len(data)])
        self.must["damaged"] = name
        assert name in verify.run(root).damaged

    def committed(self) -> list[str]:
        """Files that must not change any more, oldest first: their names are drawn anew in every run."""
        root = self.world.root
        names = set(json.loads((root / "manifest.json").read_text())["files"]) | {"manifest.json"}
        names |= set(stamps(root, "generations", *(f"_state/{one}" for one in RECORDS)))
        names |= {"_state/job.json", "_state/job.copy.json"}
        noted = json.loads((root / "_state/stamps.json").read_text())["files"]  # others are no part of a finished run
        found = {name: (root / name).stat() for name in names & noted.keys()}
        return sorted((name for name in found if found[name].st_size), key=lambda name: (found[name].st_mtime_ns, name))

    @precondition(lambda self: not self.must["damaged"])
    @rule()
    def clean_up(self) -> None:
        self.say("clean_up")
        Root(self.world.root).path.mkdir(exist_ok=True)
        with lock.lock(Root(self.world.root)) as held:
            store.drop_leftovers(held)


def pick(names: Sequence[str], draw: int) -> str:
    """One of the names; each kind of file is as likely as any other, however many there are of it."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition("/")[0].partition("-")[0], []).append(name)
    chosen = kinds[sorted(kinds)[draw % len(kinds)]]
    return chosen[draw // len(kinds) % len(chosen)]


def play(made: World, seed: int, examples: int, steps: int, shrink: bool = False) -> None:
    """So many examples from one seed."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=False,
        database=None,
        deadline=None,
        phases=phases,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    machine = type("Machine", (Machine,), {"world": made})
    seeded(seed)(get_state_machine_test(machine, settings=chosen))()


EXAMPLES, STEPS = 10, 20
"""Of one seed."""


def suite(folder: Path, seed: int, minutes: float, shrink: bool = False, rounds: int | None = None) -> dict[str, Any]:
    """Figures of seeds from `seed` on, until the time is over."""
    began = time.monotonic()
    failures: list[dict[str, Any]] = []
    done = 0
    with world(folder) as made:
        while time.monotonic() < began + 60 * minutes if rounds is None else done < rounds:
            try:
                play(made, seed + done, EXAMPLES, STEPS, shrink)
            except (Exception, pytest.fail.Exception) as error:
                errors = [error, *getattr(error, "exceptions", [])]  # a group, where the same steps ended otherwise
                why = [f"{type(one).__name__}: {one}"[:600] for one in errors]
                failures.append({"seed": seed + done, "why": why, "script": made.script})
            done += 1
    figures = {name: made.counts[name] for name in sorted(made.counts)}
    return {
        "suite": "machine",
        "seed": seed,
        "seeds": done,
        **figures,
        "failures": failures,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=5)
    options.add_argument("--rounds", type=int, help="seeds to play, instead of minutes")
    options.add_argument("--shrink", action="store_true", help="look for the shortest script that fails")
    asked = options.parse_args()
    kills.quiet()
    with tempfile.TemporaryDirectory() as folder:
        result = suite(Path(folder), asked.seed, asked.minutes, asked.shrink, asked.rounds)
    print(json.dumps(result))
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
