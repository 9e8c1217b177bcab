"""The page of a training: one HTML file made from the finished folder alone, beside its neighbours on the same data.

Comes in: training.json, evaluation and curve of the folder, and those of other folders. Goes out: report.html.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from pipeline.errors import StaleError
from pipeline.html import Grid, Page, Section, render
from pipeline.training import curves, output

FILE = "report.html"
GOOD = 0.95
"""Share of the full nDCG that a prefix should keep to be cut to (assumed: what a search may usually lose)."""
ALWAYS = ("objective.kind", "objective.weights", "objective.schedule")
"""Settings that stand in the comparison even where all have the same."""
Record = Mapping[str, Any]
Row = Mapping[str, Any]


def write(draft: Path, place: Path) -> tuple[str, int]:
    """Make the page of a whole folder that is to lie at `place`, beside others: its path, its bytes."""
    record = output.read(draft)
    if record is None:
        raise StaleError(f"{draft} is no finished training; give the folder that `matryoshka train` ended with")
    curve = pl.read_parquet(draft / output.CURVE, glob=False)
    text = page(record, curve, place.name, others(record, place)).encode()
    (draft / FILE).write_bytes(text)
    return str(draft / FILE), len(text)


def others(record: Record, place: Path) -> dict[str, Record]:
    """Finished trainings beside `place` that were measured on the same, by the name of their folder."""
    found = {path.parent.name: output.read(path.parent) for path in sorted(place.parent.glob(f"*/{output.RECORD}"))}
    return {
        name: other
        for name, other in found.items()
        if other is not None and name != place.name and _measured_on(other) == _measured_on(record)
    }


def _measured_on(record: Record) -> tuple[Any, ...]:
    return record["fingerprint"]["content"], record["spec"]["seed"], record["evaluation"][0]["k"]


def page(record: Record, curve: pl.DataFrame, name: str, beside: Mapping[str, Record]) -> str:
    """The page as HTML; `name` is the folder's."""
    content, base = record["fingerprint"]["content"], Path(record["base"]["name"]).name
    about = (
        f"A {record['kind']} model of {record['full_dim']} dimensions, trained from {base} on {content['pairs']:,} "
        f"pairs in {record['steps']:,} steps."
    )
    sections = [
        _quality(record), _course(record, curve), _compared({name: record, **beside}, name), _facts(record),
        _raw(record),
    ]  # fmt: skip
    shown = [section for section in sections if section is not None]
    return render(Page(record["name"], about, " ".join(verdict(record)), _figures(record), shown))


def by_dim(record: Record, when: str = "after") -> dict[int, Row]:
    """Rows of the evaluation by dim, the largest first."""
    return {row["dim"]: row for row in record["evaluation"] if row["when"] == when}


def cut(record: Record, figure: str = "kept") -> Row | None:
    """The smallest trained prefix that keeps enough; None where only all dimensions do. `figure`: or `kept_low`."""
    rows = [row for dim, row in by_dim(record).items() if dim in record["dims"] and dim < record["full_dim"]]
    return min((row for row in rows if row[figure] >= GOOD), key=lambda row: int(row["dim"]), default=None)


def verdict(record: Record) -> list[str]:
    """What to do, as the figures have it, in sentences."""
    after, before = by_dim(record), by_dim(record, "before")
    full, base = after[record["full_dim"]], before[record["full_dim"]]
    metric, found, safe = f"nDCG@{full['k']}", cut(record), cut(record, "kept_low")
    smaller = [row for dim, row in after.items() if dim in record["dims"] and dim < record["full_dim"]]
    if found is not None:
        said = [
            f"Cut to {found['dim']} of {record['full_dim']} dimensions: they keep {_kept(found)} of the full {metric}, "
            f"{found['ndcg']:.3f} of {full['ndcg']:.3f} (the base has {before[found['dim']]['ndcg']:.3f} there)."
        ]
        if safe is None or safe["dim"] != found["dim"]:
            instead = f"{safe['dim']} keep {_kept(safe)}" if safe else "no prefix is wholly above it"
            said.append(f"That interval reaches below {GOOD:.0%}; {instead}.")
    elif smaller:
        most = max(smaller, key=lambda row: float(row["kept"]))
        said = [
            f"Cut nothing: no trained prefix keeps {GOOD:.0%} of the full {metric}, the best is {most['dim']} with "
            f"{_kept(most)}. Train longer, give more pairs, or weigh short dims more."
        ]
    else:
        said = [f"This training knows no prefix below {record['full_dim']} dimensions: use all of them."]
    how = "more than" if apart(full, base) > 0 else "less than" if apart(full, base) < 0 else "about what"
    said.append(
        f"All {record['full_dim']} dimensions find {how} the base did ({full['ndcg']:.3f}, {base['ndcg']:.3f})."
    )
    return said


