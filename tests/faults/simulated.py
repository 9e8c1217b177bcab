"""Storage in memory, shared by simulated processes that take turns at every call.

Which process goes on, and what goes wrong, is drawn from one seed: a process is stopped for good before or after a
call, or stands still for a while; a call fails before or after its effect (a lost reply); a file is torn; the power
goes, and of what was not synced any part may be lost, whatever the order it was done in.
"""

import errno
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from greenlet import getcurrent, greenlet

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Killed(BaseException):
    """The process is no more; nothing it does from here on has an effect."""


@dataclass(eq=False)
class Inode:
    """A file's bytes, and those that are on disk for sure (None: nothing is)."""

    data: bytes
    synced: bytes | None = None


@dataclass
class Folder:
    """Names now; names for sure; what changed in between, in order: (name, inode or None)."""

    names: dict[str, Inode] = field(default_factory=dict)
    durable: dict[str, Inode] = field(default_factory=dict)
    pending: list[tuple[str, Inode | None]] = field(default_factory=list)


@dataclass
class Process:
    """One that takes turns."""

    number: int
    host: str
    task: greenlet
    dead: bool = False
    result: Any = None
    error: BaseException | None = None
    wakes: float = 0.0
    waits_for: Callable[[], bool] | None = None
    stands_until: int = 0


@dataclass
class Odds:
    """Chances per call of a writing process; `most` faults in all."""

    kill: float = 0.01
    fail: float = 0.01
    stand: float = 0.01
    power: float = 0.002
    most: int = 4


