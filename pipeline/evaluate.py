"""The evaluate stage: what every way to search finds, against exact search and, where given, qrels.

Rankings and seconds are measured first and kept; every metric is a pure function of them. Exact search streams, so
memory does not grow with the corpus.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import hybrid, queries as files
from pipeline.errors import FloorError
from pipeline.levels import Hits
from pipeline.margin import Stopping
from pipeline.metrics import METRICS, interval, judged, recall_exact
from pipeline.predictor import Predictor
from pipeline.search import Index
from pipeline.spec import Evaluate
from pipeline.storage import Root
from pipeline.sweep import Questions, Ranking, Setting, run as sweep_of
from pipeline.tables import vector_matrix
from pipeline.vectors import unit

log = logging.getLogger(__name__)

CORPUS_QUERIES = 500
EXAMPLES = 10
EXCERPT = 240

SCHEMA = pl.Schema(
    {
        "choice": pl.String(),
        "mode": pl.String(),
        "dim": pl.Int64(),
        "precision": pl.String(),
        "scoring": pl.String(),
        "shortlist": pl.Int64(),
        "candidates": pl.Float64(),
        "k": pl.Int64(),
        "queries": pl.Int64(),
        **{f"{metric}{bound}": pl.Float64() for metric in METRICS for bound in ("", "_low", "_high")},
        "bytes_per_row": pl.Int64(),
        "median_ms": pl.Float64(),
        "p95_ms": pl.Float64(),
    }
)
RANKINGS_SCHEMA = pl.Schema(
    {"setting": pl.Int64(), "query": pl.String(), "rows": pl.List(pl.Int64()), "seconds": pl.Float64()}
)
"""`setting` is the row of evaluation.parquet; `seconds` is null for queries that were not timed."""
EXAMPLES_SCHEMA = pl.Schema(
    {
        "query": pl.Int64(),
        "question": pl.String(),
        "level": pl.Int64(),
        "table": pl.String(),
        "rank": pl.Int64(),
        "row": pl.Int64(),
        "id": pl.String(),
        "text": pl.String(),
        "score": pl.Float32(),
        "lost": pl.Boolean(),
    }
)
"""Top hits of some queries at each level of the cascade and by exact search; `lost` hits are missing in the end."""


@dataclass(frozen=True)
class Measured:
    """The three files of an evaluation, and when to stop rescoring, by table and scoring: two ways to tell."""

    evaluation: pl.DataFrame
    rankings: pl.DataFrame
    examples: pl.DataFrame
    stopping: Mapping[str, Stopping]
    predictors: Mapping[str, Predictor]


def run(settings: Evaluate, index: Index, seed: int, root: Root) -> Measured:
    """Sweep every prefix table x shortlist x mode (see `Setting`), the job's cascade, exact search.

    Where there is a full-text index and queries were given: full text alone, and fused with the cascade. A predictor
    of the shortlist is trained where `search.stop` asks for it.
    """
    questions = _questions(settings, index, seed, root)
    sweep, rankings, stopping, predictors = sweep_of(settings, index, questions, seed)
    rows = scored(sweep, rankings, questions, settings.k, index, seed)
    for row in rows:
        log.info(
            "evaluate choice=%s mode=%s scoring=%s shortlist=%s recall_exact=%.4f",
            *(row[name] for name in ("choice", "mode", "scoring", "shortlist", "recall_exact")),
        )
    return Measured(
        pl.DataFrame(rows, schema=SCHEMA),
        _kept(rankings, questions),
        _examples(rankings, questions, settings.k, index, seed),
        stopping,
        predictors,
    )


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


def _questions(settings: Evaluate, index: Index, seed: int, root: Root) -> Questions:
    if settings.queries is None:
        return _from_corpus(index, seed)
    asked = files.read_queries(settings.queries)
    texts = asked["text"].to_list()
    vectors = files.embedded(f"evaluate.queries: {settings.queries}", texts, index.documents.info, root, index.embed)
    qrels = files.read_qrels(settings.qrels) if settings.qrels else None
    return Questions(asked["_id"].to_list(), texts, vectors, None, qrels)


def _from_corpus(index: Index, seed: int) -> Questions:
    """Seeded corpus rows as queries; each one's own row is left out of every answer."""
    documents = index.documents.table
    total = documents.count_rows()
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(CORPUS_QUERIES, total), replace=False))
    names = [name for name in ("row", "id", "text", "vector") if name in documents.schema.names]
    taken = documents.take(pa.array(chosen), columns=names)
    rows = taken.column("row").to_numpy()
    texts = taken.column("text" if "text" in names else "id").to_pylist()
    return Questions([str(row) for row in rows], texts, unit(vector_matrix(taken.column("vector"))), rows, None)


