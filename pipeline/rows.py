"""One rule for rows: from raw columns to id, text, digest, or the reason why a row cannot be used.

The scan and the embedding both come here, so they agree on every row.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import ids
from pipeline.errors import DataError
from pipeline.sources import Column, RawBatch
from pipeline.spec import Corpus

REASONS = (
    "null_text", "blank_text", "undecodable", "duplicate_text", "non_finite", "zero_norm", "model_error",
)  # fmt: skip
QUARANTINE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("shard", pa.int64()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
ALWAYS_ALLOWED = 10
"""Rows that may be quarantined whatever the share."""
SURROGATE = re.compile("[\ud800-\udfff]")


def columns(corpus: Corpus) -> list[str]:
    """The columns that are read, each once."""
    named = [*([corpus.id] if corpus.id else []), *corpus.text, *corpus.keep, *corpus.filter]
    return list(dict.fromkeys(named))


@dataclass
class Rows:
    """Usable rows of a batch, and what was set aside; `offsets` are positions in the file."""

    file: str
    offsets: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    extras: dict[str, pa.Array] = field(default_factory=dict)
    rejected: list[tuple[int, str | None, str, str]] = field(default_factory=list)  # offset, id, reason, detail
    repaired: int = 0
    first_row: int = 0  # row number of the file's first row

    def drop(self, repeated: frozenset[int]) -> None:
        """Set aside the rows whose text an earlier row already has."""
        gone = [at for at, offset in enumerate(self.offsets) if self.first_row + offset in repeated] if repeated else []
        self.set_aside(dict.fromkeys(gone, ""), "duplicate_text")

    def set_aside(self, gone: Mapping[int, str], reason: str) -> None:
        """Set aside usable rows by position, each with a detail."""
        if not gone:
            return
        self.rejected += [(self.offsets[at], self.ids[at], reason, detail) for at, detail in gone.items()]
        kept = sorted(set(range(len(self.ids))) - set(gone))
        self.offsets, self.ids = [self.offsets[at] for at in kept], [self.ids[at] for at in kept]
        self.texts, self.digests = [self.texts[at] for at in kept], [self.digests[at] for at in kept]
        self.extras = {name: array.take(pa.array(kept, pa.int64())) for name, array in self.extras.items()}

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were set aside, by reason."""
        return Counter(reason for _, _, reason, _ in self.rejected)


def clean(raw: RawBatch, file: str, corpus: Corpus, types: Mapping[str, pa.DataType]) -> Rows:
    """Apply the text rule to a batch; `types` are those of the carried columns.

    Raises DataError where an id is missing or of a type that cannot be one.
    """
    for column in corpus.text:
        _check_text_type(raw.columns[column], column, file)
    rows = Rows(file)
    kept = _quickly(rows, raw, corpus)
    if kept is None:
        kept = _one_by_one(rows, raw, corpus)
    taken = pa.array(kept, pa.int64())
    for column in [*corpus.keep, *corpus.filter]:
        rows.extras[column] = typed(raw.columns[column], types[column], column, file).take(taken)
    return rows


def _one_by_one(rows: Rows, raw: RawBatch, corpus: Corpus) -> list[int]:
    """Positions of the usable rows, which are added."""
    names = _values(raw.columns[corpus.id]) if corpus.id else [None] * raw.count
    parts = [_values(raw.columns[name]) for name in corpus.text]
    kept = []
    for number in range(raw.count):
        offset = raw.start + number
        if number in raw.bad:
            rows.rejected.append((offset, None, "undecodable", raw.bad[number][:200]))
            continue
        name = _id(names[number], corpus.id, rows.file, offset) if corpus.id else None
        text, repaired = _text([part[number] for part in parts])
        if isinstance(text, Refused):
            rows.rejected.append((offset, name, text.reason, text.detail))
            continue
        rows.repaired += repaired
        digest = ids.of_text(text)
        kept.append(number)
        rows.offsets.append(offset)
        rows.ids.append(digest.hex() if name is None else name)
        rows.texts.append(text)
        rows.digests.append(digest)
    return kept


def _quickly(rows: Rows, raw: RawBatch, corpus: Corpus) -> list[int] | None:
    """The same for batches in which every row is usable and nothing is to be repaired; None for others.

    A third of the time: the texts of most corpora pass here.
    """
    parts = [raw.columns[name] for name in corpus.text]
    names = raw.columns[corpus.id] if corpus.id else None
    if raw.bad or not all(_is_clean(part) for part in ([*parts] if names is None else [*parts, names])):
        return None
    if names is not None and names.null_count:
        return None
    joined = pc.binary_join_element_wise(*parts, "\n", null_handling="skip") if len(parts) > 1 else parts[0]
    texts = joined.to_pylist()
    given = None if names is None else names.to_pylist()
    if len(texts) < raw.count:  # the join leaves rows out that are null everywhere (pyarrow 26)
        return None
    if any(not text or text.isspace() for text in texts) or (given is not None and "" in given):
        return None
    rows.digests = [ids.of_text(text) for text in texts]
    rows.texts = texts
    rows.ids = [digest.hex() for digest in rows.digests] if given is None else given
    rows.offsets = list(range(raw.start, raw.start + raw.count))
    return list(range(raw.count))


