"""Parquet files of strangers: footers are checked before a page is read, arrays before they are used.

A footer can lie about its pages; then what is read differs from what it says, and that is refused too.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import limits
from pipeline.errors import DataError

BATCH_ROWS = 4096
HEADER_BYTES = 16
"""Of a page header: its kind and its unpacked size stand in them."""


class _NoPages(Exception):
    """Pages were asked for."""


class _Footer(io.RawIOBase):
    """A file of which no page can be read."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        """Yes, says it."""
        return True

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Stand elsewhere."""
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Raise _NoPages."""
        raise _NoPages


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
        for group in groups:
            rows, read = self._batch_rows(group, columns), 0
            for batch in self.file.iter_batches(rows, row_groups=[group], columns=list(columns)):
                read += batch.num_rows
                yield batch
            if read != self.groups[group]:
                raise self._damaged(f"row group {group} has {read:,} rows, its footer says {self.groups[group]:,}")

    def packed_bytes(self, group: int, columns: Sequence[str]) -> int:
        """What these columns of a row group take in the file."""
        return sum(chunk.total_compressed_size for chunk in self._chunks(group, columns))

    def _chunks(self, group: int, columns: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
        """What the footer says of these columns of a row group, checked."""
        # Asked for a broken chunk's metadata, pyarrow 26 ends the process; a reader of the same raises an error.
        blind = pa.PythonFile(_Footer(self._size), mode="r")
        reader = pq.ParquetFile(blind, metadata=self.file.metadata, pre_buffer=False, buffer_size=4096)
        with suppress(_NoPages):
            list(reader.iter_batches(1, row_groups=[group], columns=list(columns), use_threads=False))
        prefixes = tuple(f"{name}." for name in columns)
        leaves = [self.file.schema.column(number) for number in range(self.file.metadata.num_columns)]
        footer, chunks = self.file.metadata.row_group(group), []
        for number, leaf in enumerate(leaves):
            if f"{leaf.path}.".startswith(prefixes):
                chunk = footer.column(number)
                start, packed, unpacked = _start(chunk), chunk.total_compressed_size, chunk.total_uncompressed_size
                if min(start, packed, unpacked) < 0 or start + packed > self._size:
                    raise self._damaged(f"column {leaf.path!r} of row group {group} lies outside the file")
                if chunk.path_in_schema != leaf.path or leaf.logical_type.type == "UNDEFINED":
                    raise self._damaged(f"its footer is at odds with itself about column {leaf.path!r}")
                most = max(limits.FREE_BYTES, limits.MAX_PACKING * packed)
                self._check(f"bytes that {packed:,} of column {leaf.path!r} unpack to", unpacked, most)
                chunks.append(chunk)
        return chunks

    def _batch_rows(self, group: int, columns: Sequence[str]) -> int:
        """Rows of a batch that keeps within BATCH_BYTES."""
        chunks = self._chunks(group, columns)
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
    """Raise Arrow's error where offsets or indices point outside of their buffers; bytes that are no UTF-8 pass."""
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
