"""A second reading of `where`, in plain Python: a text as a function of a row, and rows to try it on."""

import math
import random
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa

from pipeline.filters import Column

NAN, INF, LOW, HIGH = math.nan, math.inf, -(2**63), 2**63 - 1
WORDS = [
    "", "en", "EN", "it's", 'a"b', "50%", "5_", "a_b", "a\\b", "\\", "a\\", "a\nb", "\x00", "a\x00b", "’", "‘en’", "%",
    "_", "ü", "日本", "😀", "\u202e", "\x1b[31m", "--", "' OR 1=1 --", "true", "NULL", "1", None,
]  # fmt: skip
TYPES = {
    "lang": (pa.string(), Column("string"), WORDS),
    "it's a name": (pa.string(), Column("string"), ["x", "y'", "", None]),
    "select": (pa.string(), Column("string"), ["in", "not", None]),
    "year": (pa.int64(), Column("integer"), [LOW, LOW + 1, -3, 0, 1, 2001, 2**53 + 1, HIGH - 1, HIGH, None]),
    "NOT": (pa.int8(), Column("integer", -128, 127), [-128, -1, 0, 1, 127, None]),
    "small": (pa.uint8(), Column("integer", 0, 255), [0, 1, 254, 255, None]),
    "Big": (pa.uint64(), Column("integer", 0, 2**64 - 1), [0, 1, HIGH, HIGH + 1, 2**64 - 1, None]),
    "ratio": (pa.float64(), Column("float"), [NAN, -NAN, INF, -INF, 0.0, -0.0, 0.1, -2.5, 5e-324, 1.7e308, 1e16, None]),
    "thin": (pa.float32(), Column("float", bits=32), [NAN, -NAN, INF, -INF, -0.0, 0.1, 3.4028235e38, 16777216.0, None]),
    "half": (pa.float16(), Column("float", bits=16), [NAN, -NAN, INF, -INF, 0.0, 0.1, 65504.0, -65504.0, None]),
    "ok": (pa.bool_(), Column("boolean"), [True, False, None]),
}
COLUMNS = {name: column for name, (_, column, _) in TYPES.items()}


def _row(rng: random.Random) -> dict:
    return {name: rng.choice(values) for name, (_, _, values) in TYPES.items()}


def stored(seed: int) -> tuple[list[dict], pa.Table]:
    """Rows with every value of every column, some of them twice, as Python values and as a table."""
    rng, longest = random.Random(seed), max(len(values) for _, _, values in TYPES.values())
    rows = [{name: values[n % len(values)] for name, (_, _, values) in TYPES.items()} for n in range(longest)]
    rows += [_row(rng) for _ in range(60)] + [dict.fromkeys(TYPES)]
    columns = {}
    for name, (kind, _, _) in TYPES.items():
        values = [row[name] for row in rows]
        if pa.types.is_floating(kind):  # through NumPy, which keeps the sign of a NaN
            narrow = np.array([0.0 if value is None else value for value in values], kind.to_pandas_dtype())
            columns[name] = pa.array(narrow, kind, mask=np.array([value is None for value in values]))
            for row, value in zip(rows, narrow.tolist(), strict=True):
                row[name] = None if row[name] is None else value
        else:
            columns[name] = pa.array(values, kind)
    flat = pa.array(np.random.default_rng(seed).standard_normal(2 * len(rows)).astype(np.float32))
    return rows, pa.table(columns | {"vector": pa.FixedSizeListArray.from_arrays(flat, 2)})


class Refused(Exception):
    """Outside the documented grammar."""


SIGNS = ["<=", ">=", "!=", "<>", "=", "<", ">", "(", ")", ","]
KEYWORDS = {"and", "or", "not", "in", "is", "null", "like", "true", "false"}


def tokens(text: str) -> list[tuple[str, object]]:
    """(kind, value) of each token."""
    found, at = [], 0
    while at < len(text):
        one = text[at]
        if one.isspace():
            at += 1
        elif one == "'":
            end = at + 1
            while (end := text.find("'", end)) >= 0 and text[end : end + 2] == "''":
                end += 2
            if end < 0:
                raise Refused("a string without an end")
            found.append(("string", text[at + 1 : end].replace("''", "'")))
            at = end + 1
        elif one in '"`':
            end = text.find(one, at + 1)
            if end <= at + 1:
                raise Refused("a name without an end")
            found.append(("name", text[at + 1 : end]))
            at = end + 1
        elif sign := next((sign for sign in SIGNS if text.startswith(sign, at)), ""):
            found.append((sign, sign))
            at += len(sign)
        else:
            at = _word(text, at, found)
    return found


