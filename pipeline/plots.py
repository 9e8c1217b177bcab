"""The report's plots: frames in, Vega-Lite specs and the numbers they show out; pure."""

from collections.abc import Callable, Sequence
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
    values_of,
)  # fmt: skip
from pipeline.vectors import bytes_per_row

STRETCH = 6
"""Power of the quality axis against cost: near the best, where the choice is made, settings stand apart."""
MODES = ["alone", "rescored", "cascade", "exact", "margin", "predictor", "hybrid"]
MAX_POINTS = 400
"""Of a curve; more cannot be seen."""
NAMES = {"recall_exact": "recall of exact search", "recall": "recall", "ndcg": "nDCG", "mrr": "MRR"}


def described(measured: pl.DataFrame) -> pl.DataFrame:
    """The evaluation with the names that plots and sentences use.

    `codes`: how the first table is stored and scored; `way`: mode and shortlist; `scanned`: bytes of the first table,
    null where the full-text index comes first.
    """
    rows = measured.to_dicts()
    return measured.with_columns(
        codes=pl.Series([_codes(row) for row in rows], dtype=pl.String),
        way=pl.Series([_way(row) for row in rows], dtype=pl.String),
        scanned=pl.Series([_scanned(row) for row in rows], dtype=pl.Int64),
    )


def _scanned(row: dict[str, Any]) -> int | None:
    return None if row["dim"] is None else bytes_per_row(row["dim"], row["precision"])


def _codes(row: dict[str, Any]) -> str:
    """How the first table is stored and scored; prefixes of a nested table are a series of their own."""
    if row["dim"] is None:
        return "text"
    if row["precision"] == "binary":
        return f"binary {row['scoring']}"
    return f"{row['precision']} nested" if row["choice"].endswith("_nested") else str(row["precision"])


def _way(row: dict[str, Any]) -> str:
    return str(row["mode"]) if row["shortlist"] is None else f"{row['mode']}, shortlist {row['shortlist']:,}"


def by_dim(rows: pl.DataFrame, metric: str, source: str) -> Plot:
    """A metric against dimension with intervals; alone and rescored from the shortest list that was measured."""
    of_tables = rows.filter(~pl.col("choice").is_in(["cascade", "exact", "text", "hybrid"]))
    shortest = pl.col("shortlist") == pl.col("shortlist").filter(pl.col("mode") == "rescored").min()
    shown = of_tables.filter((pl.col("mode") == "alone") | ((pl.col("mode") == "rescored") & shortest))
    fields = ["dim", "codes", "way", metric, f"{metric}_low", f"{metric}_high"]
    numbers = shown.select(fields).sort("codes", "way", "dim")
    data = values_of(_apart(numbers).to_dicts())
    label, codes = _label(rows, metric), sorted(set(numbers["codes"]))
    picked = alt.selection_point(fields=["codes"], bind="legend", name="picked")
    base = alt.Chart(data).encode(
        x=dim_axis("at", numbers["dim"].to_list()),
        color=color_of("codes", codes),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
        tooltip=tooltip(
            ("codes", "stored as"), ("way", "searched"), ("dim", "dimensions"), (metric, label),
            (f"{metric}_low", "95% from"), (f"{metric}_high", "to"),
        ),
    )  # fmt: skip
    quality: dict[str, Any] = {"title": label, "scale": alt.Scale(zero=False, nice=True), "axis": Y_AXIS}
    lines = base.mark_line(strokeWidth=2).encode(
        y=alt.Y(f"{metric}:Q", **quality), strokeDash=dash_of(sorted(set(numbers["way"])))
    )
    points = base.mark_point(filled=True, size=60).encode(y=f"{metric}:Q", shape=shape_of("codes", codes))
    bars = base.mark_rule(strokeWidth=2).encode(y=f"{metric}_low:Q", y2=f"{metric}_high:Q")
    layers: list[alt.Chart] = [bars, lines, points.add_params(picked)]
    exact = rows.filter(choice="exact")[metric][0]
    if metric != "recall_exact":
        layers.insert(0, _level(exact))
    return Plot(
        f"dim-{metric}",
        f"{_first_up(label)} by dimension",
        f"Line plot. {_first_up(label)} rises from {_range(numbers, metric)}; exact search has {exact:.3f}.",
        f"{source} Bars are the intervals; points of one dimension stand a little apart."
        + (" The grey line is exact search." if metric != "recall_exact" else ""),
        finished(alt.layer(*layers)),
        numbers,
    )


