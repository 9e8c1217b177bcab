"""What is done. A piece of work is done when its record is; a root keeps to what it was begun with.

`_state/job.json` holds the fingerprint: every setting that changes what the stored vectors mean.
`_state/<stage>/<key>/<name>.json` are records, each made once and never changed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.errors import StaleError

Record = dict[str, Any]


class Ledger:
    """Records of one stage under one key; another key is another job."""

    def __init__(self, root: Path, stage: str, key: str = "") -> None:
        self.folder = root / "_state" / stage / key if key else root / "_state" / stage

    def add(self, name: str, record: Record) -> Record:
        """Make a record unless there is one; the record that stands."""
        path = self.folder / f"{name}.json"
        if store.create(path, store.to_json(record)):
            return record
        found = store.read_json(path)
        assert found is not None
        return dict(found)

    def get(self, name: str) -> Record | None:
        """One record, or None where the work is not done."""
        found = store.read_json(self.folder / f"{name}.json")
        return None if found is None else dict(found)

    def drop(self, name: str) -> None:
        """Forget a record whose work is lost."""
        (self.folder / f"{name}.json").unlink()

    def names(self) -> set[str]:
        """Names of everything that is done."""
        if not self.folder.is_dir():
            return set()
        return {path.stem for path in self.folder.iterdir() if path.suffix == ".json" and not path.name.startswith(".")}

    def file(self, name: str) -> Path:
        """Where a file that belongs to a record lies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def begun(root: Path) -> Record | None:
    """What the root was begun with; None for a fresh one."""
    found = store.read_json(root / "_state" / "job.json")
    return None if found is None else dict(found)


def begin(root: Path, fingerprint: Mapping[str, Any]) -> Record:
    """Begin a root, or go on with it; StaleError where it was begun otherwise."""
    wanted = store.to_json(dict(fingerprint))
    store.create(root / "_state" / "job.json", wanted)
    standing = begun(root)
    assert standing is not None
    refuse_changes(root, standing, json.loads(wanted))
    return standing


def refuse_changes(root: Path, standing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise StaleError where a wanted field differs from the standing one; fields not wanted are not compared."""
    changed = [field for field in wanted if standing.get(field) != wanted[field]]
    if changed:
        first = changed[0]
        others = f" (also {', '.join(changed[1:])})" if changed[1:] else ""
        raise StaleError(
            f"{root} was begun with another {first}: {_shown(standing.get(first))} then, "
            f"{_shown(wanted[first])} now{others}; set it back, or choose another root"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def newest_generation(root: Path) -> dict[str, Any] | None:
    """The last published generation; None where nothing was finished."""
    folder = root / "generations"
    numbers = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()] if folder.is_dir() else []
    if not numbers:
        return None
    found = store.read_json(folder / f"{max(numbers)}.json")
    assert found is not None
    return dict(found)


def publish(root: Path, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Make the next generation, put-if-absent, and copy it to manifest.json."""
    last = newest_generation(root)
    number = 1 if last is None else int(last["generation"]) + 1
    body = {**generation, "generation": number}
    body["checksum"] = checksum(body)
    if not store.create(root / "generations" / f"{number}.json", store.to_json(body)):
        raise StaleError(f"{root}: generation {number} was published by another job meanwhile; run again")
    copy_to_manifest(root, body)
    return body


def copy_to_manifest(root: Path, generation: Mapping[str, Any]) -> None:
    """Make manifest.json a copy of the newest generation, unless it is one."""
    path, wanted = root / "manifest.json", store.to_json(dict(generation))
    if not path.is_file() or path.read_bytes() != wanted:
        store.write(path, wanted)


def checksum(generation: Mapping[str, Any]) -> str:
    """sha256 over a generation's canonical JSON without its checksum."""
    return hashlib.sha256(store.to_json({k: v for k, v in generation.items() if k != "checksum"})).hexdigest()
