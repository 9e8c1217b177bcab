"""Before a run: what was damaged since it was written is set aside, so that only its work is done again.

A file whose size and time (or ETag) are those of the last look is trusted (`verify` re-reads everything, and touches
what it finds damaged, so that the next run looks again).
"""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import ledger
from pipeline.errors import DamageError
from pipeline.seam import Stamp
from pipeline.storage import ASIDE, DRAFTS, KEPT, STATE, Root, read_signed, signed, to_json

log = logging.getLogger(__name__)

STAMPS = f"{STATE}/stamps.json"
"""The stamp of every file at the last look: a cache, which may be lost."""
Stamps = dict[str, Stamp]
UNSIGNED = (ASIDE, DRAFTS, f"{STATE}/locks")


def run(root: Root) -> set[str]:
    """Set damaged files aside; names of the tables that miss something and must be published afresh."""
    known = _known(root)
    seen = _stamps(root)
    changed = sorted(name for name in _private(root, seen) if seen[name] != known.get(name))
    for name, is_whole in zip(changed, root.each(lambda name: _is_whole(root, name), changed), strict=True):
        if not is_whole:
            _set_aside(root, name)
    try:
        newest = ledger.newest_generation(root)
    except DamageError:  # set aside just now, or beyond that: nothing is known of the files
        newest = None
    files: Mapping[str, str] = {} if newest is None else newest["files"]
    damaged = set()
    for name, digest in files.items():
        if name in seen and seen[name] == known.get(name):
            continue
        if name not in seen or root.disk.digest(root / name) != digest:
            damaged.add(name)
            if name in seen:
                _set_aside(root, name)
    return {name.split("/")[1].removesuffix(".lance") for name in damaged if name.startswith("lancedb/")}


def remember(root: Root) -> None:
    """Note size and time of every file, all of which are known to be whole."""
    root.write(STAMPS, to_json(signed({"files": _stamps(root)})))


def table_files(
    root: Root, tables: Mapping[str, Mapping[str, str]], newest: Mapping[str, Any] | None
) -> dict[str, str]:
    """sha256 by name of every file in the folders of these tables; those of data files come with them.

    Files of the newest generation that did not change since the last look are not read again.
    """
    known, seen = _known(root), _stamps(root)
    before: Mapping[str, str] = {} if newest is None else newest["files"]
    digests = {
        f"lancedb/{table}.lance/data/{path}": one for table, files in tables.items() for path, one in files.items()
    }
    found = {}
    for name in seen:
        if name.startswith("lancedb/") and name.split("/")[1].removesuffix(".lance") in tables:
            unchanged = name in before and seen[name] == known.get(name)
            found[name] = digests.get(name) or (before[name] if unchanged else str(root.disk.digest(root / name)))
    return found


def _known(root: Root) -> Stamps:
    try:
        return dict((read_signed(root, STAMPS) or {"files": {}})["files"])
    except DamageError:
        return {}


def _stamps(root: Root) -> Stamps:
    """A stamp of every file below the root, by name."""
    return dict(root.disk.stamps(root.path, (DRAFTS, ASIDE)))


def _private(root: Root, seen: Stamps) -> Iterator[str]:
    """Files that tell by themselves whether they are whole."""
    for name in seen:
        kept = name.startswith(f"{KEPT}/")
        signed_one = name.startswith((f"{STATE}/", "generations/")) and name.endswith(".json") and name != STAMPS
        if kept or (signed_one and not name.startswith(UNSIGNED)):
            yield name


def _is_whole(root: Root, name: str) -> bool:
    if name.startswith(f"{KEPT}/"):
        return root.has(name.removeprefix(f"{KEPT}/"))
    try:
        read_signed(root, name)
    except (DamageError, json.JSONDecodeError):
        return False
    return True


def _set_aside(root: Root, name: str) -> None:
    log.warning("repair damaged=%s: set aside, what it held is done again", name)
    root.set_aside(name)
