"""`where`: parsed, checked against the filter columns, and rebuilt; nothing else reaches SQL.

    condition := and { OR and }            and := not { AND not }
    not       := NOT not | "(" condition ")" | test
    test      := column op literal | column [NOT] IN "(" literal {"," literal} ")"
               | column [NOT] LIKE string | column IS [NOT] NULL | column            (a boolean one)
    op        := = != <> < <= > >=         literal := 'string' ('' escapes) | number | true | false

Our own because general SQL parsers keep parts of a node (a NOT before LIKE, an ESCAPE) where a rebuild
can miss them, and a missed part is a wrong answer.
"""

import re
from collections.abc import Mapping
from typing import Literal

from pipeline.errors import QueryError

Kind = Literal["string", "number", "boolean"]

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


def rebuild(where: str, columns: Mapping[str, Kind]) -> str:
    """The same condition as safe SQL for Lance; `columns` maps each filter column to its kind.

    Raises QueryError for anything outside the grammar, an unknown column, or a literal of the wrong kind.
    """
    parser = _Parser(where, columns)
    built = parser.condition(0)
    if parser.kind != "end":
        raise parser.unexpected("AND, OR or the end")
    return built


class _Parser:
    """Recursive descent over the grammar above; the current token is (kind, text)."""

    def __init__(self, where: str, columns: Mapping[str, Kind]) -> None:
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
            return f"({quoted} {operator} {self.literal(name)})"
        if self.take("IS"):
            negated = self.take("NOT")
            self.expect("NULL")
            return f"({quoted} IS {'NOT ' if negated else ''}NULL)"
        no = "NOT " if self.take("NOT") else ""
        if self.take("IN"):
            return f"({quoted} {no}IN ({self.literals(name)}))"
        if self.take("LIKE"):
            if self.columns[name] != "string":
                raise QueryError(f"where: LIKE needs a column of strings, {name} holds {self.columns[name]}s")
            return f"({quoted} {no}LIKE {self.literal(name)})"
        if not no and self.columns[name] == "boolean":
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

    def literals(self, column: str) -> str:
        self.expect("(")
        items = [self.literal(column)]
        while self.take(","):
            items.append(self.literal(column))
        self.expect(")")
        return ", ".join(items)

    def literal(self, column: str) -> str:
        kind = {"TRUE": "boolean", "FALSE": "boolean"}.get(self.text, "") if self.kind == "keyword" else self.kind
        if kind not in ("string", "number", "boolean"):
            raise self.unexpected("a 'string', a number, true or false")
        if kind != self.columns[column]:
            raise QueryError(f"where: {column} holds {self.columns[column]}s, {self.text} is a {kind}")
        text = self.number(self.text) if kind == "number" else self.text.lower() if kind == "boolean" else self.text
        self.advance()
        return text

    def number(self, text: str) -> str:
        try:
            value: int | float = int(text)
        except ValueError:
            value = float(text)
        if not -(2**63) <= value < 2**63:
            raise QueryError(f"where: {text} is beyond 64 bits")
        return repr(value)

    def unexpected(self, wanted: str) -> QueryError:
        return QueryError(f"where={self.where!r}: expected {wanted}, found {self.text!r}")
