"""The evaluate stage: what every way to search finds, against exact search and, where given, qrels.

Rankings and seconds are measured first and kept; every metric is a pure function of them. Exact search streams, so
memory does not grow with the corpus.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import hybrid, lessons, margin, queries as files
from pipeline.cascade import QUERIES_AT_ONCE, Level
from pipeline.errors import FloorError
from pipeline.levels import Hits, best_of, joined, ranked_columns
from pipeline.margin import Stopping
from pipeline.metrics import METRICS, interval, judged, recall_exact, without_own
from pipeline.predictor import Predictor
from pipeline.search import Index
from pipeline.spec import Evaluate, Stop
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, vector_matrix
from pipeline.vectors import Matrix, unit
from pipeline.views import View

log = logging.getLogger(__name__)

CORPUS_QUERIES = 500
TIMED_QUERIES, TIMED_SECONDS = 100, 2.0
FEWEST_QUERIES = 50
"""Fewer say nothing of the share of queries that an adaptive shortlist would fail."""
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
class Setting:
    """One way to search: a cascade, rescored or not; `mode` is alone, rescored, cascade, exact, or its `stop`."""

    choice: str
    mode: str
    levels: tuple[Level, ...]
    rescore: bool = True
    stop: Stop = "fixed"


@dataclass(frozen=True)
class Questions:
    """Unit float32 query vectors; `own_rows` are the rows they were taken from, or None; qrels by query id."""

    ids: Sequence[str]
    texts: Sequence[str]
    vectors: Matrix
    own_rows: NDArray[np.int64] | None
    qrels: Mapping[str, Mapping[str, int]] | None


@dataclass(frozen=True)
class Ranking:
    """Rows found for each query, best first (-1: none), and the seconds of the first queries, one at a time."""

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    seconds: NDArray[np.float64]
    candidates: float | None = None
    """Rows that met the full vectors, mean over queries; None where it is just the shortlist."""


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
    sweep, pairs = _sweep(index, settings), _Pairs(questions)
    rankings = _rankings(sweep, questions, settings.k, index, pairs)
    stopping = pairs.learned(settings.k)
    predictors = _predictors(sweep, questions, settings.k, index, seed)
    knowing = copy.copy(index)
    knowing.opened = index.opened.knowing(stopping, predictors)
    last = [
        *_adaptive(sweep, "margin", stopping, index),
        *_adaptive(sweep, "predictor", predictors, index),
        *_by_words(settings, index),
        Setting("cascade", "cascade", tuple(index.opened.cascade(settings.k)), stop=index.opened.stop),
        Setting("exact", "exact", ()),
    ]
    rankings |= _rankings(last, questions, settings.k, knowing, pairs)
    sweep += last
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


def _sweep(index: Index, settings: Evaluate) -> list[Setting]:
    """Every table by itself, rescored, and before the finest one."""
    k = settings.k
    rows = index.opened.row_count
    lengths = sorted({max(200, 20 * k), *(length for length in settings.shortlists if k <= length <= rows)})
    finest = _finest(index)
    sweep = []
    for view in index.opened.views.values():
        for how in () if view.is_full else view.hows:
            sweep.append(Setting(view.name, "alone", ((view.name, k, how),), rescore=False))
            sweep += [Setting(view.name, "rescored", ((view.name, length, how),)) for length in lengths]
            if view is not finest or view.at(how).info.dim < view.info.dim:
                sweep += [
                    Setting(view.name, "cascade", ((view.name, n, how), (finest.name, max(k, n // 4), "auto")))
                    for n in lengths
                ]
    return sweep


def _finest(index: Index) -> View:
    """The prefix table nearest to the full vectors."""
    return max(
        (view for view in index.opened.views.values() if not view.is_full), key=lambda view: (view.row_bytes, view.name)
    )


def _predictors(
    sweep: Sequence[Setting], questions: Questions, k: int, index: Index, seed: int
) -> dict[str, Predictor]:
    """Predictors for every table and scoring; real queries, every second of them, calibrate where there are any."""
    if index.opened.stop != "predictor":
        return {}
    tables = dict.fromkeys((one.levels[0][0], one.levels[0][2]) for one in sweep if one.mode == "rescored")
    asked = questions.vectors[::2] if questions.own_rows is None else None
    own = np.zeros(0, np.int64) if questions.own_rows is None else questions.own_rows
    return lessons.run(index.opened, list(tables), k, _longest(sweep, k), seed, asked, own)


def _adaptive(
    sweep: Sequence[Setting],
    stop: Literal["margin", "predictor"],
    learned: Mapping[str, Stopping | Predictor],
    index: Index,
) -> list[Setting]:
    """The adaptive shortlist beside the fixed ones of each table."""
    shortest: dict[str, Setting] = {}
    for one in sweep:
        name = index.opened.steps(0, one.levels, one.rescore)[0].name
        if one.mode == "rescored" and name in learned:
            shortest.setdefault(name, replace(one, mode=stop, stop=stop))
    return list(shortest.values())


def _by_words(settings: Evaluate, index: Index) -> list[Setting]:
    """What reads the full-text index; rows taken from the corpus are no questions, and are not asked."""
    if settings.queries is None or not hybrid.has_text_index(index.opened):
        return []
    cascade = tuple(index.opened.cascade(settings.k))
    return [Setting("text", "alone", (), rescore=False), Setting("hybrid", "hybrid", cascade, stop=index.opened.stop)]


def _answered(setting: Setting, vectors: Matrix, texts: Sequence[str], k: int, index: Index) -> tuple[Hits, int]:
    """The hits of one setting, and how many rows met the full vectors, over all queries."""
    opened = index.opened
    if setting.choice == "text":
        return hybrid.text_hits(opened, texts, k, None)[0], 0
    if setting.choice == "hybrid":
        found, _, steps = hybrid.rank(
            opened, texts, vectors, k, None, lambda n: opened.rank(vectors, n, None, setting.levels, stop=setting.stop)
        )
        return found, sum(step.candidates for step in steps)
    found, steps = opened.rank(vectors, k, None, setting.levels, setting.rescore, setting.stop)
    return found, steps[-1].candidates


class _Pairs:
    """Coarse scores and cosines of the longest shortlists, of every second query: what `margin` learns from."""

    def __init__(self, questions: Questions) -> None:
        self._own, self._found = questions.own_rows, dict[str, list[tuple[Matrix, Matrix]]]()

    def add(self, name: str, start: int, hits: Hits, cosines: Matrix) -> None:
        """Take in one block of queries, which begins at query `start`."""
        known = hits.offsets >= 0
        if self._own is not None:
            known &= hits.rows != self._own[start : start + len(known), None]
        pair = (np.where(known, part, -np.inf)[start % 2 :: 2] for part in (hits.scores, cosines))
        self._found.setdefault(name, []).append((next(pair), next(pair)))

    def learned(self, k: int) -> dict[str, Stopping]:
        """What there is enough of to learn from, by table and scoring."""
        found = {}
        for name, blocks in self._found.items():
            coarse, full = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
            if len(coarse) >= FEWEST_QUERIES and coarse.shape[1] > 4 * k:
                found[name] = margin.fit(coarse, full, k)
        return found


def _rankings(
    sweep: Sequence[Setting], questions: Questions, k: int, index: Index, pairs: _Pairs
) -> dict[Setting, Ranking]:
    """Each table is scanned once for all its shortlists: a shorter one is the beginning of a longer one."""
    asked = k if questions.own_rows is None else k + 1  # room for the query's own row
    blocks: dict[Setting, list[Hits]] = {setting: [] for setting in sweep}
    candidates = dict.fromkeys(sweep, 0)
    for start in range(0, len(questions.vectors), QUERIES_AT_ONCE):
        vectors = questions.vectors[start : start + QUERIES_AT_ONCE]
        coarse: dict[tuple[str, str | int], _Coarse] = {}
        for setting in sweep:
            if setting.choice in index.opened.views and setting.stop == "fixed":
                table, _, how = setting.levels[0]
                if (table, how) not in coarse:
                    coarse = {(table, how): _Coarse(index, vectors, table, how, _longest(sweep, asked))}
                    pairs.add(coarse[table, how].name, start, *coarse[table, how].pair())
                hits = coarse[table, how].ranked(setting, asked)
            else:
                texts = questions.texts[start : start + QUERIES_AT_ONCE]
                hits, count = _answered(setting, vectors, texts, asked, index)
                candidates[setting] += count
            blocks[setting].append(hits)
    found = {}
    for setting, hits in ((setting, joined(parts)) for setting, parts in blocks.items()):
        rows, offsets = hits.rows[:, :asked], hits.offsets[:, :asked]
        if questions.own_rows is not None:
            rows, offsets = without_own(rows, offsets, questions.own_rows, k)
        seconds = timed(setting, questions.vectors, k, index, questions.texts)
        met = None if setting.stop == "fixed" else candidates[setting] / len(questions.vectors)
        found[setting] = Ranking(rows, offsets, seconds, met)
    return found


def _longest(sweep: Sequence[Setting], asked: int) -> int:
    return max([asked, *(setting.levels[0][1] for setting in sweep if setting.levels)])


class _Coarse:
    """One table's longest shortlist for a block of queries, and the scores that finer passes give to it."""

    def __init__(self, index: Index, vectors: Matrix, table: str, how: str | int, keep: int) -> None:
        self._index, self._vectors = index, vectors
        step = index.opened.steps(keep, [(table, keep, how)], rescore=False)[0]
        self.name = step.name
        self._hits = index.opened.level(step, vectors, None, keep, None)
        self._scores: dict[str, Matrix] = {}

    def pair(self) -> tuple[Hits, Matrix]:
        """The hits, and their cosines."""
        return self._hits, self._scored(DOCUMENTS)

    def ranked(self, setting: Setting, asked: int) -> Hits:
        """What the setting finds, at least as wide as asked where there are so many."""
        hits, columns = self._hits, slice(0, max(asked, setting.levels[0][1]))
        hits = _columns(hits, columns)
        if not setting.rescore:
            return hits
        if len(setting.levels) > 1:
            finer, keep, _ = setting.levels[1]
            picked = ranked_columns(hits, self._scored(finer)[:, columns], max(asked, keep))
        else:
            picked = np.tile(np.arange(hits.offsets.shape[1]), (len(hits.offsets), 1))
        scores = np.take_along_axis(self._scored(DOCUMENTS)[:, columns], picked, 1)
        return best_of(_columns(hits, picked), scores, asked)

    def _scored(self, table: str) -> Matrix:
        if table not in self._scores:
            self._scores[table] = self._index.opened.scores(table, self._vectors, self._hits)
        return self._scores[table]


def _columns(hits: Hits, picked: Any) -> Hits:
    if isinstance(picked, slice):
        return Hits(hits.offsets[:, picked], hits.rows[:, picked], hits.scores[:, picked])
    return hits.taken(picked)


def timed(setting: Setting, vectors: Matrix, k: int, index: Index, texts: Sequence[str] = ()) -> NDArray[np.float64]:
    """Seconds of the same search, one query at a time, after one to warm up."""
    _answered(setting, vectors[:1], texts[:1], k, index)
    seconds: list[float] = []
    for number, vector in enumerate(vectors[:TIMED_QUERIES]):
        start = time.perf_counter()
        _answered(setting, vector[None], texts[number : number + 1], k, index)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > TIMED_SECONDS:
            break
    return np.array(seconds)


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
