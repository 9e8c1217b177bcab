"""One job holds a root at a time. Who holds it is the highest fencing number in `_state/locks`.

`<n>.json` claims number n, put-if-absent; `<n>.ended.json` gives it back; `<n>.beat` is a counter that a living holder
raises. A holder whose process is gone from this host, or whose counter stands still for `PATIENCE` seconds of the
taker's own clock, is taken over. Nothing rests on that guess: what a holder that was given up still writes carries its
lower number, or a name that stands already, and has no effect.
"""

import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import DamageError, LockedError
from pipeline.storage import DRAFTS, STATE, Root, not_writable, read_signed, signed, to_json

log = logging.getLogger(__name__)

LOCKS = f"{STATE}/locks"
PATIENCE = 60.0
"""Seconds that a holder elsewhere may stand still."""
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.ENOSYS}
"""Errors of a file system that cannot be written, or that cannot name a file only where no other has the name."""
BEAT, POLL = 5.0, 1.0
"""Seconds between two beats of a holder, and between two looks of one who waits."""


@dataclass(frozen=True)
class Owner:
    """A process as every host can name it; `started` tells it from a later one of the same number."""

    host: str
    boot: str
    process: int
    started: str

    @classmethod
    def me(cls) -> "Owner":
        """The process that asks."""
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()) or "")

    def is_here(self) -> bool:
        """Whether it is, or was, a process of this host since it was started."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def is_alive(self) -> bool:
        """Whether the process still runs; only to be asked on its own host."""
        return _started(self.process) == self.started


def _boot() -> str:
    """The host's current boot and, in a container, its own world of process numbers; empty where neither is told."""
    told = []
    with suppress(OSError):
        told = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(told)


def _started(process: int) -> str | None:
    """When a process began, in the kernel's ticks since boot; None where it is gone or dead but not yet reaped."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return _by_signal(process) if not Path("/proc/self/stat").exists() else None
    except ProcessLookupError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _by_signal(process: int) -> str | None:
    """Without /proc a process is known by its number alone; a number used again counts as alive, which is safe."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@contextmanager
def lock(root: Root, me: Owner | None = None, beat: float | None = BEAT) -> Iterator[Root]:
    """Hold the root; gives the same root with its fencing number, under which drafts are written.

    Raises LockedError where a living job holds it. `beat=None` starts no thread for the counter.
    """
    held = take(root, me or Owner.me())
    over = threading.Event()
    thread = threading.Thread(target=_keep_beating, args=(held, beat, over), daemon=True)
    if beat is not None:
        thread.start()
    try:
        yield held
    finally:
        over.set()
        if beat is not None:
            thread.join()
        with suppress(OSError):  # what is not given back is taken over when this process is gone
            give_back(held)


def take(root: Root, me: Owner) -> Root:
    """Claim the next number; LockedError where the holder lives or another job was quicker."""
    last = highest(root)
    owner, dead = None, True
    if last and root.size(_ended(last)) is None:
        owner = _owner(root, last)
        dead = owner is None or (not owner.is_alive() if owner.is_here() else _stands_still(root, last, owner))
    if not dead:
        raise _refused(root, owner)
    held = replace(root, fence=last + 1)
    claim = {**vars(me), "token": root.disk.unique(), "presumed_dead": owner is not None and not owner.is_here()}
    if not _claimed(root, held.fence, to_json(signed(claim))) or highest(root) != held.fence:
        raise _refused(root, _owner(root, highest(root)))
    if owner is not None:
        log.warning("lock took over from process=%d host=%s", owner.process, owner.host)
    _clean(held)
    return held


def _claimed(root: Root, fence: int, claim: bytes) -> bool:
    """Whether this call made the claim; SpecError where the file system refuses."""
    try:
        return root.create(_claim(fence), claim)
    except FileNotFoundError:  # whoever claimed it meanwhile removed the drafts of those without a number
        return False
    except OSError as error:
        if error.errno in REFUSALS:
            raise not_writable(root, error) from None
        raise


def check(held: Root) -> None:
    """LockedError where another job has taken the root over meanwhile."""
    if highest(held) != held.fence:
        raise _refused(held, _owner(held, highest(held)))


def took_from_elsewhere(held: Root) -> bool:
    """Whether the job before was only presumed dead, so that it may still write."""
    claim = read_signed(held, _claim(held.fence))
    return claim is not None and bool(claim["presumed_dead"])


def beat_once(held: Root, count: int) -> None:
    """Show that the holder lives."""
    held.write(_beat(held.fence), str(count).encode())


def give_back(held: Root) -> None:
    """End the holding: the next job need not wait."""
    held.drop_drafts(held.fence)
    held.create(_ended(held.fence), to_json(signed({})))


def highest(root: Root) -> int:
    """The number of the newest claim; 0 where there was none."""
    numbers = [name.removesuffix(".json") for name in root.names(LOCKS) if name.endswith(".json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _claim(fence: int) -> str:
    return f"{LOCKS}/{fence}.json"


def _ended(fence: int) -> str:
    return f"{LOCKS}/{fence}.ended.json"


def _beat(fence: int) -> str:
    return f"{LOCKS}/{fence}.beat"


def _owner(root: Root, fence: int) -> Owner | None:
    """Who made a claim; None where that cannot be read any more."""
    try:
        claim = read_signed(root, _claim(fence))
    except DamageError:
        return None
    return None if claim is None else Owner(*(claim[name] for name in Owner.__dataclass_fields__))


def _stands_still(root: Root, fence: int, owner: Owner) -> bool:
    """Whether a holder elsewhere does not raise its counter for PATIENCE seconds."""
    seen, until = root.read(_beat(fence)), root.disk.clock() + PATIENCE
    log.warning(
        "lock waiting up to %.0f s to see whether process=%d host=%s lives", PATIENCE, owner.process, owner.host
    )
    while root.disk.clock() < until:
        root.disk.sleep(POLL)
        if root.read(_beat(fence)) != seen or root.size(_ended(fence)) is not None:
            return root.size(_ended(fence)) is not None
    return True


def _refused(root: Root, owner: Owner | None) -> LockedError:
    who = "another job" if owner is None else f"another job (process {owner.process} on {owner.host})"
    return LockedError(f"{root.path} is held by {who}; wait for it to end, or stop it")


def _clean(held: Root) -> None:
    """Remove drafts and claims of earlier holders, by their numbers; the highest claim always stays."""
    numbers = {name.split(".")[0] for folder in (LOCKS, DRAFTS) for name in held.names(folder)}
    for fence in sorted(int(number) for number in numbers if number.isdigit()):
        if fence < held.fence:
            held.drop_drafts(fence)
            for name in (_beat(fence), _ended(fence), _claim(fence)):
                held.delete(name)


def _keep_beating(held: Root, seconds: float, over: threading.Event) -> None:
    count = 0
    while not over.wait(seconds):
        count += 1
        with suppress(OSError):  # a full disk must not look like a dead holder for longer than it lasts
            beat_once(held, count)
