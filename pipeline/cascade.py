"""One generation, open for search: its tables at their pinned versions, and the levels of a cascade over them.

A level is data: (table, shortlist). The first one scans its table or asks its ANN index, the next ones score what is
left with their own codes, full-dimension cosine comes last. Codes are read from Lance or held in memory (`resident`);
the answer is the same.
"""

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import filters, predictor, resident, store
from pipeline.cores import one_blas_thread
from pipeline.errors import DamageError, QueryError, SpecError
from pipeline.levels import (
    Hits,
    Step,
    allowed,
    beginnings,
    from_index,
    joined,
    plan_misses,
    rescored,
    scanned,
    scores_of,
    stopped,
    uncovered,
)
from pipeline.margin import WIDEST, Line, Stopping
from pipeline.nested import check_blocks, check_cascade
from pipeline.predictor import Predictor
from pipeline.resident import Held
from pipeline.spec import Engine, Stop
from pipeline.storage import Root, kept_name
from pipeline.tables import DOCUMENTS, PARAMETERS, TableInfo, matrices, vector_matrix
from pipeline.transform import Transform
from pipeline.vectors import Matrix, Scoring, truncate, unit
from pipeline.views import View

QUERIES_AT_ONCE = 256
"""Queries that share one scan; bounds memory at 256 x 8,192 scores."""
SCANNED_BYTES = 256_000_000
"""Codes beyond this are left to an index where there is one (about 10 ms at the 27 GB/s that one core reads here)."""
FILTERS = 16
"""Filters whose rows are remembered."""
Level = tuple[str, int, str | int]
"""Table, shortlist, and how: binary codes are scored (auto, asymmetric or hamming), or far a nested table is read (a
dim; auto: all)."""
Cascade = Sequence[Level | tuple[str, int]]
Rule = tuple[Line, float] | Callable[[Matrix, Matrix], NDArray[np.int64]]
"""When to stop rescoring: the margin's line and threshold; or lengths from query vectors and their coarse scores."""


