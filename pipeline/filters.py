"""`where`: parsed, checked against the filter columns, and rebuilt; nothing else reaches SQL.

    condition := and { OR and }            and := not { AND not }
    not       := NOT not | "(" condition ")" | test
    test      := column op literal | column [NOT] IN "(" literal {"," literal} ")"
               | column [NOT] LIKE string | column IS [NOT] NULL | column            (a boolean one)
    op        := = != <> < <= > >=         literal := 'string' ('' escapes) | number | true | false

Our own because general SQL parsers keep parts of a node (a NOT before LIKE, an ESCAPE) where a rebuild
can miss them, and a missed part is a wrong answer.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import QueryError

Kind = Literal["string", "integer", "float", "boolean"]


@dataclass(frozen=True)
class Column:
    """What a filter column holds; integers lie within low … high."""

    kind: Kind
    low: int = -(2**63)
    high: int = 2**63 - 1

    @property
    def wants(self) -> str:
        """The kind of literal that it is compared with."""
        return "number" if self.kind in ("integer", "float") else self.kind


TOKEN = re.compile(
    r"""\s*(?: (?P<string>'(?:[^']|'')*')
             | (?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
             | (?P<word>[^\W\d]\w*) | "(?P<quoted>[^"]+)" | `(?P<ticked>[^`]+)`
             | (?P<sign><=|>=|!=|<>|=|<|>|\(|\)|,) )""",
    re.VERBOSE,
)
KEYWORDS = {"AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "TRUE", "FALSE"}
MAX_DEPTH = 100
"""Nesting of NOT and parentheses; deeper conditions would exhaust Python's stack."""


def rebuild(where: str, columns: Mapping[str, Column]) -> str:
    """The same condition as safe SQL for Lance; `columns` tells what each filter column holds.

    Raises QueryError for anything outside the grammar, an unknown column, or a literal of the wrong kind.
    """
    parser = _Parser(where, columns)
    built = parser.condition(0)
    if parser.kind != "end":
        raise parser.unexpected("AND, OR or the end")
    return built


class _Parser:
    """Recursive descent over the grammar above; the current token is (kind, text)."""

    def __init__(self, where: str, columns: Mapping[str, Column]) -> None:
        self.where, self.columns, self.position = where, columns, 0
        self.kind = self.text = ""
        self.advance()

    def advance(self) -> None:
        match = TOKEN.match(self.where, self.position)
        if match is None:
            rest = self.where[self.position :].strip()
            if rest:
                raise QueryError(f"where={self.where!r}: cannot read {rest[:20]!r}")
            self.kind, self.text = "end", "the end"
            return
        self.position = match.end()
        kind = str(match.lastgroup)
        text = match[kind]
        if kind == "word" and text.upper() in KEYWORDS:
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

    def condition(self, depth: int) -> str:
        parts = [self.conjunction(depth)]
        while self.take("OR"):
            parts.append(self.conjunction(depth))
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def conjunction(self, depth: int) -> str:
        parts = [self.negation(depth)]
        while self.take("AND"):
            parts.append(self.negation(depth))
        return parts[0] if len(parts) == 1 else f"({' AND '.join(parts)})"

    def negation(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise QueryError(f"where: nested deeper than {MAX_DEPTH}")
        if self.take("NOT"):
            return f"(NOT {self.negation(depth + 1)})"
        if self.take("("):
            inner = self.condition(depth + 1)
            self.expect(")")
            return inner
        return self.test()

    def test(self) -> str:
        name = self.column()
        quoted = f"`{name}`"
        if self.kind == "sign" and self.text in ("=", "!=", "<>", "<", "<=", ">", ">="):
            operator = "!=" if self.text == "<>" else self.text
            self.advance()
            literal = self.literal(name)
            if self.columns[name].kind == "integer":
                return f"({_integer_test(name, self.columns[name], operator, _number(literal))})"
            return f"({quoted} {operator} {literal})"
        if self.take("IS"):
            negated = self.take("NOT")
            self.expect("NULL")
            return f"({quoted} IS {'NOT ' if negated else ''}NULL)"
        no = "NOT " if self.take("NOT") else ""
        if self.take("IN"):
            return f"({no}{self.membership(name)})"
        if self.take("LIKE"):
            if self.columns[name].kind != "string":
                raise QueryError(f"where: LIKE needs a column of strings, {name} holds {self.columns[name].wants}s")
            return f"({quoted} {no}LIKE {self.literal(name)})"
        if not no and self.columns[name].kind == "boolean":
            return quoted
        raise self.unexpected("= != < <= > >= IN, LIKE or IS")

    def column(self) -> str:
        if self.kind != "word":
            raise self.unexpected("a filter column")
        if self.text not in self.columns:
            known = ", ".join(self.columns) or "none (list them under corpus.filter)"
            raise QueryError(f"where: no filter column {self.text!r}; filter columns: {known}")
        name = self.text
        self.advance()
        return name

    def membership(self, column: str) -> str:
        items = self.literals(column)
        if self.columns[column].kind == "integer":
            tests = [_integer_test(column, self.columns[column], "=", _number(item)) for item in items]
            return f"({' OR '.join(tests)})"
        return f"(`{column}` IN ({', '.join(items)}))"

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
            raise QueryError(f"where: {column} holds {self.columns[column].wants}s, {self.text} is a {kind}")
        text = self.text.lower() if kind == "boolean" else self.text
        if self.columns[column].kind == "float":
            text = repr(float(_number(text)))
        self.advance()
        return text

    def unexpected(self, wanted: str) -> QueryError:
        return QueryError(f"where={self.where!r}: expected {wanted}, found {self.text!r}")


def _number(text: str) -> int | float:
    """The value of a literal; QueryError where it is too large to compare with."""
    try:
        value: int | float = int(text)
    except ValueError:
        value = float(text)
    if math.isinf(value) or (isinstance(value, int) and abs(value) >= 2**63):
        raise QueryError(f"where: {text} is beyond 64 bits")
    return value


def _integer_test(name: str, column: Column, operator: str, value: int | float) -> str:
    """A comparison with integers only: Lance takes no fraction, and nothing beyond the column's own range."""
    never = f"`{name}` > {column.high}" if column.low else f"`{name}` < 0"  # unknown where null, as SQL wants it
    always = f"NOT ({never})"
    if operator in ("=", "!=") and value != math.floor(value):
        return never if operator == "=" else always
    bound = math.floor(value) if operator in (">", "<=") else math.ceil(value)
    if bound < column.low or (bound == column.low == -(2**63)):
        return always if operator in (">", ">=", "!=") else never
    if bound > column.high:
        return always if operator in ("<", "<=", "!=") else never
    return f"`{name}` {operator} {bound}"
