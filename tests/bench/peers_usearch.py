"""usearch: an HNSW graph over int8 full vectors, as it ranks them and with its shortlist rescored from memory."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.vectors import Matrix
from tests.bench.measure import Contender, Search, Setting
from tests.bench.sets import K, Rescorer, Set

FILE = "index.usearch"


def contenders() -> list[Contender]:
    """One graph, opened in two ways."""

    def one(name: str, rescored: bool) -> Contender:
        def start(of: Set, folder: Path) -> Search:
            return _start(of, folder, Rescorer(of) if rescored else None)

        def settings(of: Set) -> list[Setting]:
            wide = (64,) if of.quick else (32, 64, 128, 256, 512)
            return [{"dtype": "i8", "expansion_search": ef} | ({"shortlist": 50} if rescored else {}) for ef in wide]

        return Contender(name, "usearch", "usearch-i8", _make, start, settings, ("usearch.index",))

    return [one("usearch-i8", False), one("usearch-i8-rescored", True)]


def _index(of: Set) -> Any:
    from usearch.index import Index

    return Index(ndim=of.dim, metric="cos", dtype="i8")


def _make(of: Set, folder: Path) -> dict[str, float]:
    start, index = time.perf_counter(), _index(of)
    for first, rows in of.blocks():
        index.add(np.arange(first, first + len(rows)), rows, threads=of.threads)
    added = time.perf_counter()
    index.save(str(folder / FILE))
    return {"add": added - start, "write": time.perf_counter() - added}


def _start(of: Set, folder: Path, rescore: Rescorer | None) -> Search:
    index = _index(of)
    index.load(str(folder / FILE))

    def search(queries: Matrix, setting: Setting) -> Matrix:
        index.expansion_search = setting["expansion_search"]
        size = setting.get("shortlist", K)
        found = index.search(queries, size, threads=of.threads if len(queries) > 1 else 1)
        keys = np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)
        return keys if rescore is None else rescore(queries, keys)

    return search
