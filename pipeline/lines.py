"""Rows of line formats, one at a time: a line that is too long or does not parse costs only itself.

A string in place of a row says why it did not parse.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any

from pipeline import limits
from pipeline.errors import DataError


class Unpacked(io.RawIOBase):
    """What a packed stream unpacks to; DataError where that is out of all proportion to the file."""

    def __init__(self, stream: Any, path: str, size: int) -> None:
        self._stream, self._path = stream, path
        self._left = max(limits.FREE_UNPACKED, limits.MAX_UNPACKED * size)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        count = int(self._stream.readinto(buffer))
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"cannot read {self._path}: it unpacks to more than {limits.MAX_UNPACKED} times its size; "
                "unpack it yourself or leave it out"
            )
        return count


class _TooLong(csv.Error):
    """A line is too long; it has been passed over."""


class _Lines(Iterator[str]):
    """Lines of UTF-8; bytes that are none become lone surrogates, which cleaning counts and replaces.

    `newline` is TextIOWrapper's. Raises _TooLong for a line that is too long, and goes on behind it.
    """

    def __init__(self, stream: IO[bytes], newline: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        self._ends = ("\n",) if newline else ("\n", "\r")

    def __next__(self) -> str:
        line = self._text.readline(limits.MAX_TEXT + 1)
        if not line:
            raise StopIteration
        if len(line) <= limits.MAX_TEXT or line.endswith(self._ends):
            return line
        length = len(line)
        while rest := self._text.readline(1 << 20):
            length += len(rest)
            if rest.endswith(self._ends):
                break
        raise _TooLong(f"a line of {length:,} characters; at most {limits.MAX_TEXT:,} are read")


def records(stream: IO[bytes], kind: str) -> Iterator[dict[str, Any] | str]:
    """Rows of a txt, jsonl or csv stream."""
    if kind == "csv":
        yield from _csv_records(stream)
        return
    lines = _Lines(stream, "\n")
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except _TooLong as error:
            yield str(error)
            continue
        if kind == "txt":
            yield {"text": line.rstrip("\r\n")}
        elif line.strip():
            yield _json_record(line)


def csv_rows(stream: IO[bytes]) -> Iterator[list[str]]:
    """Rows of fields, the header first; csv.Error in place of a row that is none."""
    csv.field_size_limit(limits.MAX_TEXT)
    return csv.reader(_Lines(stream, ""), strict=True)


def _csv_records(stream: IO[bytes]) -> Iterator[dict[str, str | None] | str]:
    """Rows by the header's names; an empty field is null."""
    rows = csv_rows(stream)
    header, number = next(rows, []), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except _TooLong as error:
            yield str(error)
            continue
        except csv.Error as error:
            if "unexpected end of data" in str(error):  # a whole file behind one quote is no bad row
                raise csv.Error(f"a quote is opened in row {number} or before and never closed") from None
            yield f"not CSV: {error}"
            continue
        if len(row) == len(header):
            yield {name: value or None for name, value in zip(header, row, strict=True)}
        elif row:  # csv gives [] for an empty line, which is no row
            yield f"{len(row)} fields where the header has {len(header)}"


def _json_record(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object"
    if line.count("[") + line.count("{") > limits.MAX_DEPTH and _is_deep(row):
        return f"JSON nested deeper than {limits.MAX_DEPTH} levels"
    return row


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(limits.MAX_DEPTH):
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [below for one in inner for below in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in level)
