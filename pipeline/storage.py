"""The one seam to storage: every file of a root but Lance's own goes through `Root`.

A file appears whole or not at all: draft, fsync, rename (or link, which never replaces), fsync of the folder. Drafts
lie in a folder of the job that holds the root, so that what a killed one left is known by name. `Disk` is a folder's
storage, `bucket.Bucket` an object store's; tests put a simulated one in their place that stops, fails, tears or forgets
at any call.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from pipeline.errors import DamageError, SpecError
from pipeline.seam import Backend, Place, Stamp

STATE = "_state"
DRAFTS = f"{STATE}/drafts"
KEPT = f"{STATE}/kept"
"""Files named by their sha256: written once, never changed."""
ASIDE = f"{STATE}/damaged"
"""Where damaged files are moved, out of every reader's way."""
EACH = 1_000
"""Files that are in hand at once where many are read."""
T = TypeVar("T")


class Disk:
    """A local file system, or one mounted."""

    at_once = 1

    def put(self, path: PurePath, data: bytes) -> None:
        """Make a file of these bytes, not yet durable."""
        with Path(path).open("wb") as file:
            file.write(data)

    def sync(self, path: PurePath) -> None:
        """Bring a file's bytes to disk."""
        _fsync(path)

    def replace(self, source: PurePath, target: PurePath) -> None:
        """Rename; a target that exists is replaced."""
        Path(source).replace(target)

    def link(self, source: PurePath, target: PurePath) -> None:
        """Give a file a second name; FileExistsError where the name is taken."""
        os.link(source, target)

    def make_folder(self, folder: PurePath) -> None:
        """Make a folder and those above it, durable; no error where it exists."""
        if Path(folder).is_dir():
            return
        self.make_folder(folder.parent)
        Path(folder).mkdir(exist_ok=True)
        _fsync(folder.parent)

    def sync_folder(self, folder: PurePath) -> None:
        """Bring a folder's names to disk."""
        _fsync(folder)

    def get(self, path: PurePath) -> bytes:
        """A file's bytes; FileNotFoundError."""
        return Path(path).read_bytes()

    def digest(self, path: PurePath) -> str | None:
        """sha256 of a file's bytes, in hex; None where there is no file."""
        return sha256(path) if Path(path).is_file() else None

    def names(self, folder: PurePath) -> list[str]:
        """Names in a folder; none where there is no folder."""
        try:
            return [entry.name for entry in os.scandir(folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: PurePath) -> dict[str, int]:
        """Bytes of each file in a folder, by name, at one look; none where there is no folder."""
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # deleted since it was listed
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def size(self, path: PurePath) -> int | None:
        """A file's bytes counted; None where there is no file."""
        return Path(path).stat().st_size if Path(path).is_file() else None

    def delete(self, path: PurePath) -> None:
        """Remove a file; no error where there is none."""
        Path(path).unlink(missing_ok=True)

    def remove_folder(self, folder: PurePath) -> None:
        """Remove a folder and what is in it; no error where there is none."""
        for below, folders, files in os.walk(folder, topdown=False):
            for name in files:
                Path(below, name).unlink(missing_ok=True)
            for name in folders:
                Path(below, name).rmdir()
        if Path(folder).is_dir():
            Path(folder).rmdir()

    def free(self, folder: PurePath) -> int:
        """Bytes that may still be written."""
        return shutil.disk_usage(folder).free

    def draft_folder(self, folder: PurePath) -> Path:
        """Make a folder of this machine for drafts: that one."""
        self.make_folder(folder)
        return Path(folder)

    def local(self, path: PurePath) -> Path:
        """A file as one of this machine: itself."""
        return Path(path)

    def stamps(self, folder: PurePath, leave_out: Collection[str]) -> Mapping[str, Stamp]:
        """Size and time in nanoseconds of every file below a folder, hidden ones apart."""
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in _walk(folder, "", leave_out)}

    def unique(self) -> str:
        """A name that was never given before."""
        return uuid.uuid4().hex

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def _walk(folder: PurePath, prefix: str, leave_out: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if name not in leave_out:
                yield from _walk(folder / entry.name, name + "/", leave_out)
        elif entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
            yield name, entry.stat()


def _fsync(path: PurePath) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Root:
    """All that a job writes, below one place; `fence` is the number of the job that holds it (0: a reader).

    Names are relative, with `/`. One that leads out of the root is a DamageError: only a damaged record has it.
    """

    path: Place
    fence: int = 0
    disk: Backend = field(default_factory=Disk)

    def __truediv__(self, name: str) -> Place:
        """Where a file of the root lies."""
        return self.path / _inside(name)

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file in one step, durable when this returns."""
        while True:  # a turn that fails means that another job took the root and removed drafts without a number
            target = self._ready(name)
            try:
                self.disk.replace(self._draft(data), target)
                break
            except FileNotFoundError:
                if self.fence:
                    raise
        self.disk.sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless one of that name exists; True where this call made it. Durable either way."""
        target = self._ready(name)
        draft = self._draft(data)
        made = True
        try:
            self.disk.link(draft, target)
        except FileExistsError:
            made = False
        finally:
            self.disk.delete(draft)
        self.disk.sync_folder(target.parent)
        return made

    def adopt(self, draft: Path, name: str) -> None:
        """Move a finished draft, its bytes on disk, to its name; durable when this returns."""
        target = self._ready(name)
        self.disk.replace(draft, target)
        self.disk.sync_folder(target.parent)

    def each(self, call: Callable[[str], T], names: Iterable[str]) -> Iterator[T]:
        """What `call` says of each name, in order; it only reads."""
        if self.disk.at_once == 1:
            yield from map(call, names)
            return
        left = iter(names)
        with ThreadPoolExecutor(self.disk.at_once) as pool:
            while some := list(islice(left, EACH)):
                yield from pool.map(call, some)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is no such file."""
        try:
            return self.disk.get(self / name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        """A file's bytes counted; None where there is no such file."""
        return self.disk.size(self / name)

    def local(self, name: str) -> Path:
        """A file as one of this machine, to be opened or mapped by others; FileNotFoundError for an object."""
        return self.disk.local(self / name)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file in a folder, by name; none where there is no folder."""
        return self.disk.sizes(self / folder)

    def names(self, folder: str) -> list[str]:
        """Names in a folder, in order; none where there is no folder."""
        return sorted(self.disk.names(self / folder))

    def delete(self, name: str) -> None:
        """Remove a file that our own records name; DamageError where a link leads out of the root."""
        path = self / name
        if not path.parent.resolve().is_relative_to(self.path.resolve()):
            raise DamageError(f"{path} leads out of {self.path} by a link; nothing was deleted")
        self.disk.delete(path)

    def set_aside(self, name: str) -> None:
        """Move a damaged file to `_state/damaged`, so that no reader takes it and its work is done again."""
        target = self._ready(f"{ASIDE}/{self.disk.unique()}-{PurePosixPath(name).name}")
        self.disk.replace(self / name, target)
        self.disk.sync_folder((self / name).parent)

    def keep(self, data: bytes) -> str:
        """Keep bytes under their sha256, which is returned; the same bytes are kept once."""
        digest = hashlib.sha256(data).hexdigest()
        if self.has(digest):  # but maybe not yet durable, if another process made it
            self.disk.sync_folder(self / KEPT)
        else:
            self.write(kept_name(digest), data)
        return digest

    def keep_file(self, draft: Path) -> str:
        """Keep a draft's bytes under their sha256."""
        self.disk.sync(draft)
        digest = sha256(draft)
        self.adopt(draft, kept_name(digest))
        return digest

    def kept(self, digest: str) -> bytes:
        """The bytes of that sha256; DamageError where they are gone or changed."""
        data = self.read(kept_name(digest))
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise DamageError(f"{self / kept_name(digest)} is not what was written; run the job again to repair it")
        return data

    def has(self, digest: str) -> bool:
        """Whether the bytes of that sha256 are there and whole."""
        return self.disk.digest(self / kept_name(digest)) == digest

    def draft_folder(self) -> Path:
        """A folder of its own for files that others write; removed with this job's drafts."""
        return self.disk.draft_folder(self / f"{DRAFTS}/{self.fence}/{self.disk.unique()}")

    def drop_drafts(self, fence: int) -> None:
        """Remove what the holder of that number left unfinished; 0 stands for all who never came to hold the root."""
        folder = self / f"{DRAFTS}/{fence}"
        if fence:
            self.disk.remove_folder(folder)
        for name in [] if fence else self.disk.names(folder):  # others may be about to use the folder itself
            self.disk.delete(folder / name)

    def _ready(self, name: str) -> Place:
        target = self / name
        self.disk.make_folder(target.parent)
        return target

    def _draft(self, data: bytes) -> Place:
        folder = self / f"{DRAFTS}/{self.fence}"
        self.disk.make_folder(folder)
        draft = folder / self.disk.unique()
        try:
            self.disk.put(draft, data)
            self.disk.sync(draft)  # a failed fsync is never tried again: the draft is given up
        except OSError:
            self.disk.delete(draft)
            raise
        return draft


def kept_name(digest: str) -> str:
    """Where the bytes of a sha256 are kept."""
    return f"{KEPT}/{digest}"


def _inside(name: str) -> PurePosixPath:
    """A name as a path below the root; DamageError for one that leads elsewhere."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\\0:"):
        raise DamageError(f"{name!r} is no name of a file below a root; the record that holds it is damaged")
    return PurePosixPath(name)


def prepare(root: Root) -> None:
    """Make the root's folders; SpecError where that is not allowed."""
    if isinstance(root.path, Path) and ":/" in str(root.path):
        raise SpecError(f"root {root.path}: object stores are named by a text, s3://bucket/name, not by a Path")
    try:
        for name in (STATE, "lancedb", "generations"):
            root.disk.make_folder(root / name)
    except OSError as error:
        raise not_writable(root, error) from None


def not_writable(root: Root, error: OSError) -> SpecError:
    """What to tell of a root that cannot be used."""
    return SpecError(f"cannot write to root {root.path}: {error.strerror}; choose a folder that can be written")


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no NaN."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def signed(value: dict[str, Any]) -> dict[str, Any]:
    """The value with its checksum: sha256 over its canonical JSON without one."""
    body = {name: one for name, one in value.items() if name != "checksum"}
    return {**body, "checksum": hashlib.sha256(to_json(body)).hexdigest()}


def read_signed(root: Root, name: str) -> dict[str, Any] | None:
    """A value written with its checksum; None where there is none, DamageError where it changed since."""
    data = root.read(name)
    if data is None:
        return None
    try:
        value = json.loads(data, object_pairs_hook=_interned)
        whole = _unsigned_digest(data, value["checksum"]) == value["checksum"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamageError(f"{root / name} is not what was written; run the job again to repair it")
    return dict(value)


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are shared with all others: of 100,000 records they would be half of the memory."""
    return {sys.intern(name): value for name, value in pairs}


def _unsigned_digest(data: bytes, checksum: str) -> str:
    """sha256 of signed JSON without its checksum: of the bytes as they are, since 1E-05 reads like 1e-05."""
    before, after = data.split(b'"checksum":"%s"' % checksum.encode())
    if after.startswith(b","):
        after = after[1:]
    else:
        before = before.removesuffix(b",")
    digest = hashlib.sha256(before)
    digest.update(after)
    return digest.hexdigest()


def sha256(path: PurePath) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