def _is_clean(column: Column) -> bool:
    """Whether these are strings of valid UTF-8, in which no lone surrogate can be."""
    if not isinstance(column, pa.Array) or not pa.types.is_string(column.type):
        return False
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


@dataclass(frozen=True)
class Refused:
    """Why a row has no usable text."""

    reason: str
    detail: str = ""


def _text(parts: Sequence[Any]) -> tuple[str | Refused, bool]:
    """The row's text by the text rule, and whether something undecodable was replaced in it."""
    present = [part for part in parts if part is not None]
    if not present:
        return Refused("null_text"), False
    pieces, repaired = [], False
    for part in present:
        if not isinstance(part, str | bytes):
            return Refused("undecodable", f"text is a {type(part).__name__}, not a string"), False
        piece = part.decode("utf-8", "surrogateescape") if isinstance(part, bytes) else part
        fixed = SURROGATE.sub("\ufffd", piece)
        repaired = repaired or fixed != piece
        pieces.append(fixed)
    text = "\n".join(pieces)
    return (text if text.strip() else Refused("blank_text")), repaired


def _id(value: Any, column: str, file: str, offset: int) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{file} row {offset}: the id in {column!r} is {what}; give every row a string or an integer")
    if not value:
        raise DataError(
            f"{file} row {offset}: the id in {column!r} is empty; give every row an id, or set corpus.id: null"
        )
    return SURROGATE.sub("\ufffd", value)


def _check_text_type(column: Column, name: str, file: str) -> None:
    kind = column.type if isinstance(column, pa.Array) else pa.string()
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind)):
        raise DataError(f"{file}: the text column {name!r} holds {kind}, not strings; name another one")


def _values(column: Column) -> list[Any]:
    """A column's values; Arrow strings as bytes, so that invalid UTF-8 can be seen."""
    if isinstance(column, list):
        return column
    return list((column.cast(pa.binary()) if pa.types.is_string(column.type) else column).to_pylist())


def observed_type(column: Column, name: str, file: str) -> pa.DataType:
    """The Arrow type a carried column shows in this batch; DataError where its values are of several kinds."""
    if isinstance(column, pa.Array):
        return column.type
    try:
        return _array(column).type
    except OverflowError:
        raise DataError(f"{file}: column {name!r} holds a number beyond 64 bits; write it as a string") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise DataError(f"{file}: column {name!r} holds values of several types; make them one type") from None


def _array(column: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Values of a line format as Arrow."""
    try:
        return pa.array(column, kind)
    except UnicodeEncodeError:
        return pa.array([_repaired(value) for value in column], kind)


def _repaired(value: Any) -> Any:
    """A JSON value in which lone surrogates became U+FFFD."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_repaired(one) for one in value]
    if isinstance(value, dict):
        return {_repaired(name): _repaired(one) for name, one in value.items()}
    return value


def csv_type(column: Sequence[str | None]) -> pa.DataType:
    """The narrowest of int64, float64, bool, string that reads every value; empty fields are null."""
    values = _array([value or None for value in column], pa.string())
    if values.null_count == len(values):
        return pa.null()
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            read = values.cast(kind)
        except pa.ArrowInvalid:
            continue
        if pa.types.is_integer(kind) and not read.cast(pa.string()).equals(values):
            return pa.string()  # 007 is no number
        return kind
    return pa.string()


def unify(known: pa.DataType, seen: pa.DataType) -> pa.DataType | None:
    """A type that holds both without loss; None where there is none."""
    try:
        schemas = [pa.schema([("c", kind)]) for kind in (known, seen)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("c").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def _valid(column: pa.Array) -> pa.Array:
    """A column in which bytes that are no UTF-8 became U+FFFD: Lance would write them and then not read them."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if not pa.types.is_string(column.type):
            raise
        values = column.cast(pa.binary()).to_pylist()
        return pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], pa.string())
    return column


def typed(column: Column, kind: pa.DataType, name: str, file: str) -> pa.Array:
    """A carried column as the type the whole corpus agreed on."""
    try:
        if isinstance(column, pa.Array):
            return _valid(column if column.type == kind else column.cast(kind))
        if all(value is None for value in column):
            return pa.nulls(len(column), kind)
        if all(value is None or isinstance(value, str) for value in column):
            repaired = [_repaired(value) for value in column]
            if pa.types.is_string(kind):
                return pa.array(repaired, kind)
            return pc.cast(pa.array([value or None for value in repaired], pa.string()), kind)
        return _array(column, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{file}: column {name!r} does not fit {kind}: {str(error).splitlines()[0]}") from None


def check_budget(corpus: Corpus, total: int, reasons: Mapping[str, int]) -> None:
    """DataError where more rows are set aside than `max_quarantined` allows; repeated texts are not counted."""
    counted = {reason: count for reason, count in reasons.items() if reason != "duplicate_text" and count}
    allowed = max(ALWAYS_ALLOWED, math.floor(corpus.max_quarantined * total + 1e-9))
    if sum(counted.values()) > allowed:
        raise DataError(
            f"{sum(counted.values())} of {total} rows cannot be used ({listed(counted)}), {allowed} are allowed; "
            "mend the corpus or raise corpus.max_quarantined"
        )


def listed(reasons: Mapping[str, int]) -> str:
    """Reasons and counts on one line."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
