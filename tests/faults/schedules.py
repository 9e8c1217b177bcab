"""Seeded schedules of whole jobs on simulated storage, against P1-P12 (exactly once, whatever goes wrong).

    python -m tests.faults.schedules --seed 0 --count 1000

The lock, the ledger, the embed stage's driver, merging (of two shards of three), commits, publishing and clean-up are
the real code; a stand-in takes the place of the model (a hash of the row) and of Lance (files and versions on the
simulated disk). A second, derived table goes through the same ledger. Every schedule: two jobs on two hosts start at
random moments, faults strike, then one undisturbed run finishes; a checker that shares no code with the project looks
at the files that are left.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa

from pipeline import embed, ledger, lock, merge, storage, store
from pipeline.embedder import COUNTERS, METERS, Embedder, Facts, Trial, Work, parquet_bytes
from pipeline.encoders.models import ModelFolder
from pipeline.errors import PipelineError
from pipeline.ledger import Ledger
from pipeline.sources import Shard
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.workers import MAX_TRIES, Died, Team
from tests.faults.simulated import Odds, SimDisk, World

SHARDS, SHARD_ROWS, FRAGMENT_ROWS = 3, 2, 5
QUARANTINED = {3}
"""Rows that cannot be embedded."""
ROOT = Path("/root")
DERIVED = "prefix"
DATA = "lancedb/documents.lance/data/"
SPEC = JobSpec.of(
    {
        "name": "simulated",
        "root": str(ROOT),
        "corpus": {"source": "c.parquet", "text": "text"},
        "model": {"name": "stub"},
        "prefixes": [{"dim": 2, "precision": "float16"}],
    }
)
FACTS = Facts("stub", None, "sha256:0", 4, "torch", "float32", None, 64, {"document": "", "query": ""}, {})
FOLDER = ModelFolder("stub", None, "stub", "sha256:0", 4, None, None)
SHARDS_OF_JOB = [Shard(number, number * SHARD_ROWS, SHARD_ROWS, ()) for number in range(SHARDS)]
FIELDS = {"scan": "s", "corpus.rows": SHARDS * SHARD_ROWS, "corpus.digest": "d"}
NO_QUARANTINE = parquet_bytes(pa.table({"row": pa.array([], pa.int64())}))


KINDS = (
    Odds(),
    Odds(kill=0.04, fail=0, stand=0, power=0, most=8),
    Odds(kill=0.005, fail=0.005, stand=0.04, power=0, most=8),
    Odds(kill=0, fail=0.03, stand=0.01, power=0, most=8),
    Odds(kill=0.005, fail=0.005, stand=0.005, power=0.02, most=6),
)
"""What goes wrong in a schedule: a bit of all, or much of one kind."""


class Violation(AssertionError):
    """A promise was broken."""


def vector(row: int) -> str:
    """What the stand-in model makes of a row."""
    return hashlib.sha256(str(row).encode()).hexdigest()


class StubEmbedder(Embedder):
    """A worker without a model: its records and files come about as the real one's do."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._device = lambda work, *values: (work(*values), 0.0)  # no thread, which a simulation could not stop

    def _resolve(self, shard: Shard) -> Facts:
        return FACTS

    def _try(self, trial: Trial) -> int:
        return trial.shard.rows

    def _embed(self, work: Work) -> dict[str, Any]:
        rows = [row for row in range(work.shard.first_row, work.shard.first_row + work.shard.rows)]
        kept = [row for row in rows if row not in QUARANTINED]
        written = write(self._root, "documents", {row: vector(row) for row in kept}, f"embed/{work.name}")
        digest = hashlib.sha256(",".join(vector(row) for row in kept).encode()).hexdigest()
        return {
            "shard": work.shard.number,
            "rows": len(kept),
            "set_aside": [{"row": row, "reason": "null_text"} for row in rows if row in QUARANTINED],
            "quarantined": {"null_text": len(rows) - len(kept)} if len(rows) > len(kept) else {},
            "repaired": 0,
            **written.to_json(),
            "digest": digest,
            "peak_memory_bytes": 0,
            **dict.fromkeys((*COUNTERS, *METERS), 0),
        }


def write(root: Root, table: str, content: dict[int, str], record: str) -> store.Written:
    """The real path of a fragment; only Lance's writer is a stand-in."""
    return store.write_fragments(root, table, SimpleNamespace(num_rows=len(content), content=content), None, record)


def draft_fragments(folder: Path, data: Any, schema: Any) -> list[Any]:
    """In Lance's place: one file of rows."""
    disk = CURRENT.disk
    name = f"{disk.unique()}.lance"
    if isinstance(data, store.Stored):
        rows = {row: value for path in data.files for row, value in json.loads(disk.get(path)).items()}
    else:
        rows = data.content
    content = json.dumps(rows).encode()
    disk.put(folder / "data" / name, content)
    return [Fragment(name, len(content), len(rows))]


