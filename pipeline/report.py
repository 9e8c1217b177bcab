"""The report: one HTML page made from a root's files alone; no model starts and nothing is measured.

Comes in: the newest generation and the files it was published with. Goes out: report.html.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from pipeline import ledger, plots, querylog
from pipeline.encoders import meters
from pipeline.errors import StaleError
from pipeline.html import Example, Grid, Hit, Page, Section, grid, render
from pipeline.metrics import METRICS
from pipeline.seam import Place
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, PARAMETERS

FILE = "report.html"
WARN_CLIPPED = 0.001
"""Share of a table's int8 numbers above which the page warns."""
MAX_DETAILS = 20
"""Quarantined rows shown one by one."""
BOUNDS = ("low", "high")
SECONDS = {
    "read_seconds": "reading and cleaning (beside forward)",
    "tokenize_seconds": "tokenizing (beside forward)",
    "waiting_seconds": "device waiting for tokens",
    "forward_seconds": "forward",
    "write_seconds": "writing (beside forward)",
    "merge_seconds": "joining shards to few fragments",
}
"""Where the time of embedding goes, summed over workers."""


@dataclass(frozen=True)
class Facts:
    """What the page is made from."""

    generation: Mapping[str, Any]
    measured: pl.DataFrame
    timed: int
    examples: pl.DataFrame
    quarantine: pl.DataFrame
    reasons: pl.DataFrame
    query_log: pl.DataFrame | None


def run(root: Root) -> Place:
    """Write the page of the root's newest generation; StaleError where none is finished."""
    root.write(FILE, page(read(root)).encode())
    return root / FILE


def read(root: Root) -> Facts:
    """The facts of the newest generation; StaleError where there is none, or where its files are gone."""
    generation = ledger.newest_generation(root)
    if generation is None:
        raise StaleError(f"{root.path} has no finished generation; run the job first")
    for name in ("evaluation.parquet", "rankings.parquet", "examples.parquet", "quarantine.parquet"):
        if root.disk.digest(root / name) != generation["files"].get(name, ""):
            number = generation["generation"]
            raise StaleError(f"{root / name} is not what generation {number} was published with; run again")
    rankings = pl.scan_parquet(root.local("rankings.parquet"), glob=False)
    timed = rankings.group_by("setting").agg(pl.col("seconds").count())
    quarantine = pl.scan_parquet(root.local("quarantine.parquet"), glob=False)
    log = root.read(querylog.NAME)
    return Facts(
        generation,
        plots.described(pl.read_parquet(root.local("evaluation.parquet"), glob=False)),
        min(timed.collect()["seconds"].to_list(), default=0),
        pl.read_parquet(root.local("examples.parquet"), glob=False),
        quarantine.sort("row").head(MAX_DETAILS).collect(),
        quarantine.group_by("reason").agg(rows=pl.len()).sort("rows", "reason", descending=[True, False]).collect(),
        None if log is None else pl.read_parquet(log).sort("measured_at"),
    )


def page(facts: Facts) -> str:
    """The page as HTML."""
    generation = facts.generation
    corpus, model = generation["corpus"], generation["model"]
    about = (
        f"Generation {generation['generation']}: {corpus['rows'] - corpus['quarantined']:,} documents, "
        f"{model['name']} with {model['full_dim']} dimensions ({model['backend']}, {model['precision']})."
    )
    sections = [
        _matryoshka(facts), _dimensions(facts), _costs(facts), _variance(facts), _throughput(facts), _sizes(facts),
        _quarantine(facts), _examples(facts), _query_log(facts), _settings(facts), _raw(facts),
    ]  # fmt: skip
    shown = [section for section in sections if section is not None]
    return render(Page(generation["spec"]["name"], about, _verdict(facts), _figures(facts), shown))


def _row(facts: Facts, choice: str) -> dict[str, Any]:
    return facts.measured.row(by_predicate=pl.col("choice") == choice, named=True)


