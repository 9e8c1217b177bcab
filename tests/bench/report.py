"""What is told of a run: one JSON value, a table of the whole sweep, and a plot of recall against time."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import Contender
from tests.bench.sets import K, Set

PACKAGES = ("numpy", "lancedb", "pylance", "pyarrow", "polars", "faiss-cpu", "usearch", "numkong", "ray")
AT_LEAST = (0.9, 0.95, 0.99, 0.999)
COLORS = {
    "exact": "#5b646e", "LanceDB": "#c2410c", "faiss": "#0b7a5c", "usearch": "#8a6d00",
    "ours, lance": "#7db8ff", "ours, resident": "#0a5cad", "kernel": "#a03c8e",
}  # fmt: skip
STRETCH = 6
"""Power of the recall axis, as in the report's plots: near the best, settings stand apart."""
Results = dict[str, Any]


def results(
    of: Set,
    taken: Sequence[Contender],
    builds: Mapping[str, Any],
    rounds: Mapping[str, Sequence[Mapping[str, Any]]],
    left_out: Mapping[str, str],
) -> Results:
    """Everything measured; a row for each contender and setting."""
    rows = [row for one in taken if rounds[one.name] for row in _rows(one, builds[one.build], rounds[one.name])]
    measured = asdict(of) | {"k": K, "source": Path(of.source).name}
    del measured["folder"]
    return {"machine": machine(), "set": measured, "builds": dict(builds), "rows": rows, "left_out": dict(left_out)}


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What the figures were measured on, with which versions, when, of which commit."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with a + where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        asked = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _rows(one: Contender, built: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, with the lowest and highest round's median; memory is of the round that held most."""
    memory = {name: max(turn["memory"][name] for turn in rounds) for name in rounds[0]["memory"]}
    rows = []
    for turns in zip(*(turn["settings"] for turn in rounds), strict=True):
        medians = [turn["median_ms"] for turn in turns]
        setting = turns[0]["setting"]
        kind = "coarse" if setting.get("coarse") else "whole" if setting.get("whole") else "search"
        middle = {
            name: float(np.median([turn[name] for turn in turns]))
            for name in ("median_ms", "p95_ms", "p99_ms", "batch_qps")
        }
        rows.append(
            {
                "contender": one.name,
                "group": one.group,
                "kind": kind,
                "setting": setting,
                "label": _label(setting),
                "recall": None if turns[0]["recall"] is None else float(np.mean([turn["recall"] for turn in turns])),
                **middle,
                "medians_ms": medians,
                "queries": min(turn["queries"] for turn in turns),
                "batch": min(turn["batch"] for turn in turns),
                "build_seconds": built["seconds"],
                "build_peak_bytes": built["peak_bytes"],
                "disk_bytes": built["disk_bytes"],
                "open_seconds": float(np.median([turn["open_seconds"] for turn in rounds])),
                **memory,
            }
        )
    return rows


