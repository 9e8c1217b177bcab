"""Matryoshka-like synthetic vectors, the same for everyone.

Clusters in a power-law spectrum: coordinate i has standard deviation (i+1)**-0.5, so that early dimensions carry most,
as in a model trained with the Matryoshka loss. Seed and exponent are fixed; only the size is an argument.
"""

from pathlib import Path

import numpy as np

SEED, EXPONENT, CLUSTERS, SPREAD, QUERIES, QUERY_NOISE = 0, -0.5, 4000, 0.7, 500, 0.21
BLOCK = 50_000


def unit(rows: np.ndarray) -> np.ndarray:
    """Each row at length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(n: int, d: int, out: Path) -> None:
    """Write corpus.npy (n, d) and queries.npy (500, d), float32, unit rows."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    scale = (np.arange(1, d + 1) ** EXPONENT).astype(np.float32)
    centres = rng.standard_normal((CLUSTERS, d), dtype=np.float32) * scale
    corpus = np.lib.format.open_memmap(out / "corpus.npy", mode="w+", dtype=np.float32, shape=(n, d))
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        noise = rng.standard_normal((size, d), dtype=np.float32) * scale
        corpus[start : start + size] = unit(centres[rng.integers(0, CLUSTERS, size)] + SPREAD * noise)
    near = corpus[np.sort(rng.choice(n, QUERIES, replace=False))]
    noise = rng.standard_normal((QUERIES, d), dtype=np.float32) * scale
    np.save(out / "queries.npy", unit(near + QUERY_NOISE * noise))
