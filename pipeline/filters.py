"""`where`: parsed, checked against the filter columns, and rebuilt; nothing else reaches SQL.

    condition := and { OR and }            and := not { AND not }
    not       := NOT not | "(" condition ")" | test
    test      := column op literal | column [NOT] IN "(" literal {"," literal} ")"
               | column [NOT] LIKE string | column IS [NOT] NULL | column            (a boolean one)
    op        := = != <> < <= > >=         literal := 'string' ('' escapes) | number | true | false
    column    := name | "name" | `name`    LIKE: % any text, _ any character, \\ takes the next one as it is

A test of a null is unknown, neither true nor false, and so is its NOT. NaN is unequal to every number, neither below
nor above it. A number is rounded to the precision of a float column.

Our own because general SQL parsers keep parts of a node (a NOT before LIKE, an ESCAPE) where a rebuild
can miss them, and a missed part is a wrong answer.
"""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from pipeline.errors import QueryError

Kind = Literal["string", "integer", "float", "boolean"]
LARGEST = {16: 65504.0, 32: (2 - 2**-23) * 2.0**127}
"""The largest finite number of a narrow float; a double takes every literal that is let in."""


@dataclass(frozen=True)
class Column:
    """What a filter column holds; integers lie within low … high, floats have so many bits."""

    kind: Kind
    low: int = -(2**63)
    high: int = 2**63 - 1
    bits: int = 64

    @property
    def wants(self) -> str:
        """The kind of literal that it is compared with."""
        return "number" if self.kind in ("integer", "float") else self.kind