def _metrics(facts: Facts) -> list[str]:
    """Those worth a plot; without qrels only recall against exact search was measured."""
    judged = facts.measured["ndcg"].null_count() == 0
    return ["ndcg", "recall_exact"] if judged else ["recall_exact"]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "all"


def _verdict(facts: Facts) -> str:
    mine, exact, k = _row(facts, "cascade"), _row(facts, "exact"), facts.measured["k"][0]
    quality = ""
    if "ndcg" in _metrics(facts):
        kept, of = f"{mine['ndcg']:.3f}", f"{exact['ndcg']:.3f}"
        quality = f"keeps {_share(mine['ndcg'], exact['ndcg'])} of exact search's nDCG@{k} ({kept} of {of}) and "
    return (
        f"{_cascade_words(facts, mine)} {quality}finds {mine['recall_exact']:.1%} of exact search's {k} hits. "
        f"Its first pass reads {mine['scanned']:,} bytes per document where exact search reads {exact['scanned']:,} "
        f"({mine['scanned'] / exact['scanned']:.1%}); a query takes {mine['median_ms']:.2f} ms, "
        f"exact search {exact['median_ms']:.2f} ms (medians)."
    )


def _cascade_words(facts: Facts, mine: Mapping[str, Any]) -> str:
    """The levels in words; the first shortlist is the one that was measured."""
    levels = facts.generation["spec"]["search"]["cascade"] or [_default_level(facts)]
    lengths = [mine["shortlist"], *(max(level["shortlist"], mine["k"]) for level in levels[1:])]
    names = [level["table"] + (f"[:{level['dim']}]" if level.get("dim") else "") for level in levels]
    steps = [f"{name} (shortlist {length:,})" for name, length in zip(names, lengths, strict=True)]
    return "The cascade " + " → ".join([*steps, "full vectors"])


def _default_level(facts: Facts) -> dict[str, Any]:
    smallest = JobSpec.model_validate(facts.generation["spec"]).smallest
    return {"table": smallest.table, "dim": smallest.blocks[0] if smallest.blocks else None}


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    mine, exact, k = _row(facts, "cascade"), _row(facts, "exact"), facts.measured["k"][0]
    tables = facts.generation["tables"]
    prefixes = sum(entry["bytes"] for name, entry in tables.items() if name not in (DOCUMENTS, PARAMETERS))
    figures = [
        (f"Recall@{k} of exact", f"{mine['recall_exact']:.4f}", f"95%: {_interval(mine, 'recall_exact')}"),
        ("Median query", f"{mine['median_ms']:.2f} ms", f"p95 {mine['p95_ms']:.2f} ms; exact {exact['median_ms']:.2f}"),
        ("First pass reads", f"{mine['scanned']:,} B", f"a document; exact {exact['scanned']:,} B"),
        ("Prefix tables", _mb(prefixes), f"on disk; documents {_mb(tables[DOCUMENTS]['bytes'])}"),
    ]
    if "ndcg" in _metrics(facts):
        note = f"95%: {_interval(mine, 'ndcg')}; exact {exact['ndcg']:.4f}"
        figures.insert(0, (f"nDCG@{k}", f"{mine['ndcg']:.4f}", note))
    return figures


def _interval(row: Mapping[str, Any], metric: str) -> str:
    return f"{row[f'{metric}_low']:.4f} – {row[f'{metric}_high']:.4f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _measured_how(facts: Facts) -> str:
    queries, k = facts.measured["queries"][0], facts.measured["k"][0]
    file = facts.generation["spec"]["evaluate"]["queries"]
    asked = f"queries from {Path(file).name}" if file else "documents as queries, each never counted against itself"
    return f"Measured with {queries:,} {asked}; k = {k}; intervals: bootstrap 95% over the queries."


