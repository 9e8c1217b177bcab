"""The arithmetic of a plan: tokens, time, money, bytes, memory and advice, from what was measured on a sample.

Pure functions; each figure says whether it is measured, estimated (by which formula) or assumed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline import (
    adaptor,
    corpus as corpus_stage,
    index as index_stage,
    merge,
    probe,
    rows as row_rule,
)
from pipeline.embedder import Facts
from pipeline.sample import Counts, Line, Origin, Sample
from pipeline.spec import JobSpec, Prefix
from pipeline.vectors import Matrix, bytes_per_row

SCAN_BYTES_PER_SECOND = 10e9
"""One core through full vectors (assumed; 25 GB/s from memory was measured on one Zen 4 core)."""
EXACT_IS_FAST_MS, INT8_SCAN_ROWS, MANY_CUT = 10.0, 1_000_000, 0.05
"""Where advice begins: milliseconds, rows, share of rows (assumed)."""
DIGEST_BYTES = 16
PARAMETERS_FILE_BYTES = 2_000
"""What Lance writes beside the numbers (measured: 2,000 beside 4 kB; beside 600 kB 8,700, which is 1.5 %)."""
ENOUGH_BITS = 256
"""Signs that kept at least 0.997 of nDCG@10 with a shortlist of 200 (measured: three corpora, 384 dimensions)."""


@dataclass(frozen=True)
class Figure:
    """One number, its unit, and where it comes from: `how` is the measurement or the formula."""

    name: str
    value: float
    unit: str
    origin: Origin
    how: str

    @property
    def shown(self) -> str:
        """The value for people, with its unit."""
        if self.unit == "share":
            return f"{self.value:.1%}"
        value, unit = float(self.value), self.unit
        if unit == "bytes":
            power = min(int(np.log10(max(value, 1))) // 3, 4)
            value, unit = value / 1000**power, ("bytes", "kB", "MB", "GB", "TB")[power]
        return f"{value:,.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.3g} {unit}"


@dataclass(frozen=True)
class Bucket:
    """Rows of low … high tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """Figures by name in the order they are shown; lengths before any cut; the verdict on plain prefixes; advice."""

    job: str
    figures: tuple[Figure, ...]
    histogram: tuple[Bucket, ...]
    verdict: probe.Verdict
    kept: tuple[probe.Kept, ...]
    advice: tuple[str, ...]

    def __getitem__(self, name: str) -> float:
        """The value of a figure; KeyError where there is none."""
        return {figure.name: figure.value for figure in self.figures}[name]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "job": self.job,
            "figures": [asdict(figure) for figure in self.figures],
            "histogram": [asdict(bucket) for bucket in self.histogram],
            "verdict": self.verdict.figures(),
            "kept": [one.figures() for one in self.kept],
            "advice": list(self.advice),
        }


@dataclass(frozen=True)
class Embedded:
    """The sample through the model: `tokens` of every text before any cut; unit vectors of `rows` of them."""

    facts: Facts
    device: str
    tokens: Counts
    vectors: Matrix
    queries: Matrix | None
    rows: int
    seconds: float
    reasons: dict[str, int]


def row_figures(sample: Sample, reasons: Mapping[str, int]) -> list[Figure]:
    """Rows in all, drawn, set aside by reason, and last the usable ones."""
    rows, drawn = sample.rows, sample.drawn
    found = [
        Figure("rows", rows.count, "rows", rows.origin, rows.how),
        Figure("sample_rows", drawn, "rows", "measured", sample.how),
    ]
    found += [
        Figure(f"quarantined.{reason}", count, "rows", "measured", "in the sample")
        for reason, count in sorted(reasons.items())
    ]
    aside = sum(reasons.values())
    how = f"rows x {drawn - aside:,} usable / {drawn:,} sampled rows"
    if drawn == rows.count:
        return [*found, Figure("usable_rows", drawn - aside, "rows", "measured", "every row was looked at")]
    return [*found, Figure("usable_rows", round(rows.count * (1 - aside / drawn)), "rows", "estimated", how)]


def token_figures(tokens: Counts, limit: int | None, usable: int) -> list[Figure]:
    """Tokens that the model will read, of rows of `tokens` each before the cut to `limit`, and what the cut costs."""
    kept = tokens if limit is None else np.minimum(tokens, limit)
    mean, all_tokens = float(kept.mean()), max(int(tokens.sum()), 1)
    error = 2 * float(kept.std()) / np.sqrt(len(kept)) / max(mean, 1e-9)
    of = f"{len(tokens):,} sampled rows, prompt included; the longest has {int(tokens.max()):,}"
    cut = "no limit" if limit is None else f"share beyond max_tokens = {limit:,}"
    return [
        Figure("tokens_per_row", mean, "tokens", "measured", f"mean of {of}"),
        Figure("tokens", usable * mean, "tokens", "estimated", f"usable rows x mean, +- {error:.1%} (2 std errors)"),
        Figure("cut_rows", float((tokens > kept).mean()), "share", "measured", f"of sampled rows; {cut}"),
        Figure("cut_tokens", float((tokens - kept).sum()) / all_tokens, "share", "measured", f"of their tokens; {cut}"),
    ]  # fmt: skip


