"""The set that all contenders answer about: the same float16 rows, queries, prefixes and truth for each of them.

`prepare` writes them below the work folder; `Set` reads them back in each contender's process.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.vectors import Matrix, truncate, unit
from tests.bench import synthetic

K = 10
BLOCK = 50_000
PCA_ROWS = 100_000
WARM = 20
"""Queries before the clock runs; others than the timed ones where there are enough."""


@dataclass(frozen=True)
class Set:
    """Where the set lies and how it is measured.

    `seconds` is what one setting may take in a round for single queries, `prefix` how peers cut: plain, or after a PCA.
    """

    folder: str
    source: str
    rows: int
    dim: int
    queries: int
    prefix: str = "plain"
    seconds: float = 10.0
    threads: int = 2
    quick: bool = False

    @classmethod
    def load(cls, folder: Path) -> "Set":
        """The set that was prepared in a folder."""
        return cls(**json.loads((folder / "set.json").read_text()))

    @property
    def corpus(self) -> Matrix:
        """Stored rows float16[n, D], memory-mapped."""
        return np.load(Path(self.folder, "corpus.npy"), mmap_mode="r")

    @property
    def all_queries(self) -> Matrix:
        """Unit float32[q, D]: the timed ones, then those to warm up with."""
        return np.load(Path(self.folder, "queries.npy"))

    @property
    def truth(self) -> Matrix:
        """Rows of the ten nearest by exact cosine, int64[q, 10]."""
        return np.load(Path(self.folder, "truth.npy"))

    @property
    def short(self) -> int:
        """Dimensions of the peers' prefix: 128, less for shorter vectors."""
        return min(128, self.dim // 2)

    @property
    def bits(self) -> list[int]:
        """Lengths of binary prefixes."""
        return [bits for bits in (64, 128, 256) if bits <= self.dim]

    def blocks(self) -> Iterator[tuple[int, Matrix]]:
        """First row and unit float32[<= 50,000, D] of each block."""
        for start in range(0, self.rows, BLOCK):
            yield start, unit(self.corpus[start : start + BLOCK])  # mapped anew: old pages would count as memory

    def cut(self, vectors: Matrix, dim: int) -> Matrix:
        """The peers' unit prefix of unit rows."""
        if self.prefix == "pca":
            fitted = np.load(Path(self.folder, "pca.npz"))
            vectors = (vectors - fitted["mean"]) @ fitted["axes"][:, :dim]
        return truncate(vectors, dim)

    def prefixes(self, dim: int) -> Matrix:
        """The whole corpus cut to unit float32[n, dim]."""
        out = np.empty((self.rows, dim), np.float32)
        for start, rows in self.blocks():
            out[start : start + len(rows)] = self.cut(rows, dim)
        return out

    def cutter(self, dim: int) -> "Cutter":
        """The same cut for queries, its matrix held in memory."""
        if self.prefix != "pca":
            return Cutter(dim)
        fitted = np.load(Path(self.folder, "pca.npz"))
        return Cutter(dim, fitted["mean"], np.ascontiguousarray(fitted["axes"][:, :dim]))


@dataclass(frozen=True)
class Cutter:
    """Queries to unit prefixes."""

    dim: int
    mean: Matrix | None = None
    axes: Matrix | None = None

    def __call__(self, queries: Matrix) -> Matrix:
        """Unit float32[q, dim]."""
        return truncate(queries if self.axes is None else (queries - self.mean) @ self.axes, self.dim)


def prepare(asked: Set, source: tuple[Path, Path] | None) -> Set:
    """Write corpus, queries, the peers' PCA and the truth; `source` names corpus and queries, None: synthetic."""
    folder = Path(asked.folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "synthetic"
    if source is None:
        synthetic.write(asked.rows, asked.dim, made)
        source = (made / "corpus.npy", made / "queries.npy")
    rows, queries = (np.load(path, mmap_mode="r") for path in source)
    if rows.ndim != 2 or queries.ndim != 2 or rows.shape[1] != queries.shape[1]:
        raise SystemExit(f"corpus {rows.shape} and queries {queries.shape} must be matrices of one width")
    stored = np.lib.format.open_memmap(folder / "corpus.npy", mode="w+", dtype=np.float16, shape=rows.shape)
    for start in range(0, len(rows), BLOCK):
        block = np.asarray(rows[start : start + BLOCK], np.float32)
        far = np.abs(np.linalg.norm(block, axis=1) - 1).max() > 1e-3
        stored[start : start + BLOCK] = unit(block) if far else block
    stored.flush()
    count = min(asked.queries, len(queries))
    np.save(folder / "queries.npy", unit(queries[: count + WARM]))
    made_set = Set(**{**asdict(asked), "rows": len(rows), "dim": rows.shape[1], "queries": count})
    if asked.prefix == "pca":
        _fit_pca(made_set)
    np.save(folder / "truth.npy", _truth(made_set))
    shutil.rmtree(made, ignore_errors=True)
    (folder / "set.json").write_text(json.dumps(asdict(made_set)))
    return made_set


def _fit_pca(of: Set) -> None:
    """Centred PCA of seeded rows, for peers on models that were not trained for prefixes."""
    chosen = np.sort(np.random.default_rng(0).choice(of.rows, min(PCA_ROWS, of.rows), replace=False))
    sample = unit(of.corpus[chosen])
    mean = sample.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(sample - mean, rowvar=False))
    np.savez(Path(of.folder, "pca.npz"), mean=mean, axes=axes[:, ::-1].astype(np.float32))


def _truth(of: Set) -> Matrix:
    """The ten nearest of each timed query by float32 products, ties by row."""
    queries = of.all_queries[: of.queries]
    rows, scores = np.zeros((of.queries, 0), np.int64), np.zeros((of.queries, 0), np.float32)
    for start, block in of.blocks():
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (of.queries, len(block)))
        rows, scores = nearest(np.hstack([rows, numbers]), np.hstack([scores, queries @ block.T]), K)
    return rows


def nearest(rows: Matrix, scores: Matrix, k: int) -> tuple[Matrix, Matrix]:
    """The k best of each line, best first, ties by row: rows and scores [q, k]."""
    keep = min(k, scores.shape[1])
    picked = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
    rows, scores = np.take_along_axis(rows, picked, 1), np.take_along_axis(scores, picked, 1)
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


class Rescorer:
    """The stored rows in memory, float16[n, D], for peers that have only a shortlist."""

    def __init__(self, of: Set) -> None:
        self._rows = np.load(Path(of.folder, "corpus.npy"))
        norms = [np.linalg.norm(block.astype(np.float32), axis=1) for block in _slices(self._rows)]
        self._norms = np.concatenate(norms)

    def __call__(self, queries: Matrix, found: Matrix) -> Matrix:
        """The ten best of each shortlist int64[q, s] (-1: none) by exact cosine, int64[q, 10]."""
        best = np.full((len(queries), K), -1, np.int64)
        for number, query in enumerate(queries):
            mine = found[number][found[number] >= 0]
            scores = (self._rows[mine].astype(np.float32) @ query) / self._norms[mine]
            rows, _ = nearest(mine[None], scores[None], K)
            best[number, : rows.shape[1]] = rows[0]
        return best


def _slices(rows: Matrix) -> Iterator[Matrix]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
