"""Few fragments: what the shards' workers wrote is joined to fragments of about `store.FRAGMENT_ROWS` rows.

Consecutive shards form a group, by their rows in the corpus; a group of one stays as it is. A merge is done when its
record is, as a shard is. The record holds those of its shards too, so that it stands without them: their files are
deleted as soon as it is on disk, and merging needs room for one more copy of a group only. Rows, their order and the
digests of their shards stay what they were.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline import store
from pipeline.ledger import Ledger, Record, Slot
from pipeline.sources import Shard
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS
from pipeline.workers import Team

log = logging.getLogger(__name__)

T = TypeVar("T")
DATA = f"{store.table_name(DOCUMENTS)}/data"
COUNTERS = ("merge_seconds", "merged_bytes")
"""What merging cost: seconds of all workers, bytes written again."""


@dataclass(frozen=True)
class Group:
    """Consecutive shards whose rows lie in one fragment."""

    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Name of its record, by which other groups are never taken for it."""
        first, last = self.shards[0].name, self.shards[-1].name
        return f"{first}-{last}" if self.is_joint else first

    @property
    def is_joint(self) -> bool:
        """Whether there is anything to join."""
        return len(self.shards) > 1


@dataclass(frozen=True)
class Work:
    """A group to merge: the slot of its record, those of its shards' records, in order, and the table's schema."""

    name: str
    shards: tuple[str, ...]
    schema: pa.Schema


def groups(shards: Sequence[Shard]) -> list[Group]:
    """All shards in order, joined up to FRAGMENT_ROWS rows of the corpus; known before anything is embedded."""
    found: list[list[Shard]] = []
    rows = 0
    for shard in shards:
        if not found or rows + shard.rows > store.FRAGMENT_ROWS:
            found.append([])
            rows = 0
        found[-1].append(shard)
        rows += shard.rows
    return [Group(tuple(group)) for group in found]


def per_fragment(rows: int, shard_rows: int) -> int:
    """Rows of a full fragment where `rows` rows are cut into shards of so many."""
    return min(rows, shard_rows * max(1, store.FRAGMENT_ROWS // shard_rows))


def room(root: Root, rows: int, shard_rows: int) -> int:
    """Rows that stand twice, at least, while the groups that are not merged yet are; 0 where there are none."""
    joint = per_fragment(rows, shard_rows)
    tail = rows % joint if joint else 0
    count = rows // joint + (tail > shard_rows) if joint > shard_rows else 0
    return joint if count > len(_book(root).names()) else 0


def newest(root: Root, groups: Sequence[Group]) -> list[str]:
    """What each group's record is called, by the names of records alone: of its merge, or of its only shard."""
    merged = _book(root).newest([group.name for group in groups])
    alone = Ledger(root, "embed").newest([group.name for group in groups])
    return [f"merge/{both}" if group.is_joint else one for group, both, one in zip(groups, merged, alone, strict=True)]


def standing(root: Root, groups: Sequence[Group], keep: Callable[[Record], T]) -> dict[str, T]:
    """What to keep of the records of merges whose files are there, by the group's name.

    Their shards are done, whatever became of them; files of theirs that were left are deleted.
    """
    there, left = set(root.names(DATA)), list[str]()

    def kept(record: Record) -> T:
        left.extend(path for path in _shard_files(record) if path in there)
        return keep(record)

    names = [group.name for group in groups if group.is_joint]
    slots = _book(root).slots(names, store.wholeness(root, DOCUMENTS), kept)
    if left:
        _drop_shards(root, left)
    return {name: slot.done for name, slot in zip(names, slots, strict=True) if slot.record is not None}


def run(
    groups: Sequence[Group],
    merged: Mapping[str, T],
    slots: Mapping[str, Slot],
    schema: pa.Schema,
    root: Root,
    workers: Callable[[], AbstractContextManager[Team]],
    keep: Callable[[Record], T],
) -> dict[str, T]:
    """Merge every group that `merged` lacks; what to keep of each record. Files of their shards are gone afterwards.

    `slots` are of the shards, by name; all of them are done. `workers` are asked for where there is work; their
    handler is a `Merger` or leaves the work to one. DamageError where a shard's file is not what it was.
    """
    kept = dict(merged)
    joint = [group for group in groups if group.is_joint and group.name not in merged]
    places = _book(root).slots([group.name for group in joint], store.wholeness(root, DOCUMENTS))
    todo = [
        Work(place.name, tuple(slots[shard.name].name for shard in group.shards), schema)
        for place, group in zip(places, joint, strict=True)
    ]
    if todo:
        with workers() as team:
            for record in team.map(todo):
                _drop_shards(root, _shard_files(record))
                kept[record["group"]] = keep(record)
                log.info(
                    "embed merged=%s shards=%d rows=%d bytes=%d seconds=%.1f",
                    record["group"], len(record["shards"]), record["rows"], record["merged_bytes"],
                    record["merge_seconds"],
                )  # fmt: skip
    return kept


class Merger:
    """Reads the shards of a group, a batch at a time, and writes one fragment of them."""

    def __init__(self, root: Root, threads: int) -> None:
        self._root = root

    def __call__(self, work: Work) -> Record:
        """The record of a group."""
        found = _book(self._root).read(work.name)
        return _book(self._root).add(work.name, self._merge(work)) if found is None else found

    def _merge(self, work: Work) -> Record:
        start, book = time.perf_counter(), Ledger(self._root, "embed")
        records = [Slot(name, book.read(name)).done for name in work.shards]
        files = {path: digest for record in records for path, digest in record["files"].items()}
        store.check_files(self._root, DOCUMENTS, files)
        rows = sum(record["rows"] for record in records)
        content = store.Stored([self._root / store.data_name(DOCUMENTS, path) for path in files], rows)
        written = store.write_fragments(self._root, DOCUMENTS, content, work.schema, f"merge/{work.name}")
        return {
            "group": work.name.partition("~")[0],
            "rows": rows,
            "shards": [{name: value for name, value in one.items() if name != "fragments"} for one in records],
            **written.to_json(),
            "merged_bytes": sum(file["file_size_bytes"] for one in written.fragments for file in one["files"]),
            "merge_seconds": round(time.perf_counter() - start, 3),
        }


def _book(root: Root) -> Ledger:
    return Ledger(root, "merge")


def _shard_files(record: Record) -> list[str]:
    """Data files that were joined."""
    return [path for shard in record["shards"] for path in shard["files"]]


def _drop_shards(root: Root, paths: Iterable[str]) -> None:
    """Delete what was merged, by name, when the records that hold the same rows are on disk for sure."""
    root.disk.sync_folder(root / _book(root).folder)
    for path in paths:
        root.delete(f"{DATA}/{path}")
    root.disk.sync_folder(root / DATA)
