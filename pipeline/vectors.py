"""Vector maths, once for corpus and queries: unit length, truncation, codecs, top k.

Everything here is a pure function of NumPy arrays; rows are vectors. The order is fixed:
transform, truncate (which includes unit length), encode.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]
Precision = Literal["float32", "float16", "int8", "binary"]
Scoring = Literal["dot", "asymmetric", "hamming"]
"""How codes are scored: `dot` for numbers; for binary a float query against bits, or bits against bits."""

MIN_NORM = 1e-12
"""Below this length a vector has no direction (float32 squares underflow near 1e-23)."""


def unit(vectors: Matrix) -> Matrix:
    """Bring each row to length 1, in float32; rows shorter than `MIN_NORM` stay as they are."""
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms < MIN_NORM, np.float32(1), norms)


def truncate(vectors: Matrix, dim: int) -> Matrix:
    """Keep the first `dim` numbers of each row and bring it back to length 1.

    Raises ValueError where `dim` is not within 1 … the rows' own dimension.
    """
    if not 1 <= dim <= vectors.shape[1]:
        raise ValueError(f"cannot keep {dim} of {vectors.shape[1]} dimensions")
    return unit(vectors[:, :dim])


@dataclass(frozen=True)
class Codec:
    """How a prefix (unit float32 rows) is stored, and how stored codes are scored.

    `scale` (int8 only) is float32[dim]; `rotation` (binary only) is float32[dim, dim] or None
    for the identity.
    """

    kind: Precision
    scale: Matrix | None = None
    rotation: Matrix | None = None

    def encode(self, prefix: Matrix) -> Matrix:
        """Codes of unit rows: float16/float32[n, dim], int8[n, dim] or uint8[n, dim / 8]."""
        if self.kind == "int8":
            assert self.scale is not None
            return np.clip(np.rint(prefix / self.scale), -127, 127).astype(np.int8)
        if self.kind == "binary":
            return np.packbits(self.rotated(prefix) > 0, axis=-1)
        return prefix.astype(self.kind)

    def scores(self, queries: Matrix, codes: Matrix, scoring: Scoring | None = None) -> Matrix:
        """Similarity of unit query prefixes [q, dim] to codes [n, …], float32[q, n], higher is better.

        The dot product. For binary, `asymmetric` (None takes it) is the dot product of the query with the unit vector
        of signs, `hamming` is 1 - 2 * hamming distance / dim. Equal codes score equal to the last bit.
        """
        if self.kind == "int8":
            assert self.scale is not None
            return (queries * self.scale) @ codes.astype(np.float32).T
        if self.kind == "binary":
            signs = _signs(codes)
            width = np.float32(signs.shape[1])
            if scoring == "hamming":
                return np.asarray((_signs(self.encode(queries)) @ signs.T) / width)
            return np.asarray(_exact_products(self.rotated(queries), signs) / np.sqrt(width))
        return np.asarray(queries @ codes.astype(np.float32).T)

    def scores_each(self, queries: Matrix, codes: Matrix, scoring: Scoring | None = None) -> Matrix:
        """The same for each query's own codes [q, n, …], float32[q, n]."""
        if self.kind != "binary":
            scaled = queries if self.scale is None else queries * self.scale
            return np.asarray((codes.astype(np.float32) @ scaled[:, :, None])[:, :, 0])
        width = np.float32(codes.shape[-1] * 8)
        if scoring == "hamming":
            bits = np.bitwise_count(codes ^ self.encode(queries)[:, None]).sum(axis=-1, dtype=np.int64)
            return np.asarray((width - 2 * bits.astype(np.float32)) / width, np.float32)
        return sign_scores(self.rotated(queries), codes)

    def clipped_share(self, prefix: Matrix) -> float:
        """Share of numbers that int8 cuts off at ±127; 0.0 for the other kinds."""
        if self.scale is None or not prefix.size:
            return 0.0
        return float((np.abs(np.rint(prefix / self.scale)) > 127).mean())

    def rotated(self, prefix: Matrix) -> Matrix:
        """What a binary prefix's signs are taken of: the prefix turned, float32[n, dim]."""
        return prefix if self.rotation is None else prefix @ self.rotation


def _signs(codes: Matrix) -> Matrix:
    """Packed bits as -1 and 1, float32[n, dim]."""
    return np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1


def _exact_products(queries: Matrix, signs: Matrix) -> Matrix:
    """Dot products with signs, free of rounding whatever the order of summing, so that equal codes tie."""
    whole, step = _on_grid(queries)
    return np.asarray((whole @ signs.T) * step, dtype=np.float32)


