"""Affine transforms before truncation: transform(v) = (v - mean) @ matrix.

Fitted once on a seeded sample, stored in `parameters`, applied identically to corpus and queries.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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


def pca(moments: Moments) -> tuple[Transform, NDArray[np.float64]]:
    """Centred PCA and the variance along each component, largest first.

    Each component's largest number is positive, so that the sign is fixed.
    """
    mean = moments.total / max(moments.count, 1)
    covariance = moments.products / max(moments.count, 1) - np.outer(mean, mean)
    variances, components = np.linalg.eigh(covariance)
    variances, components = variances[::-1].clip(min=0), components[:, ::-1]
    peaks = components[np.abs(components).argmax(axis=0), np.arange(moments.dim)]
    components = components * np.where(peaks < 0, -1.0, 1.0)
    return Transform("pca", mean.astype(np.float32), components.astype(np.float32)), variances