def _label(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    if "cascade" in setting:
        levels = [
            f"{table.removeprefix('prefix_')} {size}{'' if how in ([], ['auto']) else ' ' + how[0]}"
            for table, size, *how in setting["cascade"]
        ]
        return " → ".join(levels) + (" alone" if setting.get("coarse") else "")
    return ", ".join(f"{name} {value}" for name, value in setting.items() if name != "coarse")


def text(told: Results) -> str:
    """The whole sweep, then the quickest of each contender at given recalls."""
    at, of = told["machine"], told["set"]
    lines = [
        f"{of['rows']:,} x {of['dim']} ({of['source']}), {of['queries']} queries, recall@{of['k']} of exact search, "
        f"{of['threads']} threads of {at['cpu']} ({at['cores']} cores), {at['date']}, commit {at['commit']}",
        ", ".join(f"{name} {version}" for name, version in at["packages"].items() if version),
        "",
        table([_cells(row) for row in told["rows"] if row["kind"] == "search"], HEAD),
    ]
    apart = [row for row in told["rows"] if row["kind"] != "search"]
    if apart:
        lines += ["", "whole: ids and columns too; coarse: the first level alone, without rescoring", ""]
        lines += [table([_cells(row) for row in apart], HEAD)]
    lines += ["", *_best(told["rows"])]
    lines += [f"left out: {name}: {why}" for name, why in told["left_out"].items()]
    return "\n".join(lines)


HEAD = ("contender", "setting", "recall", "median ms", "rounds", "p95", "p99", "batch q/s", "build s", "MB open",
        "MB serving", "mapped", "MB peak", "MB disk")  # fmt: skip


SIZES = ("opened_bytes", "serving_bytes", "mapped_bytes", "peak_bytes", "disk_bytes")


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = min(row["medians_ms"]), max(row["medians_ms"])
    batch = f"{row['batch_qps']:,.0f}" + ("" if row["batch"] == 64 else f" at {row['batch']}")
    return [
        row["contender"] + ("" if row["kind"] == "search" else f" ({row['kind']})"),
        row["label"],
        "" if row["recall"] is None else f"{row['recall']:.4f}",
        f"{row['median_ms']:.3f}" + ("" if row["queries"] >= 100 else f" ({row['queries']} queries)"),
        f"{low:.3f}-{high:.3f}",
        f"{row['p95_ms']:.3f}",
        f"{row['p99_ms']:.3f}",
        batch,
        f"{row['build_seconds']:.1f}",
        *(f"{row[name] / 1e6:,.0f}" for name in SIZES),
    ]


def _best(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The highest recall of each contender, and its quickest setting at each recall asked for."""
    searched = [row for row in rows if row["kind"] == "search"]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in searched):
        mine = [row for row in searched if row["contender"] == name]
        top = min(mine, key=lambda row: (-row["recall"], row["median_ms"]))
        cells = [name, f"{top['recall']:.4f} in {top['median_ms']:.3f} ms"]
        for least in AT_LEAST:
            good = [row for row in mine if row["recall"] >= least]
            cells.append(f"{min(row['median_ms'] for row in good):.3f}" if good else "never")
        lines.append(cells)
    return [table(lines, ("contender", "best recall", *(f"ms at {least}" for least in AT_LEAST)))]


def table(lines: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Columns side by side; numbers to the right."""
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]

    def shown(line: Sequence[str]) -> str:
        sized = list(zip(line, widths, strict=True))
        cells = [cell.ljust(width) for cell, width in sized[:2]] + [cell.rjust(width) for cell, width in sized[2:]]
        return "  ".join(cells).rstrip()

    return "\n".join([shown(head), *(shown(line) for line in lines)])


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that are better than every row that is as quick."""
    best, kept = -1.0, []
    for row in sorted(rows, key=lambda row: (row["median_ms"], -row["recall"])):
        if row["recall"] > best:
            kept.append(row)
            best = row["recall"]
    return kept


def pareto(told: Results) -> str:
    """An SVG: recall against median milliseconds, a line through each group's front, all settings as points."""
    import altair as alt
    import vl_convert

    names = ("contender", "group", "label", "recall", "median_ms")
    rows = [{name: row[name] for name in names} for row in told["rows"] if row["kind"] == "search"]
    groups = [group for group in COLORS if any(row["group"] == group for row in rows)]
    fronts = [row for group in groups for row in front([row for row in rows if row["group"] == group])]
    overall = front(rows)
    lowest = min(row["recall"] for row in rows)
    ticks = [tick for tick in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0) if tick >= min(lowest, 0.9)]
    speed = alt.Scale(type="log", nice=False, padding=20)
    quality = alt.Scale(type="pow", exponent=STRETCH, domain=[min(lowest, 0.9), 1.0], nice=False, padding=8)
    x = alt.X("median_ms:Q", title="median milliseconds of a single query", scale=speed)
    y = alt.Y(
        "recall:Q",
        title=f"recall@{told['set']['k']} of exact search",
        axis=alt.Axis(values=ticks, format=".2f"),
        scale=quality,
    )
    color = alt.Color("group:N", title=None, scale=alt.Scale(domain=groups, range=[COLORS[group] for group in groups]))
    shape = alt.Shape("group:N", title=None, scale=alt.Scale(domain=groups))
    best, own, every = (alt.Chart(alt.InlineData(values=values)) for values in (overall, fronts, rows))
    layers = [
        best.mark_line(color="#999999", strokeDash=[4, 4], interpolate="step-after").encode(x=x, y=y),
        own.mark_line(strokeWidth=2).encode(x=x, y=y, color=color),
        every.mark_point(filled=True, size=45, opacity=0.75).encode(x=x, y=y, color=color, shape=shape),
        best.mark_text(align="left", dx=7, dy=9, fontSize=9).encode(x=x, y=y, text="contender:N"),
    ]
    of, cpu = told["set"], told["machine"]["cpu"]
    title = f"{of['rows']:,} x {of['dim']} ({of['source']}), {of['threads']} threads of {cpu}; dashed: the Pareto front"
    chart = alt.layer(*layers).properties(width=860, height=460, title=title)
    return str(vl_convert.vegalite_to_svg(chart.to_json()))


def main() -> None:
    """Tell a finished run again: `python -m tests.bench.report results.json`."""
    path = Path(sys.argv[1])
    told = json.loads(path.read_text())
    path.with_name("pareto.svg").write_text(pareto(told))
    print(text(told))


if __name__ == "__main__":
    main()