def _word(text: str, at: int, found: list) -> int:
    """A word or a number: all that hangs together."""
    end = at + 1
    while end < len(text) and (
        text[end].isalnum()
        or text[end] in "_."
        or (text[end] in "+-" and text[end - 1] in "eE" and text[at] in "-.0123456789")
    ):
        end += 1
    word = text[at:end]
    if text[at] in "-.0123456789":
        if not word.isascii() or set(word) - set("0123456789.eE+-"):
            raise Refused(f"no number: {word}")
        try:
            float(word)
        except ValueError:
            raise Refused(f"no number: {word}") from None
        found.append(("number", word))
    elif "." in word or not (text[at].isalpha() or text[at] == "_"):
        raise Refused(f"no word: {word}")
    else:
        known = word.isascii() and word.lower() in KEYWORDS
        found.append((word.lower(), word) if known else ("name", word))
    return end


class Reading:
    """A text as a function of a row: True, False, or None where SQL has unknown."""

    def __init__(self, text: str) -> None:
        self.left = tokens(text)[::-1]
        self.left.insert(0, ("end", ""))
        self.means = self.either()
        self.need("end")

    def next(self, *kinds: str) -> bool:
        if self.left[-1][0] in kinds:
            self.value = self.left.pop()[1]
            return True
        return False

    def need(self, *kinds: str):
        if not self.next(*kinds):
            raise Refused(f"{self.left[-1]} where {kinds} should stand")
        return self.value

    def either(self):
        parts = [self.both()]
        while self.next("or"):
            parts.append(self.both())
        return lambda row: _any([part(row) for part in parts])

    def both(self):
        parts = [self.one()]
        while self.next("and"):
            parts.append(self.one())
        return lambda row: _not(_any([_not(part(row)) for part in parts]))

    def one(self):
        if self.next("not"):
            inner = self.one()
            return lambda row: _not(inner(row))
        if self.next("("):
            inner = self.either()
            self.need(")")
            return inner
        return self.test()

    def test(self):
        name = self.need("name")
        if name not in COLUMNS:
            raise Refused(f"no column {name}")
        kind = COLUMNS[name].kind
        if self.next("=", "!=", "<>", "<", "<=", ">", ">="):
            operator, literal = self.value, self.literal(name)
            return lambda row: compared(operator, row[name], literal)
        if self.next("is"):
            no = self.next("not")
            self.need("null")
            return lambda row: (row[name] is None) != no
        no = self.next("not")
        if self.next("in"):
            self.need("(")
            literals = {self.literal(name)}
            while self.next(","):
                literals.add(self.literal(name))
            self.need(")")
            found = lambda row: None if row[name] is None else row[name] in literals  # noqa: E731
        elif kind == "string" and self.next("like"):
            pattern = pattern_of(self.need("string"))
            found = lambda row: None if row[name] is None else bool(pattern.fullmatch(row[name]))  # noqa: E731
        elif kind == "boolean" and not no:
            return lambda row: row[name]
        else:
            raise Refused(f"no test: {name}")
        return (lambda row: _not(found(row))) if no else found

    def literal(self, name: str):
        kind = COLUMNS[name].kind
        if kind == "string":
            return self.need("string")
        if kind == "boolean":
            return self.need("true", "false").lower() == "true"
        try:
            exact = Decimal(self.need("number"))
        except ArithmeticError:
            raise Refused("beyond any number") from None
        if kind == "integer":
            return exact
        with np.errstate(over="ignore"):
            narrow = float(TYPES[name][0].to_pandas_dtype()(float(exact)))
        return exact if math.isinf(narrow) else narrow  # beyond the finite ones, below infinity


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _any(values: list) -> bool | None:
    return True if True in values else None if None in values else False


def compared(operator: str, left, right) -> bool | None:
    """One test of SQL; NaN is unequal to everything and neither below nor above it."""
    if left is None:
        return None
    if left != left:
        return operator in ("!=", "<>")
    return {
        "=": left == right, "!=": left != right, "<>": left != right, "<": left < right, "<=": left <= right,
        ">": left > right, ">=": left >= right,
    }[operator]  # fmt: skip


def pattern_of(text: str) -> re.Pattern:
    """LIKE: % any text, _ one character, a backslash takes the next character as it is (itself at the end)."""
    made, at = "", 0
    while at < len(text):
        one = text[at]
        if one == "\\" and at + 1 < len(text):
            at += 1
            made += re.escape(text[at])
        else:
            made += {"%": ".*", "_": "."}.get(one) or re.escape(one)
        at += 1
    return re.compile(made, re.DOTALL)