class World:
    """Processes, a clock, and one disk."""

    def __init__(self, seed: int, odds: Odds) -> None:
        self.random = random.Random(seed)
        self.odds, self.faults = odds, 0
        self.time, self.turns, self.names = 0.0, 0, 0
        self.folders: dict[str, Folder] = {}
        self.processes: list[Process] = []
        self.log: list[str] = []
        self.main = getcurrent()
        self.history: list[tuple[int, str, str]] = []

    def start(self, host: str, work: Callable[[], Any]) -> Process:
        """A new process; it goes on when `run` picks it."""
        process = Process(len(self.processes) + 1, host, greenlet(lambda: self._body(process, work)))
        process.task.parent = self.main
        self.processes.append(process)
        return process

    def _body(self, process: Process, work: Callable[[], Any]) -> None:
        try:
            process.result = work()
        except Killed:
            process.dead = True
        except BaseException as error:  # what a process ends with belongs to its caller
            process.error = error

    def here(self) -> Process | None:
        """The process that runs now; None outside all of them."""
        return next((one for one in reversed(self.processes) if one.task is getcurrent()), None)

    def is_over(self, process: Process) -> bool:
        return process.dead or process.task.dead

    def alive(self, number: int) -> bool:
        return not self.is_over(self.processes[number - 1])

    def kill(self, process: Process) -> None:
        """End a process before its next call."""
        process.dead = True

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Let processes take turns until all are over (or `until`)."""
        while not (until is not None and until()):
            self.turns += 1
            assert self.turns < 200_000, "no end in sight"
            ready = [one for one in self.processes if not self.is_over(one) and self._can_go(one)]
            if not ready:
                left = [one for one in self.processes if not self.is_over(one)]
                if not left:
                    return
                self._pass_time(left)
                continue
            self.random.choice(ready).task.switch()

    def _can_go(self, one: Process) -> bool:
        if one.stands_until > self.turns or one.wakes > self.time:
            return False
        return one.waits_for is None or one.waits_for()

    def _pass_time(self, left: list[Process]) -> None:
        sleeping = [one.wakes for one in left if one.wakes > self.time]
        standing = [one.stands_until for one in left if one.stands_until > self.turns]
        if sleeping:
            self.time = min(sleeping)
        elif standing:
            self.turns = min(standing)
        else:
            raise AssertionError("every process waits for another")

    def turn(self) -> Process | None:
        """Give others a turn; Killed where the process ends here."""
        process = self.here()
        if process is None:
            return None
        if process.dead:
            raise Killed
        self.main.switch()
        if process.dead:
            raise Killed
        return process

    def wait(self, condition: Callable[[], bool]) -> None:
        """Stand by until something is true."""
        process = self.here()
        assert process is not None
        process.waits_for = condition
        try:
            self.turn()
        finally:
            process.waits_for = None

    def chance(self, share: float) -> bool:
        """Whether something goes wrong now."""
        if self.faults >= self.odds.most or self.random.random() >= share:
            return False
        self.faults += 1
        return True

    def cut_power(self) -> None:
        """Every process ends, and what was not synced is lost, torn or kept, as chance has it."""
        for process in self.processes:
            process.dead = True
        inodes = set()
        for folder in self.folders.values():
            names = dict(folder.durable)
            for name, inode in self.random.sample(folder.pending, len(folder.pending)):
                if self.random.random() < 0.5:
                    _apply(names, name, inode)
            folder.names, folder.durable, folder.pending = names, dict(names), []
            inodes |= {id(inode): inode for inode in names.values()}.items()
        for _, inode in sorted(inodes, key=lambda one: one[1].data):
            if inode.synced != inode.data:
                inode.data = self._torn(inode)
            inode.synced = inode.data

    def _torn(self, inode: Inode) -> bytes:
        return self.random.choice(
            [
                inode.synced or b"",
                inode.data,
                inode.data[: self.random.randrange(len(inode.data) + 1)],
                bytes(len(inode.data)),
            ]
        )


def _apply(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


class SimDisk:
    """A backend of `pipeline.storage.Root` on a world."""

    at_once = 1

    def __init__(self, world: World) -> None:
        self.world = world

    def _call(self, what: str, path: Path, effect: Callable[[], Any], writes: bool = True) -> Any:
        world = self.world
        process = world.turn()
        if process is None:
            return effect()
        if not writes:
            return effect()
        odds = world.odds
        if world.chance(odds.power):
            world.log.append(f"{process.number} power cut before {what} {path.name}")
            world.cut_power()
            raise Killed
        if world.chance(odds.stand):
            process.stands_until = world.turns + world.random.choice((20, 200, 2000))
            world.log.append(f"{process.number} stands still before {what} {path.name}")
            world.turn()
        before = world.random.random() < 0.5
        if world.chance(odds.kill):
            world.log.append(f"{process.number} killed {'before' if before else 'after'} {what} {path.name}")
            process.dead = True
            if not before:
                effect()
            raise Killed
        if world.chance(odds.fail):
            world.log.append(f"{process.number} {'error' if before else 'lost reply'} at {what} {path.name}")
            if not before:
                effect()
            raise OSError(world.random.choice(ERRORS), "simulated", str(path))
        result = effect()
        world.history.append((process.number, what, str(path)))
        return result

    def _folder(self, path: Path) -> Folder:
        return self.world.folders.setdefault(str(path), Folder())

    def _change(self, path: Path, inode: Inode | None) -> None:
        folder = self._folder(path.parent)
        _apply(folder.names, path.name, inode)
        folder.pending.append((path.name, inode))

    def _inode(self, path: Path) -> Inode:
        inode = self._folder(path.parent).names.get(path.name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return inode

    def put(self, path: Path, data: bytes) -> None:
        def effect() -> None:
            torn = self.world.chance(self.world.odds.fail)
            part = data[: self.world.random.randrange(len(data) + 1)] if torn else data
            self._change(path, Inode(part))
            if torn:
                raise OSError(errno.ENOSPC, "simulated", str(path))

        self._call("put", path, effect)

    def sync(self, path: Path) -> None:
        def effect() -> None:
            inode = self._inode(path)
            inode.synced = inode.data

        self._call("sync", path, effect)

    def replace(self, source: Path, target: Path) -> None:
        def effect() -> None:
            inode = self._inode(source)
            self._change(source, None)
            self._change(target, inode)

        self._call("replace", target, effect)

    def link(self, source: Path, target: Path) -> None:
        def effect() -> None:
            inode = self._inode(source)
            if target.name in self._folder(target.parent).names:
                raise FileExistsError(errno.EEXIST, "exists", str(target))
            self._change(target, inode)

        self._call("link", target, effect)

    def make_folder(self, folder: Path) -> None:
        self._folder(folder)

    def sync_folder(self, folder: Path) -> None:
        def effect() -> None:
            held = self._folder(folder)
            held.durable, held.pending = dict(held.names), []

        self._call("sync_folder", folder, effect)

    def get(self, path: Path) -> bytes:
        return self._call("get", path, lambda: self._inode(path).data, writes=False)

    def digest(self, path: Path) -> str | None:
        def effect() -> str | None:
            inode = self._folder(path.parent).names.get(path.name)
            return None if inode is None else hashlib.sha256(inode.data).hexdigest()

        return self._call("digest", path, effect, writes=False)

    def names(self, folder: Path) -> list[str]:
        def effect() -> list[str]:
            inside = [name.removeprefix(f"{folder}/") for name in self.world.folders if name.startswith(f"{folder}/")]
            below = [name.split("/")[0] for name in inside]
            return sorted({*self._folder(folder).names, *below})

        return self._call("names", folder, effect, writes=False)

    def size(self, path: Path) -> int | None:
        def effect() -> int | None:
            inode = self._folder(path.parent).names.get(path.name)
            return None if inode is None else len(inode.data)

        return self._call("size", path, effect, writes=False)

    def sizes(self, folder: Path) -> dict[str, int]:
        def effect() -> dict[str, int]:
            return {name: len(inode.data) for name, inode in self._folder(folder).names.items()}

        return self._call("sizes", folder, effect, writes=False)

    def delete(self, path: Path) -> None:
        self._call("delete", path, lambda: self._change(path, None))

    def remove_folder(self, folder: Path) -> None:
        def effect() -> None:
            for name in list(self.world.folders):
                if name == str(folder) or name.startswith(f"{folder}/"):
                    del self.world.folders[name]

        self._call("remove_folder", folder, effect)

    def unique(self) -> str:
        self.world.names += 1
        return f"u{self.world.names}"

    def draft_folder(self, folder: Path) -> Path:
        self.make_folder(folder)
        return folder

    def local(self, path: Path) -> Path:
        return path

    def stamps(self, folder: Path, leave_out: Any) -> dict[str, Any]:
        return {}

    def clock(self) -> float:
        return self.world.time

    def sleep(self, seconds: float) -> None:
        process = self.world.here()
        if process is None:
            self.world.time += seconds
            return
        process.wakes = self.world.time + seconds
        self.world.turn()

    def all_files(self) -> dict[str, bytes]:
        """Every file there is, by path."""
        return {
            f"{folder}/{name}": inode.data
            for folder, held in self.world.folders.items()
            for name, inode in held.names.items()
        }
