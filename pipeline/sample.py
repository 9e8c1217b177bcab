"""Seeded rows of a bounded part of a corpus, cleaned as the job cleans them, and what its columns weigh as Lance.

Nothing is written but to a scratch folder. Rows come from the beginnings of seeded row groups and files.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import (
    corpus as corpus_stage,
    docstrings,
    limits,
    rows as row_rule,
    sources,
    store,
)
from pipeline.errors import DataError
from pipeline.sources import RawBatch, Reader, SourceFile
from pipeline.spec import Corpus, JobSpec

Origin = Literal["measured", "estimated", "assumed"]
Counts = NDArray[np.int64]
SAMPLE_ROWS = 1_000
BLOCKS = 64
"""Row groups, pieces of Lance tables, or files of lines that are looked into, at most."""
READ_ROWS, READ_BYTES = 65_536, 2**28
"""What is read of them, at most; of lines 1/8 of the bytes, since each becomes a Python object."""
WEIGHED_ROWS, WEIGHED_BYTES = 8_192, 2**23
"""Up to which a sample is copied before it is written to be weighed."""


@dataclass(frozen=True)
class Window:
    """Rows start … stop of a file, of which some are drawn; `bytes` is what reading them takes."""

    path: str
    file: SourceFile
    start: int
    stop: int
    bytes: int = 0


@dataclass(frozen=True)
class Rows:
    """How many rows the corpus has, and how that is known."""

    count: int
    origin: Origin
    how: str


@dataclass(frozen=True)
class Sample:
    """Rows drawn: the texts of usable ones, their columns as tables hold them, reasons of the others."""

    rows: Rows
    drawn: int
    how: str
    texts: list[str]
    documents: pa.Table
    filters: pa.Table
    reasons: dict[str, int]


@dataclass(frozen=True)
class Line:
    """Bytes of stored columns: `fixed` per file and `each` per row."""

    fixed: float
    each: float

    def at(self, rows: float, files: int = 1) -> float:
        """Bytes of so many rows in so many files."""
        return self.fixed * files + self.each * rows


def draw(spec: JobSpec, files: Sequence[SourceFile], scratch: Path) -> Sample:
    """Seeded rows of a bounded part of the corpus, cleaned as the job cleans them."""
    corpus = spec.corpus
    counted = [file for file in files if file.kind in ("parquet", "lance", "docstrings")]
    lines = [file for file in files if file not in counted]
    blocks = [block for file in counted for block in _blocks(file, corpus)]
    windows, known = chosen(blocks, spec.seed), sum(block.stop - block.start for block in blocks)
    heads, rows = _heads(lines, known, corpus, spec.seed, scratch)
    whole = len(heads) == len(lines) and sum(w.stop - w.start for w in windows) == known and rows.origin == "measured"
    share = known / max(rows.count, 1)
    drawn = list(_drawn(windows, round(SAMPLE_ROWS * share), corpus, spec.seed))
    drawn += _drawn(heads, SAMPLE_ROWS - round(SAMPLE_ROWS * share), corpus, spec.seed)
    where = "all rows" if whole else f"the beginnings of {len(windows)} of {len(blocks)} row groups or pieces of tables"
    if lines and not whole:
        where += f" and of {len(heads)} of {len(lines)} files (large ones likelier)"
    return _cleaned(drawn, corpus, rows, f"seeded positions in {where}")


def _cleaned(drawn: Sequence[tuple[str, RawBatch]], corpus: Corpus, rows: Rows, how: str) -> Sample:
    """The sample as tables hold it; a text that is there already is set aside as in the job, where ids are hashes."""
    bare = corpus.model_copy(update={"keep": (), "filter": ()})  # carried columns have no common type yet
    usable, names, texts = [], [], []
    reasons, seen = Counter[str](), set[bytes]()
    for path, raw in drawn:
        clean = row_rule.clean(raw, path, bare, {})
        reasons.update(clean.reasons)
        if corpus.id is None and seen.issuperset(clean.digests):
            reasons.update(["duplicate_text"] * len(clean.digests))
        elif clean.texts:
            usable.append(raw)
            names += clean.ids
            texts += clean.texts
        seen.update(clean.digests)
    if not usable:
        listed = row_rule.listed(reasons) or "none was read"
        raise DataError(f"none of {len(drawn)} sampled rows can be used ({listed}); mend the corpus")
    carried = {name: _carried(name, usable) for name in (*corpus.keep, *corpus.filter)}
    named = {"id": pa.array(names, pa.string())} | ({"text": pa.array(texts, pa.string())} if corpus.keep_text else {})
    filters = {name: carried[name] for name in corpus.filter}
    tables = pa.table(named | carried), pa.table(filters)
    return Sample(rows, len(drawn), how, texts, *tables, dict(reasons))


def _blocks(file: SourceFile, corpus: Corpus) -> list[Window]:
    """Pieces of a file whose rows are known: row groups, or as much of a Lance table as is read of one."""
    if file.kind == "docstrings":
        return [Window(file.path, file, 0, len(docstrings.stdlib()))]
    if file.kind == "lance":
        total, step = sources.footer_rows(file) or 0, READ_ROWS // BLOCKS
        return [Window(file.path, file, at, min(at + step, total)) for at in range(0, total, step)]
    corpus_stage.check_columns(corpus, file, first=False)
    columns = row_rule.columns(corpus)
    with sources.reading(file):
        opened, at, found = sources.opened(file), 0, []
        for group, rows in enumerate(opened.groups):
            found.append(Window(file.path, file, at, at + rows, opened.packed_bytes(group, columns)))
            at += rows
    return found


def chosen(blocks: Sequence[Window], seed: int) -> list[Window]:
    """Seeded blocks, larger ones likelier, each cut to its share of what may be read; in the corpus' order."""
    rows = np.array([block.stop - block.start for block in blocks])
    filled = np.flatnonzero(rows)
    if not len(filled):
        return []
    likely = rows[filled] / rows.sum()
    order = np.random.default_rng(seed).choice(filled, min(BLOCKS, len(filled)), replace=False, p=likely)
    spent = np.cumsum([blocks[number].bytes for number in order])
    kept = sorted(order[: max(1, int((spent <= READ_BYTES).sum()))])
    each = READ_ROWS // len(kept)
    return [replace(blocks[at], stop=min(blocks[at].stop, blocks[at].start + each)) for at in kept]


