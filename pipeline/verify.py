"""An independent check of a finished root, from its files alone: `matryoshka verify`.

Comes in: the root's folder. Goes out: problems, each a sentence that names a file, or a table and its row. It shares
no code with what writes but the calls to an object store, and writes nothing: a damaged file is touched, so that the
next run looks at it again.
"""

import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import recompute
from pipeline.bucket import Bucket
from pipeline.errors import PipelineError, StaleError
from pipeline.reread import FORMAT, Notes
from pipeline.seam import Location, Place

THREADS = 2
GENERATIONS, MANIFEST, STATE = "generations/", "manifest.json", "_state/"
JOB, JOB_COPY, STAMPS = "_state/job.json", "_state/job.copy.json", "_state/stamps.json"
IGNORED = ("_state/locks/", "_state/drafts/", "_state/damaged/", "_state/logs/")
COMES_AND_GOES = (*IGNORED, "_state/moves/", "_state/probe-")
UNRECORDED = {"report.html", "query_log.parquet"}
HINT = "/_versions/latest_version_hint.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What was found: `damaged` are the files that are not what was written, or gone; `unknown` are no problem."""

    generation: int
    problems: tuple[str, ...]
    damaged: tuple[str, ...]
    unknown: tuple[str, ...]
    checked: Mapping[str, int]
    """How much was looked at; `rounded` are numbers that only rounding in float32 accounts for, `older` files that
    only an older generation names: those are left alone."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def run(root: Place) -> Findings:
    """Check everything below a root; StaleError where nothing was ever finished there."""
    files = _Files(root)
    newest = files.check()
    if newest is not None:
        recompute.run(root, newest, files.damaged, files.quarantine(), files.notes)
    number = 0 if newest is None else int(newest["generation"])
    files.touch()
    told = (*files.damaged.values(), *files.notes.told())
    return Findings(number, told, tuple(files.damaged), files.unknown(), dict(files.notes.checked))


@dataclass
class _Files:
    """The files below a root: those that tell by themselves whether they are whole, then those the generation names."""

    root: Place
    notes: Notes = field(default_factory=Notes)
    damaged: dict[str, str] = field(default_factory=dict)
    """A sentence on each file, by its name."""
    _seen: set[str] = field(default_factory=set)
    _links: set[str] = field(default_factory=set)
    """Links, sockets and the like: nothing that the job writes."""
    _named: set[str] = field(default_factory=set)
    _older: set[str] = field(default_factory=set)
    """Named by any generation: what the newest one does not use any more may be gone or changed."""
    _data: set[str] = field(default_factory=set)
    _store: Bucket = field(default_factory=Bucket)
    _objects: Mapping[str, int] = field(default_factory=dict)
    """Bytes counted of each object, where the root is in a bucket."""

    def __post_init__(self) -> None:
        """List what is there; links to folders are not followed."""
        if isinstance(self.root, Location):
            self._objects = {name: size for name, (size, _) in self._store.stamps(self.root, ()).items()}
            self._seen |= set(self._objects)
            return
        for below, folders, files in os.walk(self.root):
            for name in (*files, *folders):
                path = Path(below, name)
                with suppress(FileNotFoundError):  # a job at work on the root
                    mode = path.lstat().st_mode
                    if not stat.S_ISDIR(mode):
                        (self._seen if stat.S_ISREG(mode) else self._links).add(path.relative_to(self.root).as_posix())

    def check(self) -> Record | None:
        """Check all files; the generation to look into, None where no record of one is left whole."""
        records = {name: self._record(name) for name in sorted(self._seen) if self._is_record(name)}
        if MANIFEST not in self._seen and not any(name.startswith(GENERATIONS) for name in records):
            raise StaleError(f"{self.root} holds no finished generation; run its job first")
        self._check_kept()
        self._check_state(records)
        newest = self._newest(records)
        if newest is not None:
            with self.notes.reading(f"generation {newest['generation']}"):
                self._check_files(newest)
        self.notes.checked["records"] += len(records)
        return newest

    def quarantine(self) -> Any:
        """Its file, as its path or open."""
        name = recompute.QUARANTINE
        return self.root / name if isinstance(self.root, Path) else io.BytesIO(self._bytes(name) or b"")

    def touch(self) -> None:
        """Let the next run notice damaged files: by a new time; in a bucket by taking away what it saw last."""
        if isinstance(self.root, Location):
            if self.damaged:
                with suppress(OSError):
                    self._store.delete(self.root / STAMPS)
            return
        for name in self.damaged:
            if name in self._seen:
                with suppress(OSError):
                    os.utime(self.root / name)

    def unknown(self) -> tuple[str, ...]:
        """Files that no record names."""
        known = self._named | self._older | UNRECORDED
        return tuple(
            sorted(
                name
                for name in self._seen | self._links
                if name not in known
                and not name.startswith(IGNORED)
                and not (name.startswith("lancedb/") and name.rpartition("/data/")[2] in self._data)
            )
        )

    def _is_record(self, name: str) -> bool:
        if not name.endswith(".json") or name.startswith(IGNORED):
            return False
        number = name.removeprefix(GENERATIONS).removesuffix(".json")
        return name.startswith(STATE) or (
            name.startswith(GENERATIONS) and number.isdecimal() and str(int(number)) == number
        )

    def _record(self, name: str) -> Record | None:
        """A record that has its own checksum; None, and a problem, where it was changed."""
        self._named.add(name)
        data = self._bytes(name)
        value = None if data is None else _signed(data)
        if value is None:
            self._bad(name, "is not what was written: its checksum differs")
            return None
        listed = value.get("files")
        if name.startswith(STATE) and isinstance(listed, dict | list) and name != STAMPS:
            self._data |= {one for one in listed if isinstance(one, str)}
        return value

    def _check_kept(self) -> None:
        kept = [name for name in self._seen if name.startswith("_state/kept/")]
        self._named.update(kept)
        self._compare({name: name.removeprefix("_state/kept/") for name in kept})

    def _check_state(self, records: Mapping[str, Record | None]) -> None:
        """What the last run left in `_state`, and both copies of what the root was begun with."""
        stamps = records.get(STAMPS) or {}
        for name in stamps.get("files", {}):
            if name.startswith((STATE, GENERATIONS)) and not name.startswith(COMES_AND_GOES) and name not in self._seen:
                self._bad(name, "is gone")
        for name in (JOB, JOB_COPY):
            if name not in self._seen:
                self._bad(name, "is gone")
        if records.get(JOB) and records.get(JOB_COPY) and records[JOB] != records[JOB_COPY]:
            self._bad(JOB_COPY, f"does not say what {JOB} says")

    def _newest(self, records: Mapping[str, Record | None]) -> Record | None:
        """The newest generation that stands; one with a lower fence than an earlier one is void."""
        newest: Record | None = None
        numbers = sorted(int(name[len(GENERATIONS) : -5]) for name in records if name.startswith(GENERATIONS))
        for number in numbers:
            name = f"{GENERATIONS}{number}.json"
            found = records[name]
            if found is None:
                continue
            if found.get("generation") != number or found.get("format") != FORMAT or not _has_fields(found):
                self._bad(name, f"is no generation {number} of format {FORMAT}")
                continue
            self._older.update(found["files"])
            if newest is None or found["fence"] >= newest["fence"]:
                newest = found
        return self._compared_with_copy(newest)

    def _compared_with_copy(self, newest: Record | None) -> Record | None:
        """The newest generation, or what manifest.json says of it where its own file is damaged or gone."""
        self._named.add(MANIFEST)
        data = self._bytes(MANIFEST)
        copy = None if data is None else _signed(data)
        if copy is not None and _has_fields(copy):
            name = f"{GENERATIONS}{copy['generation']}.json"
            is_newer = newest is None or copy["generation"] > newest["generation"]
            if is_newer and (name in self.damaged or name not in self._seen):
                self._bad(name, "is gone")
                return copy
        if newest is None or data != _canonical(newest):
            self._bad(MANIFEST, "is gone" if data is None else "is no copy of the newest generation")
        return newest

    def _check_files(self, generation: Record) -> None:
        """Compare every file that a generation names with its sha256."""
        self._named.update(generation["files"])
        self.notes.checked["older"] = len((self._older - self._named) & self._seen)
        wanted = {}
        for name, digest in generation["files"].items():
            if _leads_out(name) or not isinstance(digest, str):
                self.notes.say(f"generation {generation['generation']} names {name!r}, which is no file below a root")
            elif name not in self._seen:
                is_there = isinstance(self.root, Path) and os.path.lexists(self.root / name)
                self._bad(name, "is no plain file below the root" if is_there else "is gone")
            else:
                wanted[name] = digest
        self._compare(wanted)
        for name in generation["copies"]:
            kept = f"_state/kept/{generation['files'][name]}"
            if kept not in self._seen:
                self._bad(kept, f"is gone, the copy of {name}")

    def _is_newer_hint(self, name: str) -> bool:
        """Whether it is Lance's hint and names the highest version there: a run that was stopped may have made one."""
        if not name.endswith(HINT):
            return False
        numbers = [
            one[:-9].rpartition("/")[2] for one in self._seen if one.startswith(name[: -len(HINT)] + "/_versions/")
        ]
        versions = [2**64 - 1 - int(one) for one in numbers if one.isdecimal()]
        return self._bytes(name) == f'{{"version":{max(versions, default=0)}}}'.encode()

    def _compare(self, wanted: Mapping[str, str]) -> None:
        """Compare files that are there with their sha256."""
        with ThreadPoolExecutor(THREADS) as pool:
            for name, (digest, size) in zip(wanted, pool.map(self._digest, wanted), strict=True):
                if digest != wanted[name] and not self._is_newer_hint(name):
                    self._bad(name, "is not what was written: its sha256 differs")
                self.notes.checked["files"] += 1
                self.notes.checked["bytes"] += size

    def _digest(self, name: str) -> tuple[str, int]:
        if isinstance(self.root, Location):
            return self._store.digest(self.root / name) or "gone", self._objects[name]
        try:
            with (self.root / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        except OSError as error:
            return f"not readable: {error.strerror}", 0

    def _bytes(self, name: str) -> bytes | None:
        if name not in self._seen:
            return None
        path = self.root / name
        try:
            return path.read_bytes() if isinstance(path, Path) else self._store.get(path)
        except PipelineError:  # the store fails, which says nothing of the object
            raise
        except OSError:
            return None

    def _bad(self, name: str, what: str) -> None:
        self.damaged.setdefault(name, f"{name} {what}")


def _leads_out(name: str) -> bool:
    """Whether a name is none of a file below a root."""
    return any(part in ("", ".", "..") for part in name.split("/")) or any(one in name for one in "\\:\0")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _signed(data: bytes) -> Record | None:
    """A value that stands as it was written, its checksum over all the rest; None for any other bytes."""
    try:
        value = json.loads(data)
        rest = {name: one for name, one in value.items() if name != "checksum"}
        whole = value["checksum"] == hashlib.sha256(_canonical(rest)).hexdigest() and _canonical(value) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(value) if whole else None


def _has_fields(found: Record) -> bool:
    """Whether a record has what is needed to look for the files of a generation."""
    numbers = all(isinstance(found.get(name), int) for name in ("generation", "fence"))
    return numbers and isinstance(found.get("files"), dict) and isinstance(found.get("copies"), list)
