"""Exact search by one float32 matrix product (NumPy's BLAS)."""

from pathlib import Path

import numpy as np

from pipeline.vectors import Matrix
from tests.bench.measure import Contender, Search, Setting
from tests.bench.sets import K, Set


def contenders() -> list[Contender]:
    """The one that defines the truth."""
    return [Contender("exact-blas", "exact", "nothing", _nothing, _start, lambda _: [{"vectors": "float32 in memory"}])]


def _nothing(of: Set, folder: Path) -> dict[str, float]:
    return {}


def _start(of: Set, folder: Path) -> Search:
    rows = np.empty((of.rows, of.dim), np.float32)
    for start, block in of.blocks():
        rows[start : start + len(block)] = block

    def search(queries: Matrix, setting: Setting) -> Matrix:
        scores = rows @ queries.T
        best = np.empty((len(queries), K), np.int64)
        for number, column in enumerate(np.ascontiguousarray(scores.T)):
            picked = np.argpartition(column, -K)[-K:]
            best[number] = picked[np.argsort(-column[picked], kind="stable")]
        return best

    return search