TOKEN = re.compile(
    r"""\s*(?: (?P<string>'(?:[^']|'')*')
             | (?P<number>-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w.])
             | (?P<word>[^\W\d]\w*) | "(?P<quoted>[^"]+)" | `(?P<ticked>[^`]+)`
             | (?P<sign><=|>=|!=|<>|=|<|>|\(|\)|,) )""",
    re.VERBOSE,
)
KEYWORDS = {"AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "TRUE", "FALSE"}
NEGATED = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
MAX_DEPTH, MAX_TESTS = 20, 1_000
"""Measured: Lance's parser ends at 45 parentheses, two to a level here; 100,000 ORs overflow its stack and kill us."""


def rebuild(where: str, columns: Mapping[str, Column]) -> str:
    """The same condition as safe SQL for Lance; `columns` tells what each filter column holds.

    Raises QueryError for anything outside the grammar, an unknown column, or a literal of the wrong kind.
    """
    parser = _Parser(where, columns)
    built = parser.condition(0, False)
    if parser.kind != "end":
        raise parser.unexpected("AND, OR or the end")
    return built


class _Parser:
    """Recursive descent over the grammar above; the current token is (kind, text).

    NOT is carried down to the tests (`no`), and a test that is negated there asks for a value first: DataFusion
    simplifies as if nothing were unknown, `NOT (a AND NOT a)` to true and `a NOT IN (1) OR a NOT IN (2)` as well.
    """

    def __init__(self, where: str, columns: Mapping[str, Column]) -> None:
        self.where, self.columns, self.position, self.tests = where, columns, 0, 0
        self.kind = self.text = ""
        if any("\ud800" <= character <= "\udfff" for character in where):
            raise QueryError(f"where={_shown(where)!r}: not Unicode text")
        self.advance()

    def advance(self) -> None:
        match = TOKEN.match(self.where, self.position)
        if match is None:
            rest = self.where[self.position :].strip()
            if rest:
                raise QueryError(f"where={_shown(self.where)!r}: cannot read {rest[:20]!r}")
            self.kind, self.text = "end", "the end"
            return
        self.position = match.end()
        kind = str(match.lastgroup)
        text = match[kind]
        if kind == "word" and text.isascii() and text.upper() in KEYWORDS:
            kind, text = "keyword", text.upper()
        self.kind, self.text = ("word" if kind in ("quoted", "ticked") else kind), text

    def take(self, text: str) -> bool:
        """Step over `text`, a keyword or a sign, if it comes next."""
        if self.kind in ("keyword", "sign") and self.text == text:
            self.advance()
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise self.unexpected(text)

    def condition(self, depth: int, no: bool) -> str:
        parts = [self.conjunction(depth, no)]
        while self.take("OR"):
            parts.append(self.conjunction(depth, no))
        return _joined(parts, "AND" if no else "OR")

    def conjunction(self, depth: int, no: bool) -> str:
        parts = [self.negation(depth, no)]
        while self.take("AND"):
            parts.append(self.negation(depth, no))
        return _joined(parts, "OR" if no else "AND")

    def negation(self, depth: int, no: bool) -> str:
        if depth > MAX_DEPTH:
            raise QueryError(f"where: nested deeper than {MAX_DEPTH}")
        if self.take("NOT"):
            return self.negation(depth + 1, not no)
        if self.take("("):
            inner = self.condition(depth + 1, no)
            self.expect(")")
            return inner
        return self.test(no)

    def test(self, no: bool) -> str:
        self.tests += 1
        if self.tests > MAX_TESTS:
            raise QueryError(f"where: more than {MAX_TESTS:,} tests; ask for many values with IN (…)")
        name = self.column()
        column = self.columns[name]
        if self.kind == "sign" and self.text in ("<>", *NEGATED):
            operator = "!=" if self.text == "<>" else self.text
            self.advance()
            if operator in ("=", "!="):
                return _among(name, column, [self.literal(name)], no != (operator == "!="))
            return _ordered(name, column, operator, self.literal(name), no)
        if self.take("IS"):
            some = self.take("NOT") != no
            self.expect("NULL")
            return f"(`{name}` IS {'NOT ' if some else ''}NULL)"
        own = self.take("NOT")
        if self.take("IN"):
            return _among(name, column, self.literals(name), no != own)
        if self.take("LIKE"):
            if column.kind != "string":
                raise QueryError(f"where: LIKE needs a column of strings, {name} holds {column.wants}s")
            return _known(name, "LIKE " + self.literal(name), no != own)
        if not own and column.kind == "boolean":
            return _known(name, "IN (true)", no)
        raise self.unexpected("= != < <= > >= IN, LIKE or IS")

    def column(self) -> str:
        if self.kind != "word":
            raise self.unexpected("a filter column")
        if self.text not in self.columns:
            known = ", ".join(self.columns) or "none (list them under corpus.filter)"
            raise QueryError(f"where: no filter column {_shown(self.text)!r}; filter columns: {known}")
        name = self.text
        self.advance()
        return name

    def literals(self, column: str) -> list[str]:
        self.expect("(")
        items = [self.literal(column)]
        while self.take(","):
            items.append(self.literal(column))
        self.expect(")")
        return items

    def literal(self, column: str) -> str:
        kind = {"TRUE": "boolean", "FALSE": "boolean"}.get(self.text, "") if self.kind == "keyword" else self.kind
        if kind not in ("string", "number", "boolean"):
            raise self.unexpected("a 'string', a number, true or false")
        if kind != self.columns[column].wants:
            raise QueryError(f"where: {column} holds {self.columns[column].wants}s, {_shown(self.text)} is a {kind}")
        text = self.text
        self.advance()
        return text

    def unexpected(self, wanted: str) -> QueryError:
        return QueryError(f"where={_shown(self.where)!r}: expected {wanted}, found {_shown(self.text)!r}")


def _shown(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def _joined(parts: Sequence[str], word: str) -> str:
    return parts[0] if len(parts) == 1 else f"({f' {word} '.join(parts)})"


def _known(name: str, test: str, no: bool) -> str:
    """A test, or that a column has a value which does not pass it."""
    return f"(`{name}` IS NOT NULL AND `{name}` NOT {test})" if no else f"(`{name}` {test})"


def _among(name: str, column: Column, literals: Sequence[str], no: bool) -> str:
    """Equal to one of the literals; those that the column cannot hold are left out, since Lance refuses them."""
    held = [shown for literal in literals if (shown := _held(column, literal))]
    if not held:
        return f"(`{name}` IS NOT NULL)" if no else "false"
    return _known(name, f"IN ({', '.join(held)})", no)


def _held(column: Column, literal: str) -> str:
    """A literal as the column's own value; empty where it can hold no such value."""
    if column.wants != "number":
        return literal
    value = _number(literal)
    if column.kind == "float":
        rounded = _rounded(column, value)
        return "" if math.isinf(rounded) else repr(rounded)
    if value != math.floor(value) or not column.low <= value <= column.high:
        return ""
    return str(int(value)) if value > -(2**63) else f"{1 - 2**63} - 1"  # Lance reads the sign after the digits


def _ordered(name: str, column: Column, operator: str, literal: str, no: bool) -> str:
    """Below or above a literal."""
    if column.kind == "integer":
        return _bounded(name, column, NEGATED[operator] if no else operator, _number(literal))
    if column.kind != "float":
        return f"(`{name}` {NEGATED[operator] if no else operator} {literal})"
    bound = _rounded(column, _number(literal))
    if math.isinf(bound):
        operator = operator[0] + ("=" if (bound > 0) == (operator[0] == "<") else "")
        bound = math.copysign(LARGEST[column.bits], bound)
    # DataFusion has NaN above every number, or below it, by its sign bit.
    if no:
        return f"(`{name}` {NEGATED[operator]} {bound!r} OR isnan(`{name}`))"
    return f"(`{name}` {operator} {bound!r} AND NOT isnan(`{name}`))"


def _bounded(name: str, column: Column, operator: str, value: Decimal) -> str:
    """An order of integers, with a bound that the column can hold: Lance takes no fraction and no other number."""
    bound = math.floor(value) + 1 if operator in (">", "<=") else math.ceil(value)
    above = operator in (">", ">=")
    if column.low < bound <= column.high:
        return f"(`{name}` {'>=' if above else '<'} {bound})"
    return f"(`{name}` IS NOT NULL)" if above == (bound <= column.low) else "false"


def _rounded(column: Column, value: Decimal) -> float:
    """The nearest number of the column's precision; infinite beyond its range."""
    try:
        return float(struct.unpack(code := {16: "e", 32: "f"}.get(column.bits, "d"), struct.pack(code, value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _number(text: str) -> Decimal:
    """The exact value of a literal; QueryError where it is too large to compare with."""
    whole = text.lstrip("-").isdigit()
    try:
        value = Decimal(text)
    except ArithmeticError:  # an exponent of twenty digits
        value = Decimal("inf")
    if math.isinf(float(value)) or (whole and abs(value) >= 2**64):
        raise QueryError(f"where: {_shown(text)} is beyond 64 bits")
    return value


def equal(column: str, value: str) -> str:
    """The filter of rows whose string column has just this value."""
    quoted = value.replace("'", "''")
    return f"(`{column}` = '{quoted}')"