def _apart(numbers: pl.DataFrame) -> pl.DataFrame:
    """`at`: the dimension, moved a little per series so that intervals do not cover each other."""
    series = (numbers["codes"] + " " + numbers["way"]).rank("dense") - 1
    shift = (series - len(set(series)) / 2 + 0.5) * 0.035
    return numbers.with_columns(at=pl.col("dim") * (2.0**shift))


def kept(figures: Sequence[dict[str, Any]], of: str, source: str) -> Plot:
    """What each way of cutting keeps of the neighbours among the full vectors; `of` is rows or queries."""
    numbers = pl.DataFrame(
        [one for one in figures if one["of"] == of],
        schema={"way": pl.String(), "dim": pl.Int64(), "neighbours": pl.Float64(), "error": pl.Float64()},
    )
    ways = [way for way in ("plain", "shuffled", "random", "pca", "adaptor", "order") if way in set(numbers["way"])]
    picked = alt.selection_point(fields=["way"], bind="legend", name="picked")
    base = alt.Chart(values_of(numbers.to_dicts())).encode(
        x=dim_axis("dim", numbers["dim"].to_list()),
        y=alt.Y("neighbours:Q", title="share of the 10 nearest kept", axis=Y_PERCENT),
        color=color_of("way", ways),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
        tooltip=tooltip(("way", "cut"), ("dim", "dimensions"), ("neighbours", "kept"), ("error", "error of cosines")),
    )
    lines = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=60).encode(shape=shape_of("way", ways)).add_params(picked)
    fewest = min(numbers["dim"].to_list())
    least = numbers.filter(dim=fewest)
    at_least = ", ".join(f"{row['way']} {row['neighbours']:.1%}" for row in least.to_dicts())
    return Plot(
        f"kept-{of}",
        f"Nearest neighbours of {'documents' if of == 'rows' else of}",
        f"Line plot. At {fewest} dimensions the share of neighbours kept is: {at_least}.",
        source,
        finished(alt.layer(lines, points)),
        numbers,
    )


def by_cost(rows: pl.DataFrame, metric: str, cost: str, title: str, source: str) -> Plot:
    """All settings with that cost: a metric against it, the Pareto front, this job's choice and exact search."""
    rows = rows.filter(pl.col(cost).is_not_null())
    label, front = _label(rows, metric), pareto(rows, cost, metric)
    fields = ["choice", "codes", "way", metric, f"{metric}_low", f"{metric}_high", cost]
    fields += ["p95_ms"] if cost == "median_ms" else []
    numbers = rows.select(fields, front=pl.Series([row in front for row in range(len(rows))])).sort(cost, metric)
    known = sorted(set(numbers["codes"]))
    picked = alt.selection_point(fields=["codes"], bind="legend", name="picked")
    x, y = _cost_axis(numbers, cost, title), _stretched(numbers[metric].to_list(), metric, label)
    step = chart_of(numbers.filter("front")).mark_line(
        interpolate="step-after", color="var(--muted)", strokeWidth=1.5, strokeDash=[4, 3]
    )
    modes = numbers.with_columns(mode=pl.col("way").str.split(", ").list.first())
    points = chart_of(modes).mark_point(size=70, strokeWidth=1.8).encode(
        x=x, y=y, color=color_of("codes", known), shape=shape_of("mode", MODES),
        opacity=alt.condition(picked, alt.value(0.95), alt.value(0.1)),
        tooltip=tooltip(
            ("choice", "choice"), ("codes", "first table"), ("way", "searched"), (metric, label),
            (f"{metric}_low", "95% from"), (f"{metric}_high", "to"), (cost, title),
            *([("p95_ms", "p95 ms")] if cost == "median_ms" else []),
        ),
    ).add_params(picked)  # fmt: skip
    layers: list[Any] = [step.encode(x=x, y=y), points, *_marked(numbers, cost, metric)]
    if cost == "median_ms":
        layers.insert(0, chart_of(numbers).mark_rule(color="var(--rule)").encode(x=x, x2="p95_ms", y=y))
    return Plot(
        f"{cost.replace('_', '-')}-{metric}",
        f"{_first_up(label)} by {title}",
        f"Scatter plot of {len(numbers)} settings. {_marked_says(numbers, cost, metric)}",
        f"{source} The dashed line is the Pareto front: no setting left of it is as good. The quality axis is "
        "stretched towards its upper end.",
        finished(alt.layer(*layers)),
        numbers,
    )


def pareto(rows: pl.DataFrame, cost: str, metric: str) -> set[int]:
    """Numbers of the rows that are better than every row that costs less."""
    front, best = set(), float("-inf")
    order = rows.with_row_index("number").sort(cost, metric, descending=[False, True], maintain_order=True)
    for row in order.select("number", metric).iter_rows():
        if row[1] > best:
            front.add(int(row[0]))
            best = row[1]
    return front