@dataclass
class Fragment:
    """In place of Lance's description of one."""

    path: str
    size: int
    physical_rows: int

    @property
    def files(self) -> list[Any]:
        return [SimpleNamespace(path=self.path)]

    def to_json(self) -> dict[str, Any]:
        return {"files": [{"path": self.path, "file_size_bytes": self.size}], "rows": self.physical_rows}


@dataclass
class Current:
    """What the stand-ins work on now."""

    world: World
    disk: SimDisk


CURRENT: Current


def _versions(uri: str) -> dict[int, list[str]]:
    folder = Path(uri) / "_versions"
    found = {}
    for name in CURRENT.disk.names(folder):
        found[int(name.split(".")[0])] = json.loads(CURRENT.disk.get(folder / name))
    return found


def overwrite(uri: str, schema: Any, fragments: Sequence[Any]) -> int:
    """In Lance's place: the next version, put-if-absent; durable, as `sync_table` would make it."""
    disk, folder = CURRENT.disk, Path(uri) / "_versions"
    draft = folder.parent / disk.unique()
    disk.put(draft, json.dumps([one["files"][0]["path"] for one in fragments]).encode())
    disk.sync(draft)
    while True:
        version = max(_versions(uri), default=0) + 1
        try:
            disk.link(draft, folder / f"{version}.manifest")
        except FileExistsError:
            continue
        disk.delete(draft)
        return version


def landed(uri: str, wanted: Sequence[Any]) -> int | None:
    """In Lance's place: the newest version, if it holds these files."""
    versions = _versions(uri)
    newest = max(versions, default=0)
    paths = [file["path"] for one in wanted for file in one["files"]]
    return newest if newest and versions[newest] == paths else None


def sync_table(root: Root, table: str) -> None:
    root.disk.sync_folder(root / f"{store.table_name(table)}/_versions")


def parquet(table: pa.Table, **options: Any) -> bytes:
    """A small deterministic file instead of Parquet."""
    return json.dumps(table["row"].to_pylist()).encode()


class SimTeam(Team):
    """Workers that are processes of their own: they die, reply late or never, or do an item at once with another."""

    def __init__(self, world: World, root: Root) -> None:
        self._world, self._root = world, root

    def outcomes(self, items: Sequence[Any], tries: int = MAX_TRIES) -> Iterator[Any]:
        for item in items:
            yield self._one(item, tries)

    def _one(self, item: Any, tries: int) -> Any:
        world = self._world
        driver = world.here()

        def work() -> Any:
            is_merge = isinstance(item, merge.Work)
            return (merge.Merger(self._root, 1) if is_merge else StubEmbedder(self._root))(item)

        for _ in range(tries):
            workers = [world.start(driver.host, work)]
            if world.chance(world.odds.fail):  # the reply is lost, or thought lost: the item is given out again
                workers.append(world.start(driver.host, work))
            world.wait(lambda: any(world.is_over(one) for one in workers))
            over = next(one for one in workers if world.is_over(one))
            if over.error is not None:
                raise over.error
            if not over.dead:
                return over.result
        return Died(item, tries, "simulated")


class SimPool:
    """In place of the pool."""

    def __init__(self, world: World, root: Root) -> None:
        self._team = SimTeam(world, root)

    def team(self, *arguments: Any, **options: Any) -> Any:
        return mock.MagicMock(__enter__=lambda _: self._team, __exit__=lambda *_: False)


def job(root: Root, world: World, change: int) -> dict[str, Any]:
    """One run: lock, embed, derive, clean up, publish. `change` stands for a setting that only `derived` knows."""
    storage.prepare(root)
    me = lock.Owner(world.here().host, "", world.here().number, "")
    with lock.lock(root, me, beat=None) as held:
        full = embed.run(SPEC, FOLDER, SHARDS_OF_JOB, FIELDS, {}, held, SimPool(world, held))
        book = Ledger(held, "derive", f"k{change}")
        slots = []
        for number in range(2):
            slot = book.slot(str(number), lambda record: store.is_whole(held, DERIVED, record["fragments"]))
            if slot.record is None:
                content = {number * 10 + change: "derived"}
                written = write(held, DERIVED, content, f"derive/k{change}/{slot.name}")
                book.add(slot.name, {"rows": 1, **written.to_json()})
            slots.append(book.slot(str(number)))
        fragments = [one for slot in slots for one in slot.done["fragments"]]
        version = store.commit(held, DERIVED, None, fragments)
        store.drop_leftovers(held)
        note = held.keep(f"note {change}".encode())
        candidate = {
            "tables": {"documents": full.version, DERIVED: version},
            "data": {"documents": full.fragments, DERIVED: fragments},
            "change": change,
            "files": {"quarantine.parquet": full.quarantine, "note": note},
            "copies": ["quarantine.parquet", "note"],
        }
        newest = ledger.newest_generation(held)
        lock.check(held)
        same = newest is not None and all(
            newest[name] == json.loads(json.dumps(value)) for name, value in candidate.items()
        )
        if newest is None or not same or lock.took_from_elsewhere(held):
            newest = ledger.publish(held, candidate)
        ledger.settle(held)
        return newest


