"""What the command line shows: results as tables on stdout, progress and logs on stderr."""

import base64
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.figures import Plan
from pipeline.verify import Findings
from pipeline.workers import Progress

log = logging.getLogger(__name__)
out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, emoji=False)
TAG = re.compile(r"(\\*)\[(?=([a-z#/@][^\[]*?\])?)")
"""A bracket, the backslashes before it, and what follows where rich would take that for a tag."""
MAX_UNKNOWN = 20
"""Files listed by name that no record names."""
PLAIN_SECONDS = 10.0
"""Between two progress lines where stderr is no terminal."""


def shown(text: str) -> str:
    """Text from outside as one line: what cannot be printed (controls, bidi marks, lone surrogates) is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> str:
    """The same as markup without any tag; put no tag right behind it, a last backslash would undo that."""
    return TAG.sub(lambda found: found[1] * (2 if found[2] else 1) + r"\[", shown(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that reads like the text it holds; only what cannot be printed is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=json_value)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def me() -> str:
    """How this command was called."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return f"{Path(sys.executable).name} -m pipeline"
    return Path(called).name if shutil.which(Path(called).name) == called else os.path.relpath(called)


def json_value(value: Any) -> str:
    """What JSON has no word for: bytes as base64, the rest (dates, decimals) as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def print_json(value: Any, indent: int | None = 2) -> None:
    """A result for programs."""
    sys.stdout.write(json_text(value, indent) + "\n")


def print_output(text: str) -> None:
    """What another process wrote, as it comes."""
    sys.stdout.write("\n".join(map(shown, text.split("\n"))))
    sys.stdout.flush()


def print_hits(hits: pl.DataFrame) -> None:
    """Hits as lines: rank, score, id, the beginning of the text."""
    for hit in hits.iter_rows(named=True):
        text = " ".join((hit.get("text") or "").split())
        out.print(f"  {hit['rank']:2}  {hit['score']:.4f}  [cyan]{plain(hit['id'])} [/] {plain(text[:100])}")


def print_steps(steps: Sequence[Mapping[str, Any]]) -> None:
    """What each level of a search did."""
    table = Table("table", "engine", "scoring", "rows", "bytes", "shortlist", "ms", "note", box=None)
    for step in steps:
        cells = [
            step["table"] if step["dim"] is None else f"{step['table']}[:{step['dim']}]",
            step["engine"],
            step["scoring"],
            f"{step['rows']:,}",
            f"{step['bytes']:,}",
            str(step["shortlist"]),
        ]
        table.add_row(*map(plain, cells), f"{step['milliseconds']:.2f}", plain(step["note"]))
    out.print(table)


def print_plan(made: Plan) -> None:
    """Figures, histogram, verdict and advice of a plan."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("origin", no_wrap=True)
    table.add_column("how")
    for figure in made.figures:
        table.add_row(figure.name, figure.shown, figure.origin, plain(figure.how))
    out.print(table)
    out.print("\nTokens of the sampled rows, before any cut:")
    most = max(bucket.rows for bucket in made.histogram)
    for bucket in made.histogram:
        bar = "█" * round(40 * bucket.rows / most)
        out.print(f"  {bucket.low:>7,} … {bucket.high:<7,} {bucket.rows:>6,}  {bar}")
    out.print(f"\nPlain prefixes, on the sample: [bold]{made.verdict.says}[/]; {plain(made.verdict.because)}")
    for sentence in made.advice:
        out.print(f"[yellow]advice:[/] {plain(sentence)}")