def sign_scores(rotated: Matrix, codes: Matrix) -> Matrix:
    """The asymmetric score of each rotated query [q, dim] with its own codes uint8[q, n, dim / 8], float32[q, n].

    A sum with signs is twice the sum over the set bits, less the sum over all: whole numbers on the query's grid.
    """
    whole, step = _on_grid(rotated)
    bits = np.unpackbits(codes, axis=-1).astype(np.float32)
    sums = 2 * np.matmul(bits, whole[:, :, None])[:, :, 0] - whole.sum(axis=1, keepdims=True)
    return np.asarray((sums * step) / np.sqrt(np.float32(rotated.shape[1])), np.float32)


def _on_grid(queries: Matrix) -> tuple[Matrix, Matrix]:
    """Whole numbers float32[q, dim] and their step [q, 1]: every partial sum with signs is a whole number below 2^24.

    The absolute error per number is at most 2^-24 of the row's sum of absolute values.
    """
    sums = np.abs(queries).sum(axis=1, keepdims=True)
    step = np.exp2(np.ceil(np.log2(np.maximum(sums, MIN_NORM))) - 23).astype(np.float32)
    return np.rint(queries / step).astype(np.float32), step


def int8_scale(largest: Matrix) -> Matrix:
    """One step per dimension so that `largest` (float[dim], absolute values) maps to 127.

    Rounded up to four significant digits: the table's metadata stays under 16 KB up to some 1,700
    dimensions, and the stored text is exactly the number that encoded.
    """
    step = np.maximum(np.asarray(largest, dtype=np.float64), 1e-6) / 127
    digit = 10.0 ** (np.floor(np.log10(step)) - 3)
    return (np.ceil(step / digit - 1e-9) * digit).astype(np.float32)


@dataclass
class Magnitudes:
    """Histogram of the absolute values of each dimension of unit rows, over a stream; memory is dim x `BINS` counts."""

    BINS: ClassVar[int] = 4_096
    dim: int
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.counts = np.zeros((self.dim, self.BINS), np.int64)

    def add(self, rows: Matrix) -> None:
        """Take in unit rows [n, dim]."""
        bins = np.minimum((np.abs(rows) * self.BINS).astype(np.int64), self.BINS - 1)
        bins += np.arange(self.dim) * self.BINS
        self.counts += np.bincount(bins.ravel(), minlength=self.counts.size).reshape(self.counts.shape)

    def percentile(self, share: float) -> Matrix:
        """Per dimension, the smallest bin edge that at least `share` of the values do not exceed, float32[dim]."""
        reached = np.cumsum(self.counts, axis=1) >= share * self.counts.sum(axis=1, keepdims=True)
        return np.asarray((reached.argmax(axis=1) + 1) / self.BINS, np.float32)


def code_width(dim: int, precision: Precision) -> int:
    """Numbers per stored row: dim, or dim / 8 bytes of packed bits."""
    return dim // 8 if precision == "binary" else dim


def code_dtype(precision: Precision) -> np.dtype[Any]:
    """The element type of stored codes."""
    return np.dtype({"binary": "uint8"}.get(precision, precision))


def vector_columns(blocks: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Columns that hold the numbers between the ends of nested blocks, `vector_0_64` and on, with where each stands."""
    return {f"vector_{start}_{end}": (start, end) for start, end in pairwise([0, *blocks])}


def bytes_per_row(dim: int, precision: Precision) -> int:
    """Bytes of one stored code."""
    return code_width(dim, precision) * code_dtype(precision).itemsize


def along(values: Matrix, columns: NDArray[np.int64]) -> Matrix:
    """Per row, the values in these columns: `np.take_along_axis(values, columns, 1)` in a fifth of its time."""
    return np.asarray(values[np.arange(len(values))[:, None], columns])


def top(scores: Matrix, k: int) -> NDArray[np.int64]:
    """Columns of the k highest float32 scores per row, best first, ties by lower column.

    Shape [rows, min(k, columns)]; scores must be finite or -inf.
    """
    places, _ = best(scores, np.arange(scores.shape[1]), k)
    return places


def best(scores: Matrix, places: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], Matrix]:
    """The k highest float32 scores per row and their places (below 2^32 - 1), best first, ties by lower place.

    Shapes [rows, min(k, columns)]; scores must be finite or -inf.
    """
    keys = sort_keys(scores, places)
    columns = keys.shape[1]
    if k < columns:
        keys = np.partition(keys, columns - k, axis=1)[:, columns - k :]
    keys = np.sort(keys, axis=1)[:, ::-1]
    ascending = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ascending >> 31, ascending ^ np.uint32(0x80000000), ~ascending)
    found: NDArray[np.int64] = _LAST - (keys & np.uint64(_LAST)).astype(np.int64)
    return found, bits.view(np.float32)


_LAST = 0xFFFFFFFF


def sort_keys(scores: Matrix, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Score and place in one number, higher is better, so that ties are settled exactly; place -1 comes last."""
    bits = np.ascontiguousarray(scores + np.float32(0), dtype=np.float32).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000)).astype(np.uint64)
    return np.asarray((ascending << np.uint64(32)) | (_LAST - (places & _LAST)).astype(np.uint64))
