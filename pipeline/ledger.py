"""What is done. A piece of work is done when its record is; a root keeps to what it was begun with.

`_state/job.json` holds the fingerprint: every setting that changes what the stored vectors mean.
`_state/<stage>/<key>/<name>.json` are records, each made once and never changed; only a damaged one is moved aside.
Work that was lost or damaged afterwards is done again under the next edition of its name (`<name>~1`), so that a name
which stands once does not open again to a job that was given up.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DamageError, StaleError
from pipeline.storage import STATE, Root, read_signed, signed, to_json

log = logging.getLogger(__name__)

Record = dict[str, Any]
JOB, JOB_COPY = f"{STATE}/job.json", f"{STATE}/job.copy.json"
"""What cannot be made again stands twice."""
GENERATIONS, MANIFEST = "generations", "manifest.json"


@dataclass(frozen=True)
class Slot:
    """Where the record of a piece of work belongs, and the record, or None where the work is to be done.

    In place of the record stands what was kept of it, where `slots` was told to keep less.
    """

    name: str
    record: Any = None

    @property
    def done(self) -> Any:
        """The record of finished work."""
        assert self.record is not None, f"{self.name} has no record after all work was done"
        return self.record


class Ledger:
    """Records of one stage under one key; another key is another job."""

    def __init__(self, root: Root, stage: str, key: str = "") -> None:
        self.root = root
        self.folder = f"{STATE}/{stage}/{key}" if key else f"{STATE}/{stage}"

    def add(self, slot: str, record: Record) -> Record:
        """Make the record of a slot unless it stands; the one that stands."""
        name, data = f"{self.folder}/{slot}.json", to_json(signed(record))
        del record  # may be large, and will be read again
        if self.root.create(name, data):
            return _unsigned(json.loads(data))
        found = self.read(slot)
        assert found is not None
        return found

    def read(self, slot: str) -> Record | None:
        """The record of a slot; None where there is none, DamageError where it changed since it was made."""
        found = read_signed(self.root, f"{self.folder}/{slot}.json")
        return None if found is None else _unsigned(found)

    def slot(self, name: str, is_sound: Callable[[Record], bool] = lambda record: True) -> Slot:
        """The newest edition of a piece of work; the next one where its record is damaged or not sound."""
        return self.slots([name], is_sound)[0]

    def slots(
        self,
        names: Sequence[str],
        is_sound: Callable[[Record], bool] = lambda record: True,
        keep: Callable[[Record], Any] = lambda record: record,
    ) -> list[Slot]:
        """The same for many, with one look at the folder; what it does not show is not asked for.

        `keep`: what to hold of a record, few of which are in memory at a time.
        """
        editions = self._editions()
        return list(self.root.each(lambda name: self._slot(name, editions.get(name), is_sound, keep), names))

    def _slot(
        self, name: str, edition: int | None, is_sound: Callable[[Record], bool], keep: Callable[[Record], Any]
    ) -> Slot:
        if edition is None:
            return Slot(name)
        try:
            record = self.read(_edition(name, edition))
        except DamageError as error:
            log.warning("ledger redo=%s because=%s", name, error)
            return Slot(_edition(name, edition + 1))
        if record is None:
            return Slot(_edition(name, edition))
        if not is_sound(record):
            log.warning("ledger redo=%s because what it names is gone or damaged", name)
            return Slot(_edition(name, edition + 1))
        return Slot(_edition(name, edition), keep(record))

    def get(self, name: str) -> Record | None:
        """The record of a piece of work that is done; None where it is not."""
        found: Record | None = self.slot(name).record
        return found

    def once(
        self, name: str, make: Callable[[], Record], is_sound: Callable[[Record], bool] = lambda record: True
    ) -> Record:
        """The record of a piece of work, which is done now where it is not done yet."""
        slot = self.slot(name, is_sound)
        found: Record = self.add(slot.name, make()) if slot.record is None else slot.record
        return found

    def newest(self, names: Sequence[str]) -> list[str]:
        """The newest slot of each name, by the names of records alone (none is read)."""
        editions = self._editions()
        return [_edition(name, editions.get(name, 0)) for name in names]

    def _editions(self) -> dict[str, int]:
        """The newest edition of everything that has a record."""
        editions: dict[str, int] = {}
        for file in self.root.names(self.folder):
            if file.endswith(".json"):
                name, _, edition = file.removesuffix(".json").partition("~")
                editions[name] = max(editions.get(name, 0), int(edition or 0))
        return editions

    def names(self) -> set[str]:
        """Names of everything that has a record."""
        return set(self._editions())


def _unsigned(value: Mapping[str, Any]) -> Record:
    return {name: one for name, one in value.items() if name != "checksum"}


def _edition(name: str, number: int) -> str:
    return f"{name}~{number}" if number else name


def begun(root: Root) -> Record | None:
    """What the root was begun with; None for a fresh one."""
    with suppress(DamageError):
        found = read_signed(root, JOB)
        if found is not None:
            return found
    return read_signed(root, JOB_COPY)


def restore(root: Root) -> Record | None:
    """What the root was begun with, after both copies of it were made durable."""
    standing = begun(root)
    if standing is not None:
        for name in (JOB_COPY, JOB):
            root.create(name, to_json(signed(standing)))
    return standing


def begin(root: Root, fingerprint: Mapping[str, Any]) -> Record:
    """Begin a root, or go on with it; StaleError where it was begun otherwise."""
    wanted = json.loads(to_json(dict(fingerprint)))
    root.create(JOB_COPY, to_json(signed(wanted)))
    standing = restore(root)
    assert standing is not None
    refuse_changes(root, standing, wanted)
    return standing


def refuse_changes(root: Root, standing: Mapping[str, Any], wanted: Mapping[str, Any], summary: str = "") -> None:
    """Raise StaleError where a wanted field differs from the standing one; fields not wanted are not compared."""
    changed = [field for field in wanted if standing.get(field) != wanted[field]]
    if changed:
        first = changed[0]
        others = f" (also {', '.join(changed[1:])})" if changed[1:] else ""
        others += f": {summary}" if summary else ""
        raise StaleError(
            f"{root.path} was begun with another {first}: {_shown(standing.get(first))} then, "
            f"{_shown(wanted[first])} now{others}; set it back, or choose another root"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def newest_generation(root: Root) -> Record | None:
    """The last published generation; None where nothing was finished, DamageError where one was changed since.

    One with a lower fencing number than an earlier one was published by a job that had been given up: it is void.
    """
    newest: Record | None = None
    for number in generation_numbers(root):
        found = read_signed(root, f"{GENERATIONS}/{number}.json")
        if found is not None and (newest is None or found["fence"] >= newest["fence"]):
            newest = found
    return newest


def generation_numbers(root: Root) -> list[int]:
    """Numbers of everything published, ascending."""
    names = [name.removesuffix(".json") for name in root.names(GENERATIONS) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isdigit())


def publish(held: Root, generation: Mapping[str, Any]) -> Record:
    """Make the next generation, put-if-absent, under the holder's fencing number."""
    while True:  # ends: each turn that fails means that another file was made
        number = max(generation_numbers(held), default=0) + 1
        data = to_json(signed({**generation, "generation": number, "fence": held.fence}))
        if held.create(f"{GENERATIONS}/{number}.json", data):
            return dict(json.loads(data))


def settle(root: Root) -> None:
    """Bring manifest.json and the files beside it to what the newest generation says.

    Looks again after writing: a job that was given up may have put back what it knew.
    """
    while (newest := newest_generation(root)) is not None:
        wanted = {name: newest["files"][name] for name in newest["copies"]}
        changed = [name for name, digest in wanted.items() if root.read(name) != root.kept(digest)]
        for name in changed:
            root.write(name, root.kept(wanted[name]))
        manifest = to_json(newest)
        if root.read(MANIFEST) == manifest and not changed:
            return
        root.write(MANIFEST, manifest)
