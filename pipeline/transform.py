"""Affine transforms before truncation: transform(v) = (v - mean) @ matrix.

Fitted once on a seeded sample, stored in `parameters`, applied identically to corpus and queries.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline import rotation
from pipeline.vectors import Matrix


@dataclass(frozen=True)
class Transform:
    """`mean` is float32[D] and `matrix` float32[D, D]; both None for kind `none`."""

    kind: str = "none"
    mean: Matrix | None = None
    matrix: Matrix | None = None

    def apply(self, vectors: Matrix) -> Matrix:
        """Transform float rows [n, D]; float32 comes back. Kind `none` returns them as they are."""
        vectors = np.asarray(vectors, dtype=np.float32)
        if self.mean is None or self.matrix is None:
            return vectors
        return np.asarray((vectors - self.mean) @ self.matrix, dtype=np.float32)

    def stacked(self) -> Matrix:
        """The artefact as it is stored: D + 1 rows, the mean and then the matrix."""
        assert self.mean is not None and self.matrix is not None
        return np.vstack([self.mean[None, :], self.matrix])

    def digest(self) -> str | None:
        """Its name in `parameters`; None for kind `none`."""
        return None if self.matrix is None else digest(self.kind, self.stacked())

    @classmethod
    def unstacked(cls, kind: str, rows: Matrix) -> "Transform":
        """The transform kept in `parameters` under `kind`."""
        return cls(kind, rows[0], rows[1:])


def digest(kind: str, values: Matrix) -> str:
    """Name of a fitted artefact: sha256 over kind, shape and float32 values."""
    values = np.ascontiguousarray(values, dtype="<f4")
    return hashlib.sha256(f"{kind} {values.shape}\n".encode() + values.tobytes()).hexdigest()


@dataclass
class Moments:
    """Count, mean and scatter of a stream of rows, in float64; memory is D x D."""

    dim: int
    count: int = 0
    total: NDArray[np.float64] = field(init=False)
    products: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.total = np.zeros(self.dim)
        self.products = np.zeros((self.dim, self.dim))

    def add(self, rows: Matrix) -> None:
        """Take in rows [n, D]."""
        rows = np.asarray(rows, dtype=np.float64)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows

    def mean(self) -> NDArray[np.float64]:
        """float64[D]."""
        return self.total / max(self.count, 1)

    def covariance(self) -> NDArray[np.float64]:
        """float64[D, D], divided by the count."""
        return self.products / max(self.count, 1) - np.outer(self.mean(), self.mean())

    def without(self, rows: Matrix) -> "Moments":
        """The moments of the same stream less these rows, which were part of it."""
        part, rest = Moments(self.dim), Moments(self.dim)
        part.add(rows)
        rest.count, rest.total = self.count - part.count, self.total - part.total
        rest.products = self.products - part.products
        return rest


def pca(moments: Moments) -> tuple[Transform, NDArray[np.float64]]:
    """Centred PCA and the variance along each component, largest first.

    Each component's largest number is positive, so that the sign is fixed.
    """
    variances, components = np.linalg.eigh(moments.covariance())
    variances, components = variances[::-1].clip(min=0), components[:, ::-1]
    peaks = components[np.abs(components).argmax(axis=0), np.arange(moments.dim)]
    components = components * np.where(peaks < 0, -1.0, 1.0)
    return Transform("pca", moments.mean().astype(np.float32), components.astype(np.float32)), variances


def random_rotation(dim: int, seed: int) -> Transform:
    """A rotation drawn evenly from all: what a cut keeps when the order of the dimensions means nothing."""
    return Transform("random", np.zeros(dim, np.float32), rotation.random(dim, seed))


def shuffled(dim: int, seed: int) -> Transform:
    """The same dimensions in another order."""
    return _reordered("shuffled", np.random.default_rng(seed).permutation(dim))


def _reordered(kind: str, order: Sequence[int] | NDArray[np.int64]) -> Transform:
    matrix = np.zeros((len(order), len(order)), np.float32)
    matrix[order, np.arange(len(order))] = 1
    return Transform(kind, np.zeros(len(order), np.float32), matrix)


def order(moments: Moments) -> Transform:
    """Dimensions by importance, unturned: each prefix is a choice of raw coordinates.

    Greedy: the next dimension is the one that brings the linear CKA (Kornblith et al. 2019) of the chosen
    coordinates with all of them highest, which the squared entries of the covariance alone decide.
    """
    weights = moments.covariance() ** 2
    to_all, within = weights.sum(axis=1), np.zeros(moments.dim)
    left = np.ones(moments.dim, bool)
    chosen: list[int] = []
    shared = norm = 0.0
    for _ in range(moments.dim):
        norms = norm + 2 * within + np.diag(weights)
        alignment = np.where(left, (shared + to_all) / np.sqrt(np.maximum(norms, 1e-300)), -np.inf)
        best = int(alignment.argmax())
        chosen.append(best)
        left[best] = False
        shared, norm = shared + to_all[best], float(norms[best])
        within += weights[best]
    return _reordered("order", chosen)
