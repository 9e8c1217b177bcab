"""Codes of one table held in memory or mapped from a file, and the kernels that scan them.

The kernels are faiss': hamming distances, bits against a float query (4-bit look-up tables), scalar-quantized and
float products. Whatever they round, an exact pass over slightly more rows than asked decides, so that the answer is
that of a scan from disk. The table is cut into one part per core, which threads scan at the same time.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cores import THREADS, has, spread
from pipeline.vectors import Codec, Matrix, Scoring, along, best, sign_scores

PART_BYTES = 3_000_000
"""A part has at least this many bytes: handing a smaller one to a thread costs more than it saves (0.1 ms)."""
OVERFETCH = 1.2
"""Rows asked of a rounding kernel, as a multiple of those wanted (enough to prove the cut on all but few queries)."""
SIDE_BY_SIDE = 64
"""Rows that a look-up serves at once (measured: 0.22 ms for 250,000 rows of 128 bits; 0.27 at faiss' default, 32)."""
SUBSETS = 8
"""Filtered copies of the codes that are kept for the next query with the same filter."""
MANY = 4
"""Where more than 1 / MANY of the rows are wanted, all are scored."""
BLOCK = 8_192


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
    return faiss.IndexPQFastScan(flat, SIDE_BY_SIDE)


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
