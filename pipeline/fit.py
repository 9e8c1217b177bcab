"""The fit stage: what must be learned from the corpus, once, on a seeded sample.

Comes in: `documents`. Goes out: the verdict on the model's prefixes, the transform and one codec per prefix, the
matrices in `parameters`. Memory is bounded by a batch, a D x D matrix and some 25,000 rows.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline import adaptor, probe, rotation, store
from pipeline.errors import SpecError
from pipeline.ledger import Ledger, Record
from pipeline.spec import JobSpec, Prefix
from pipeline.storage import Root
from pipeline.tables import (
    DOCUMENTS,
    FORMAT,
    METADATA_KEY,
    PARAMETERS,
    Fits,
    FittedPrefix,
    Parent,
    TableInfo,
    logical_digest,
    parameters_schema,
    vector_matrix,
)
from pipeline.transform import Moments, Transform, order, pca
from pipeline.vectors import Codec, Magnitudes, Matrix, int8_scale, truncate, unit

log = logging.getLogger(__name__)

BATCH_ROWS = 8_192
HELD_OUT, POOL = 1_024, 8_192
"""Rows whose neighbours the probe looks up, which no compared transform was fitted on, and rows looked among."""
ROTATION_ROWS = 20_000
INT8_PERCENTILE = 0.9999
"""Share of each dimension's values that int8 holds; what is larger is clipped and counted."""

OnQueries = Callable[[], Matrix | None]
"""Gives query vectors float32[q, D] for the probe, or None; called only when something is to be fitted."""


def no_queries() -> None:
    """The probe looks at corpus rows alone."""


def run(
    spec: JobSpec,
    parent: Parent,
    declared: Sequence[int] | None,
    root: Root,
    queries: OnQueries = no_queries,
    afresh: bool = False,
) -> Fits:
    """Fit what is missing; `declared` are the dims that the model says it was trained for.

    `transform: auto` follows the probe: `none` for prefixes that hold, else the learned adaptor where it beats PCA on
    held-out rows, else PCA. Signs are taken of a PCA where numbers go through the adaptor: they measured better.
    `afresh` publishes `parameters` again. SpecError for a spec that insists on `none` against the measurement.
    """
    sample = _Sample(parent, root, spec.seed, spec.transform.sample_rows)
    with threadpool_limits(1):  # eigh differs in its last bits with the number of threads
        fitting = _Fitting(sample, root, tuple(declared or ()), queries)
        decision = fitting.decision(spec)
        fitted = {prefix.table: _fit_prefix(prefix, decision["kind"], fitting) for prefix in spec.prefixes}
    artefacts = {name: artefact for one in fitted.values() for name, artefact in one.artefacts().items()}
    version, record = _write_parameters(root, artefacts, parent.info, afresh)
    return Fits(fitted, version, tuple(sorted(artefacts)), decision, record)


