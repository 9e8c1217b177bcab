"""`parquet/documents`: the finished `documents` table as Parquet, one file per fragment, where `embed.parquet` asks.

Made from the stored fragments alone, so that whoever writes a file, and however often, writes the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline import store
from pipeline.embedder import parquet_bytes
from pipeline.ledger import Ledger, Record
from pipeline.storage import Root, sha256
from pipeline.tables import DOCUMENTS, Parent
from pipeline.workers import Pool

FOLDER = f"parquet/{DOCUMENTS}"
GROUP_ROWS = 8_192


@dataclass(frozen=True)
class Part:
    """One fragment to write; `name` is the slot of its record."""

    name: str
    file: str
    fragment: int


def run(parent: Parent, root: Root, pool: Pool) -> dict[str, str]:
    """Write what is missing; sha256 by name of every file."""
    book = Ledger(root, "parquet", parent.digest[:16])
    numbers = [
        one.fragment_id for one in store.open_table(store.table_uri(root, DOCUMENTS), parent.version).get_fragments()
    ]
    files = [f"{FOLDER}/part-{at:07d}.parquet" for at in range(len(numbers))]
    names = [f"{at:07d}" for at in range(len(numbers))]
    slots = book.slots(names, partial(_is_whole, root))
    todo = [
        Part(slot.name, file, number)
        for slot, file, number in zip(slots, files, numbers, strict=True)
        if slot.record is None
    ]
    if todo:
        with pool.team(partial(_Writer, parent, root)) as team:
            for _ in team.map(todo):
                pass
    records = [slot.done for slot in book.slots(names)]
    return {record["file"]: record["sha256"] for record in records}


def _is_whole(root: Root, record: Mapping[str, Any]) -> bool:
    return root.size(record["file"]) == int(record["bytes"])


class _Writer:
    """Turns fragments into Parquet files."""

    def __init__(self, parent: Parent, root: Root, threads: int) -> None:
        self._root, self._book = root, Ledger(root, "parquet", parent.digest[:16])
        self._documents = store.open_table(store.table_uri(root, DOCUMENTS), parent.version)

    def __call__(self, part: Part) -> Record:
        table = self._documents.get_fragment(part.fragment).to_table()
        data = parquet_bytes(
            table, use_dictionary=False, use_byte_stream_split=["vector.list.element"], row_group_size=GROUP_ROWS
        )
        self._root.write(part.file, data)
        return self._book.add(
            part.name, {"file": part.file, "bytes": len(data), "sha256": sha256(self._root / part.file)}
        )