def print_findings(root: str, found: Findings) -> None:
    """Every problem, the files that no record names, and how much was looked at."""
    for sentence in found.problems:
        out.print(f"[bold red]problem:[/] {plain(sentence)}")
    for name in found.unknown[:MAX_UNKNOWN]:
        out.print(f"[yellow]unknown:[/] no record names {plain(name)}")
    if len(found.unknown) > MAX_UNKNOWN:
        out.print(f"[yellow]unknown:[/] and {len(found.unknown) - MAX_UNKNOWN:,} more files")
    counts = {name: found.checked.get(name, 0) for name in ("files", "bytes", "records", "tables", "rows", "codes")}
    state = "is whole" if found.is_whole else f"has {len(found.problems):,} problem(s)"
    out.print(
        f"{plain(root)}: generation {found.generation} {state}; checked {counts['files']:,} files "
        f"({counts['bytes'] / 1e6:,.1f} MB), {counts['records']:,} records, {counts['tables']:,} tables, "
        f"{counts['rows']:,} rows, {counts['codes']:,} codes computed again"
    )


def print_evaluation(measured: pl.DataFrame, whole: bool = False) -> None:
    """Every setting; or each table alone and at the default shortlist, the cascade and exact."""
    if not whole:
        default = measured["k"][0] * 20
        usual = (pl.col("mode") != "cascade") & (
            pl.col("shortlist").is_null() | (pl.col("shortlist") == max(200, default))
        )
        best = pl.col("scoring") != "hamming"
        measured = measured.filter((pl.col("choice") == "cascade") | (usual & best))
    judged = measured["ndcg"].null_count() < len(measured)
    k = measured["k"][0]
    names = ["recall_exact", *(["recall", "ndcg", "mrr"] if judged else [])]
    table = Table(box=None, padding=(0, 1))
    for heading in (
        "choice",
        "mode",
        "dim",
        "scoring",
        "short list",
        *(f"{name} @{k}" for name in names),
        "bytes a row",
        "median ms",
    ):
        table.add_column(heading, no_wrap=heading == "choice", overflow="fold")
    for row in measured.iter_rows(named=True):
        values = [f"{row[name]:.4f}" for name in names]
        table.add_row(
            row["choice"],
            row["mode"],
            str(row["dim"]),
            row["scoring"],
            str(row["shortlist"] or "-") if row["candidates"] is None else f"~{row['candidates']:.0f}",
            *values,
            str(row["bytes_per_row"]),
            f"{row['median_ms']:.2f}",
        )
    out.print(f"\nMeasured with {measured['queries'][0]:,} queries, milliseconds one query at a time:")
    out.print(table)


def print_log(measured: pl.DataFrame) -> None:
    """The query log, oldest first."""
    table = Table("measured (UTC)", "file", "queries", "generation", "recall_exact", "95 %", "median ms", box=None)
    for row in measured.iter_rows(named=True):
        table.add_row(
            f"{row['measured_at']:%Y-%m-%d %H:%M}",
            plain(row["file"]),
            f"{row['queries']:,}",
            str(row["generation"]),
            f"{row['recall_exact']:.4f}",
            f"{row['recall_exact_low']:.4f}-{row['recall_exact_high']:.4f}",
            f"{row['median_ms']:.2f}",
        )
    out.print(table)


