"""Search: a cascade of levels over prefix tables, rescored with the full vectors of one generation.

A level is data: (table, shortlist). The first one scans its table (or asks its ANN index), the next ones score
what is left with their own codes, full-dimension cosine comes last. Every table is pinned to its version.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import filters, ledger, store
from pipeline.encoders import models
from pipeline.encoders.batches import Encoder, encode_rows
from pipeline.errors import DamageError, DataError, QueryError, StaleError
from pipeline.spec import check_cascade
from pipeline.tables import DOCUMENTS, PARAMETERS, TableInfo, matrices, vector_matrix
from pipeline.transform import Transform
from pipeline.vectors import MIN_NORM, Codec, Matrix, top, truncate, unit

SCAN_ROWS = 8_192
QUERIES_AT_ONCE = 256
"""Queries that share one scan; bounds memory at 256 x 8,192 scores."""
QUERY_BATCH_TOKENS = 4_096
Cascade = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class View:
    """One table at its pinned version, with what scores it."""

    name: str
    table: lance.LanceDataset
    info: TableInfo
    codec: Codec
    ann: Mapping[str, Any] | None = None

    @property
    def is_full(self) -> bool:
        """Whether these are the full vectors."""
        return self.info.parent is None

    def scores(self, queries: Matrix, codes: Matrix) -> Matrix:
        """Similarity of unit query prefixes [q, dim] to stored codes [n, …], float32[q, n].

        Full vectors are brought back to unit length (half precision lost some) and multiplied in float64: float32
        products differ in the last bit by where a row stands, and then equal rows would not tie.
        """
        if not self.is_full:
            return self.codec.scores(queries, codes)
        return np.asarray(queries.astype(np.float64) @ unit(codes).astype(np.float64).T, dtype=np.float32)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored vector."""
        kind = self.table.schema.field("vector").type
        return int(kind.list_size * kind.value_type.bit_width // 8)


@dataclass(frozen=True)
class Hits:
    """Per query, best first: positions in the tables, row numbers, scores; -1 where there are fewer hits."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: Matrix

    @classmethod
    def none(cls, queries: int) -> "Hits":
        """No hit for any query."""
        empty = np.zeros((queries, 0), np.int64)
        return cls(empty, empty, np.zeros((queries, 0), np.float32))


@dataclass
class Step:
    """What one level did."""

    table: str
    engine: str
    shortlist: int
    rows: int = 0
    bytes: int = 0
    milliseconds: float = 0.0
    note: str = ""


def open_index(root: str | Path, model: str | None = None, device: str | None = None) -> "Index":
    """Open the newest generation of a finished root; loads no model until a text is searched.

    `model` names another copy of the recorded model, `device` a torch device. StaleError where nothing is finished.
    """
    generation = ledger.newest_generation(Path(root))
    if generation is None:
        raise StaleError(f"{root} holds no finished generation; run the job first")
    return Index(Path(root), generation, model, device)


class Index:
    """One generation, open for search. Opening reads no vectors and loads no model."""

    def __init__(
        self, root: Path, generation: Mapping[str, Any], model: str | None = None, device: str | None = None
    ) -> None:
        """Pin every table of the generation; StaleError where a version is gone."""
        self.generation = generation
        self._root, self._model, self._device = root, model, device
        self._encoder: Encoder | None = None
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

    def _view(self, name: str, table: lance.LanceDataset, ann: Mapping[str, Any] | None) -> View:
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
        overrides the spec's; [] is exact. `score` is the float32 cosine with the full vector. QueryError (a
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

    def cascade(self, k: int) -> list[tuple[str, int]]:
        """The spec's cascade, else the table with the fewest bytes per row at shortlist max(200, 20 k)."""
        levels = self.generation["spec"]["search"]["cascade"]
        return self.default_cascade(k) if levels is None else [(one["table"], one["shortlist"]) for one in levels]

    def default_cascade(self, k: int) -> list[tuple[str, int]]:
        """The table with the fewest bytes per row, shortlist max(200, 20 k)."""
        prefixes = [view for view in self.views.values() if not view.is_full]
        smallest = min(prefixes, key=lambda view: (view.row_bytes, view.name))
        return [(smallest.name, max(200, 20 * k))]

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
        try:
            levels = [(str(table), int(size)) for table, size in (self.cascade(k) if cascade is None else cascade)]
        except (ValueError, TypeError):
            raise QueryError(f"a cascade is a list of (table, shortlist), not {cascade!r}") from None
        try:
            check_cascade(levels, [name for name in self.views if name != DOCUMENTS])
        except ValueError as error:
            raise QueryError(str(error)) from None
        clause = None if where is None else filters.rebuild(where, self._filter_columns())
        blocks, steps = [], self._steps(k, levels, rescore)
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            blocks.append(self._rank(vectors[start : start + QUERIES_AT_ONCE], k, clause, steps))
        return _joined(blocks), steps

    def _steps(self, k: int, cascade: Cascade, rescore: bool) -> list[Step]:
        steps = []
        for table, size in cascade:
            note = f"shortlist raised from {size} to k" if size < k else ""
            steps.append(Step(table, "", max(size, k), note=note))
        if rescore or not steps:
            steps.append(Step(DOCUMENTS, "", k))
        return steps

    def _rank(self, queries: Matrix, k: int, where: str | None, steps: list[Step]) -> Hits:
        hits: Hits | None = None
        for number, step in enumerate(steps):
            start = time.perf_counter()
            view = self.views[step.table]
            prefixes = queries if view.is_full else truncate(self._transform(view).apply(queries), view.info.dim)
            keep = k if number == len(steps) - 1 else step.shortlist
            if hits is not None:
                hits = _rescored(view, prefixes, hits, keep, step)
            elif view.ann is not None:
                hits = _from_index(view, prefixes, keep, where, step)
            else:
                hits = _scanned(view, prefixes, keep, where, step)
            step.milliseconds += (time.perf_counter() - start) * 1000
        assert hits is not None
        return hits

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
        blank = [number for number, text in enumerate(texts) if not text.strip()]
        if blank:
            raise QueryError(f"query {blank[0]} is blank")
        if not texts:
            return np.zeros((0, self.documents.info.full_dim), np.float32)
        if self._encoder is None:
            self._encoder = self._load()
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded = encode_rows(self._encoder, texts, "query", self.documents.info.prompts["query"], QUERY_BATCH_TOKENS)
        for number, (reason, detail) in sorted(encoded.failed.items()):
            raise QueryError(f"query {number} cannot be embedded: {reason} {detail}")
        return encoded.vectors

    def _load(self) -> Encoder:
        from pipeline.encoders.sentence import SentenceEncoder

        info = self.documents.info
        folder = models.resolve(self._model or info.model, None if self._model else info.revision)
        if folder.digest != info.model_digest:
            raise DataError(
                f"{folder.name} is {folder.digest[:19]}…, the tables need {info.model} {info.model_digest[:19]}…; "
                "give open_index the same model, or run the job again in another root"
            )
        return SentenceEncoder(folder, info.max_tokens, self._device, None)

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


def _filter_column(kind: pa.DataType) -> filters.Column:
    if pa.types.is_integer(kind):
        signed = pa.types.is_signed_integer(kind)
        low = -(2 ** (kind.bit_width - 1)) if signed else 0
        return filters.Column("integer", low, 2 ** (kind.bit_width - signed) - 1)
    return filters.Column("string" if pa.types.is_string(kind) else "boolean" if pa.types.is_boolean(kind) else "float")


def _scanned(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Score every row that passes the filter, a batch at a time."""
    columns = ["row", "vector"] if where is None else ["row", "_rowoffset", "vector"]
    best, position = Hits.none(len(prefixes)), 0
    step.engine = "scan"
    for batch in view.table.scanner(columns=columns, filter=where, batch_size=SCAN_ROWS).to_batches():
        codes = vector_matrix(batch.column("vector"))
        offsets = np.arange(position, position + len(codes)) if where is None else batch["_rowoffset"].to_numpy()
        position += len(codes)
        scores = view.scores(prefixes, codes)
        best = _best(best, offsets.astype(np.int64), batch["row"].to_numpy(), scores, keep)
        step.rows, step.bytes = step.rows + len(codes), step.bytes + codes.nbytes
    return best


def _best(best: Hits, offsets: NDArray[np.int64], rows: NDArray[np.int64], scores: Matrix, keep: int) -> Hits:
    """Merge a batch into the best so far; earlier rows come first, so ties go to the lower row."""
    joined = np.concatenate([best.scores, scores], axis=1)
    picked = top(joined, keep)

    def pick(old: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
        held = old.shape[1]
        from_new: NDArray[np.int64] = new[np.maximum(picked - held, 0)]
        if not held:
            return from_new
        return np.where(picked < held, np.take_along_axis(old, np.minimum(picked, held - 1), 1), from_new)

    return Hits(pick(best.offsets, offsets), pick(best.rows, rows), np.take_along_axis(joined, picked, 1))


def _from_index(view: View, prefixes: Matrix, keep: int, where: str | None, step: Step) -> Hits:
    """Ask the table's ANN index, one query at a time; its own distances order the shortlist."""
    assert view.ann is not None
    step.engine, step.note = str(view.ann["kind"]), step.note or "rows are those returned"
    queries = view.codec.encode(prefixes) if view.codec.kind == "binary" else prefixes
    found = []
    for query in queries:
        scanner = store.nearest(view.table, query, keep, view.ann["nprobes"], where, ("row", "_rowoffset"))
        table = scanner.to_table()
        step.rows += table.num_rows
        distances = table["_distance"].to_numpy().astype(np.float32)
        scores = 1 - 2 * distances / view.info.dim if view.codec.kind == "binary" else 1 - distances
        rows = table["row"].to_numpy()
        order = np.lexsort((rows, -scores))
        offsets = table["_rowoffset"].to_numpy().astype(np.int64)
        found.append(Hits(offsets[order][None], rows[order][None], scores[order][None]))
    return _joined(found)


def _rescored(view: View, prefixes: Matrix, hits: Hits, keep: int, step: Step) -> Hits:
    """Score the hits with this table's codes and keep the best; reads each row once for all queries."""
    step.engine = step.engine or "take"
    wanted = np.unique(hits.offsets[hits.offsets >= 0])
    if not len(wanted):
        return Hits.none(len(prefixes))
    taken = view.table.take(pa.array(wanted), columns=["row", "vector"])
    codes, rows = vector_matrix(taken.column("vector")), taken.column("row").to_numpy()
    step.rows, step.bytes = step.rows + len(codes), step.bytes + taken.column("vector").nbytes
    found = []
    for query, offsets, claimed in zip(prefixes, hits.offsets, hits.rows, strict=True):
        ordered = np.argsort(offsets, kind="stable")
        ordered = ordered[offsets[ordered] >= 0]
        at = np.searchsorted(wanted, offsets[ordered])
        if not np.array_equal(rows[at], claimed[ordered]):
            raise DamageError(
                f"{view.name} holds other rows than the tables before it; run `verify`, then the job again"
            )
        scores = view.scores(query[None], codes[at])
        picked = top(scores, keep)[0]
        found.append(Hits(wanted[at][picked][None], rows[at][picked][None], scores[:, picked]))
    return _joined(found)


def _joined(blocks: Sequence[Hits]) -> Hits:
    """Hits of several queries under one another, padded with -1 to one width."""
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return Hits.none(0)
    width = max(block.offsets.shape[1] for block in blocks)

    def pad(part: Matrix, value: float) -> Matrix:
        return np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=value)

    return Hits(
        np.concatenate([pad(block.offsets, -1) for block in blocks]),
        np.concatenate([pad(block.rows, -1) for block in blocks]),
        np.concatenate([pad(block.scores, -np.inf) for block in blocks]),
    )