def apart(one: Row, other: Row) -> int:
    """1 where one nDCG is above the other and their intervals do not touch, -1 where it is below, else 0."""
    return int(one["ndcg_low"] > other["ndcg_high"]) - int(one["ndcg_high"] < other["ndcg_low"])


def _kept(row: Row) -> str:
    return f"{row['kept']:.1%} (95%: {row['kept_low']:.1%} – {row['kept_high']:.1%})"


def _interval(row: Row) -> str:
    return f"{row['ndcg_low']:.3f} – {row['ndcg_high']:.3f}"


def _figures(record: Record) -> list[tuple[str, str, str]]:
    after, base = by_dim(record), by_dim(record, "before")
    full, content = after[record["full_dim"]], record["fingerprint"]["content"]
    found = cut(record) or after[min(record["dims"], default=record["full_dim"])]
    return [
        (
            f"nDCG@{full['k']} at {full['dim']}", f"{full['ndcg']:.4f}",
            f"95%: {_interval(full)}; base {base[full['dim']]['ndcg']:.4f}",
        ),
        (
            f"nDCG@{full['k']} at {found['dim']}", f"{found['ndcg']:.4f}",
            f"95%: {_interval(found)}; base {base[found['dim']]['ndcg']:.4f}",
        ),
        (f"Kept at {found['dim']}", f"{found['kept']:.1%}", f"95%: {found['kept_low']:.1%} – {found['kept_high']:.1%}"),
        ("Prefixes", str(record["probe"]["says"]), "by the neighbours that they keep"),
        ("Training", f"{record['seconds'].get('train', 0):,.0f} s", f"{content['pairs']:,} pairs"),
    ]  # fmt: skip


def _measured_how(record: Record) -> str:
    content = record["fingerprint"]["content"]
    return (
        f"Measured on {content['measured_queries']:,} held-out queries over {content['measured_documents']:,} "
        "documents, by exact search of plain prefixes; intervals: bootstrap 95% over the queries."
    )


def _quality(record: Record) -> Section:
    evaluation, how = pl.DataFrame(record["evaluation"]), _measured_how(record)
    metric = f"nDCG@{evaluation['k'][0]}"
    drawn = [curves.by_dim(evaluation, "ndcg", metric, how)]
    if len(by_dim(record)) > 1:
        share = f"share of its full {metric} kept"
        drawn.append(curves.by_dim(evaluation, "kept", share, f"{how} The same queries are drawn for both parts."))
    words = [f"Are plain prefixes trained? By measurement: {record['probe']['says']}; {record['probe']['because']}."]
    return Section("quality", "Before and after", words, (), drawn)


def _course(record: Record, curve: pl.DataFrame) -> Section:
    """Loss of each dimension and watched quality over the steps."""
    drawn, names = [], set(curve["name"])
    loss = "Mean since the point before, without the weight of the dimension; the objective's own unit."
    if any(name.startswith("loss_") for name in names):
        drawn.append(curves.over_steps(curve, "loss", "Loss of each dimension", "loss", loss))
    k = record["evaluation"][0]["k"]
    watched = "On a part of the held-out queries, which the figures above do not count, over a part of the documents."
    if any(name.startswith("ndcg_") for name in names):
        drawn.append(curves.over_steps(curve, "ndcg", f"Held-out nDCG@{k} of each prefix", f"nDCG@{k}", watched))
    stop = record["spec"]["stop"]
    words = []
    if stop:
        words = [
            f"Training was to end where nDCG at {stop['dim']} dimensions got no better at {stop['patience']} "
            f"checkpoints in a row, and to keep the best; it ended after {record['steps']:,} steps."
        ]
    return Section("course", "While training", words, (), drawn)