def _matryoshka(facts: Facts) -> Section:
    transform = facts.generation["transform"]
    verdict, kind, model = transform["verdict"], transform["kind"], facts.generation["model"]["name"]
    says = {"trained": "was trained", "not trained": "was not trained"}.get(verdict["says"], "may be trained or not")
    words = [f"{model} {says} for prefixes (verdict: {verdict['says']}): {verdict['because']}."]
    asked = facts.generation["spec"]["transform"]["kind"]
    how = "chosen by this measurement" if asked == "auto" else f"asked for by the job (transform.kind: {asked})"
    taken = "no transform: prefixes are the first numbers as they are" if kind == "none" else f"the transform {kind}"
    compared = f" {_up(transform['compared']['because'])}." if transform["compared"] else ""
    words.append(f"Prefixes are cut with {taken}, {how}.{compared}")
    warnings = []
    if transform["lost"]:
        lost = ", ".join(f"{100 * share:.1f} points at {dim}" for dim, share in transform["lost"].items())
        warnings.append(
            f"Plain prefixes are used without a verdict for them. Against PCA they lose of the neighbours: {lost}."
        )
    if kind == "none" and verdict["far"]:
        dims = ", ".join(map(str, verdict["far"]))
        warnings.append(f"Dimensions {dims} are far from every one that the model was trained for.")
    source = (
        f"Measured by the fit stage on documents held out of a sample of {transform['sample_rows']:,}: the share of "
        "the 10 nearest by full vectors that is among the 10 nearest after the cut. Means, no intervals."
    )
    drawn = [
        plots.kept(transform["kept"], of, source)
        for of in ("rows", "queries")
        if any(one["of"] == of for one in transform["kept"])
    ]
    return Section("matryoshka", "Is it Matryoshka?", words, warnings, drawn)


def _up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _dimensions(facts: Facts) -> Section:
    words = ["What a prefix finds by itself, and what it finds when the full vectors rescore its shortlist."]
    words += _hybrid_words(facts)
    drawn = [plots.by_dim(facts.measured, metric, _measured_how(facts)) for metric in _metrics(facts)]
    return Section("dimensions", "Quality against dimension", words, (), drawn)


def _hybrid_words(facts: Facts) -> list[str]:
    """Whether the full-text index pays, where it was measured."""
    if "hybrid" not in set(facts.measured["choice"]):
        return []
    metric = _metrics(facts)[0]
    of = {"ndcg": "nDCG", "recall_exact": "recall of exact search"}[metric]
    text, both, alone = (_row(facts, choice) for choice in ("text", "hybrid", "cascade"))
    return [
        f"{of}@{alone['k']} of the full-text index by itself {text[metric]:.3f} (95%: {_interval(text, metric)}), "
        f"of the cascade {alone[metric]:.3f} ({_interval(alone, metric)}), of both fused (hybrid) {both[metric]:.3f} "
        f"({_interval(both, metric)}), in {both['median_ms']:.2f} instead of {alone['median_ms']:.2f} ms a query."
    ]


def _costs(facts: Facts) -> Section:
    words = [
        "Every setting that was measured. Bytes scanned are those of the first pass, which looks at every document and "
        "should stay in memory; bytes stored are those of every table that the setting reads."
    ]
    how = _measured_how(facts)
    when = f"{how} Milliseconds: one query at a time on the machine of the job, at least {facts.timed} queries."
    costs = [
        ("scanned", "bytes scanned per document", how),
        ("bytes_per_row", "bytes stored per document", how),
        ("median_ms", "milliseconds per query (median)", f"{when} Grey lines reach to p95."),
    ]
    drawn = [
        plots.by_cost(facts.measured, metric, cost, title, source)
        for cost, title, source in costs
        for metric in _metrics(facts)
    ]
    return Section("costs", "Quality against cost", words, (), drawn)


def _variance(facts: Facts) -> Section | None:
    shares = facts.generation["transform"]["explained"]
    if not shares:
        return None
    prefixes = JobSpec.model_validate(facts.generation["spec"]).prefixes
    dims = sorted({dim for prefix in prefixes for dim in prefix.dims})
    rows = facts.generation["transform"]["sample_rows"]
    source = f"Cumulative eigenvalues of the covariance of {rows:,} sampled documents; points are the job's prefixes."
    words = ["How much of the corpus' variance the first principal axes hold: what any linear cut could keep at best."]
    return Section("variance", "Explained variance", words, (), [plots.explained(shares, dims, source)])


