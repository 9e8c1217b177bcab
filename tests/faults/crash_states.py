"""Every state that a power cut may leave of one commit: unsynced data lost or torn, names kept in any combination.

    python -m tests.faults.crash_states

The recipe of `pipeline.storage.Root` runs on a disk that notes each call. After every call, all states that POSIX
allows are enumerated: of the changes of names that no fsync of their folder followed, any subset, in any order; of
data that no fsync of its file followed, nothing, a part, all, or zeros. In each state a reader must see what was
there before or what is there after, whole; once the recipe has returned, only what is there after.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import ledger
from pipeline.errors import DamageError
from pipeline.storage import Root, read_signed, signed, to_json
from tests.faults.simulated import Folder, Inode, Odds, SimDisk, World

ROOT = Path("/root")
Act = Callable[[Root], Any]
OLD, NEW = signed({"value": "old"}), signed({"value": "new"})


class Recorder(SimDisk):
    """Takes a look after each call."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(World(0, Odds(0, 0, 0, 0)))
        self.look = look

    def _call(self, what: str, path: Path, effect: Callable[[], Any], writes: bool = True) -> Any:
        result = super()._call(what, path, effect, writes)
        if writes:
            self.look()
        return result


def contents(inode: Inode) -> list[bytes]:
    """What a file's bytes may be after a cut."""
    if inode.synced == inode.data:
        return [inode.data]
    half = inode.data[: len(inode.data) // 2]
    return list(dict.fromkeys([inode.synced or b"", half, bytes(len(inode.data)), inode.data]))


def orders(folder: Folder) -> list[dict[str, Inode]]:
    """The names that a folder may have after a cut."""
    found: dict[tuple[Any, ...], dict[str, Inode]] = {}
    for count in range(len(folder.pending) + 1):
        for kept in itertools.permutations(folder.pending, count):
            names = dict(folder.durable)
            for name, inode in kept:
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
            found[tuple(sorted((name, id(inode)) for name, inode in names.items()))] = names
    return list(found.values())


def states(disk: SimDisk) -> Iterator[dict[str, Folder]]:
    """Every state of the whole disk."""
    folders = list(disk.world.folders.items())
    for names in itertools.product(*(orders(folder) for _, folder in folders)):
        inodes = list({id(inode): inode for one in names for inode in one.values()}.values())
        for data in itertools.product(*(contents(inode) for inode in inodes)):
            after = {id(inode): Inode(bytes_, bytes_) for inode, bytes_ in zip(inodes, data, strict=True)}
            yield {
                path: Folder(*({name: after[id(inode)] for name, inode in one.items()} for _ in range(2)))
                for (path, _), one in zip(folders, names, strict=True)
            }


def enumerate_states(
    before: Callable[[Root], None], act: Callable[[Root], None], see: Callable[[Root], Any]
) -> dict[str, Any]:
    """Act once; how many states were looked at, and those in which a reader saw what it must not."""
    allowed: list[Any] = []
    count, wrong = 0, []

    def look() -> None:
        nonlocal count
        if not allowed:
            return
        for state in states(disk):
            count += 1
            world = World(0, Odds(0, 0, 0, 0))
            world.folders = state
            found = see(Root(ROOT, disk=SimDisk(world)))
            if found not in allowed:
                wrong.append(repr(found))

    disk = Recorder(look)
    root = Root(ROOT, fence=1, disk=disk)
    before(root)
    old = see(root)
    for folder in disk.world.folders.values():
        folder.durable, folder.pending = dict(folder.names), []
    # A dry run tells what is there afterwards.
    world = World(0, Odds(0, 0, 0, 0))
    world.folders = next(states(disk))
    dry = Root(ROOT, fence=1, disk=SimDisk(world))
    act(dry)
    new = see(dry)
    allowed += [old, new]
    act(root)
    allowed.remove(old)
    if old == new:
        allowed.append(new)
    look()  # durable once it has returned
    return {"states": count, "wrong": wrong}


def seen(root: Root, name: str = "a.json") -> Any:
    """What a reader makes of a record."""
    try:
        return read_signed(root, name)
    except DamageError:
        return "damaged"


def generation(root: Root) -> Any:
    """What a reader makes of the newest generation."""
    try:
        found = ledger.newest_generation(root)
    except DamageError:
        return "damaged"
    return None if found is None else found["value"]


def published(value: str) -> Callable[[Root], None]:
    """Publish a generation that keeps one file."""

    def act(root: Root) -> None:
        ledger.publish(root, {"value": value, "files": {}, "copies": []})

    return act


CASES: dict[str, tuple[Act, Act, Act]] = {
    "create": (lambda root: None, lambda root: root.create("a.json", to_json(NEW)), seen),
    "create, taken": (
        lambda root: root.create("a.json", to_json(OLD)),
        lambda root: root.create("a.json", to_json(NEW)),
        seen,
    ),
    "write": (lambda root: None, lambda root: root.write("a.json", to_json(NEW)), seen),
    "write over": (
        lambda root: root.write("a.json", to_json(OLD)),
        lambda root: root.write("a.json", to_json(NEW)),
        seen,
    ),
    "keep": (lambda root: None, lambda root: root.keep(b"kept"), lambda root: root.has(KEPT)),
    "publish first": (lambda root: None, published("new"), generation),
    "publish next": (published("old"), published("new"), generation),
}
KEPT = hashlib.sha256(b"kept").hexdigest()


def run() -> dict[str, Any]:
    """Figures of every case."""
    found = {name: enumerate_states(*case) for name, case in CASES.items()}
    return {
        "suite": "crash states",
        "count": sum(one["states"] for one in found.values()),
        "cases": {name: one["states"] for name, one in found.items()},
        "violations": [f"{name}: {what}" for name, one in found.items() for what in one["wrong"]][:20],
    }


def main() -> None:
    """One line of JSON."""
    result = run()
    print(json.dumps(result))
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
