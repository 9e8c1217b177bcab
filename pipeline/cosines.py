"""Cosines of float queries with full vectors, float16 or float32: quick ones that say which are worth exact ones."""

import numpy as np
from numpy.typing import NDArray

from pipeline.cores import has, spread
from pipeline.vectors import MIN_NORM, Matrix, best, unit

FEW = 64
"""Rows that one thread scores sooner than two."""
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
        return np.asarray(unit(rows) @ query.astype(np.float32))
    import numkong

    return np.asarray(1 - np.asarray(numkong.cdist(query[None], rows, "angular"))[0])


def nearest_full(queries: Matrix, vectors: Matrix, keep: int, before: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """Places [q, keep] and exact cosines of the best of vectors [n, d] that can still beat scores `before` [q, …].

    -1 and -inf where there are fewer. Products in float32 tell which rows are worth exact ones.
    """
    wide = widened(vectors)
    lengths = np.maximum(np.sqrt(np.einsum("ij,ij->i", wide, wide)), np.float32(MIN_NORM))
    rough = (queries @ wide.T) / lengths
    together = np.concatenate([before, rough], axis=1)
    cut = max(0, together.shape[1] - keep)
    floor = np.partition(together, cut, axis=1)[:, cut] - ROUNDING
    query, column = np.nonzero(rough >= floor[:, None])
    scores = np.full(rough.shape, -np.inf, np.float32)
    scores[query, column] = exact_cosines(queries[query], vectors[column])
    places, scores = best(scores, np.arange(len(vectors)), keep)
    return np.where(np.isfinite(scores), places, -1), scores


def widened(rows: Matrix) -> Matrix:
    """float16 as float32 (numkong takes a twentieth of NumPy's time)."""
    if rows.dtype != np.float16 or not has("numkong"):
        return rows.astype(np.float32, copy=False)
    import numkong

    return np.asarray(numkong.astype(np.ascontiguousarray(rows), "float32"))


def exact_cosines(queries: Matrix, rows: Matrix) -> Matrix:
    """Cosines float32[n] of unit queries [n, d] each with its own row [n, d], which is brought to length 1.

    Products are summed in float64, so that equal rows tie whatever stands beside them.
    """

    def some(part: slice) -> Matrix:
        pairs = unit(widened(rows[part])).astype(np.float64), queries[part].astype(np.float64)
        return np.asarray(np.einsum("ij,ij->i", *pairs), np.float32)

    return np.concatenate(spread(some, len(rows))) if len(rows) > FEW else some(slice(None))