def histogram(tokens: Counts) -> tuple[Bucket, ...]:
    """Rows by token length: 0 … 8, 9 … 16, and on in powers of two, up to the longest."""
    edges = [0, *(2**power for power in range(3, 64) if 2 ** (power - 1) < max(int(tokens.max()), 8))]
    return tuple(
        Bucket(low + 1 if low else 0, high, int((((tokens > low) | (low == 0)) & (tokens <= high)).sum()))
        for low, high in pairwise(edges)
    )


def time_figures(done: Embedded, usable: int, price: float | None) -> list[Figure]:
    """How fast the sample went, how long all rows take at that rate, and what it costs."""
    facts, is_gpu = done.facts, done.device.startswith("cuda")
    one = "GPU" if is_gpu else "machine"
    rate, per_row = done.rows / done.seconds, float(np.mean(np.minimum(done.tokens, facts.max_tokens or 2**62)))
    how = f"{done.rows:,} sampled rows in {done.seconds:.1f} s: {done.device}, {facts.backend} {facts.precision}"
    hours = usable / rate / 3600
    found = [
        Figure("rows_per_second", rate, "rows/s", "measured", how),
        Figure("tokens_per_second", rate * per_row, "tokens/s", "measured", "rows per second x tokens per row"),
        Figure("embed_seconds", usable / rate, "s", "estimated", f"usable rows / rows per second, on one {one}"),
        Figure(f"{one.lower()}_hours", hours, f"{one}-hours", "estimated", "embed_seconds / 3600; n of them take 1/n"),
    ]  # fmt: skip
    if price is None:
        return found
    per_million = 1e6 / rate / 3600 * price
    basis = f"at {price:g} per {one}-hour (given)"
    return [
        *found,
        Figure("cost_per_million_rows", per_million, "money", "estimated", f"1e6 / rows per second / 3600 {basis}"),
        Figure("cost", hours * price, "money", "estimated", f"{one}-hours {basis}"),
    ]


def transform_kind(asked: str, verdict: probe.Verdict, rows: int) -> str:
    """What the fit stage will choose if it sees what the sample showed; `adaptor` may become `pca`."""
    if asked != "auto":
        return asked
    if verdict.holds:
        return "none"
    return "adaptor" if rows * 3 // 4 >= adaptor.MIN_ROWS else "pca"