def simulate(seed: int, odds: Odds | None = None) -> World:
    """One schedule; Violation names what was broken and the seed that repeats it."""
    global CURRENT
    world = World(seed, odds or KINDS[seed % len(KINDS)])
    disk = SimDisk(world)
    CURRENT = Current(world, disk)
    root = Root(ROOT, disk=disk)
    changes = [world.random.randrange(2), world.random.randrange(2)]
    jobs = [(f"host{number}", change) for number, change in enumerate(changes)]
    started = []
    reader = world.start("host8", lambda: read(root, world))
    try:
        for host, change in jobs:
            started.append((world.start(host, lambda change=change: job(root, world, change)), change))
            pause = world.random.choice((0, 0, 10, 300))
            seen = world.turns
            world.run(until=lambda: world.turns >= seen + pause or all(world.is_over(one) for one in world.processes))
        world.run()
        for process, _ in [*started, (reader, 0)]:
            _expected_end(process)
        world.takeovers = _takeovers(disk)
        before = None
        for again in range(2):  # the second run has nothing to do
            world.odds = Odds(0, 0, 0, 0)
            last = world.start("host9", lambda: job(root, world, changes[-1]))
            world.run()
            if last.error is not None:
                raise Violation(f"the undisturbed run failed: {last.error!r}") from last.error
            if again and last.result["generation"] != before:
                raise Violation("a run with nothing to do published again")
            before = last.result["generation"]
        check(disk, changes[-1], last.result)
        _once_made_stay(world)
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{error!r}") from error
    return world


def read(root: Root, world: World) -> int:
    """A reader at any moment: what the newest generation names is there and is what it says (P11)."""
    seen = 0
    for _ in range(6):
        wakes = world.turns + world.random.choice((10, 100, 400))
        others = [one for one in world.processes if one.host != "host8"]
        world.wait(lambda: world.turns >= wakes or all(world.is_over(one) for one in others))
        generation = ledger.newest_generation(root)
        if generation is None:
            continue
        seen += 1
        for table, version in generation["tables"].items():
            uri = Path(store.table_uri(root, table))
            paths = json.loads(root.disk.get(uri / "_versions" / f"{version}.manifest"))
            for path in paths:
                json.loads(root.disk.get(uri / "data" / path))
        for name in generation["copies"]:
            root.kept(generation["files"][name])
    return seen


def _takeovers(disk: SimDisk) -> int:
    """How many jobs took the root from one that was only presumed dead."""
    claims = [
        json.loads(data) for path, data in disk.all_files().items() if "/locks/" in path and path.endswith(".json")
    ]
    return sum(claim.get("presumed_dead", False) for claim in claims)


def _expected_end(process: Any) -> None:
    """A disturbed job may fail as the surroundings do, be refused, or be overtaken; never with a defect."""
    if process.error is not None and not isinstance(process.error, OSError | PipelineError):
        raise Violation(f"a job ended with {process.error!r}") from process.error


def check(disk: SimDisk, change: int, told: dict[str, Any]) -> None:
    """The files that are left, read without the project's code."""
    files = {path.removeprefix(f"{ROOT}/"): data for path, data in disk.all_files().items()}
    generations = {}
    for name, data in files.items():
        if name.startswith("generations/"):
            value = json.loads(data)
            body = json.dumps(
                {k: v for k, v in value.items() if k != "checksum"}, sort_keys=True, separators=(",", ":")
            )
            if hashlib.sha256(body.encode()).hexdigest() != value["checksum"]:
                raise Violation(f"{name} is torn")
            generations[int(name.split("/")[1].removesuffix(".json"))] = value
    highest, newest = -1, None
    for number in sorted(generations):
        if generations[number]["fence"] >= highest:
            highest, newest = generations[number]["fence"], generations[number]
    if newest != told or newest["change"] != change:
        raise Violation("P12: what the run told is not the newest generation")
    if json.loads(files["manifest.json"]) != newest:
        raise Violation("the manifest is not the newest generation")
    for name in newest["copies"]:
        if hashlib.sha256(files[name]).hexdigest() != newest["files"][name]:
            raise Violation(f"{name} is not the generation's")
    expected = {row: vector(row) for row in range(SHARDS * SHARD_ROWS) if row not in QUARANTINED}
    rows = _content(files, newest, "documents")
    if rows != list(expected.items()):
        raise Violation(f"P1/P6: rows {[row for row, _ in rows]}, wanted {list(expected)}")
    if sorted([row for row, _ in rows] + json.loads(files["quarantine.parquet"])) != list(range(SHARDS * SHARD_ROWS)):
        raise Violation("P6: rows and quarantine are not the input")
    if [row for row, _ in _content(files, newest, DERIVED)] != [change, 10 + change]:
        raise Violation("P8: another setting's rows are in the derived table")
    _nothing_left_over(files)