def _throughput(facts: Facts) -> Section:
    seconds, embed = facts.generation["seconds"], facts.generation["embed"]
    stages = [name for name in ("corpus", "embed", "fit", "derive", "index", "evaluate") if name in seconds]
    numbers = pl.DataFrame(
        {"what": stages, "value": [float(seconds[name]) for name in stages]},
        schema={"what": pl.String(), "value": pl.Float64()},
    )
    source = "Wall-clock seconds of the longest run of each stage; a resumed run counts its own part only."
    model = facts.generation["model"]
    speed = meters.speed(embed, model["flops"], model["peak_flops"])
    compiled = ", compiled" if model.get("compiled") else ""
    facts_of = [
        (
            "backend",
            f"{model['backend']}, {model['precision']}, {model['attention']}{compiled}, ids by {model['tokenizer']}",
        ),
        ("tokens per second and worker, in forward", f"{speed.tokens_per_second:,.0f}"),
        (
            "share of the measured matrix rate used (MFU)",
            "–" if speed.utilisation is None else f"{speed.utilisation:.1%}",
        ),
        ("matrix rate, GFLOP/s", f"{model['peak_flops'] / 1e9:,.0f}" if model["peak_flops"] else "–"),
        ("padding, share of what the model was given", f"{speed.padding:.2%}"),
        ("waiting for tokens, share of the device's time", f"{speed.waiting:.2%}"),
        ("tokens", f"{embed['tokens']:,}"),
        ("texts that an earlier row of the shard had", f"{embed['repeats']:,}"),
        ("documents cut at max_tokens", f"{embed['cut_rows']:,}"),
        ("tokens cut off", f"{embed['cut_tokens']:,}"),
        ("batches halved for memory", f"{embed['halvings']:,}"),
        *((f"seconds, {what}", f"{embed.get(name, 0.0):,.1f}") for name, what in SECONDS.items()),
        ("written again to join them", _mb(embed.get("merged_bytes", 0))),
        ("peak memory of a worker", _mb(embed["peak_memory_bytes"])),
    ]
    grids = [Grid("The embed stage, counted by its workers", [("", False), ("measured", True)], facts_of)]
    drawn = [plots.bars(numbers, "seconds", "Time per stage", "seconds", source)]
    return Section("throughput", "Throughput", (), (), drawn, grids)


def _sizes(facts: Facts) -> Section:
    tables: Mapping[str, Mapping[str, Any]] = facts.generation["tables"]
    rows = [
        (
            name, f"{entry['rows']:,}", f"{entry['bytes']:,}",
            f"{entry['bytes'] / entry['rows']:,.1f}" if entry["rows"] and name != PARAMETERS else "–",
            _index_kind(facts, name, entry),
            f"{entry['clipped_share']:.4%}" if name.endswith("int8") else "–",
        )
        for name, entry in tables.items()
    ]  # fmt: skip
    columns = [("table", False), ("rows", True), ("bytes", True), ("bytes a row", True), ("index", False)]
    grids = [Grid("Tables of this generation", [*columns, ("clipped", True)], rows)]
    warnings = [
        f"{name}: {entry['clipped_share']:.2%} of its numbers were too large for int8 and were clipped; the sample "
        "that its scales come from does not stand for the corpus. Raise transform.sample_rows, or take float16."
        for name, entry in tables.items()
        if (entry.get("clipped_share") or 0) > WARN_CLIPPED
    ]
    numbers = pl.DataFrame({"what": list(tables), "value": [entry["bytes"] / 1e6 for entry in tables.values()]})
    source = "Data files of each table as published, without indexes and old versions; documents include their texts."
    drawn = [plots.bars(numbers, "sizes", "Size on disk", "MB", source)]
    return Section("sizes", "Tables and sizes", (), warnings, drawn, grids)


def _index_kind(facts: Facts, name: str, entry: Mapping[str, Any]) -> str:
    if name == DOCUMENTS and facts.generation["spec"]["index"].get("text"):
        return "full text"
    return str((entry["index"] or {}).get("kind", "none"))