def byte_figures(spec: JobSpec, rows: int, full_dim: int, documents: Line, filters: Line, kind: str) -> list[Figure]:
    """Bytes of each table's data, without indexes, and in all."""
    vector, number = bytes_per_row(full_dim, spec.embed.vectors), math.ceil(math.log2(max(rows, 2))) / 8
    joint = merge.per_fragment(rows, corpus_stage.shard_rows(rows, spec.corpus))
    files = -(-rows // max(joint, 1))
    weighed, packed = "columns (the sample, written as Lance)", f"{number:.3g} for row (packed)"
    size = documents.at(rows, files) + rows * (vector + DIGEST_BYTES + number)
    how = (
        f"rows x ({vector} + digest {DIGEST_BYTES} + {packed} + {documents.each:.0f} for id, text and other {weighed})"
    )
    found = [Figure("bytes.documents", round(size), "bytes", "estimated", how)]
    for prefix in spec.prefixes:
        each = prefix.bytes_per_row
        how = f"rows x ({each} + {packed} + {filters.each:.1f} for filter columns)"
        size = filters.at(rows) + rows * (each + number)
        found.append(Figure(f"bytes.{prefix.table}", round(size), "bytes", "estimated", how))
    numbers = parameter_numbers(spec.prefixes, full_dim, kind)
    how = f"4 x {numbers:,} numbers (transform {kind} and rotations) + {PARAMETERS_FILE_BYTES:,}"
    found.append(Figure("bytes.parameters", PARAMETERS_FILE_BYTES + 4 * numbers, "bytes", "estimated", how))
    if spec.embed.parquet:
        found.append(replace(found[0], name="bytes.parquet", how="as documents"))
    total = sum(figure.value for figure in found)
    found.append(Figure("bytes", total, "bytes", "estimated", "sum of the above; indexes come on top"))
    if corpus_stage.shard_rows(rows, spec.corpus) < joint:
        how = f"while shards are merged, each worker needs room for a second copy of at most {joint:,} rows"
        found.append(Figure("bytes.merging", found[0].value * joint / rows, "bytes", "estimated", how))
    return found


def parameter_numbers(prefixes: Sequence[Prefix], full_dim: int, kind: str) -> int:
    """Numbers in `parameters`: a transform (beside an adaptor PCA, for binary tables), a rotation per binary one."""
    binary = [prefix for prefix in prefixes if prefix.precision == "binary"]
    kinds = {"pca" if kind == "adaptor" and prefix in binary else kind for prefix in prefixes} - {"none"}
    return len(kinds) * (full_dim + 1) * full_dim + sum(one.dim**2 for one in binary if one.rotation != "none")


def memory_figures(spec: JobSpec, rows: int, full_dim: int) -> list[Figure]:
    """Memory that holds the codes of each level of the cascade, and the full vectors."""
    levels = [prefix for name in cascade(spec) for prefix in spec.prefixes if prefix.table == name]
    found = [
        Figure(f"memory.{one.table}", rows * one.bytes_per_row, "bytes", "estimated", f"rows x {one.bytes_per_row}")
        for one in levels
    ]
    each = bytes_per_row(full_dim, spec.embed.vectors)
    how = f"rows x {each}; only short lists are read of them, so they may stay on disk"
    return [*found, Figure("memory.full", rows * each, "bytes", "estimated", how)]


def index_figures(spec: JobSpec, rows: int) -> list[Figure]:
    """Memory that the build of each index takes, on one machine."""
    chosen = [(one, index_stage.choose(one, spec.index, rows)[0]) for one in spec.prefixes]
    how = "{} build on one machine: rows it trains on as float32, twice the stored vectors and row ids"
    return [
        Figure(
            f"memory.index.{one.table}",
            index_stage.build_bytes(one, kind, rows),
            "bytes",
            "estimated",
            how.format(kind),
        )
        for one, kind in chosen
        if kind != "none"
    ]


def cascade(spec: JobSpec) -> list[str]:
    """Tables of the cascade, coarse to fine; the smallest table where the spec names none."""
    if spec.search.cascade is not None:
        return list(dict.fromkeys(level.table for level in spec.search.cascade))
    return [spec.smallest.table]


def advice(spec: JobSpec, plan: Plan, full_dim: int) -> list[str]:
    """What to change before the run, in sentences; empty where nothing stands out."""
    rows, levels = int(plan["usable_rows"]), cascade(spec)
    said = []
    exact_ms = rows * full_dim * 4 / SCAN_BYTES_PER_SECOND * 1000
    if exact_ms <= EXACT_IS_FAST_MS:
        said.append(
            f"{rows:,} rows: exact full-dimension search takes about {max(1, round(exact_ms))} ms (estimated: "
            "rows x dim x 4 bytes at 10 GB/s, assumed); keep the full vectors and skip the prefixes"
        )
    said += _about_prefixes(spec, plan.verdict)
    if levels and "_int8" in levels[0] and rows > INT8_SCAN_ROWS:
        said.append(
            f"{levels[0]} comes first in the cascade and LanceDB cannot index int8, so each query scans all "
            f"{rows:,} rows; begin with a binary or float16 table"
        )
    if plan["cut_rows"] > MANY_CUT:
        said.append(
            f"max_tokens cuts {plan['cut_rows']:.0%} of rows and {plan['cut_tokens']:.0%} of all tokens; split long "
            "texts into rows, raise model.max_tokens where the model has more positions, or take one that reads further"
        )
    names = [figure.name for figure in plan.figures if figure.name.startswith("quarantined.")]
    refused = sum(plan[name] for name in names if name != "quarantined.duplicate_text")
    aside = plan["rows"] * refused / plan["sample_rows"]
    if aside > max(row_rule.ALWAYS_ALLOWED, spec.corpus.max_quarantined * plan["rows"]):
        said.append(
            f"about {aside:,.0f} rows cannot be used, more than corpus.max_quarantined allows, and the run would stop; "
            "mend the corpus or raise it"
        )
    return said


def _about_prefixes(spec: JobSpec, verdict: probe.Verdict) -> list[str]:
    said = []
    if verdict.says == "not trained" and spec.transform.kind == "none" and not spec.transform.accept_loss:
        said.append(
            "transform.kind: none will be refused after embedding, if all rows say what the sample says; use auto"
        )
    declared = ", ".join(map(str, verdict.declared))
    if verdict.says == "not trained" and declared:
        said.append(f"the model declares {declared}, the sample says otherwise; leave transform.kind at auto")
    if verdict.far:
        far, near = ", ".join(map(str, verdict.far)), declared or "those that hold on the sample"
        said.append(f"prefix dims {far} are far from trained ones ({near}); take one of those, or a transform")
    said += [
        f"{one.table} reads {one.bytes_per_row} bytes a row; {ENOUGH_BITS // 8} ({ENOUGH_BITS} bits) and a short list "
        "of 200 kept 99.7 % of nDCG@10 where it was measured (three corpora, 384 dimensions); try that first"
        for one in spec.prefixes
        if one.precision == "binary" and one.dim > ENOUGH_BITS
    ]
    return said
