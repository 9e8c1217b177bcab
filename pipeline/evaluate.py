"""The evaluate stage: what each table and the cascade find, against exact search and, where given, qrels.

Rankings and seconds are measured first; every metric is a pure function of them.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import polars as pl
import pyarrow as pa
from ir_measures import RR, R, nDCG
from numpy.typing import NDArray

from pipeline.errors import DataError, FloorError, QueryError, SpecError
from pipeline.search import Cascade, Index
from pipeline.spec import Evaluate
from pipeline.tables import vector_matrix
from pipeline.vectors import Matrix, unit

log = logging.getLogger(__name__)

CORPUS_QUERIES = 500
TIMED_QUERIES, TIMED_SECONDS = 100, 5.0
RESAMPLES = 1_000
METRICS = ("recall_exact", "recall", "ndcg", "mrr")


@dataclass(frozen=True)
class Choice:
    """One way to search: a cascade, rescored or not."""

    name: str
    mode: str
    cascade: Cascade
    rescore: bool


@dataclass(frozen=True)
class Questions:
    """Unit float32 query vectors; `own_rows` are the rows they were taken from, or None; qrels by query id."""

    ids: Sequence[str]
    vectors: Matrix
    own_rows: NDArray[np.int64] | None
    qrels: Mapping[str, Mapping[str, int]] | None


@dataclass(frozen=True)
class Ranking:
    """Rows found for each query, best first (-1: none), and the seconds of single queries."""

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    seconds: NDArray[np.float64]


def run(settings: Evaluate, index: Index, seed: int) -> pl.DataFrame:
    """Measure every prefix table alone and rescored, the cascade, and exact; one row each."""
    questions = _questions(settings, index, seed)
    choices = _choices(index, settings.k)
    rankings = {choice: _ranking(choice, questions, settings.k, index) for choice in choices}
    truth = rankings[choices[-1]]
    rows = []
    for choice, ranking in rankings.items():
        values = {"recall_exact": recall_exact(ranking.rows, truth.rows)}
        if questions.qrels is not None:
            values |= _judged(ranking, questions, settings.k, index)
        rows.append(_row(choice, ranking, values, settings.k, len(questions.ids), index, seed))
        log.info("evaluate choice=%s mode=%s recall_exact=%.4f", choice.name, choice.mode, rows[-1]["recall_exact"])
    return pl.DataFrame(rows, schema=SCHEMA)


def check_floor(settings: Evaluate, measured: pl.DataFrame) -> None:
    """FloorError where the cascade is below a floor."""
    cascade = measured.filter(pl.col("choice") == "cascade").row(0, named=True)
    missed = [
        f"{name} {cascade[name]:.4f} < {floor:g}" for name, floor in settings.floor.items() if cascade[name] < floor
    ]
    if missed:
        raise FloorError(
            f"the cascade misses its floor: {', '.join(missed)}; nothing was published. "
            "Raise a shortlist, add a finer level, or lower evaluate.floor"
        )


SCHEMA = pl.Schema(
    {
        "choice": pl.String(),
        "mode": pl.String(),
        "dim": pl.Int64(),
        "precision": pl.String(),
        "shortlist": pl.Int64(),
        "k": pl.Int64(),
        "queries": pl.Int64(),
        **{f"{metric}{bound}": pl.Float64() for metric in METRICS for bound in ("", "_low", "_high")},
        "bytes_per_row": pl.Int64(),
        "median_ms": pl.Float64(),
        "p95_ms": pl.Float64(),
    }
)


def check_files(settings: Evaluate) -> None:
    """SpecError where a file or column is missing, DataError where it cannot be read or its ids do not match."""
    if settings.queries:
        queries = set(_read(settings.queries, "evaluate.queries", ("_id", "text"))["_id"])
        if settings.qrels:
            qrels = _read(settings.qrels, "evaluate.qrels", ("query_id", "corpus_id", "score"))
            unknown = qrels.filter(~pl.col("query_id").is_in(list(queries)))
            if len(unknown):
                raise DataError(
                    f"evaluate.qrels: {settings.qrels} judges query {unknown['query_id'][0]!r}, "
                    f"which is not in {settings.queries} ({len(unknown)} such rows)"
                )


def judged_ids(settings: Evaluate) -> list[str]:
    """The corpus ids that the qrels name."""
    if not settings.qrels:
        return []
    qrels = _read(settings.qrels, "evaluate.qrels", ("query_id", "corpus_id", "score"))
    return qrels["corpus_id"].unique(maintain_order=True).to_list()


def check_judged(settings: Evaluate, names: Sequence[str], known: Sequence[bool]) -> None:
    """DataError where qrels name a corpus id that the corpus has not."""
    unknown = [name for name, there in zip(names, known, strict=True) if not there]
    if unknown:
        raise DataError(
            f"evaluate.qrels: {settings.qrels} judges document {unknown[0]!r}, which is not in the corpus "
            f"({len(unknown)} unknown ids); qrels must be of this corpus"
        )


def _read(path: str, field: str, columns: Sequence[str]) -> pl.DataFrame:
    file = Path(path)
    if not file.is_file():
        raise SpecError(f"{field}: there is no file {path}")
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": partial(pl.read_parquet, glob=False),
        ".jsonl": pl.read_ndjson,
        ".csv": partial(pl.read_csv, infer_schema=False),
        ".tsv": partial(pl.read_csv, infer_schema=False, separator="\t"),
    }
    if file.suffix not in readers:
        raise SpecError(f"{field}: {path} has no known format; use {', '.join(readers)}")
    try:
        frame = readers[file.suffix](file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{field}: cannot read {path}: {str(error).splitlines()[0]}") from None
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise SpecError(f"{field}: {path} has no column {missing[0]!r}; it needs {', '.join(columns)}")
    nested = [column for column in columns if frame[column].dtype.is_nested()]
    if nested:
        raise DataError(f"{field}: column {nested[0]!r} of {path} holds {frame[nested[0]].dtype}, not single values")
    ids = [column for column in columns if column.endswith("id")]
    frame = frame.select(columns).with_columns(pl.col(ids).cast(pl.String))
    if not len(frame) or sum(frame.null_count().row(0)):
        raise DataError(f"{field}: {path} is empty or has nulls in {', '.join(columns)}")
    return _checked_qrels(frame, field, path) if "score" in columns else _checked_queries(frame, field, path)


def _checked_queries(frame: pl.DataFrame, field: str, path: str) -> pl.DataFrame:
    if frame["_id"].n_unique() < len(frame):
        raise DataError(f"{field}: {path} has a query id twice")
    if frame["text"].dtype != pl.String:
        raise DataError(f"{field}: the text in {path} is {frame['text'].dtype}, not String")
    blank = frame.filter(pl.col("text").str.strip_chars() == "")
    if len(blank):
        raise DataError(f"{field}: {path} has a blank text for query {blank['_id'][0]!r}")
    return frame


def _checked_qrels(frame: pl.DataFrame, field: str, path: str) -> pl.DataFrame:
    frame = frame.with_columns(pl.col("score").cast(pl.Float64, strict=False))
    if not (frame["score"] % 1 == 0).fill_null(False).all():
        raise DataError(f"{field}: {path} has scores that are no whole numbers")
    return frame


def _questions(settings: Evaluate, index: Index, seed: int) -> Questions:
    if settings.queries is None:
        return _from_corpus(index, seed)
    queries = _read(settings.queries, "evaluate.queries", ("_id", "text"))
    judged: dict[str, dict[str, int]] | None = None
    if settings.qrels:
        judged = {}
        qrels = _read(settings.qrels, "evaluate.qrels", ("query_id", "corpus_id", "score"))
        for query, document, score in qrels.iter_rows():
            judged.setdefault(query, {})[document] = int(score)
    try:
        vectors = index.embed(queries["text"].to_list())
    except QueryError as error:
        raise DataError(f"evaluate.queries: {settings.queries}: {error}") from None
    return Questions(queries["_id"].to_list(), vectors, None, judged)


def _from_corpus(index: Index, seed: int) -> Questions:
    """Seeded corpus rows as queries; each one's own row is left out of every answer."""
    documents = index.documents.table
    total = documents.count_rows()
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(CORPUS_QUERIES, total), replace=False))
    taken = documents.take(pa.array(chosen), columns=["row", "vector"])
    rows = taken.column("row").to_numpy()
    return Questions([str(row) for row in rows], unit(vector_matrix(taken.column("vector"))), rows, None)