def _compared(trainings: Mapping[str, Record], mine: str) -> Section | None:
    """A table of all that were measured on the same, and what follows from it."""
    if len(trainings) < 2:
        return None
    settings = {name: output.flat(_settings(record)) for name, record in trainings.items()}
    known = list(dict.fromkeys(field for values in settings.values() for field in values))
    differ = [
        field for field in known
        if len({str(values.get(field)) for values in settings.values()}) > 1
        or (field in ALWAYS and field != ALWAYS[0])
    ]  # fmt: skip
    dims = sorted({dim for record in trainings.values() for dim in by_dim(record)}, reverse=True)
    columns = [("training", False), *((field, False) for field in differ), ("steps", True)]
    columns += [(f"at {dim}", True) for dim in dims]
    rows = []
    for name, record in trainings.items():
        cells = [f"{name} (this one)" if name == mine else name]
        cells += [_told(settings[name].get(field)) for field in differ] + [f"{record['steps']:,}"]
        rows.append(cells + [_cell(by_dim(record).get(dim)) for dim in dims])
    k = trainings[mine]["evaluation"][0]["k"]
    grids = [Grid(f"nDCG@{k} of each prefix (95 % interval), on the same queries and documents", columns, rows)]
    words = [*_advice(trainings, mine), *_single_changes(trainings, settings, mine)]
    return Section("compared", "Beside other trainings on the same data", words, grids=grids)


def _settings(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record["spec"].items() if name not in ("name", "output", "data", "workers")}


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{row['ndcg']:.4f} ({_interval(row)})"


def _shared(records: Sequence[Record]) -> list[int]:
    """Dims that all were measured at, the largest first."""
    return sorted(set.intersection(*(set(by_dim(record)) for record in records)), reverse=True)


def _advice(trainings: Mapping[str, Record], mine: str) -> list[str]:
    """Which to take, by the shortest prefix that all have, where the intervals tell them apart."""
    shared = _shared(list(trainings.values()))
    if not shared:
        return []
    full, short = shared[0], shared[-1]
    rows = {name: by_dim(record) for name, record in trainings.items()}
    best = max(rows, key=lambda name: (rows[name][short]["ndcg"], name == mine))
    said = f"{rows[best][short]['ndcg']:.4f} ({_interval(rows[best][short])})"
    if best == mine:
        clear = all(apart(rows[mine][short], row[short]) > 0 for name, row in rows.items() if name != mine)
        how = "outside the intervals of all others: take it" if clear else "within the interval of others: they do too"
        words = f"At {short} dimensions this one finds most, {said}, {how}."
    elif apart(rows[best][short], rows[mine][short]) > 0:
        words = f"Take {best}: at {short} dimensions it finds most, {said}, outside the interval of this one."
    else:
        words = f"At {short} dimensions {best} finds most, {said}, within the interval of this one: either will do."
    worse = [name for name in rows if apart(rows[best][full], rows[name][full]) < 0]
    if full != short and worse:
        words += f" At {full} it is below {', '.join(worse)}, outside the intervals: short prefixes cost it that."
    return [words]


def _single_changes(
    trainings: Mapping[str, Record], settings: Mapping[str, Mapping[str, Any]], mine: str
) -> Iterator[str]:
    """What one setting alone did, between this training and each that differs in nothing else."""
    for name, record in trainings.items():
        fields = {*settings[name], *settings[mine]}
        changed = [field for field in sorted(fields) if settings[name].get(field) != settings[mine].get(field)]
        if name == mine or len(changed) != 1:
            continue
        rows, own = by_dim(record), by_dim(trainings[mine])
        found = [(dim, own[dim]["ndcg"] - rows[dim]["ndcg"], apart(own[dim], rows[dim])) for dim in rows if dim in own]
        told = ", ".join(f"{change:+.4f} at {dim}{' (clear)' if clear else ''}" for dim, change, clear in found)
        one, other = (_told(values.get(changed[0])) for values in (settings[mine], settings[name]))
        yield f"{changed[0]}: {one} instead of {other} ({name}) brought {told}; “clear” is outside the intervals."


def _facts(record: Record) -> Section:
    content, seconds = record["fingerprint"]["content"], record["seconds"]
    rows = [
        ("pairs trained on", f"{content['pairs']:,}"),
        ("rows left out", f"{content['skipped']:,}"),
        ("queries held out", f"{content['held_out_queries']:,}"),
        ("documents", f"{content['documents']:,}"),
        ("data, sha256", content["digest"]),
        ("base", record["base"]["name"]),
        ("base, digest", record["base"]["digest"]),
        *((f"seconds, {what}", f"{value:,.1f}") for what, value in seconds.items()),
        *((f"version of {name}", version) for name, version in record["versions"].items()),
    ]
    words = ["A resumed training counts the seconds of its last part only."]
    return Section("facts", "Data, base and time", words, grids=[Grid("Facts", [("", False), ("is", False)], rows)])


def _raw(record: Record) -> Section:
    spec = yaml.safe_dump(record["spec"], sort_keys=False, allow_unicode=True)
    whole = json.dumps(record, indent=2, sort_keys=True)
    return Section("raw", "Spec and record", raw=[("Spec (YAML)", spec), ("Record (JSON)", whole)])