class _Sample:
    """Seeded rows of `documents`, read again for each pass; files are compared with what was written first."""

    def __init__(self, parent: Parent, root: Root, seed: int, size: int) -> None:
        self.parent, self.seed, self._root = parent, seed, root
        self.key = f"{FORMAT} {parent.digest} {seed} {size}"
        self.rows = min(size, parent.rows)
        self._chosen: NDArray[np.int64] | None = None
        if size < parent.rows:
            self._chosen = np.sort(np.random.default_rng(seed).choice(parent.rows, size, replace=False))

    @cached_property
    def _documents(self) -> store.Table:
        store.check_files(self._root, DOCUMENTS, self.parent.files)
        return store.open_table(self.parent.uri, self.parent.version)

    def __iter__(self) -> Iterator[Matrix]:
        if self._chosen is None:
            for batch in self._documents.scanner(columns=["vector"], batch_size=BATCH_ROWS).to_batches():
                yield unit(vector_matrix(batch.column("vector")))
            return
        for start in range(0, self.rows, BATCH_ROWS):
            yield self._taken(self._chosen[start : start + BATCH_ROWS])

    @cached_property
    def held_out(self) -> NDArray[np.int64]:
        """Positions within the sample that are kept for comparing, ascending."""
        count = min(HELD_OUT, max(self.rows // 8, min(-(-self.rows // 2), 256)))
        return np.sort(np.random.default_rng(self.seed + 1).choice(self.rows, count, replace=False))

    def part(self, positions: NDArray[np.int64]) -> Matrix:
        """Some rows of the sample, unit float32[n, D], by ascending position."""
        offsets = positions if self._chosen is None else self._chosen[positions]
        blocks = [self._taken(offsets[at : at + BATCH_ROWS]) for at in range(0, len(offsets), BATCH_ROWS)]
        return np.concatenate([np.zeros((0, self.parent.info.full_dim), np.float32), *blocks])

    def some(self, count: int, leave_out: NDArray[np.int64] | None = None) -> Matrix:
        """At most `count` seeded rows, none of those left out."""
        left = np.arange(self.rows)
        left = left if leave_out is None else np.setdiff1d(left, leave_out)
        if len(left) > count:
            left = np.sort(np.random.default_rng(self.seed + 2).choice(left, count, replace=False))
        return self.part(left)

    def _taken(self, offsets: NDArray[np.int64]) -> Matrix:
        return unit(vector_matrix(self._documents.take(pa.array(offsets), columns=["vector"]).column("vector")))


@dataclass
class _Fitting:
    """Everything that is learned from one sample, each once: what has a record is not fitted again."""

    sample: _Sample
    root: Root
    declared: tuple[int, ...]
    queries: OnQueries

    @property
    def ledger(self) -> Ledger:
        """Records of everything learned."""
        return Ledger(self.root, "fit")

    @cached_property
    def moments(self) -> Moments:
        """Of the whole sample."""
        moments = Moments(self.sample.parent.info.full_dim)
        for vectors in self.sample:
            moments.add(vectors)
        return moments

    @cached_property
    def held_out(self) -> Matrix:
        """Rows to compare on: no compared transform has seen them."""
        return self.sample.part(self.sample.held_out)

    def kept(self, queries: Matrix | None, ways: Mapping[str, Transform], dims: Sequence[int]) -> list[probe.Kept]:
        """What cuts keep of held-out rows' neighbours among a pool of the sample."""
        return probe.measure(self.pool, len(self.held_out), queries, ways, dims)

    @cached_property
    def pool(self) -> Matrix:
        """The rows held out, then others."""
        return np.concatenate([self.held_out, self.sample.some(POOL - len(self.held_out), self.sample.held_out)])

    @cached_property
    def held_out_pca(self) -> Transform:
        """PCA of the other rows."""
        return pca(self.moments.without(self.held_out))[0]

    @cached_property
    def rotation_rows(self) -> Matrix:
        """Rows that every rotation is learned from."""
        return self.sample.some(ROTATION_ROWS)

    @property
    def ladder(self) -> list[int]:
        """Dims that decide."""
        return probe.ladder(self.sample.parent.info.full_dim, self.declared)

    def transform(self, kind: str) -> Transform:
        """The transform of a kind, fitted on the sample (the adaptor: less the rows held out)."""
        if kind == "none":
            return Transform()
        name = f"{kind}-{_key(self.sample.key, str(self.ladder) if kind == 'adaptor' else '')}"
        return Transform.unstacked(kind, self.kept_matrix(name, lambda: self._learn(kind).stacked()))

    def kept_matrix(self, name: str, learn: Callable[[], Matrix]) -> Matrix:
        """A matrix that is learned once."""

        def made() -> Record:
            start = time.perf_counter()
            matrix = learn()
            seconds = round(time.perf_counter() - start, 3)
            log.info("fit made=%s sample_rows=%d seconds=%.1f", name, self.sample.rows, seconds)
            return {"kept": self.root.keep(store.npy(matrix)), "sample_rows": self.sample.rows, "seconds": seconds}

        record = self.ledger.once(name, made, lambda record: self.root.has(record["kept"]))
        return np.asarray(store.from_npy(self.root.kept(record["kept"])))

    def _learn(self, kind: str) -> Transform:
        if kind == "adaptor":
            rows = self.sample.some(adaptor.ROWS, self.sample.held_out)
            finer = 2 * self.ladder[-1]
            dims = [*self.ladder, *([finer] if finer < rows.shape[1] else [])]
            return adaptor.train(rows, dims, self.sample.seed)
        return order(self.moments) if kind == "order" else pca(self.moments)[0]

    def decision(self, spec: JobSpec) -> Record:
        """The verdict, the kind of transform that follows from it, and their figures; refuses a plain cut that loses.

        The kind never depends on the dims that are wanted, so that a table can be added later.
        """
        wanted = sorted({dim for prefix in spec.prefixes for dim in prefix.dims})
        settings = spec.transform
        name = f"decision-{_key(self.sample.key, settings.kind, str(self.declared), str(wanted))}"
        record = self.ledger.once(name, lambda: self._decide(settings.kind, wanted))
        verdict = record["verdict"]
        log.info("fit verdict=%s because=%s", verdict["says"].replace(" ", "_"), verdict["because"])
        if settings.kind == "none" and verdict["says"] == "not trained" and not settings.accept_loss:
            raise SpecError(
                f"transform.kind: none was asked, but {self.sample.parent.info.model} was not trained for prefixes: "
                f"{verdict['because']}; use transform.kind: auto, or set transform.accept_loss: true "
                "(no text is embedded again)"
            )
        _warn(record)
        return record

    def _decide(self, asked: str, wanted: Sequence[int]) -> Record:
        start = time.perf_counter()
        full_dim, queries = self.sample.parent.info.full_dim, self.queries()
        dims = sorted({*self.ladder, *(dim for dim in wanted if dim < full_dim)})
        kept = probe.compare(self.pool, len(self.held_out), queries, self.held_out_pca, dims, self.sample.seed)
        verdict = probe.judge(kept, self.ladder, self.declared, wanted, self.sample.rows, full_dim)
        kind = asked
        if asked == "auto":
            kind = "none" if verdict.holds else "adaptor"
        compared = None
        if kind == "adaptor":
            kind, compared = self._better_of_adaptor_and_pca()
        if kind == "adaptor":
            kept += self.kept(queries, {kind: self.transform(kind)}, dims)
        if kind == "order":
            kept += self.kept(queries, {kind: order(self.moments.without(self.held_out))}, dims)
        _, variances = pca(self.moments)
        explained = np.cumsum(variances) / (float(variances.sum()) or 1.0)
        return {
            "kind": kind,
            "sample_rows": self.sample.rows,
            "verdict": verdict.figures(),
            "kept": [one.figures() for one in kept],
            "compared": compared,
            "lost": probe.lost(kept, wanted) if kind == "none" and verdict.says != "trained" else None,
            "explained": [round(float(share), 6) for share in explained],
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _better_of_adaptor_and_pca(self) -> tuple[str, Record]:
        """The adaptor if it keeps more of held-out rows' neighbours than PCA, mean over the ladder's dims; else PCA."""
        rows = self.sample.rows - len(self.sample.held_out)
        if rows < adaptor.MIN_ROWS:
            return "pca", {"kept": "pca", "because": f"{rows} rows are too few to train an adaptor"}
        ways = {"pca": self.held_out_pca, "adaptor": self.transform("adaptor")}
        kept = self.kept(None, ways, self.ladder)
        means = {way: float(np.mean([one.neighbours.mean() for one in kept if one.way == way])) for way in ways}
        won = "adaptor" if means["adaptor"] > means["pca"] else "pca"
        because = f"of held-out rows' neighbours the adaptor keeps {means['adaptor']:.1%}, PCA {means['pca']:.1%}"
        log.info("fit transform=%s because=%s", won, because)
        return won, {"kept": won, "because": because, **{way: round(mean, 4) for way, mean in means.items()}}


def _warn(record: Mapping[str, Any]) -> None:
    """Say aloud where plain prefixes are used against, or without, a verdict for them."""
    verdict = record["verdict"]
    if record["kind"] == "none" and verdict["says"] != "trained":
        log.warning("fit transform=none: the verdict on plain prefixes is %s; lost=%s", verdict["says"], record["lost"])
    if record["kind"] == "none" and verdict["far"]:
        log.warning("fit transform=none: dims %s are far from those that the model was trained for", verdict["far"])
    if verdict["declared"] and verdict["says"] == "not trained":
        log.warning("fit the model declares %s, the measurement says otherwise", verdict["declared"])


def _fit_prefix(prefix: Prefix, kind: str, fitting: _Fitting) -> FittedPrefix:
    """The prefix's transform and codec: int8 learns its scales, binary its rotation."""
    if prefix.precision == "binary" and kind == "adaptor":
        kind = "pca"
    transform = fitting.transform(kind)
    codec = Codec(prefix.precision)
    if prefix.precision == "int8":
        codec = Codec("int8", scale=_scale(prefix, transform, fitting))
    if prefix.precision == "binary" and prefix.rotation != "none":
        codec = Codec("binary", rotation=_rotation(prefix, transform, fitting))
    return FittedPrefix(transform, codec)


def _scale(prefix: Prefix, transform: Transform, fitting: _Fitting) -> Matrix:
    key = f"{prefix.table}-{_key(fitting.sample.key, str(transform.digest()), str(INT8_PERCENTILE))}"

    def learn() -> Matrix:
        magnitudes = Magnitudes(prefix.dim)
        for vectors in fitting.sample:
            magnitudes.add(truncate(transform.apply(vectors), prefix.dim))
        return int8_scale(magnitudes.percentile(INT8_PERCENTILE))

    return fitting.kept_matrix(key, learn)


def _rotation(prefix: Prefix, transform: Transform, fitting: _Fitting) -> Matrix:
    sample = fitting.sample
    key = f"{prefix.table}-{_key(sample.key, str(transform.digest()), prefix.rotation)}"

    def learn() -> Matrix:
        if prefix.rotation == "random":
            return rotation.random(prefix.dim, sample.seed)
        way = rotation.itq if prefix.rotation == "itq" else rotation.whitened_itq
        return way(truncate(transform.apply(fitting.rotation_rows), prefix.dim), sample.seed)

    return fitting.kept_matrix(key, learn)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write_parameters(
    root: Root, artefacts: Mapping[str, tuple[str, Matrix]], info: TableInfo, afresh: bool
) -> tuple[int, Record]:
    """Keep the fitted matrices where every reader finds them; the table's version and the record of its files."""
    schema = parameters_schema(info)
    book = Ledger(root, "parameters")
    name = _key(*sorted(artefacts), schema.metadata[METADATA_KEY].decode())
    slot = book.slot(name, store.wholeness(root, PARAMETERS))
    record = slot.record
    if record is None:
        rows: list[dict[str, Any]] = [
            {"digest": key, "kind": kind, "rows": len(values), "cols": values.shape[1], "values": values.ravel()}
            for key, (kind, values) in sorted(artefacts.items())
        ]
        table = pa.Table.from_pylist(rows, schema)
        written = store.write_fragments(root, PARAMETERS, table, schema, f"parameters/{slot.name}")
        record = book.add(slot.name, {"rows": len(rows), "digest": logical_digest(table), **written.to_json()})
    return store.commit(root, PARAMETERS, schema, record["fragments"], afresh), record