def _choices(index: Index, k: int) -> list[Choice]:
    """Everything that is measured; exact comes last."""
    choices = []
    for view in index.views.values():
        if not view.is_full:
            choices.append(Choice(view.name, "alone", ((view.name, k),), rescore=False))
            choices.append(Choice(view.name, "rescored", ((view.name, max(200, 20 * k)),), rescore=True))
    choices.append(Choice("cascade", "cascade", tuple(index.cascade(k)), rescore=True))
    choices.append(Choice("exact", "exact", (), rescore=True))
    return choices


def _ranking(choice: Choice, questions: Questions, k: int, index: Index) -> Ranking:
    own = questions.own_rows
    asked = k if own is None else k + 1  # room for the query's own row
    hits, _ = index.rank(questions.vectors, asked, None, choice.cascade, choice.rescore)
    rows, offsets = (hits.rows, hits.offsets) if own is None else without_own(hits.rows, hits.offsets, own, k)
    return Ranking(rows, offsets, _timed(choice, questions.vectors, k, index))


def without_own(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], own: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first k hits of each query that are not the row it was taken from."""
    last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    rows, offsets = np.take_along_axis(rows, last, 1), np.take_along_axis(offsets, last, 1)
    mine = rows == own[:, None]
    return np.where(mine, -1, rows), np.where(mine, -1, offsets)


def _timed(choice: Choice, vectors: Matrix, k: int, index: Index) -> NDArray[np.float64]:
    """Seconds of the same search, one query at a time, after one to warm up."""
    index.rank(vectors[:1], k, None, choice.cascade, choice.rescore)
    seconds: list[float] = []
    for vector in vectors[:TIMED_QUERIES]:
        start = time.perf_counter()
        index.rank(vector[None], k, None, choice.cascade, choice.rescore)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > TIMED_SECONDS:
            break
    return np.array(seconds)


def recall_exact(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per query, the share of exact search's hits among those found; -1 stands for no hit."""
    shares = np.ones(len(truth))  # where there is nothing to find, nothing is missed
    for number, (true, got) in enumerate(zip(truth, found, strict=True)):
        wanted = true[true >= 0]
        if len(wanted):
            shares[number] = np.isin(wanted, got).mean()
    return shares