@contextmanager
def watched() -> Iterator["Watch"]:
    """Progress and logs on stderr: bars on a terminal, plain lines elsewhere."""
    if not err.is_terminal:
        configure_logging(None)
        yield Watch(None)
        return
    columns = (
        TextColumn("{task.description:9}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=err, transient=True) as bars:
        configure_logging(bars.console)
        yield Watch(bars)


def configure_logging(console: Console | None) -> None:
    """Plain lines on stderr, or above the bars of a terminal."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if console is not None:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    form = "%(message)s" if console else "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(_OneLine(form))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pipeline").setLevel(logging.INFO)


class _OneLine(logging.Formatter):
    """Keeps an event on its line, whatever names it tells of; a traceback keeps its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


class Watch:
    """Turns stage progress into a bar, or into a line every ten seconds."""

    def __init__(self, bars: Bars | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._told = time.monotonic()

    def __call__(self, stage: str, rows: int | None, progress: Progress) -> None:
        """Show a stage's progress; `rows` is None where the whole is not known yet."""
        now = time.monotonic()
        seconds = now - self._started.setdefault(stage, now)
        rate = progress.rows / seconds if seconds else 0.0
        state = f"{progress.rows:,}" + (f" of {rows:,} rows" if rows else " rows")
        if progress.rows and seconds:
            state += f"  {rate:,.0f} rows/s" + (
                f"  {progress.tokens / seconds:,.0f} tokens/s" if progress.tokens else ""
            )
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=rows, state=state)
            self._bars.update(self._tasks[stage], completed=progress.rows, state=state)
        elif progress.rows and now - self._told > PLAIN_SECONDS:
            self._told = now
            left = f"  {(rows - progress.rows) / rate:,.0f} s left" if rows and rate else ""
            log.info("%s %s%s", stage, state, left)


def print_summary(name: str, root: str, generation: Mapping[str, Any]) -> None:
    """What a generation holds: rows, model, transform, tables."""
    rows, model = generation["corpus"], generation["model"]
    out.print(f"\n[bold]{name}[/], generation {generation['generation']} in {plain(root)}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rows["reasons"].items()))
    out.print(f"  {rows['rows']:,} rows in, {rows['quarantined']:,} quarantined{f' ({reasons})' if reasons else ''}")
    counted = generation["embed"]
    out.print(
        f"  {plain(model['name'])}, {model['full_dim']} dimensions, {model['backend']} {model['precision']}; "
        f"max_tokens cut {counted['cut_tokens']:,} tokens from {counted['cut_rows']:,} rows"
    )
    found = generation["transform"]
    out.print(f"  plain prefixes: [bold]{found['verdict']['says']}[/], {plain(found['verdict']['because'])}")
    chosen = f"; {found['compared']['because']}" if found["compared"] else ""
    lost = f"; lost against PCA, by dimension: {found['lost']}" if found["lost"] else ""
    out.print(f"  transform: [bold]{found['kind']}[/]{plain(chosen + lost)}")
    table = Table("table", "rows", "bytes a row", "MB", "index", box=None, padding=(0, 2))
    for table_name, entry in generation["tables"].items():
        each = f"{entry['bytes'] / entry['rows']:.0f}" if entry["rows"] else "-"
        index = entry.get("index") or {}
        table.add_row(
            f"  lancedb/{table_name}.lance",
            f"{entry['rows']:,}",
            each,
            f"{entry['bytes'] / 1e6:.1f}",
            index.get("kind", "-"),
        )
    out.print(table)


def print_training(record: Mapping[str, Any], is_new: bool) -> None:
    """What a trained model does at each prefix, before and after."""
    if not is_new:
        out.print(f"Nothing left to do: {plain(record['output'])} is that model.")
    data = record["fingerprint"]["content"]
    out.print(
        f"\n[bold]{plain(record['name'])}[/], {record['kind']}, {record['full_dim']} dimensions, "
        f"{data['pairs']:,} pairs, {record['steps']:,} steps, in {plain(record['output'])}"
    )
    out.print(f"  plain prefixes: [bold]{record['probe']['says']}[/], {plain(record['probe']['because'])}")
    k = record["evaluation"][0]["k"]
    table = Table("dim", f"nDCG@{k}", "interval", "of its full nDCG", "before", "before, PCA", box=None, padding=(0, 2))
    rows = {(row["when"], row["dim"]): row for row in record["evaluation"]}
    for (when, dim), row in rows.items():
        if when == "after":
            table.add_row(
                f"  {dim}",
                f"{row['ndcg']:.4f}",
                f"{row['ndcg_low']:.4f}-{row['ndcg_high']:.4f}",
                f"{row['kept']:.1%}",
                f"{rows['before', dim]['ndcg']:.4f}",
                f"{rows['pca', dim]['ndcg']:.4f}",
            )
    out.print(table)
    out.print(f"  {data['measured_queries']:,} held-out queries over {data['measured_documents']:,} documents")
