"""The report's HTML: sections, tables and plots in, one page out that needs nothing else and may load nothing.

Every text goes through jinja2's autoescape; only constants, the library and `in_script` are marked safe. Scripts run
by their hash alone (Content-Security-Policy); Vega evaluates its expressions with its interpreter (`ast`), so no
`eval` is allowed either.
"""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import polars as pl
import vl_convert

from pipeline.marks import Plot
from pipeline.template import DRAW, PAGE, STYLE


@dataclass(frozen=True)
class Grid:
    """A table of the page: (heading, is a number) per column, cells as text."""

    title: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Hit:
    """One hit of an example: `place` is its rank by exact search; 0 where exact search does not have it."""

    place: int
    name: str
    text: str
    score: float
    lost: bool


@dataclass(frozen=True)
class Example:
    """A question, the names of the levels, and per rank the hit of each level."""

    question: str
    levels: Sequence[str]
    ranks: Sequence[Sequence[Hit | None]]
    lost: int


@dataclass(frozen=True)
class Section:
    """A chapter of the page; empty parts are left out."""

    name: str
    title: str
    words: Sequence[str] = ()
    warnings: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    grids: Sequence[Grid] = ()
    examples: Sequence[Example] = ()
    raw: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """Everything the page says."""

    title: str
    about: str
    verdict: str
    figures: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML."""
    scripts = [_bundle(), DRAW]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return _template().render(page=page, style=STYLE, scripts=scripts, policy=policy)


def grid(title: str, frame: pl.DataFrame, headings: dict[str, str] | None = None) -> Grid:
    """A frame as a table of the page."""
    names = headings or {name: name.replace("_", " ") for name in frame.columns}
    columns = [(heading, frame.schema[name].is_numeric()) for name, heading in names.items()]
    return Grid(title, columns, [[shown(row[name]) for name in names] for row in frame.to_dicts()])


def shown(value: Any) -> str:
    """A cell: whole numbers with separators, others with four significant decimals, nothing as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"
    return str(value)


def in_script(value: Any) -> str:
    """JSON that no text can break out of: it has no `<`, `>` or `&`, and no line separators."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one classic script that leaves only `vegaEmbed` behind."""
    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in code.lower() and "<!--" not in code
    return f"(() => {{{code}\n}})();"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"in_script": in_script, "grid": lambda plot: grid(plot.title, plot.numbers)}
    return environment.from_string(PAGE)
