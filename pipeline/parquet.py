"""Parquet files of strangers: footers are checked before a page is read, arrays before they are used.

A footer can lie about its pages; then what is read differs from what it says, and that is refused too.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import limits
from pipeline.errors import DataError

BATCH_ROWS = 4096
HEADER_BYTES = 16
"""Of a page header: its kind and its unpacked size stand in them."""


class Parquet:
    """An open Parquet file whose footer keeps within the limits."""

    def __init__(self, handle: pa.NativeFile, path: str) -> None:
        """Raise DataError where the footer declares more than is read, Arrow's errors where it is broken."""
        self._handle, self._path, self._size = handle, path, handle.size()
        end = handle.read_at(8, max(self._size - 8, 0))
        if end.endswith(b"PAR1"):
            self._check("bytes of its footer", int.from_bytes(end[:4], "little"), limits.MAX_FOOTER_BYTES)
        self.file = pq.ParquetFile(
            handle,
            page_checksum_verification=True,
            thrift_string_size_limit=limits.MAX_FOOTER_BYTES,
            thrift_container_size_limit=limits.MAX_THRIFT_ITEMS,
        )
        footer = self.file.metadata
        self._check("columns", footer.num_columns, limits.MAX_COLUMNS)
        most = max(limits.FREE_BYTES, limits.MAX_PACKING * self._size)
        self._check(f"rows in {self._size:,} bytes", footer.num_rows, min(limits.MAX_ROWS, most))
        self.groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if min(self.groups, default=0) < 0 or sum(self.groups) != footer.num_rows:
            raise self._damaged(f"its row groups have other rows than its footer's {footer.num_rows:,}")

    def batches(self, groups: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of these row groups; DataError where the pages are not what the footer says."""
        paths = [self.file.schema.column(number).path for number in range(self.file.metadata.num_columns)]
        prefixes = tuple(f"{name}." for name in columns)
        leaves = [number for number, path in enumerate(paths) if f"{path}.".startswith(prefixes)]
        sizes = [self._batch_rows(group, leaves) for group in groups]
        for group, rows in zip(groups, sizes, strict=True):
            read = 0
            for batch in self.file.iter_batches(rows, row_groups=[group], columns=list(columns)):
                read += batch.num_rows
                yield batch
            if read != self.groups[group]:
                raise self._damaged(f"row group {group} has {read:,} rows, its footer says {self.groups[group]:,}")

    def _batch_rows(self, group: int, leaves: Sequence[int]) -> int:
        """Rows of a batch that keeps within BATCH_BYTES, after the footer's sizes are checked."""
        chunks = [self.file.metadata.row_group(group).column(leaf) for leaf in leaves]
        for chunk in chunks:
            start, packed, unpacked = _start(chunk), chunk.total_compressed_size, chunk.total_uncompressed_size
            if min(start, packed, unpacked) < 0 or start + packed > self._size:
                raise self._damaged(f"column {chunk.path_in_schema!r} of row group {group} lies outside the file")
            most = max(limits.FREE_BYTES, limits.MAX_PACKING * packed)
            self._check(f"bytes that {packed:,} of column {chunk.path_in_schema!r} unpack to", unpacked, most)
        total = sum(chunk.total_uncompressed_size for chunk in chunks)
        self._check(f"bytes that row group {group} unpacks to", total, limits.MAX_GROUP_BYTES)
        repeatable = sum(self._repeatable(chunk) for chunk in chunks)
        return max(1, min(BATCH_ROWS, limits.BATCH_BYTES // max(repeatable, 1)))

    def _repeatable(self, chunk: pq.ColumnChunkMetaData) -> int:
        """Bytes that each row of a chunk can repeat: its dictionary, or, where values share prefixes, all of it."""
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            return int(chunk.total_uncompressed_size)
        return dictionary_bytes(self._handle.read_at(HEADER_BYTES, _start(chunk)))

    def _check(self, what: str, claimed: int, most: int) -> None:
        if claimed > most:
            raise DataError(
                f"cannot read {self._path}: it claims {claimed:,} {what}, at most {most:,} are read; "
                "write it in smaller parts or leave it out"
            )

    def _damaged(self, what: str) -> DataError:
        return DataError(f"cannot read {self._path}: {what}; mend the file or leave it out")


def _start(chunk: pq.ColumnChunkMetaData) -> int:
    """Where a column chunk's first page begins; some writers leave the dictionary's place at 0."""
    places = [chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else 0]
    return int(min([place for place in places if place], default=0))


def dictionary_bytes(header: bytes) -> int:
    """Unpacked bytes of a page, from the first bytes of its header, where it is a dictionary, else 0.

    A header is Thrift's compact protocol: field 1, an i32, is the page's kind; field 2, an i32, its unpacked size.
    """
    if header[:3] != b"\x15\x04\x15":  # field 1 of type i32, kind 2 (zigzag), field 2 of type i32
        return 0
    size = 0
    for place, byte in enumerate(header[3:8]):
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            break
    return size >> 1


def check(column: pa.Array) -> None:
    """Raise ArrowInvalid where offsets or indices point outside of their buffers. Bytes that are no UTF-8 may stand."""
    if pa.types.is_dictionary(column.type):
        pa.DictionaryArray.from_arrays(column.indices, column.dictionary, safe=True)
    elif pa.types.is_string(column.type):
        column.view(pa.binary()).validate(full=True)
    elif pa.types.is_large_string(column.type):
        column.view(pa.large_binary()).validate(full=True)
    elif not pa.types.is_string_view(column.type):
        column.validate(full=True)


def too_long(column: pa.Array) -> dict[int, str]:
    """Rows of a plain column whose string is longer than is read, and why they are bad."""
    is_text = pa.types.is_string(column.type) or pa.types.is_binary(column.type)
    if not is_text or column.nbytes <= limits.MAX_TEXT:
        return {}
    lengths = pc.binary_length(column).fill_null(0).to_pylist()
    return {
        row: f"a text of {length:,} bytes; at most {limits.MAX_TEXT:,} are read"
        for row, length in enumerate(lengths)
        if length > limits.MAX_TEXT
    }