def _marked(numbers: pl.DataFrame, cost: str, metric: str) -> list[Any]:
    """A ring and a word for this job's choice and for exact search."""
    named = numbers.filter(pl.col("choice").is_in(["cascade", "exact"])).with_columns(
        name=pl.col("choice").replace({"cascade": "this job"})
    )
    base = chart_of(named).encode(x=f"{cost}:Q", y=f"{metric}:Q")
    layers: list[Any] = [base.mark_point(size=260, strokeWidth=2, color="var(--ink)", shape="circle")]
    for name, aside in (("this job", 21), ("exact", -21)):  # apart, where the two are close
        word = chart_of(named.filter(name=name)).encode(x=f"{cost}:Q", y=f"{metric}:Q", text="name:N")
        style: dict[str, Any] = {"dy": aside, "fontWeight": 600, "fontSize": 12}
        layers += [word.mark_text(stroke="var(--paper)", strokeWidth=4, strokeJoin="round", **style)]
        layers += [word.mark_text(color="var(--ink)", **style)]
    return layers


def _marked_says(numbers: pl.DataFrame, cost: str, metric: str) -> str:
    said = {
        row["choice"]: f"{row[metric]:.3f} at {row[cost]:,.4g}"
        for row in numbers.filter(pl.col("choice").is_in(["cascade", "exact"])).to_dicts()
    }
    return "; ".join(f"{'this job' if name == 'cascade' else name}: {words}" for name, words in said.items()) + "."


def explained(shares: Sequence[float], dims: Sequence[int], source: str) -> Plot:
    """The corpus' variance that the first principal axes hold, with the job's prefixes."""
    every = max(1, len(shares) // MAX_POINTS)
    at = sorted({1, len(shares), *range(every, len(shares) + 1, every), *(dim for dim in dims if dim <= len(shares))})
    curve = pl.DataFrame({"dim": at, "share": [shares[dim - 1] for dim in at]})
    numbers = curve.filter(pl.col("dim").is_in([*dims, len(shares)])).with_columns(
        label=pl.format("{}: {}%", "dim", (pl.col("share") * 100).round(0).cast(pl.Int64()))
    )
    x = alt.X("dim:Q", title="dimensions", scale=alt.Scale(nice=False, domain=[0, len(shares) * 1.02]), axis=X_AXIS)
    y = alt.Y("share:Q", title="variance explained", scale=alt.Scale(domain=[0, 1.02]), axis=Y_PERCENT)
    tips = tooltip(("dim", "dimensions"), ("share", "explained"))
    area = chart_of(curve).mark_area(color="var(--s1)", opacity=0.13, line=False).encode(x=x, y=y)
    line = chart_of(curve).mark_line(color="var(--s1)", strokeWidth=2).encode(x=x, y=y)
    marked = chart_of(numbers.filter(pl.col("dim").is_in(list(dims))))
    drops = marked.mark_rule(color="var(--muted)", strokeDash=[2, 3]).encode(x=x, y=y)
    points = marked.mark_point(filled=True, size=80, opacity=1, color="var(--s1)").encode(x=x, y=y, tooltip=tips)
    words = marked.mark_text(align="left", dx=9, dy=9, color="var(--ink)", fontSize=12).encode(x=x, y=y, text="label:N")
    says = ", ".join(f"{row['dim']} dimensions explain {row['share']:.1%}" for row in numbers.to_dicts())
    return Plot(
        "explained", "Variance held by the first axes", f"Rising curve: {says}.", source,
        finished(alt.layer(area, line, drops, points, words)), numbers.select("dim", "share"),
    )  # fmt: skip


def bars(numbers: pl.DataFrame, name: str, title: str, unit: str, source: str) -> Plot:
    """Horizontal bars of the columns `what` and `value`, in the frame's order."""
    order = numbers["what"].to_list()
    shown = numbers.with_columns(label=pl.col("value").map_elements(_short, return_dtype=pl.String()))
    most = max([*shown["value"].to_list(), 1e-9])
    base = chart_of(shown).encode(
        y=alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=140, ticks=False, domain=False)),
        x=alt.X("value:Q", title=unit, scale=alt.Scale(domain=[0, most * 1.35], nice=False), axis=X_AXIS),
        tooltip=tooltip(("what", "of"), ("value", unit)),
    )
    marks = base.mark_bar(color="var(--s1)", height={"band": 0.62}, cornerRadiusEnd=2)
    words = base.mark_text(align="left", dx=6, color="var(--ink)", fontSize=12).encode(text="label:N")
    says = ", ".join(f"{row['what']} {row['label']}" for row in shown.to_dicts())
    spec = finished(alt.layer(marks, words), height=30 * len(numbers) + 10)
    return Plot(name, title, f"Bars, {unit}: {says}.", source, spec, numbers)


