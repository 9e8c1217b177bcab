"""The sweep of an evaluation: every way to search that is compared, what each finds, and its seconds.

Each table is scanned once for all its shortlists. What the scans tell of when to stop rescoring is learned on the way.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import hybrid, lessons, margin
from pipeline.cascade import QUERIES_AT_ONCE, Level
from pipeline.levels import Hits, best_of, joined, ranked_columns
from pipeline.margin import Stopping
from pipeline.metrics import without_own
from pipeline.predictor import Predictor
from pipeline.search import Index
from pipeline.spec import Evaluate, Stop
from pipeline.tables import DOCUMENTS
from pipeline.vectors import Matrix
from pipeline.views import View

TIMED_QUERIES, TIMED_SECONDS = 100, 2.0
FEWEST_QUERIES = 50
"""Fewer say nothing of the share of queries that an adaptive shortlist would fail."""


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


def run(
    settings: Evaluate, index: Index, questions: Questions, seed: int
) -> tuple[list[Setting], dict[Setting, Ranking], dict[str, Stopping], dict[str, Predictor]]:
    """All settings with their rankings, the job's cascade and exact search last; what was learned of when to stop."""
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
    return sweep, rankings, stopping, predictors


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