def _judged(ranking: Ranking, questions: Questions, k: int, index: Index) -> dict[str, NDArray[np.float64]]:
    """Recall, nDCG and MRR at k per judged query, by trec_eval's definitions."""
    assert questions.qrels is not None
    known = np.unique(ranking.offsets[ranking.offsets >= 0])
    names = index.documents.table.take(pa.array(known), columns=["id"]).column("id").to_pylist()
    by_offset = dict(zip(known.tolist(), names, strict=True))
    run = {
        query: {by_offset[offset]: float(-rank) for rank, offset in enumerate(offsets) if offset >= 0}
        for query, offsets in zip(questions.ids, ranking.offsets.tolist(), strict=True)
        if query in questions.qrels
    }
    measures = {"recall": R @ k, "ndcg": nDCG @ k, "mrr": RR @ k}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(run, 0.0) for name in measures}
    names_of = {str(measure): name for name, measure in measures.items()}
    for metric in ir_measures.iter_calc(list(measures.values()), questions.qrels, run):
        values[names_of[str(metric.measure)]][metric.query_id] = metric.value
    return {name: np.array([one[query] for query in run]) for name, one in values.items()}


def _row(
    choice: Choice,
    ranking: Ranking,
    values: Mapping[str, NDArray[np.float64]],
    k: int,
    queries: int,
    index: Index,
    seed: int,
) -> dict[str, Any]:
    first = index.views[choice.cascade[0][0]] if choice.cascade else index.documents
    read = [index.views[table] for table, _ in choice.cascade] + ([index.documents] if choice.rescore else [])
    row: dict[str, Any] = {
        "choice": choice.name,
        "mode": choice.mode,
        "dim": first.info.dim,
        "precision": first.info.precision,
        "shortlist": max(k, choice.cascade[0][1]) if choice.cascade and choice.rescore else None,
        "k": k,
        "queries": queries,
        "bytes_per_row": sum(view.row_bytes for view in read),
        "median_ms": float(np.median(ranking.seconds)) * 1000,
        "p95_ms": float(np.percentile(ranking.seconds, 95)) * 1000,
    }
    for metric, per_query in values.items():
        low, high = interval(per_query, seed)
        row |= {metric: float(per_query.mean()), f"{metric}_low": low, f"{metric}_high": high}
    return row


def interval(per_query: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean over queries (percentile method, Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [per_query[rng.integers(0, len(per_query), len(per_query))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
