"""Codes and full vectors once more, as plain .npy files that searches map into memory, where `search.cache` asks.

Made from the published tables alone, in row order, and kept under their sha256: a search that maps one opens at once,
and what the operating system holds of it is shared by every process of the machine.
"""

from collections.abc import Mapping

import numpy as np

from pipeline import store
from pipeline.ledger import Ledger, Record
from pipeline.storage import Root, kept_name
from pipeline.tables import TableInfo, vector_matrix
from pipeline.vectors import code_dtype

BATCH_ROWS = 65_536


def run(tables: Mapping[str, tuple[int, str]], root: Root) -> dict[str, str]:
    """Make what is missing of tables given by version and digest; sha256 of each one's file by table name."""
    book = Ledger(root, "cache")
    found = {}
    for name, (version, digest) in tables.items():
        if "vector" not in store.open_table(store.table_uri(root, name), version).schema.names:
            continue  # nested blocks are read as they are needed
        slot = book.slot(
            f"{name}-{digest[:16]}", lambda record: root.size(kept_name(record["sha256"])) == record["bytes"]
        )
        record = book.add(slot.name, _written(name, version, root)) if slot.record is None else slot.record
        found[name] = str(record["sha256"])
    return found


def _is_there(root: Root, record: Record) -> bool:
    return root.size(kept_name(record["sha256"])) == int(record["bytes"])


def _written(name: str, version: int, root: Root) -> Record:
    table = store.open_table(store.table_uri(root, name), version)
    width, dtype = table.schema.field("vector").type.list_size, code_dtype(TableInfo.of(table.schema).precision)
    draft = root.draft_folder() / f"{name}.npy"
    codes = np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=(table.count_rows(), width))
    start = 0
    for batch in table.scanner(columns=["vector"], batch_size=BATCH_ROWS).to_batches():
        codes[start : start + batch.num_rows] = vector_matrix(batch.column("vector"))
        start += batch.num_rows
    codes.flush()
    size = draft.stat().st_size
    return {"sha256": root.keep_file(draft), "bytes": size}
