"""Codes of one table held in memory or mapped from a file, and the kernels that scan them.

The kernels are faiss': hamming distances, bits against a float query (4-bit look-up tables), scalar-quantized and
float products. Whatever they round, an exact pass over slightly more rows than asked decides, so that the answer is
that of a scan from disk. The table is cut into one part per core, which threads scan at the same time.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import MIN_NORM, Codec, Matrix, Scoring, sign_scores, top

THREADS = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
PART_ROWS = 65_536
"""A part has at least this many rows: handing a smaller one to a thread costs more than it saves."""
OVERFETCH = 1.5
"""Rows asked of a rounding kernel, as a multiple of those wanted (enough to prove the cut on all but few queries)."""
SUBSETS = 8
"""Filtered copies of the codes that are kept for the next query with the same filter."""
MANY = 4
"""Where more than 1 / MANY of the rows are wanted, all are scored."""
BLOCK = 8_192


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
            return self._merged(self._parts, prefixes, keep)
        if scoring == "hamming":
            offsets, distances = self._merged(self._hamming, self.codec.encode(prefixes), keep)
            return offsets, ((self.dim + 2 * distances) / np.float32(self.dim)).astype(np.float32)
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
        picked = top(scores, keep)
        return picked, np.take_along_axis(scores, picked, 1)

    def _asymmetric(self, prefixes: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
        """Look-up tables of rounded bytes find enough rows that exact scores settle which are the best."""
        queries = self.codec.rotated(prefixes)
        error = _table_error(queries)
        offsets = np.empty((len(queries), keep), np.int64)
        scores = np.empty((len(queries), keep), np.float32)
        left, fetch = np.arange(len(queries)), int(keep * OVERFETCH) + 16
        while len(left):
            fetch = min(fetch, len(self))
            found, rough = self._merged(self._signs, _nibble_order(queries[left]), fetch)
            order = np.argsort(found, axis=1)
            found = np.take_along_axis(found, order, 1)
            exact = sign_scores(queries[left], self.codes[found])
            picked = top(exact, keep)
            exact = np.take_along_axis(exact, picked, 1)
            last = exact[:, -1] * np.sqrt(np.float32(self.dim))
            proven = (last > rough.min(axis=1) + error[left]) | (fetch == len(self))
            offsets[left], scores[left] = np.take_along_axis(found, picked, 1), exact
            left, fetch = left[~proven], fetch * 2
        return offsets, scores

    def _merged(self, parts: Sequence[Any], queries: Matrix, keep: int) -> tuple[NDArray[np.int64], Matrix]:
        """Ask every part at the same time; the best of all, ties by lower position."""
        queries = np.ascontiguousarray(queries)
        if len(parts) == 1:
            found = [parts[0](queries, keep)]
        else:
            found = list(threads().map(lambda part: part(queries, keep), parts))
        offsets, scores = (np.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
        order = np.lexsort((offsets, -scores), axis=1)[:, :keep]
        return np.take_along_axis(offsets, order, 1), np.take_along_axis(scores, order, 1)

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        count = max(1, min(THREADS, len(self) // PART_ROWS))
        edges = [len(self) * part // count for part in range(count + 1)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    @cached_property
    def _hamming(self) -> list[Any]:
        return [partial(_hamming_part, np.ascontiguousarray(self.codes[a:b]), a) for a, b in self._bounds]

    @cached_property
    def _signs(self) -> list[Any]:
        return [partial(_index_part, _sign_index(np.ascontiguousarray(self.codes[a:b])), a) for a, b in self._bounds]

    @cached_property
    def _parts(self) -> list[Any]:
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
            _pool = ThreadPoolExecutor(THREADS, "scan", initializer=_alone)
        return _pool


def _alone() -> None:
    """Faiss' own threads would wait for each other inside ours; the setting holds for the calling thread."""
    if has("faiss"):
        import faiss

        faiss.omp_set_num_threads(1)


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
    index: Any = faiss.IndexPQFastScan(flat)
    index.qbs = 0x44  # blocks of 8 queries (measured: 31 ms for 64 queries where the default takes 44)
    return index


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


def cosines(queries: Matrix, vectors: Matrix, offsets: NDArray[np.int64]) -> Matrix:
    """Cosines float32[q, m] of unit queries float32[q, d] with their own rows of vectors [n, d], off by at most 1e-5.

    -inf where the offset is -1. One query at a time, so that its rows stay in the core's cache; many queries are
    shared out among threads.
    """
    if len(queries) == 1:
        return _cosines(queries, vectors, offsets)
    cuts = np.linspace(0, len(queries), min(THREADS, len(queries)) + 1).astype(int)
    parts = zip(cuts[:-1], cuts[1:], strict=True)
    found = threads().map(lambda part: _cosines(queries[slice(*part)], vectors, offsets[slice(*part)]), parts)
    return np.concatenate(list(found))


def _cosines(queries: Matrix, vectors: Matrix, offsets: NDArray[np.int64]) -> Matrix:
    scores = np.full(offsets.shape, -np.inf, np.float32)
    for query, places, out in zip(queries, offsets, scores, strict=True):
        known = places >= 0
        wide = _widened(vectors.take(places[known], axis=0))
        lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        out[known] = wide @ query / np.maximum(lengths, np.float32(MIN_NORM))
    return scores


def _widened(rows: Matrix) -> Matrix:
    """float16 as float32 (numkong takes a twentieth of NumPy's time)."""
    if rows.dtype != np.float16 or not has("numkong"):
        return rows.astype(np.float32, copy=False)
    import numkong

    return np.asarray(numkong.astype(rows, "float32"))
