"""`parquet/documents`: the finished `documents` table as Parquet, one file per fragment, where `embed.parquet` asks.

Made from the stored fragments alone, so that whoever writes a file, and however often, writes the same bytes; a row
group at a time, since a fragment may not fit into memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import store
from pipeline.ledger import Ledger, Record
from pipeline.listing import Listing
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, Parent
from pipeline.workers import Pool

FOLDER = f"parquet/{DOCUMENTS}"
GROUP_ROWS = 8_192
BUFFER_BYTES = 128_000_000
"""What Lance may read ahead; by itself it takes 2 GB."""


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
    there = Listing(root, FOLDER)
    slots = book.slots(names, lambda record: there.has(record["file"].removeprefix(f"{FOLDER}/"), record["bytes"]))
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


class _Writer:
    """Turns fragments into Parquet files."""

    def __init__(self, parent: Parent, root: Root, threads: int) -> None:
        self._root, self._book = root, Ledger(root, "parquet", parent.digest[:16])
        self._documents = store.open_table(store.table_uri(root, DOCUMENTS), parent.version)

    def __call__(self, part: Part) -> Record:
        scanner = self._documents.scanner(
            fragments=[self._documents.get_fragment(part.fragment)],
            batch_size=GROUP_ROWS,
            io_buffer_size=BUFFER_BYTES,
        )
        folder = self._root.draft_folder()
        draft = folder / "part.parquet"
        with pq.ParquetWriter(
            draft,
            self._documents.schema,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=["vector.list.element"],
        ) as writer:
            for group in groups(scanner.to_batches(), self._documents.schema):
                writer.write_table(group, row_group_size=GROUP_ROWS)
        self._root.disk.sync(draft)
        record = {"file": part.file, "bytes": self._root.disk.size(draft), "sha256": self._root.disk.digest(draft)}
        self._root.adopt(draft, part.file)
        self._root.disk.remove_folder(folder)
        return self._book.add(part.name, record)


def groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows by GROUP_ROWS, however many a batch has."""
    held = schema.empty_table()
    for batch in batches:
        held = pa.concat_tables([held, pa.Table.from_batches([batch], schema)])
        while held.num_rows >= GROUP_ROWS:
            yield held.slice(0, GROUP_ROWS)
            held = held.slice(GROUP_ROWS)
    if held.num_rows:
        yield held
