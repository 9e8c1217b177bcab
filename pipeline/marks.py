"""What plots are made of: the figure itself, axes, colours, shapes, tooltips; pure.

Colours are CSS variables of the page, so that dark mode and print need no second plot; every series has its own
shape or dash too. Widths follow the page (`width: container`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

HEIGHT = 300
SERIES = [f"var(--s{number})" for number in range(1, 7)]
DASHES = [[1, 0], [5, 3], [2, 2]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"]


@dataclass(frozen=True)
class Plot:
    """One figure: its Vega-Lite spec, its text for those who do not see it, and its numbers."""

    name: str
    title: str
    says: str
    source: str
    spec: dict[str, Any]
    numbers: pl.DataFrame


Y_AXIS = alt.Axis(tickCount=6, domain=False, ticks=False, labelPadding=6)
Y_PERCENT = alt.Axis(tickCount=6, domain=False, ticks=False, labelPadding=6, format="%")
X_AXIS = alt.Axis(tickCount=6, grid=False, labelOverlap=True)


def values_of(rows: list[dict[str, Any]]) -> Any:
    """Rows as data inside the spec."""
    return alt.InlineData(values=rows)


def chart_of(frame: pl.DataFrame) -> alt.Chart:
    """A chart of a frame."""
    return alt.Chart(values_of(frame.to_dicts()))


def dim_axis(field: str, dims: Sequence[int]) -> alt.X:
    """Logarithmic, a tick for each dimension."""
    values = sorted(set(dims))
    scale = alt.Scale(type="log", base=2, domain=[min(values) / 1.25, max(values) * 1.25], nice=False)
    return alt.X(f"{field}:Q", title="dimensions", scale=scale, axis=alt.Axis(values=values, grid=False, format="d"))


def color_of(field: str, known: Sequence[str]) -> alt.Color:
    """A colour for each of the known names."""
    colors = [SERIES[number % len(SERIES)] for number in range(len(known))]
    scale = alt.Scale(domain=list(known), range=colors)
    return alt.Color(f"{field}:N", scale=scale, legend=_legend(known))


def shape_of(field: str, known: Sequence[str]) -> alt.Shape:
    """A shape for each of the known names."""
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(known))]
    scale = alt.Scale(domain=list(known), range=shapes)
    return alt.Shape(f"{field}:N", scale=scale, legend=_legend(known))


def dash_of(known: Sequence[str]) -> alt.StrokeDash:
    """A dash for each of the known ways."""
    scale = alt.Scale(domain=list(known), range=[DASHES[number % len(DASHES)] for number in range(len(known))])
    return alt.StrokeDash("way:N", scale=scale, legend=_legend(known))


def _legend(known: Sequence[str]) -> alt.Legend:
    """Two columns where both go beside each other on a phone of 360 pixels, whatever its font."""
    return alt.Legend(title=None, columns=2 if max(map(len, known), default=0) <= 14 else 1)


def tooltip(*fields: tuple[str, str]) -> list[alt.Tooltip]:
    """What is told of a point: (field, title) each."""
    words = {"codes", "way", "choice", "what", "file"}
    return [
        alt.Tooltip(f"{field}:N", title=title)
        if field in words
        else alt.Tooltip(f"{field}:Q", title=title, format=",.4~r" if field.endswith(("_ms", "value")) else ",.4~f")
        for field, title in fields
    ]


def finished(chart: Any, height: int = HEIGHT) -> dict[str, Any]:
    """The Vega-Lite spec as the page takes it; height in pixels."""
    sized = chart.properties(
        width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )
    left_out = ("$schema", "config")  # the page has one for all; a schema is an address outside
    return {name: part for name, part in sized.to_dict().items() if name not in left_out}