def _quarantine(facts: Facts) -> Section:
    corpus = facts.generation["corpus"]
    if not len(facts.reasons):
        return Section("quarantine", "Quarantine", [f"None: all {corpus['rows']:,} rows are in the tables."])
    count = facts.reasons["rows"].sum()
    words = [f"{count:,} of {corpus['rows']:,} rows were set aside ({count / corpus['rows']:.2%})."]
    columns = ["row", "id", "file", "reason", "detail"]
    grids = [
        grid("Rows set aside, by reason", facts.reasons),
        grid(f"The first {len(facts.quarantine)} of them", facts.quarantine.select(columns)),
    ]
    return Section("quarantine", "Quarantine", words, (), (), grids)


def _examples(facts: Facts) -> Section | None:
    if not len(facts.examples):
        return None
    words = [
        "Queries with their hits at each level, first those that the cascade serves worst. “exact 3” is the third hit "
        "of exact search; “lost” marks the hits of exact search that the cascade did not bring back."
    ]
    asked = [_example(one) for _, one in facts.examples.group_by("query", maintain_order=True)]
    return Section("examples", "Example queries", words, examples=asked)


def _example(rows: pl.DataFrame) -> Example:
    exact = {row["row"]: row["rank"] for row in rows.filter(table="exact").to_dicts()}
    levels: dict[tuple[int, str], dict[int, Hit]] = {}
    for row in rows.sort("level", "rank").to_dicts():
        hit = Hit(exact.get(row["row"], 0), row["id"], row["text"], row["score"], row["lost"])
        levels.setdefault((row["level"], row["table"]), {})[row["rank"]] = hit
    ranks = range(1, max(rows["rank"].to_list()) + 1)
    table = [[hits.get(rank) for hits in levels.values()] for rank in ranks]
    return Example(rows["question"][0], [name for _, name in levels], table, int(rows["lost"].sum()))


def _query_log(facts: Facts) -> Section | None:
    log = facts.query_log
    if log is None or not len(log):
        return None
    source = "Each point is one measurement of a query log; k and n are in the table; intervals: bootstrap 95%."
    when = log.with_columns(measured_at=pl.col("measured_at").dt.strftime("%Y-%m-%d %H:%M UTC"))
    names = [name for name in log.columns if not name.startswith("recall_exact") and not name.endswith("_ms")]
    grids = [_metric_grid("Every measurement", when, names, ["median_ms", "p95_ms"])]
    return Section("query-log", "Query log", (), (), [plots.drift(log, source)], grids)


def _settings(facts: Facts) -> Section:
    names = ["choice", "mode", "dim", "precision", "scoring", "shortlist", "candidates"]
    grids = [_metric_grid("evaluation.parquet", facts.measured, names, ["bytes_per_row", "median_ms", "p95_ms"])]
    return Section("settings", "Everything that was measured", [_measured_how(facts)], grids=grids)


def _metric_grid(title: str, frame: pl.DataFrame, before: Sequence[str], after: Sequence[str]) -> Grid:
    """Columns with every metric that was measured between them, each beside its interval."""
    parts = [frame.select(before)]
    for metric in METRICS:
        if metric in frame.columns and frame[metric].null_count() < len(frame):
            ends = [pl.col(f"{metric}_{end}").map_elements("{:.4f}".format, return_dtype=pl.String()) for end in BOUNDS]
            parts.append(frame.select(metric, pl.concat_str(ends, separator=" – ").alias(f"{metric} 95%")))
    return grid(title, pl.concat([*parts, frame.select(after)], how="horizontal"))


def _raw(facts: Facts) -> Section:
    spec = yaml.safe_dump(facts.generation["spec"], sort_keys=False, allow_unicode=True)
    return Section("raw", "Spec and manifest", raw=[("Spec (YAML)", spec), ("Manifest (JSON)", _manifest(facts))])


def _manifest(facts: Facts) -> str:
    return json.dumps(facts.generation, indent=2, sort_keys=True)
