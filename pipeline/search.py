"""Search: what a user asks of a finished root, as text or vectors; answers as polars tables.

An `Index` looks at one generation at a time (`cascade.Opened`); `refresh` moves it to the newest one, searches under
way end with the one that they began with.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl

from pipeline import anytime, hybrid as fusion, ledger
from pipeline.bucket import located
from pipeline.cascade import QUERIES_AT_ONCE, Cascade, Level, Opened
from pipeline.encoders.queries import QueryEncoder
from pipeline.errors import QueryError, StaleError
from pipeline.levels import Hits, Step
from pipeline.spec import Engine, Stop
from pipeline.storage import Root
from pipeline.vectors import MIN_NORM, Matrix, unit
from pipeline.views import View


def open_index(
    root: str | Path,
    model: str | None = None,
    device: str | None = None,
    engine: Engine | None = None,
    memory: int | None = None,
) -> "Index":
    """Open the newest generation of a finished root; loads no model until a text is searched.

    `model` names another copy of the recorded model, `device` a torch device; `engine` (auto, lance, resident) and
    `memory` (bytes) stand in for the spec's. StaleError where nothing is finished.
    """
    opened = located(root)
    return Index(opened, _newest(opened), model, device, engine, memory)


def _newest(root: Root) -> Mapping[str, Any]:
    generation = ledger.newest_generation(root)
    if generation is None:
        raise StaleError(f"{root.path} holds no finished generation; run the job first")
    if "cache" not in generation:
        raise StaleError(f"{root.path} was finished by an earlier version of this project; run the job in another root")
    return generation


class Index:
    """A finished root, open for search; threads and asyncio tasks may share it."""

    def __init__(
        self,
        root: Root,
        generation: Mapping[str, Any],
        model: str | None = None,
        device: str | None = None,
        engine: Engine | None = None,
        memory: int | None = None,
    ) -> None:
        """Pin every table of the generation; StaleError where a version is gone."""
        self._root, self._engine, self._memory = root, engine, memory
        self.opened = Opened(root, generation, engine, memory)
        self._encode = QueryEncoder(self.documents.info, model, device)

    @property
    def generation(self) -> Mapping[str, Any]:
        """What is searched."""
        return self.opened.generation

    @property
    def documents(self) -> View:
        """The full vectors and what was carried with them."""
        return self.opened.documents

    def refresh(self) -> bool:
        """Move on to the newest generation; whether there was a newer one. Searches under way are not disturbed."""
        newest = _newest(self._root)
        if newest["generation"] == self.generation["generation"]:
            return False
        self.opened = Opened(self._root, newest, self._engine, self._memory)
        return True

    def search(
        self,
        queries: str | Sequence[str] | Matrix,
        k: int = 10,
        where: str | None = None,
        cascade: Cascade | None = None,
        columns: Sequence[str] | None = None,
        stop: Stop | None = None,
        deadline_ms: float | None = None,
        hybrid: bool | None = None,
    ) -> pl.DataFrame:
        """The k nearest rows of each query: rank (from 1), id, score, row, text, carried columns.

        A text gives one table; a list or a float array [n, full_dim] gives `query` (0, 1, …) first. `cascade`
        overrides the spec's: a list of (table, shortlist), (table, shortlist, scoring) or, of a table with blocks,
        (table, shortlist, dim); [] is exact. `columns` names what is read beside rank, id, score and row (null:
        everything). `score` is the float32 cosine with the full vector.

        `stop` (fixed, margin, predictor) overrides the spec's. `deadline_ms` takes the cascade as far, and its
        shortlists as wide, as that time allows, and adds how far that was: `level` (the table that ranked the answer)
        and `shortlist`. `hybrid` (null: the spec's `search.hybrid`) fuses the answer with that of the full-text index,
        for texts; `fused` after `score` is then what ordered the rows. QueryError (a ValueError) for a bad query,
        filter, k, cascade, column or option.
        """
        opened = self.opened
        answer = self._answer(opened, queries, k, where, cascade, stop, deadline_ms, hybrid)
        return _frame(opened, answer, columns)

    async def search_async(self, *arguments: Any, **options: Any) -> pl.DataFrame:
        """`search`, with the same arguments, in a thread, for asyncio."""
        return await asyncio.to_thread(self.search, *arguments, **options)

    def exact(self, queries: str | Sequence[str] | Matrix, k: int = 10, where: str | None = None) -> pl.DataFrame:
        """The same over the full vectors of every row."""
        return self.search(queries, k, where, cascade=[], hybrid=False)

    def similar(self, name: str, k: int = 10, where: str | None = None, cascade: Cascade | None = None) -> pl.DataFrame:
        """The k rows most similar to the row with this id, itself left out. QueryError where there is no such id."""
        opened = self.opened
        vector, row = opened.vector_of(name)
        hits, steps = _rank(opened, vector, k + 1, where, cascade)
        others = np.flatnonzero(hits.rows[0] != row)[None, :k]
        return _frame(opened, _Answer(hits.taken(others), steps, single=True), None)

    def explain(
        self,
        query: str | Matrix,
        k: int = 10,
        where: str | None = None,
        cascade: Cascade | None = None,
        stop: Stop | None = None,
        deadline_ms: float | None = None,
        hybrid: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Run one search and tell what each level did: table, engine, rows and bytes read, shortlist, milliseconds."""
        answer = self._answer(self.opened, query, k, where, cascade, stop, deadline_ms, hybrid)
        return [vars(step) for step in answer.steps]

    def rank(
        self,
        vectors: Matrix,
        k: int,
        where: str | None = None,
        cascade: Cascade | None = None,
        rescore: bool = True,
        stop: Stop | None = None,
    ) -> tuple[Hits, list[Step]]:
        """Positions, row numbers and scores [n, k] for unit float32 queries [n, full_dim]; what each level did.

        No ids and texts are read. `rescore=False` stops before the full vectors: scores are the last level's.
        """
        return _rank(self.opened, vectors, k, where, cascade, rescore, stop)

    def _answer(
        self,
        opened: Opened,
        queries: str | Sequence[str] | Matrix,
        k: int,
        where: str | None,
        cascade: Cascade | None,
        stop: Stop | None,
        deadline_ms: float | None,
        hybrid: bool | None,
    ) -> "_Answer":
        if deadline_ms is not None and hybrid is None:
            hybrid = False
        with_words = fusion.is_wanted(opened, queries, hybrid)
        if with_words and deadline_ms is not None:
            raise QueryError("deadline_ms and hybrid exclude each other: full text has no levels to stop between")
        vectors, single = self._vectors(queries)
        if deadline_ms is not None:
            return _Answer(*_in_time(opened, vectors, k, where, cascade, deadline_ms), single=single)
        if not with_words:
            return _Answer(*_rank(opened, vectors, k, where, cascade, stop=stop), single=single)
        texts = [queries] if isinstance(queries, str) else [str(query) for query in queries]
        levels, clause, rule = _levels(opened, k, cascade, stop), opened.clause(where), stop or opened.stop
        hits, fused, steps = fusion.rank(
            opened, texts, vectors, k, clause, lambda depth: opened.rank(vectors, depth, clause, levels, stop=rule)
        )
        return _Answer(hits, steps, fused=fused, single=single)

    def _vectors(self, queries: str | Sequence[str] | Matrix) -> tuple[Matrix, bool]:
        """Unit float32 rows, and whether the caller asked with one bare query."""
        if isinstance(queries, str):
            return self._checked(self.embed([queries]))[0], True
        if isinstance(queries, np.ndarray):
            return self._checked(queries)
        if not isinstance(queries, list | tuple) or not all(isinstance(query, str) for query in queries):
            raise QueryError("a query is a text, a list of texts, or a float array of shape (n, full_dim)")
        return self._checked(self.embed(list(queries)))[0], False

    def _checked(self, array: Matrix) -> tuple[Matrix, bool]:
        full = self.documents.info.full_dim
        if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or array.shape[-1] != full:
            raise QueryError(f"query vectors must be numbers of shape (n, {full}), not {array.dtype} {array.shape}")
        rows = np.atleast_2d(array).astype(np.float32)
        if not np.isfinite(rows).all():
            raise QueryError(f"query {int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])} holds NaN or infinity")
        if (np.linalg.norm(rows, axis=1) < MIN_NORM).any():
            raise QueryError("a query vector has length 0, which points nowhere")
        return unit(rows), array.ndim == 1

    def embed(self, texts: Sequence[str]) -> Matrix:
        """Query vectors float32[n, full_dim] of texts, by the recorded model and query prompt, in float32."""
        return self._encode(texts)


@dataclass(frozen=True)
class _Answer:
    """Hits, what each level did, how far a deadline let them come, fused scores where full text had a say."""

    hits: Hits
    steps: list[Step]
    reached: anytime.Reached | None = None
    fused: Matrix | None = None
    single: bool = False


def _rank(
    opened: Opened,
    vectors: Matrix,
    k: int,
    where: str | None,
    cascade: Cascade | None,
    rescore: bool = True,
    stop: Stop | None = None,
) -> tuple[Hits, list[Step]]:
    levels = _levels(opened, k, cascade, stop)
    return opened.rank(vectors, k, opened.clause(where), levels, rescore, stop or opened.stop)


def _in_time(
    opened: Opened, vectors: Matrix, k: int, where: str | None, cascade: Cascade | None, milliseconds: float
) -> tuple[Hits, list[Step], anytime.Reached]:
    levels = _levels(opened, k, cascade, None)
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float) or not milliseconds > 0:
        raise QueryError(f"deadline_ms must be a number above 0, not {milliseconds!r}")
    if len(vectors) > QUERIES_AT_ONCE:
        raise QueryError(f"deadline_ms is for at most {QUERIES_AT_ONCE} queries in a call, not {len(vectors)}")
    return anytime.run(opened, vectors, k, opened.clause(where), levels, milliseconds)