class Opened:
    """One generation. Never changes once open; safe to share between threads. Opening reads no vectors."""

    def __init__(
        self, root: Root, generation: Mapping[str, Any], engine: Engine | None = None, memory: int | None = None
    ) -> None:
        """Pin every table of the generation; StaleError where a version is gone.

        `engine` and `memory` (bytes) stand in for the spec's `search.engine` and `search.memory`.
        """
        search = generation["spec"]["search"]
        self.generation = generation
        self.engine: Engine = engine or search["engine"]
        self.memory = search["memory"] if memory is None else memory
        self.stop: Stop = search.get("stop", "fixed")
        self.confidence: float = search.get("confidence", 0.95)
        self._stopping = {name: Stopping.of(learned) for name, learned in generation.get("stopping", {}).items()}
        self._predictors: Mapping[str, Predictor] = {}
        if generation.get("predictor"):
            kept = root.kept(generation["files"][predictor.FILE])
            self._predictors = predictor.from_bytes(kept, generation["predictor"])
        self._root = root
        self._files = {
            table: kept_name(digest) for table, digest in generation["cache"].items() if root.size(kept_name(digest))
        }
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
        self._held: dict[str, Held] = {}
        self._allowed: OrderedDict[str, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()

    def _view(self, name: str, table: store.Table, ann: Mapping[str, Any] | None) -> View:
        info = TableInfo.of(table.schema)
        rotation = info.codec.get("rotation")
        codec = info.codec_with(None if rotation is None else self._matrices[rotation])
        view = View(name, table, info, codec, ann, self.generation["corpus"]["quarantined"] == 0)
        if ann is None:
            return view
        if why := plan_misses(view):
            return replace(view, ann=None, note=why)
        missed = uncovered(view)
        return replace(view, note=f"{missed:,} rows are not in its index and are scanned") if missed else view

    def knowing(self, stopping: Mapping[str, Stopping], predictors: Mapping[str, Predictor]) -> "Opened":
        """The same, with what an evaluation has just learned of when to stop."""
        other = copy.copy(self)
        other._stopping, other._predictors = dict(stopping), dict(predictors)
        return other

    @property
    def row_count(self) -> int:
        """Rows of every table."""
        return int(self.generation["tables"][DOCUMENTS]["rows"])

    def clause(self, where: str | None) -> str | None:
        """A filter, checked and rebuilt for Lance; QueryError where it is none."""
        if where is not None and not isinstance(where, str):
            raise QueryError(f"where must be a text like \"lang = 'en'\", not {where!r}")
        return None if where is None else filters.rebuild(where, self._filter_columns())

    def _filter_columns(self) -> dict[str, filters.Column]:
        names = self.generation["spec"]["corpus"]["filter"]
        return {name: _filter_column(self.documents.table.schema.field(name).type) for name in names}

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

    def levels(self, cascade: Cascade) -> list[Level]:
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

    def rank(
        self,
        vectors: Matrix,
        k: int,
        clause: str | None,
        levels: Sequence[Level],
        rescore: bool = True,
        stop: Stop = "fixed",
    ) -> tuple[Hits, list[Step]]:
        """Rankings of unit float32 queries [n, full_dim], without ids and texts; what each level did.

        `rescore=False` stops after the last level: scores are then those of its codes. `stop` says how many of the
        candidates of the last level meet the full vectors (spec: `search.stop`).
        """
        blocks, steps = [], self.steps(k, levels, rescore)
        rule = self._rule(steps, k, clause, stop)
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            blocks.append(self._rank(vectors[start : start + QUERIES_AT_ONCE], k, clause, steps, rule))
        return joined(blocks), steps

    def _rule(self, steps: Sequence[Step], k: int, clause: str | None, stop: Stop) -> Rule | None:
        """What tells when to stop rescoring; widens the list that the last level hands on. None: nothing does."""
        if stop == "fixed" or len(steps) < 2 or steps[-1].table != DOCUMENTS:
            return None
        last = steps[-2]
        learned = (self._stopping if stop == "margin" else self._predictors).get(last.name)
        if learned is None:
            steps[-1].note = f"the shortlist is fixed: nothing was learned of {last.name}"
            return None
        if isinstance(learned, Predictor) and clause is not None:
            steps[-1].note = "the shortlist is fixed: nothing was learned of lists with a filter"
            return None
        widest = min(last.shortlist * WIDEST, learned.width)
        handed = widest if isinstance(learned, Stopping) else learned.width
        for step in steps[:-1]:
            step.shortlist = max(step.shortlist, handed)
        if isinstance(learned, Stopping):
            return learned.line, learned.threshold(self.confidence)
        if k > learned.k:
            steps[-1].note = f"lengths in proportion to those learned for k = {learned.k}"
        at_most = max(widest, k)
        return lambda vectors, scores: np.minimum(learned.lengths(vectors, scores, self.confidence, k), at_most)

    def steps(self, k: int, cascade: Sequence[Level], rescore: bool) -> list[Step]:
        """The levels as they will be run: shortlists of at least k, how codes are scored, full vectors last."""
        steps = []
        for number, (table, size, how) in enumerate(cascade):
            view = self.views[table]
            note = f"shortlist raised from {size} to k" if size < k else ""
            if number == 0:
                note = note or view.note or self.holdings[table]
            scoring: Scoring = "dot"
            if view.codec.kind == "binary":
                by_index = number == 0 and self._asks_index(view) and how != "asymmetric"
                scoring = "hamming" if by_index or how == "hamming" else "asymmetric"
            dim = view.at(how).info.dim if view.info.blocks else None
            steps.append(Step(table, "", max(size, k), scoring, note=note, dim=dim))
        if rescore or not steps:
            steps.append(Step(DOCUMENTS, "", k, note=self.holdings[DOCUMENTS]))
        return steps

    def _rank(self, queries: Matrix, k: int, where: str | None, steps: list[Step], rule: Rule | None) -> Hits:
        hits: Hits | None = None
        for number, step in enumerate(steps):
            start = time.perf_counter()
            if callable(rule) and hits is not None and step.table == DOCUMENTS:
                hits = self.level(step, queries, beginnings(hits, rule(queries, hits.scores)), k, where)
            elif isinstance(rule, tuple) and hits is not None and step.table == DOCUMENTS:
                hits = stopped(self.documents, queries, hits, k, step, self._codes(self.documents), rule)
            else:
                hits = self.level(step, queries, hits, k if number == len(steps) - 1 else step.shortlist, where)
            step.milliseconds += (time.perf_counter() - start) * 1000
        assert hits is not None
        return hits

    def level(self, step: Step, queries: Matrix, hits: Hits | None, keep: int, where: str | None) -> Hits:
        """One level: the best `keep` of the whole table, or of the hits that an earlier level left."""
        view = self.views[step.table].at(step.dim)
        held = self._codes(view) if hits is not None or not view.is_full else None
        by_index = self._asks_index(view) and step.scoring != "asymmetric"
        if hits is None and held is None and not by_index:
            return scanned(view, self._prefixes(view, queries), keep, where, step)
        with one_blas_thread():
            prefixes = self._prefixes(view, queries)
            if hits is not None:
                return rescored(view, prefixes, hits, keep, step, held)
            if held is None:
                return from_index(view, prefixes, keep, where, step)
            if where is not None:
                held = held.subset(where, self._passing(where))
            step.engine, step.rows, step.bytes = "resident", step.rows + len(held), step.bytes + held.codes.nbytes
            found, scores = held.nearest(prefixes, keep, step.scoring)
            offsets = held.offsets(found)
            return Hits(offsets, held.rows(offsets), scores)

    def scores(self, table: str, queries: Matrix, hits: Hits) -> Matrix:
        """What a table's codes say of hits, as a level after the first would: float32 in the hits' shape."""
        view = self.views[table]
        step = Step(table, "", hits.offsets.shape[1], "asymmetric" if view.codec.kind == "binary" else "dot")
        return scores_of(view, self._prefixes(view, queries), hits, step, self._codes(view))

    def vector_of(self, name: str) -> tuple[Matrix, int]:
        """The unit full vector float32[1, full_dim] and row number of an id; QueryError where there is none."""
        if not isinstance(name, str):
            raise QueryError(f"an id is a text, not {name!r}")
        clause = filters.equal("id", name)
        found = self.documents.table.scanner(columns=["row", "vector"], filter=clause, limit=1).to_table()
        if not found.num_rows:
            raise QueryError(f"there is no id {name!r}")
        return unit(vector_matrix(found.column("vector"))), int(found.column("row")[0].as_py())

    def content(self, hits: Hits, names: Sequence[str]) -> pl.DataFrame:
        """Stored columns of the hits, one row for each, in their order.

        DamageError where `documents` holds another row than the table that found it.
        """
        found = hits.offsets >= 0
        wanted, where = np.unique(hits.offsets[found], return_inverse=True)
        if len(wanted):
            taken = self.documents.table.take(pa.array(wanted), columns=["row", *names])
        else:
            taken = self.documents.table.schema.empty_table().select(["row", *names])
        if not np.array_equal(taken.column("row").to_numpy()[where], hits.rows[found]):
            raise DamageError("the tables hold other rows in one place; run `verify`, then the job again")
        return pl.DataFrame(pl.from_arrow(taken.select(list(names))))[where]

    def _passing(self, clause: str) -> NDArray[np.int64]:
        """Ascending positions of the rows that a filter lets through, remembered for the next query with it."""
        with self._lock:
            found = self._allowed.pop(clause, None)
        found = allowed(self.documents, clause) if found is None else found
        with self._lock:
            self._allowed[clause] = found
            while len(self._allowed) > FILTERS:
                self._allowed.popitem(last=False)
        return found

    def _asks_index(self, view: View) -> bool:
        """Whether a first level asks the table's ANN index: never where its codes are held."""
        return view.ann is not None and self.holdings[view.name] != ""

    def _codes(self, view: View) -> Held | None:
        """The table's codes in memory, loaded at the first need; None where the engine reads them from Lance."""
        held = self._held.get(view.name)
        if held is not None or self.holdings[view.name]:
            return held
        with self._lock:
            if view.name not in self._held:
                self._held[view.name] = self._load(view)
            return self._held[view.name]

    def _load(self, view: View) -> Held:
        name = self._files.get(view.name)
        rows = None if view.is_dense else view.rows()
        if name is None:
            return Held(view.codes(), view.codec, view.info.dim, rows)
        path = self._root.local(name)
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
        if codes.shape != (self.row_count, view.width) or codes.dtype != view.dtype:
            raise DamageError(f"{path} does not hold the codes of {view.name}; run `verify`, then the job again")
        return Held(codes.view(np.ndarray), view.codec, view.info.dim, rows)

    @cached_property
    def holdings(self) -> dict[str, str]:
        """Why each table is not held in memory; empty for those that are.

        Tables that take few bytes come first; a table that is mapped from a file costs only its kernel's own copy.
        """
        missing = resident.available()
        if self.engine == "resident" and missing:
            raise SpecError(f"search.engine: resident cannot be used: {missing}")
        left, found = self.memory, {}
        for view in sorted(self.views.values(), key=lambda one: (one.is_full, one.row_bytes, one.name)):
            size, is_mapped = self.row_count * view.row_bytes, view.name in self._files
            needed = size * (not is_mapped) + size * (not view.is_full)
            if view.info.blocks:
                found[view.name] = "its blocks are read as they are needed"
            elif self.engine == "lance" and not (view.is_full and is_mapped):
                found[view.name] = "search.engine is lance"
            elif missing:
                found[view.name] = missing
            elif self.engine == "auto" and view.is_full and not is_mapped:
                found[view.name] = "full vectors are read from Lance unless search.cache or engine: resident"
            elif self.engine == "auto" and view.ann is not None and size > SCANNED_BYTES:
                found[view.name] = f"its index is quicker than a scan of {size / 1e6:.0f} MB"
            elif needed > left:
                found[view.name] = f"{needed / 1e6:.0f} MB are more than search.memory leaves ({left / 1e6:.0f} MB)"
            else:
                found[view.name], left = "", left - needed
        return found

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