def _content(files: dict[str, bytes], generation: dict[str, Any], table: str) -> list[tuple[int, str]]:
    folder = f"lancedb/{table}.lance"
    paths = json.loads(files[f"{folder}/_versions/{generation['tables'][table]}.manifest"])
    if paths != [one["files"][0]["path"] for one in generation["data"][table]]:
        raise Violation(f"P2: the pinned version of {table} holds other files")
    rows = []
    for path in paths:
        data = files[f"{folder}/data/{path}"]
        rows += [(int(row), value) for row, value in json.loads(data).items()]
    return rows


def _nothing_left_over(files: dict[str, bytes]) -> None:
    drafts = [name for name in files if name.startswith("_state/drafts/")]
    if drafts:
        raise Violation(f"P4: drafts are left: {drafts[:3]}")
    held = set()
    for name, data in files.items():
        if name.endswith(".json") and name.startswith(("_state/embed", "_state/merge", "_state/derive")):
            held |= set(json.loads(data).get("files", {}))
    pending = set()
    for name, data in files.items():
        if name.startswith("_state/moves/"):
            pending |= set(json.loads(data)["files"])
    stray = [name for name in files if "/data/" in name and name.rpartition("/")[2] not in held | pending]
    if stray:
        raise Violation(f"P4: files that no record names are left: {stray[:3]}")
    merges = [json.loads(data) for name, data in files.items() if name.startswith("_state/merge/")]
    twice = [path for one in merges for shard in one["shards"] for path in shard["files"] if f"{DATA}{path}" in files]
    if twice:
        raise Violation(f"P4: files of merged shards are left: {twice[:3]}")


def _once_made_stay(world: World) -> None:
    """Records and generations are linked once and never replaced."""
    for number, what, path in world.history:
        name = path.removeprefix(f"{ROOT}/")
        mutable = name in ("manifest.json", "note", "quarantine.parquet") or name.startswith(
            ("_state/kept/", "_state/drafts")
        )
        if what == "replace" and not mutable and "/data/" not in name and not name.endswith(".beat"):
            raise Violation(f"process {number} replaced {name}")


def patched() -> Any:
    """The stand-ins in their places."""
    stack = mock.patch.multiple(
        store,
        draft_fragments=draft_fragments,
        _overwrite=overwrite,
        _landed=landed,
        sync_table=sync_table,
        FRAGMENT_ROWS=FRAGMENT_ROWS,
    )
    owner = mock.patch.multiple(
        lock.Owner,
        is_here=lambda self: self.host == CURRENT.world.here().host,
        is_alive=lambda self: CURRENT.world.alive(self.process),
    )
    schema = mock.patch.object(embed, "documents_columns", lambda *arguments: pa.schema([]))
    blob = mock.patch.object(embed, "parquet_bytes", parquet)
    return stack, owner, schema, blob


def main() -> None:
    """Run schedules; one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--minutes", type=float, default=60)
    asked = options.parse_args()
    start = time.monotonic()
    result = run(asked.seed, asked.count, asked.minutes)
    result["seconds"] = round(time.monotonic() - start, 1)
    text = json.dumps(result)
    sys.stdout.write(text + "\n")
    sys.exit(bool(result["violations"]))


def run(seed: int, count: int, minutes: float = 60) -> dict[str, Any]:
    """Figures of schedules seed … seed + count."""
    import logging

    logging.disable(logging.WARNING)
    ends: dict[str, int] = {}
    violations, done, faults, takeovers = [], 0, 0, 0
    until = time.monotonic() + 60 * minutes
    one, two, three, four = patched()
    with one, two, three, four:
        for number in range(seed, seed + count):
            if time.monotonic() > until:
                break
            try:
                world = simulate(number)
            except Violation as error:
                violations.append({"seed": number, "what": str(error)})
                continue
            done += 1
            faults += world.faults
            takeovers += world.takeovers
            for process in world.processes:
                kind = "killed" if process.dead else type(process.error).__name__ if process.error else "finished"
                ends[kind] = ends.get(kind, 0) + 1
    logging.disable(logging.NOTSET)
    return {
        "suite": "schedules",
        "seed": seed,
        "count": done,
        "faults": faults,
        "takeovers": takeovers,
        "ends": ends,
        "violations": violations,
    }


if __name__ == "__main__":
    main()