def _levels(opened: Opened, k: int, cascade: Cascade | None, stop: Stop | None) -> list[Level]:
    """The levels to run; QueryError where k, the cascade or when to stop is wrong."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise QueryError(f"k must be a whole number, not {k!r}")
    if k < 1:
        raise QueryError(f"k must be at least 1, not {k}")
    if stop not in (None, *get_args(Stop)):
        raise QueryError(f"stop is {', '.join(get_args(Stop))}, not {stop!r}")
    return opened.cascade(k) if cascade is None else opened.levels(cascade)


def _frame(opened: Opened, answer: _Answer, columns: Sequence[str] | None) -> pl.DataFrame:
    """Hits with what is stored of their rows."""
    hits, more = answer.hits, {}
    stored = [name for name in opened.documents.table.schema.names if name not in ("row", "vector", "text_digest")]
    wanted = stored if columns is None else ["id", *(name for name in columns if name != "id")]
    if unknown := [name for name in wanted if name not in stored]:
        raise QueryError(f"columns: there is no {unknown[0]!r}; there are {', '.join(stored)}")
    found = hits.offsets >= 0
    content = opened.content(hits, wanted)
    query, position = np.nonzero(found)
    if answer.fused is not None:
        more["fused"] = pl.Series(answer.fused[found])
    frame = pl.DataFrame(
        {
            "query": query.astype(np.int64),
            "rank": position.astype(np.int64) + 1,
            "score": hits.scores[found].astype(np.float32),
            **more,
            "row": hits.rows[found],
        }
    ).hstack(content)
    if answer.reached is not None:
        far = answer.reached
        frame = frame.with_columns(level=pl.lit(far.table), shortlist=pl.lit(far.shortlist, pl.Int64))
    front = ["query", "rank", "id", "score", *more, "row"]
    return frame.select(*front[answer.single :], pl.exclude(front))