def scored(
    sweep: Sequence[Setting],
    rankings: Mapping[Setting, Ranking],
    questions: Questions,
    k: int,
    index: Index,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows of evaluation.parquet, from rankings and seconds alone; the last setting is the truth."""
    truth = rankings[sweep[-1]].rows
    rows = []
    for setting in sweep:
        ranking = rankings[setting]
        values = {"recall_exact": recall_exact(ranking.rows, truth)}
        if questions.qrels is not None:
            values |= judged(questions.ids, _names(ranking.offsets, index), questions.qrels, k)
        row = _described(setting, k, index) | {
            "queries": len(questions.ids),
            "candidates": ranking.candidates,
            "median_ms": float(np.median(ranking.seconds)) * 1000,
            "p95_ms": float(np.percentile(ranking.seconds, 95)) * 1000,
        }
        for metric, per_query in values.items():
            low, high = interval(per_query, seed)
            row |= {metric: float(per_query.mean()), f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row)
    return rows


def _names(offsets: NDArray[np.int64], index: Index) -> list[list[str]]:
    """The ids of hits."""
    known, where = np.unique(offsets, return_inverse=True)
    names = np.full(len(known), None, dtype=object)
    names[known >= 0] = index.documents.table.take(pa.array(known[known >= 0]), columns=["id"]).column("id").to_pylist()
    return [[name for name in line if name is not None] for line in names[where.reshape(offsets.shape)]]


def _described(setting: Setting, k: int, index: Index) -> dict[str, Any]:
    if setting.choice == "text":
        described = {"choice": "text", "mode": "alone", "dim": None, "precision": None, "scoring": "bm25"}
        return described | {"shortlist": None, "k": k, "bytes_per_row": _text_bytes(index)}
    read = [index.opened.views[table].at(how) for table, _, how in setting.levels]
    read += [index.documents] if setting.rescore else []
    first, added = read[0], read[0].row_bytes
    for before, view in pairwise(read):
        added += view.at(view.info.dim, before.info.dim if view.name == before.name else 0).row_bytes
    length = hybrid.depth(k) if setting.mode == "hybrid" else k
    step = index.opened.steps(length, setting.levels, setting.rescore)[0]
    return {
        "choice": setting.choice,
        "mode": setting.mode,
        "dim": first.info.dim,
        "precision": first.info.precision,
        "scoring": step.scoring,
        "shortlist": step.shortlist if setting.levels and setting.rescore else None,
        "k": k,
        "bytes_per_row": added + (_text_bytes(index) if setting.mode == "hybrid" else 0),
    }


def _text_bytes(index: Index) -> int:
    """The full-text index, per row."""
    return round(hybrid.text_index_bytes(index.opened) / max(index.opened.row_count, 1))


def _kept(rankings: Mapping[Setting, Ranking], questions: Questions) -> pl.DataFrame:
    """rankings.parquet: one row per setting and query."""
    frames = []
    for number, ranking in enumerate(rankings.values()):
        seconds = np.full(len(questions.ids), np.nan)
        seconds[: len(ranking.seconds)] = ranking.seconds
        found = [line[line >= 0] for line in ranking.rows]
        setting = [number] * len(questions.ids)
        columns = {"setting": setting, "query": questions.ids, "rows": found, "seconds": seconds}
        frames.append(pl.DataFrame(columns, schema=RANKINGS_SCHEMA))
    return pl.concat(frames).with_columns(pl.col("seconds").fill_nan(None))


def _examples(
    rankings: Mapping[Setting, Ranking], questions: Questions, k: int, index: Index, seed: int
) -> pl.DataFrame:
    """Up to ten queries: the five that the cascade serves worst, and seeded others."""
    (cascade, mine), (_, exact) = list(rankings.items())[-2:]
    losses = 1 - recall_exact(mine.rows, exact.rows)
    worst = [number for number in np.argsort(-losses, kind="stable")[: EXAMPLES // 2].tolist() if losses[number] > 0]
    others = [n for n in np.random.default_rng(seed).permutation(len(losses)).tolist() if n not in worst]
    rows: list[dict[str, Any]] = []
    for number in (worst + others)[:EXAMPLES]:
        own = None if questions.own_rows is None else questions.own_rows[number : number + 1]
        names = [step.shown for step in index.opened.steps(k, cascade.levels, rescore=False)] if cascade.levels else []
        ways = [(name, cascade.levels[: at + 1], False) for at, name in enumerate(names)]
        ways += [("cascade", cascade.levels, True), ("exact", (), True)]
        kept = set(mine.rows[number].tolist())
        for level, (table, levels, rescore) in enumerate(ways):
            hits, _ = index.opened.rank(questions.vectors[number : number + 1], k + 1, None, levels, rescore)
            for rank, (offset, row, score) in enumerate(_first(hits, own, k), 1):
                rows.append(
                    {
                        "query": number, "question": " ".join(questions.texts[number].split())[:EXCERPT],
                        "level": level, "table": table, "rank": rank, "row": row, "offset": offset, "score": score,
                        "lost": table == "exact" and row not in kept,
                    }
                )  # fmt: skip
    return _with_texts(rows, index)


def _first(hits: Hits, own: NDArray[np.int64] | None, k: int) -> list[tuple[int, int, float]]:
    lines = zip(hits.offsets[0].tolist(), hits.rows[0].tolist(), hits.scores[0].tolist(), strict=True)
    return [line for line in lines if line[0] >= 0 and (own is None or line[1] != own[0])][:k]


def _with_texts(rows: list[dict[str, Any]], index: Index) -> pl.DataFrame:
    table = index.documents.table
    names = [name for name in ("id", "text") if name in table.schema.names]
    wanted = sorted({row.pop("offset") for row in rows})
    if not wanted:
        return pl.DataFrame(schema=EXAMPLES_SCHEMA)
    taken = table.take(pa.array(wanted), columns=["row", *names]).to_pylist()
    content = {one["row"]: one for one in taken}
    for row in rows:
        found = content[row["row"]]
        row |= {"id": found["id"], "text": " ".join((found.get("text") or "").split())[:EXCERPT]}
    return pl.DataFrame(rows, schema=EXAMPLES_SCHEMA)
