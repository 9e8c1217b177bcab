"""Codes of one table held in memory or mapped from a file, and the kernels that scan them.

The kernels are faiss': hamming distances, bits against a float query (4-bit look-up tables), scalar-quantized and
float products. Whatever they round, an exact pass over slightly more rows than asked decides, so that the answer is
that of a scan from disk. The table is cut into one part per core, which threads scan at the same time.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from pipeline.vectors import Codec, Matrix, Scoring, along, best, sign_scores, unit

THREADS = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
PART_BYTES = 3_000_000
"""A part has at least this many bytes: handing a smaller one to a thread costs more than it saves (0.1 ms)."""
OVERFETCH = 1.2
"""Rows asked of a rounding kernel, as a multiple of those wanted (enough to prove the cut on all but few queries)."""
SUBSETS = 8
"""Filtered copies of the codes that are kept for the next query with the same filter."""
MANY = 4
"""Where more than 1 / MANY of the rows are wanted, all are scored."""
BLOCK = 8_192
FEW = 64
"""Rows that one thread scores sooner than two."""
Result = TypeVar("Result")


@cache
def has(package: str) -> bool:
    """Whether an optional package is installed."""
    return find_spec(package) is not None


def available() -> str:
    """Why codes cannot be held in memory; empty where they can."""
    missing = [package for package in ("faiss", "numkong") if not has(package)]
    if missing:
        return f"{' and '.join(missing)} not installed (pip install 'matryoshka-pipeline[resident]')"
    return ""


class Held:
    """Codes [n, width] of a table in row order; safe to share between threads.

    `rows` are their row numbers int64[n], None where each is its position. A subset knows the positions in the table
    that its codes have (`places`).
    """

    def __init__(
        self,
        codes: Matrix,
        codec: Codec,
        dim: int,
        rows: NDArray[np.int64] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> None:
        """Take codes as they lie in the table; nothing is copied before a kernel needs it."""
        self.codes, self.codec, self.dim = codes, codec, dim
        self._rows, self._places = rows, places
        self._subsets: OrderedDict[str, Held] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Rows."""
        return len(self.codes)

    def offsets(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in the table of positions that `nearest` found."""
        return found if self._places is None else self._places[found]

    def rows(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers at positions in the table."""
        return offsets if self._rows is None else self._rows[offsets]

    def nearest(self, prefixes: Matrix, keep: int, scoring: Scoring) -> tuple[NDArray[np.int64], Matrix]:
        """Positions and scores [q, min(keep, n)] of the best codes of each unit query prefix, ties by lower position.

        Scores are `Codec.scores`: for bits equal to the last bit, for numbers up to rounding in float32.
        """
        keep = min(keep, len(self))
        if keep * MANY >= len(self):
            return self._everything(prefixes, keep, scoring)
        if self.codec.kind != "binary":
            return best(*self._asked(self._numbers, prefixes, keep)[::-1], keep)
        if scoring == "hamming":
            offsets, distances = self._asked(self._hamming, self.codec.encode(prefixes), keep)
            return best(((self.dim + 2 * distances) / np.float32(self.dim)).astype(np.float32), offsets, keep)
        return self._asymmetric(prefixes, keep)

    def subset(self, name: str, places: NDArray[np.int64]) -> "Held":
        """Only the codes at ascending positions, kept for the next call with this name."""
        with self._lock:
            part = self._subsets.pop(name, None)
        if part is None:
            part = Held(self.codes[places], self.codec, self.dim, self._rows, places)
        with self._lock:
            self._subsets[name] = part
            while len(self._subsets) > SUBSETS:
                self._subsets.popitem(last=False)
        return part

    def _everything(self, prefixes: Matrix, keep: int, scoring: Scoring) -> tuple[NDArray[np.int64], Matrix]:
        blocks = [
            self.codec.scores(prefixes, np.asarray(self.codes[start : start + BLOCK]), scoring)
            for start in range(0, len(self), BLOCK)
        ]
        scores = np.concatenate(blocks, axis=1) if blocks else np.zeros((len(prefixes), 0), np.float32)
        return best(scores, np.arange(len(self)), keep)

    def _asymmetric(self, prefixes: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
        """Look-up tables of rounded bytes find enough rows that exact scores settle which are the best."""
        queries = self.codec.rotated(prefixes)
        error = _table_error(queries)
        offsets = np.empty((len(queries), keep), np.int64)
        scores = np.empty((len(queries), keep), np.float32)
        left, fetch = np.arange(len(queries)), int(keep * OVERFETCH) + 16
        while len(left):
            fetch = min(fetch, len(self))
            found, rough = self._asked(self._signs, _nibble_order(queries[left]), fetch)
            settle = partial(self._settled, queries[left], found, rough, fetch, keep)
            offsets[left], scores[left], floor = (
                np.concatenate(part) for part in zip(*spread(settle, len(left)), strict=True)
            )
            last = scores[left, -1] * np.sqrt(np.float32(self.dim))
            proven = (last > floor + error[left]) | (fetch == len(self))
            left, fetch = left[~proven], fetch * 2
        return offsets, scores

    def _settled(
        self, queries: Matrix, found: NDArray[np.int64], rough: Matrix, fetch: int, keep: int, part: slice
    ) -> tuple[NDArray[np.int64], Matrix, Matrix]:
        """The best by exact scores, and the least rough score that was let in, of some of the queries."""
        queries, found, rough = queries[part], found[part], rough[part]
        if rough.shape[1] > fetch:
            picked = np.argpartition(rough, rough.shape[1] - fetch, axis=1)[:, rough.shape[1] - fetch :]
            found, rough = along(found, picked), along(rough, picked)
        return *best(sign_scores(queries, self.codes[found]), found, keep), rough.min(axis=1)

    def _asked(self, parts: Sequence[Any], queries: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
        """The best of every part for each query, one after the other; a small table is one part for several queries.

        Parts, or those queries, are shared out among all cores.
        """
        queries = np.ascontiguousarray(queries)
        if len(parts) == 1:
            found = spread(lambda some: _asked(parts[0], queries[some], keep), len(queries))
        else:
            found = spread(lambda some: _asked(parts[some.start], queries, keep), len(parts))
        offsets, scores = (np.concatenate(columns, axis=int(len(parts) > 1)) for columns in zip(*found, strict=True))
        return offsets, scores

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        count = max(1, min(THREADS, self.codes.nbytes // PART_BYTES))
        edges = [len(self) * part // count for part in range(count + 1)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    @cached_property
    def _hamming(self) -> list[Any]:
        return [partial(_hamming_part, np.ascontiguousarray(self.codes[a:b]), a) for a, b in self._bounds]

    @cached_property
    def _signs(self) -> list[Any]:
        return [partial(_index_part, _sign_index(np.ascontiguousarray(self.codes[a:b])), a) for a, b in self._bounds]

    @cached_property
    def _numbers(self) -> list[Any]:
        return [
            partial(_index_part, _number_index(np.ascontiguousarray(self.codes[a:b]), self.codec), a)
            for a, b in self._bounds
        ]


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def threads() -> ThreadPoolExecutor:
    """One thread per core, shared by every open index of this process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(THREADS, "scan")
        return _pool


def spread(work: Callable[[slice], Result], count: int) -> list[Result]:
    """What `work` gives for consecutive slices of `count` things, one per core, in order.

    The caller's thread takes the first: handing it over would cost 0.1 ms (measured).
    """
    cuts = np.linspace(0, count, max(1, min(THREADS, count)) + 1).astype(int)
    first, *others = [slice(int(a), int(b)) for a, b in pairwise(cuts)]
    waiting = [threads().submit(work, part) for part in others]
    return [work(first), *(one.result() for one in waiting)]


def _asked(part: Any, queries: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
    """One part of the codes, on this thread alone."""
    import faiss

    usual = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        found: tuple[NDArray[np.int64], Matrix] = part(queries, keep)
    finally:
        faiss.omp_set_num_threads(usual)
    return found


@cache
def _blas() -> list[Any]:
    """What sets the threads of NumPy's matrix products."""
    return [one for one in ThreadpoolController().lib_controllers if one.user_api == "blas"]


_inside, _before = 0, list[int]()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products on the caller's thread alone, for the process, until the last caller leaves.

    OpenBLAS' threads go on spinning for some 25 ms after a small product, on the cores that the scans need (measured:
    64 queries take twice as long).
    """
    global _inside, _before
    with _pool_lock:
        if _inside == 0:
            _before = [one.get_num_threads() for one in _blas()]
            for one in _blas():
                one.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _pool_lock:
            _inside -= 1
            if _inside == 0:
                for one, count in zip(_blas(), _before, strict=True):
                    one.set_num_threads(count)


def _hamming_part(codes: Matrix, start: int, queries: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
    """Positions and negative distances, by counting; equal distances come by lower position."""
    import faiss

    distances, offsets = faiss.knn_hamming(queries, codes, min(keep, len(codes)), variant="mc")
    return offsets + start, -distances


def _index_part(index: Any, start: int, queries: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
    scores, offsets = index.search(queries, min(keep, index.ntotal))
    return offsets + start, scores


def _sign_index(codes: Matrix) -> Any:
    """Packed bits as 4-bit codes of a product quantizer whose centroids are the sixteen patterns of signs."""
    import faiss

    dim = codes.shape[1] * 8
    patterns = ((np.arange(16)[:, None] >> np.arange(3, -1, -1)) & 1) * np.float32(2) - 1
    flat: Any = faiss.IndexPQ(dim, dim // 4, 4, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.tile(patterns.reshape(-1), dim // 4).astype(np.float32), flat.pq.centroids)
    flat.is_trained = True
    flat.add_sa_codes(codes)
    return faiss.IndexPQFastScan(
        flat, 64
    )  # rows side by side (measured: a query 0.22 ms where the default 32 take 0.27)


def _nibble_order(queries: Matrix) -> Matrix:
    """Dimensions as the 4-bit codes hold them: the low half of a byte, which has its last four, comes first."""
    return queries.reshape(len(queries), -1, 2, 4)[:, :, ::-1].reshape(len(queries), -1)


def _table_error(queries: Matrix) -> Matrix:
    """How far the sum of rounded look-up tables is from the dot product with signs, float32[q].

    faiss rounds each of dim / 4 tables to whole steps of 1 / a, a = min(255 / widest table, 65535 / sum of widths)
    (faiss/utils/quantize_lut.cpp, quantize_LUT_and_bias). The bound is six standard deviations of that many
    independent roundings (each step / sqrt(12)), and float32's own beside it.
    """
    spans = 2 * np.abs(queries).reshape(len(queries), -1, 4).sum(axis=2)
    step = np.maximum(spans.max(axis=1) / 255, spans.sum(axis=1) / 65_535)
    return np.asarray(6 * step * np.sqrt(spans.shape[1] / 12) + 1e-5 * spans.sum(axis=1), np.float32)


def _number_index(codes: Matrix, codec: Codec) -> Any:
    """int8 with its scales, float16 or float32 by inner product with the float query."""
    import faiss

    dim = codes.shape[1]
    index: Any
    if codec.kind == "float32":
        index = faiss.IndexFlatIP(dim)
        index.add(codes)
        return index
    if codec.kind == "float16":
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.add_sa_codes(codes.view(np.uint8))
        return index
    assert codec.scale is not None
    # faiss reads a byte as low + (byte + 0.5) / 255 * width: with these two it is scale * (byte - 128)
    index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.concatenate([-128.5 * codec.scale, 255 * codec.scale]), index.sq.trained)
    index.is_trained = True
    index.add_sa_codes(codes.view(np.uint8) ^ np.uint8(0x80))
    return index


ROUNDING = 1e-3
"""Twice what `cosines` may be off: float16 rounds each number of a unit query by at most 2^-11 of itself."""


def cosines(queries: Matrix, vectors: Matrix, offsets: NDArray[np.int64]) -> Matrix:
    """Cosines float32[q, m] of unit queries [q, d] with their own rows of vectors [n, d], off by at most ROUNDING / 2.

    -inf where the offset is -1. One query at a time, so that its rows stay in the core's cache; many queries are
    shared out among threads.
    """
    scores, queries = np.full(offsets.shape, -np.inf, np.float32), queries.astype(vectors.dtype)
    spread(lambda part: _cosines(queries[part], vectors, offsets[part], scores[part]), len(queries))
    return scores


def _cosines(queries: Matrix, vectors: Matrix, offsets: NDArray[np.int64], scores: Matrix) -> None:
    for query, places, out in zip(queries, offsets, scores, strict=True):
        known = slice(None) if places.min(initial=0) >= 0 else places >= 0
        rows = vectors.take(places[known], axis=0)
        out[known] = _cosine(query, rows) if len(rows) else 0


def _cosine(query: Matrix, rows: Matrix) -> Matrix:
    if not has("numkong"):
        return unit(rows) @ query.astype(np.float32)
    import numkong

    return np.asarray(1 - np.asarray(numkong.cdist(query[None], rows, "angular"))[0])


def exact_cosines(queries: Matrix, rows: Matrix) -> Matrix:
    """Cosines float32[n] of unit queries [n, d] each with its own row [n, d], which is brought to length 1.

    Products are summed in float64, so that equal rows tie whatever stands beside them.
    """

    def some(part: slice) -> Matrix:
        pairs = unit(rows[part]).astype(np.float64), queries[part].astype(np.float64)
        return np.asarray(np.einsum("ij,ij->i", *pairs), np.float32)

    return np.concatenate(spread(some, len(rows))) if len(rows) > FEW else some(slice(None))
