"""128-bit hashes that stand for ids: spilled to disk by the scan, compared in bounded memory afterwards."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

HASHES_AT_ONCE = 8_000_000
"""Hashes compared at once; about 300 MB."""
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def of_text(text: str) -> bytes:
    """The digest of a text, which is its id where the corpus has none."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def of_id(name: str) -> bytes:
    """The hash of a given id."""
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=16).digest()


def of_text_id(name: str) -> bytes:
    """The digest that an id of `of_text(…).hex()` stands for; anything else stands for no row."""
    try:
        digest = bytes.fromhex(name)
    except ValueError:
        digest = b""
    return digest if len(digest) == 16 else of_id(name)


class Spill:
    """128-bit hashes and the rows they stand for, on disk, a row group at a time."""

    GROUP = 200_000

    def __init__(self, path: Path) -> None:
        schema = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("row", pa.int64())])
        self._writer = pq.ParquetWriter(path, schema)
        self._hashes: list[bytes] = []
        self._rows: list[int] = []

    def add(self, hashes: Sequence[bytes], row_numbers: Sequence[int]) -> None:
        """Keep hashes and the rows they stand for."""
        self._hashes += hashes
        self._rows += row_numbers
        if len(self._rows) >= self.GROUP:
            self._flush()

    def close(self) -> None:
        """Bring everything to disk."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        high, low = _halves(self._hashes)
        columns = [high, low, np.array(self._rows, np.int64)]
        self._writer.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], schema=self._writer.schema))
        self._hashes, self._rows = [], []


def _halves(hashes: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """128-bit hashes as two columns of 64 bits."""
    both = np.frombuffer(b"".join(hashes), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return both[:, 0], both[:, 1]


def repeated(spills: Sequence[tuple[Path, int]], scratch: Path) -> pl.DataFrame:
    """Rows (high, low, row, first) whose hash an earlier row has; `spills` are files and their numbers of rows.

    Spills are read once and dealt out by hash to files in the folder `scratch`, 24 bytes a row, each of which is then
    compared by itself.
    """
    parts = max(1, -(-sum(rows for _, rows in spills) // HASHES_AT_ONCE))
    names = [scratch / f"{number:06d}" for number in range(parts)]
    with ExitStack() as stack:
        files = [stack.enter_context(name.open("wb")) for name in names]
        first_row = 0
        for path, rows in spills:
            for batch in pq.ParquetFile(path).iter_batches(Spill.GROUP):
                _deal(batch, first_row, files)
            first_row += rows
    found = [pl.DataFrame(np.empty(0, HASHED)).with_columns(first=pl.col("row"))]
    for name in names:
        part = pl.DataFrame(np.fromfile(name, HASHED)).with_columns(first=pl.col("row").min().over("high", "low"))
        found.append(part.filter(pl.col("row") > pl.col("first")))
        name.unlink()
    return pl.concat(found).sort("row")


def _deal(batch: pa.RecordBatch, first_row: int, files: Sequence[BinaryIO]) -> None:
    """Append each hash and its row to the file of its share of all hashes."""
    hashed = np.empty(batch.num_rows, HASHED)
    for name in HASHED.names or ():
        hashed[name] = batch.column(name).to_numpy()
    hashed["row"] += first_row
    shares = hashed["high"] // np.uint64(-(-(2**64) // len(files))) if len(files) > 1 else np.zeros(len(hashed), "u8")
    order = np.argsort(shares, kind="stable")
    edges = np.searchsorted(shares[order], np.arange(len(files) + 1, dtype=np.uint64))
    hashed = hashed[order]
    for file, (start, stop) in zip(files, pairwise(edges), strict=True):
        file.write(hashed[start:stop].tobytes())


def known(spills: Sequence[Path], hashes: Sequence[bytes]) -> list[bool]:
    """Which of the hashes some row has."""
    high, low = _halves(hashes)
    asked = pl.DataFrame({"high": high, "low": low}).with_row_index("number")
    held = pl.concat([pl.scan_parquet(path, glob=False).select("high", "low") for path in spills])
    found = set(asked.lazy().join(held, on=["high", "low"], how="semi").collect()["number"].to_list())
    return [number in found for number in range(len(hashes))]