def drift(log: pl.DataFrame, source: str) -> Plot:
    """Recall against exact search over time, one line per query file."""
    numbers = log.with_columns(measured_at=pl.col("measured_at").dt.strftime("%Y-%m-%dT%H:%M:%SZ")).select(
        "measured_at", "file", "generation", "recall_exact", "recall_exact_low", "recall_exact_high"
    )
    known = sorted(set(numbers["file"]))
    base = chart_of(numbers).encode(
        x=alt.X("measured_at:T", title=None, axis=alt.Axis(labelOverlap=True, grid=False, tickCount=5)),
        color=color_of("file", known),
        tooltip=[alt.Tooltip("measured_at:T", title="measured at", format="%Y-%m-%d %H:%M"), *tooltip(
            ("file", "queries"), ("generation", "generation"), ("recall_exact", "recall"),
            ("recall_exact_low", "95% from"), ("recall_exact_high", "to"))],
    )  # fmt: skip
    label = "recall of exact search"
    lines = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("recall_exact:Q", title=label, scale=alt.Scale(zero=False), axis=Y_AXIS)
    )
    ranges = base.mark_rule(strokeWidth=2).encode(y="recall_exact_low:Q", y2="recall_exact_high:Q")
    points = base.mark_point(filled=True, opacity=1, size=60).encode(y="recall_exact:Q", shape=shape_of("file", known))
    first, last = log.sort("measured_at")["recall_exact"][0], log.sort("measured_at")["recall_exact"][-1]
    return Plot(
        "drift", "Recall of the query log over time",
        f"Line plot over time of {len(log)} measurements: first {first:.3f}, last {last:.3f}.", source,
        finished(alt.layer(ranges, lines, points)), numbers,
    )  # fmt: skip


def _cost_axis(numbers: pl.DataFrame, cost: str, title: str) -> alt.X:
    """Logarithmic, with room for the words at both ends."""
    farthest = numbers["p95_ms" if cost == "median_ms" else cost].to_list()
    low, high = max(min(numbers[cost].to_list()), 1e-3), max(farthest)
    room = max((high / low) ** 0.08, 1.1)
    scale = alt.Scale(type="log", domain=[low / room, high * room], nice=False)
    axis = alt.Axis(grid=False, labelOverlap=True, tickCount=5, format="~s" if cost != "median_ms" else "~r")
    return alt.X(f"{cost}:Q", title=title, scale=scale, axis=axis)


def _stretched(values: Sequence[float], metric: str, label: str) -> alt.Y:
    """A power scale with round ticks that stand apart, and room above for a word."""
    low, high = min(values), max(values)
    at = _position(low, high)
    ticks: list[float] = []
    for step in (10, 20, 50, 100, 200):
        for tick in (number / step for number in range(int(low * step), int(high * step) + 1)):
            if low <= tick and all(abs(at(tick) - at(other)) >= 0.08 for other in ticks):
                ticks.append(tick)
    scale = alt.Scale(type="pow", exponent=STRETCH, domain=[low * 0.97, high * 1.15 ** (1 / STRETCH)], nice=False)
    axis = alt.Axis(values=sorted(ticks), format=".3~g", domain=False, ticks=False, labelPadding=6)
    return alt.Y(f"{metric}:Q", title=label, scale=scale, axis=axis)


def _position(low: float, high: float) -> Callable[[float], float]:
    bottom, room = low**STRETCH, high**STRETCH - low**STRETCH
    return lambda value: (value**STRETCH - bottom) / room if room else 0.0


def _level(value: float) -> Any:
    level = alt.Chart(values_of([{"exact": value}])).mark_rule(color="var(--muted)", strokeWidth=1.5)
    return level.encode(y="exact:Q", tooltip=tooltip(("exact", "exact search")))


def _label(rows: pl.DataFrame, metric: str) -> str:
    name, k = NAMES[metric], rows["k"][0]
    return f"recall@{k} of exact search" if metric == "recall_exact" else f"{name}@{k}"


def _first_up(text: str) -> str:
    return text if text.startswith("nDCG") else text[:1].upper() + text[1:]


def _range(numbers: pl.DataFrame, metric: str) -> str:
    if not len(numbers):
        return "nothing"
    low, high = numbers.sort(metric).row(0, named=True), numbers.sort(metric).row(-1, named=True)
    return " to ".join(
        f"{row[metric]:.3f} ({row['dim']} dimensions, {row['codes']}, {row['way']})" for row in (low, high)
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
