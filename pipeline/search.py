"""Search: a cascade of levels over prefix tables, rescored with the full vectors of one generation.

A level is data: (table, shortlist). The first one scans its table (or asks its ANN index), the next ones score
what is left with their own codes, full-dimension cosine comes last. Every table is pinned to its version.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline import filters, ledger, store
from pipeline.encoders.queries import QueryEncoder
from pipeline.errors import DamageError, QueryError, StaleError
from pipeline.levels import Hits, Step, View, from_index, joined, rescored, scanned, scores_of
from pipeline.spec import check_blocks, check_cascade
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, PARAMETERS, TableInfo, matrices
from pipeline.transform import Transform
from pipeline.vectors import MIN_NORM, Matrix, Scoring, truncate, unit

QUERIES_AT_ONCE = 256
"""Queries that share one scan; bounds memory at 256 x 8,192 scores."""
Level = tuple[str, int, str | int]
"""Table, shortlist, and how: binary codes are scored (auto, asymmetric or hamming), or far a nested table is read (a
dim; auto: all)."""
Cascade = Sequence[Level | tuple[str, int]]


def open_index(root: str | Path, model: str | None = None, device: str | None = None) -> "Index":
    """Open the newest generation of a finished root; loads no model until a text is searched.

    `model` names another copy of the recorded model, `device` a torch device. StaleError where nothing is finished.
    """
    opened = Root(Path(root))
    generation = ledger.newest_generation(opened)
    if generation is None:
        raise StaleError(f"{root} holds no finished generation; run the job first")
    return Index(opened, generation, model, device)


class Index:
    """One generation, open for search. Opening reads no vectors and loads no model."""

    def __init__(
        self, root: Root, generation: Mapping[str, Any], model: str | None = None, device: str | None = None
    ) -> None:
        """Pin every table of the generation; StaleError where a version is gone."""
        self.generation = generation
        pinned = {
            name: store.open_table(store.table_uri(root, name), entry["version"])
            for name, entry in generation["tables"].items()
        }
        self._matrices = matrices(pinned[PARAMETERS].to_table())
        self.views = {
            name: self._view(name, table, generation["tables"][name].get("index"))
            for name, table in pinned.items()
            if name != PARAMETERS
        }
        self.documents = self.views[DOCUMENTS]
        self._transforms: dict[str | None, Transform] = {None: Transform()}
        self._encode = QueryEncoder(self.documents.info, model, device)

    def _view(self, name: str, table: store.Table, ann: Mapping[str, Any] | None) -> View:
        info = TableInfo.of(table.schema)
        rotation = info.codec.get("rotation")
        return View(name, table, info, info.codec_with(None if rotation is None else self._matrices[rotation]), ann)

    def search(
        self,
        queries: str | Sequence[str] | Matrix,
        k: int = 10,
        where: str | None = None,
        cascade: Cascade | None = None,
    ) -> pl.DataFrame:
        """The k nearest rows of each query: rank (from 1), id, score, row, text, carried columns.

        A text gives one table; a list or a float array [n, full_dim] gives `query` (0, 1, …) first. `cascade`
        overrides the spec's: a list of (table, shortlist), (table, shortlist, scoring) or, of a table with blocks,
        (table, shortlist, dim); [] is exact. `score` is the float32 cosine with the full vector. QueryError (a
        ValueError) for a bad query, filter, k or cascade.
        """
        vectors, single = self._vectors(queries)
        hits, _ = self.rank(vectors, k, where, cascade)
        return self._frame(hits, single)

    def exact(self, queries: str | Sequence[str] | Matrix, k: int = 10, where: str | None = None) -> pl.DataFrame:
        """The same over the full vectors of every row."""
        return self.search(queries, k, where, cascade=[])

    def explain(
        self, query: str | Matrix, k: int = 10, where: str | None = None, cascade: Cascade | None = None
    ) -> list[dict[str, Any]]:
        """Run one search and tell what each level did: table, engine, rows and bytes read, shortlist, milliseconds."""
        vectors, _ = self._vectors(query)
        _, steps = self.rank(vectors, k, where, cascade)
        return [vars(step) for step in steps]

    def cascade(self, k: int) -> list[Level]:
        """The spec's cascade, else the table with the fewest bytes per row at shortlist max(200, 20 k)."""
        levels = self.generation["spec"]["search"]["cascade"]
        if levels is None:
            return self.default_cascade(k)
        return [(one["table"], one["shortlist"], one.get("dim") or one.get("scoring", "auto")) for one in levels]

    def default_cascade(self, k: int) -> list[Level]:
        """The table whose scan reads the fewest bytes per row, shortlist max(200, 20 k)."""
        firsts = [view.at(view.hows[0]) for view in self.views.values() if not view.is_full]
        smallest = min(firsts, key=lambda view: (view.row_bytes, view.name))
        return [(smallest.name, max(200, 20 * k), smallest.info.dim if smallest.info.blocks else "auto")]

    def rank(
        self, vectors: Matrix, k: int, where: str | None, cascade: Cascade | None, rescore: bool = True
    ) -> tuple[Hits, list[Step]]:
        """Rankings of unit float32 queries [n, full_dim], without ids and texts; what each level did.

        `rescore=False` stops after the last level: scores are then those of its codes.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer):
            raise QueryError(f"k must be a whole number, not {k!r}")
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        if where is not None and not isinstance(where, str):
            raise QueryError(f"where must be a text like \"lang = 'en'\", not {where!r}")
        levels = self.cascade(k) if cascade is None else self._levels(cascade)
        clause = None if where is None else filters.rebuild(where, self._filter_columns())
        blocks, steps = [], self.steps(k, levels, rescore)
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            blocks.append(self._rank(vectors[start : start + QUERIES_AT_ONCE], k, clause, steps))
        return joined(blocks), steps

    def _levels(self, cascade: Cascade) -> list[Level]:
        """A caller's cascade, checked; QueryError where it cannot be run."""
        try:
            levels: list[Level] = [
                (str(table), int(size), _how(*how) if how else "auto") for table, size, *how in cascade
            ]
        except (ValueError, TypeError):
            raise QueryError(f"a cascade is a list of (table, shortlist), not {cascade!r}") from None
        try:
            check_cascade([(table, size) for table, size, _ in levels], [n for n in self.views if n != DOCUMENTS])
            dims = [(table, how if isinstance(how, int) else None) for table, _, how in levels]
            check_blocks(dims, {view.name: view.info.blocks for view in self.views.values()})
        except ValueError as error:
            raise QueryError(str(error)) from None
        scorings = [how for _, _, how in levels if isinstance(how, str)]
        wrong = [how for how in scorings if how not in ("auto", "asymmetric", "hamming")]
        if wrong:
            raise QueryError(f"cascade: scoring is auto, asymmetric or hamming, not {wrong[0]!r}")
        return levels

    def steps(self, k: int, cascade: Sequence[Level], rescore: bool) -> list[Step]:
        """The levels as they will be run: shortlists of at least k, how codes are scored, full vectors last."""
        steps = []
        for number, (table, size, how) in enumerate(cascade):
            note = f"shortlist raised from {size} to k" if size < k else ""
            view = self.views[table]
            scoring: Scoring = "dot"
            if view.codec.kind == "binary":
                by_index = number == 0 and view.ann is not None and how != "asymmetric"
                scoring = "hamming" if by_index or how == "hamming" else "asymmetric"
            steps.append(Step(table, "", max(size, k), scoring, note=note, dim=view.at(how).info.dim))
        if rescore or not steps:
            steps.append(Step(DOCUMENTS, "", k, dim=self.documents.info.dim))
        return steps

    def _rank(self, queries: Matrix, k: int, where: str | None, steps: list[Step]) -> Hits:
        hits: Hits | None = None
        for number, step in enumerate(steps):
            start = time.perf_counter()
            hits = self.level(step, queries, hits, k if number == len(steps) - 1 else step.shortlist, where)
            step.milliseconds += (time.perf_counter() - start) * 1000
        assert hits is not None
        return hits

    def level(self, step: Step, queries: Matrix, hits: Hits | None, keep: int, where: str | None) -> Hits:
        """One level: the best `keep` of the whole table, or of the hits that an earlier level left."""
        view = self.views[step.table].at(step.dim)
        prefixes = self._prefixes(view, queries)
        if hits is not None:
            return rescored(view, prefixes, hits, keep, step)
        if view.ann is not None and step.scoring != "asymmetric":
            return from_index(view, prefixes, keep, where, step)
        return scanned(view, prefixes, keep, where, step)

    def scores(self, table: str, queries: Matrix, hits: Hits) -> Matrix:
        """What a table's codes say of hits, as a level after the first would: float32 in the hits' shape."""
        view = self.views[table]
        step = Step(table, "", hits.offsets.shape[1], "asymmetric" if view.codec.kind == "binary" else "dot")
        return scores_of(view, self._prefixes(view, queries), hits, step)

    def _prefixes(self, view: View, queries: Matrix) -> Matrix:
        return queries if view.is_full else truncate(self._transform(view).apply(queries), view.info.dim)

    def _transform(self, view: View) -> Transform:
        name = view.info.transform.get("parameters")
        if name not in self._transforms:
            if name not in self._matrices:
                raise DamageError(
                    f"{view.name} needs the matrix {name}, which is not in {PARAMETERS}; run the job again"
                )
            self._transforms[name] = Transform.unstacked(view.info.transform["kind"], self._matrices[name])
        return self._transforms[name]

    def _filter_columns(self) -> dict[str, filters.Column]:
        names = self.generation["spec"]["corpus"]["filter"]
        return {name: _filter_column(self.documents.table.schema.field(name).type) for name in names}

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

    def _frame(self, hits: Hits, single: bool) -> pl.DataFrame:
        names = [name for name in self.documents.table.schema.names if name not in ("row", "vector", "text_digest")]
        found = hits.offsets >= 0
        wanted = np.unique(hits.offsets[found])
        if len(wanted):
            taken = self.documents.table.take(pa.array(wanted), columns=names)
        else:
            taken = self.documents.table.schema.empty_table().select(names)
        content = pl.DataFrame(pl.from_arrow(taken))[np.searchsorted(wanted, hits.offsets[found])]
        query, position = np.nonzero(found)
        frame = pl.DataFrame(
            {
                "query": query.astype(np.int64),
                "rank": position.astype(np.int64) + 1,
                "score": hits.scores[found].astype(np.float32),
                "row": hits.rows[found],
            }
        ).hstack(content)
        rest = [name for name in names if name != "id"]
        return frame.select(*([] if single else ["query"]), "rank", "id", "score", "row", *rest)


def shown(table: str, how: str | int) -> str:
    """A level's table in words; of a nested one also the dim."""
    return f"{table}[:{how}]" if isinstance(how, int) else table


def _how(given: Any) -> str | int:
    return int(given) if isinstance(given, int | np.integer) else str(given)


def _filter_column(kind: pa.DataType) -> filters.Column:
    if pa.types.is_integer(kind):
        signed = pa.types.is_signed_integer(kind)
        low = -(2 ** (kind.bit_width - 1)) if signed else 0
        return filters.Column("integer", low, 2 ** (kind.bit_width - signed) - 1)
    if pa.types.is_floating(kind):
        return filters.Column("float", bits=kind.bit_width)
    return filters.Column("boolean" if pa.types.is_boolean(kind) else "string")
