"""The charts of a training's page: frames in, Vega-Lite specs and the numbers they show out; pure."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from pipeline.marks import (
    X_AXIS,
    Y_AXIS,
    Y_PERCENT,
    Plot,
    chart_of,
    color_of,
    dash_of,
    dim_axis,
    finished,
    shape_of,
    tooltip,
)  # fmt: skip

WHEN = {"before": "base", "after": "trained"}
MAX_STEPS = 400
"""Points of a curve; more cannot be seen."""


def by_dim(evaluation: pl.DataFrame, metric: str, label: str, source: str) -> Plot:
    """A metric of the base and of the trained model against dimension, with intervals; `kept` is a share."""
    shown = evaluation.filter(pl.col("dim") < pl.col("dim").max()) if metric == "kept" else evaluation
    numbers = shown.select(
        pl.col("when").replace(WHEN).alias("way"), "dim", metric, f"{metric}_low", f"{metric}_high"
    ).sort("way", "dim")
    ways = [way for way in ("trained", "base") if way in set(numbers["way"])]
    shift = pl.when(pl.col("way") == "base").then(2.0**0.02).otherwise(2.0**-0.02)
    base = chart_of(numbers.with_columns(at=pl.col("dim") * shift)).encode(
        x=dim_axis("at", numbers["dim"].to_list()),
        color=color_of("way", ways),
        tooltip=tooltip(
            ("way", "model"), ("dim", "dimensions"), (metric, label), (f"{metric}_low", "95% from"),
            (f"{metric}_high", "to"),
        ),
    )  # fmt: skip
    axis = Y_PERCENT if metric == "kept" else Y_AXIS
    quality = alt.Y(f"{metric}:Q", title=label, scale=alt.Scale(zero=False, nice=True), axis=axis)
    bars = base.mark_rule(strokeWidth=2).encode(y=f"{metric}_low:Q", y2=f"{metric}_high:Q")
    lines = base.mark_line(strokeWidth=2).encode(y=quality, strokeDash=dash_of(ways))
    points = base.mark_point(filled=True, opacity=1, size=60).encode(y=f"{metric}:Q", shape=shape_of("way", ways))
    least = min(int(dim) for dim in numbers["dim"])
    said = ", ".join(f"{row['way']} {row[metric]:.3f}" for row in numbers.filter(pl.col("dim") == least).to_dicts())
    return Plot(
        f"dim-{metric}",
        f"{label[:1].upper() if metric == 'kept' else label[:1]}{label[1:]} by dimension",
        f"Line plot. At {least} dimensions: {said}.",
        f"{source} Bars are the intervals; points of one dimension stand a little apart.",
        finished(alt.layer(bars, lines, points)), numbers,
    )  # fmt: skip


def over_steps(curve: pl.DataFrame, of: str, title: str, label: str, source: str) -> Plot:
    """What the trainer told of each dimension over the steps; `of` is `loss` or `ndcg`."""
    told = curve.filter(pl.col("name").str.starts_with(f"{of}_")).with_columns(
        dim=pl.col("name").str.strip_prefix(f"{of}_").cast(pl.Int64)
    )
    numbers = told.select("step", way=pl.format("{} dimensions", "dim"), value="value", dim="dim").sort("dim", "step")
    dims = sorted({int(dim) for dim in numbers["dim"]}, reverse=True)
    ways = [f"{dim} dimensions" for dim in dims]
    steps = sorted(set(numbers["step"]))
    every = -(-len(steps) // MAX_STEPS)
    picked = alt.selection_point(fields=["way"], bind="legend", name="picked")
    base = chart_of(numbers.filter(pl.col("step").is_in([*steps[::-1][::every]]))).encode(
        x=alt.X("step:Q", title="step", axis=X_AXIS),
        y=alt.Y("value:Q", title=label, scale=alt.Scale(zero=False, nice=True), axis=Y_AXIS),
        color=color_of("way", ways),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
        tooltip=tooltip(("way", "prefix"), ("step", "step"), ("value", label)),
    )
    lines = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=45).encode(shape=shape_of("way", ways)).add_params(picked)
    return Plot(
        f"steps-{of}", title, f"Line plot over {steps[-1]:,} steps. {_ends(numbers, dims)}", source,
        finished(alt.layer(lines, points)), numbers.select("step", "dim", "value"),
    )  # fmt: skip


def _ends(numbers: pl.DataFrame, dims: Sequence[int]) -> str:
    """The first and last value of each line."""
    said: list[str] = []
    for dim in dims:
        values: list[Any] = numbers.filter(pl.col("dim") == dim)["value"].to_list()
        said.append(f"{dim} dimensions from {values[0]:.3f} to {values[-1]:.3f}")
    return f"{'; '.join(said)}."