def _heads(
    files: Sequence[SourceFile], known: int, corpus: Corpus, seed: int, scratch: Path
) -> tuple[list[Window], Rows]:
    """The beginnings of seeded files of lines, as files of their own; and the rows of the corpus by their bytes."""
    sizes = np.array([file.size for file in files], np.int64)
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return [], Rows(known, "measured", "counted: rows in footers, or those of a corpus that is read whole")
    likely = sizes[filled] / sizes.sum()
    order = np.random.default_rng(seed).choice(filled, min(BLOCKS, len(filled)), replace=False, p=likely)
    heads, read = [], 0
    for number in sorted(order):
        corpus_stage.check_columns(corpus, files[number], first=False)
        head, stored = _head(files[number], READ_BYTES // 8 // len(order), scratch / f"head-{number}")
        heads.append(head)
        read += stored
    seen = sum(head.stop for head in heads)
    if read == sizes.sum():
        return heads, Rows(known + seen, "measured", "every row was read, or counted in a footer")
    how = f"bytes of all files x {seen:,} rows / {read:,} bytes read of {len(heads)} of {len(files)} files"
    return heads, Rows(known + round(seen * float(sizes.sum()) / read), "estimated", how)


def _head(file: SourceFile, limit: int, path: Path) -> tuple[Window, int]:
    """The first stored bytes of a file, unpacked, without the row that the end cuts; and how many bytes."""
    filesystem, place, _ = sources.locate(file.path)
    codec = {"gz": "gzip", "zst": "zstd"}.get(place.lower().rpartition(".")[2])
    with sources.reading(file), filesystem.open_input_stream(place, compression=None) as stream:
        data = stream.read(limit // 4 if codec else limit)
        unpacked = _unpacked(data, codec, is_whole=len(data) == file.size) if codec else data
    path.write_bytes(unpacked)
    head = SourceFile(str(path), file.kind, path.stat().st_size, "")
    rows = sum(raw.count for raw in Reader([]).read(head))
    if len(data) == file.size:
        return Window(file.path, head, 0, rows), file.size
    return (Window(file.path, head, 0, rows - 1), len(data)) if rows > 1 else _head(file, 8 * limit, path)


def _unpacked(data: bytes, codec: str, is_whole: bool) -> bytes:
    unpacked = bytearray()
    with pa.CompressedInputStream(pa.BufferReader(data), codec) as stream:
        try:
            while part := stream.read(4096):
                unpacked += part
                if len(unpacked) > limits.MAX_UNPACKED * max(len(data), 2**16):
                    raise MemoryError(f"its first {len(data)} bytes unpack to more than {len(unpacked) - 1}")
        except OSError:  # the end is missing, as it must be where only the beginning was read
            if is_whole:
                raise
    return bytes(unpacked)


def _drawn(windows: Sequence[Window], count: int, corpus: Corpus, seed: int) -> Iterator[tuple[str, RawBatch]]:
    """Seeded rows of the windows, one a batch, with the path of their file; no more is read than they need."""
    reader = Reader(row_rule.columns(corpus))
    places = positions([window.stop - window.start for window in windows], count, seed)
    for window, offsets in zip(windows, places, strict=True):
        if not len(offsets):
            continue
        wanted = offsets + window.start
        for raw in reader.read(window.file, window.start, window.stop):
            inside = wanted[(wanted >= raw.start) & (wanted < raw.start + raw.count)] - raw.start
            yield from ((window.path, _one(raw, at)) for at in inside.tolist())
            if raw.start + raw.count > wanted[-1]:
                break


def positions(lengths: Sequence[int], count: int, seed: int) -> list[Counts]:
    """`count` seeded places among all, or all where there are fewer: ascending offsets in each window."""
    ends = np.cumsum([0, *lengths])
    picked = np.sort(np.random.default_rng(seed).choice(ends[-1], min(count, int(ends[-1])), replace=False))
    return [picked[(picked >= low) & (picked < high)] - low for low, high in zip(ends[:-1], ends[1:], strict=True)]


def _one(raw: RawBatch, at: int) -> RawBatch:
    columns = {name: column[at : at + 1] for name, column in raw.columns.items()}
    return RawBatch(raw.start + at, 1, columns, {0: raw.bad[at]} if at in raw.bad else {})


def _carried(name: str, drawn: Sequence[RawBatch]) -> pa.Array:
    """A carried column of the sample as one type; DataError where its values have none in common."""
    typed = [raw.columns[name] for raw in drawn if isinstance(raw.columns[name], pa.Array)]
    loose = [raw.columns[name][0] for raw in drawn if not isinstance(raw.columns[name], pa.Array)]
    if loose:
        is_text = all(value is None or isinstance(value, str) for value in loose)
        kind = row_rule.csv_type(loose) if is_text else row_rule.observed_type(loose, name, "the sample")
        typed.append(row_rule.typed(loose, kind, name, "the sample"))
    try:
        tables = [pa.table({name: column}) for column in typed]
        joined = pa.concat_tables(tables, promote_options="permissive").column(name).combine_chunks()
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"column {name!r} has several types ({str(error).splitlines()[0]}); files must agree") from None
    return joined.cast(pa.string()) if pa.types.is_null(joined.type) else joined


def stored(columns: pa.Table, scratch: Path) -> Line:
    """What columns take as Lance files: the sample, copied to some thousand rows, is written whole and halved.

    Lance packs numbers by the thousand and strings only in some number. A copy of a string that rarely repeats
    carries the number of the copy, since Lance would find equal ones.
    """
    if not columns.num_columns:
        return Line(0, 0)
    rows = max(len(columns), min(WEIGHED_ROWS, int(WEIGHED_BYTES * len(columns) / max(columns.nbytes, 1))))
    copied = columns.take(pa.array(np.arange(rows) % len(columns)))
    number = pa.array(np.arange(rows) // len(columns)).cast(pa.string())
    for at, name in enumerate(columns.column_names):
        column = columns.column(name)
        if pa.types.is_string(column.type) and 2 * pc.count_distinct(column).as_py() > len(column):
            copied = copied.set_column(at, name, pc.binary_join_element_wise(copied.column(name), number, ""))
    whole, part = _weighed(copied, scratch / "whole"), _weighed(copied.slice(0, rows // 2), scratch / "part")
    each = (whole - part) / (rows - rows // 2)
    return Line(max(whole - each * rows, 0.0), each)


def _weighed(columns: pa.Table, path: Path) -> int:
    pieces = store.draft_fragments(path, columns, columns.schema)
    return sum(file.file_size_bytes for piece in pieces for file in piece.files)
