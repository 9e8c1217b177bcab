"""faiss on the CPU: compressed full vectors, and indexes on a prefix with the shortlist rescored from memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.index import partitions
from pipeline.vectors import Matrix, unit
from tests.bench.measure import Contender, Search, Setting
from tests.bench.sets import K, Rescorer, Set

TRAIN_ROWS, TRAIN_EACH = 50_000, 100
"""Sample that centroids are trained on: at least so many rows, and so many for each partition."""
FILE = "index.faiss"
ADD_ROWS = 50_000


def contenders() -> list[Contender]:
    """Those of the comparison; the second HNSW is built with more care."""

    def one(name: str, make: Any, start: Any, settings: Any, slow: bool = False) -> Contender:
        return Contender(name, "faiss", name, make, start, settings, ("faiss",), slow)

    return [
        one("faiss-ivfpq-fs-refine", _make_full, _start_full, _full_settings),
        one("faiss-hnsw-prefix", _maker(lambda of: "HNSW32,SQ8"), _start_prefix, _hnsw_settings),
        one("faiss-hnsw-prefix-200", _maker(lambda of: "HNSW32,SQ8", 200), _start_prefix, _hnsw_settings, slow=True),
        one("faiss-ivf-prefix", _maker(lambda of: f"IVF{partitions(of.rows)},SQ8"), _start_prefix, _ivf_settings),
        one("faiss-binary-prefix", _make_binary, _start_binary, _binary_settings),
        Contender("faiss-hamming-kernel", "kernel", "faiss-binary-prefix", _make_binary, _start_kernel,
                  lambda of: [{"bits": bits, "shortlist": 200, "coarse": True} for bits in of.bits], ("faiss",)),
    ]  # fmt: skip


def _full_settings(of: Set) -> list[Setting]:
    count = partitions(of.rows)
    probes = sorted({min(probe, count) for probe in ((4, 32) if of.quick else (8, 16, 32, 64, 128, 256))})
    factors = (10,) if of.quick else (5, 20, 50)
    return [
        {"factory": _factory(of), "nprobe": probe, "k_factor": factor, "threads": threads}
        for threads in sorted({1, of.threads})
        for probe in probes
        for factor in factors
    ]


def _hnsw_settings(of: Set) -> list[Setting]:
    wide = (64,) if of.quick else (32, 64, 128, 256, 512)
    lists = (100,) if of.quick else (100, 200)
    return [
        {"prefix": f"{of.prefix} {of.short}", "factory": "HNSW32,SQ8", "efSearch": ef, "shortlist": size}
        for size in lists
        for ef in wide
    ]


def _ivf_settings(of: Set) -> list[Setting]:
    count = partitions(of.rows)
    probes = sorted({min(probe, count) for probe in ((32,) if of.quick else (8, 16, 32, 64, 128, 256))})
    lists = (100,) if of.quick else (100, 200)
    name = f"IVF{count},SQ8"
    return [
        {"prefix": f"{of.prefix} {of.short}", "factory": name, "nprobe": probe, "shortlist": size}
        for size in lists
        for probe in probes
    ]


def _binary_settings(of: Set) -> list[Setting]:
    lists = (200,) if of.quick else (100, 200, 400, 1000)
    return [{"bits": bits, "shortlist": size} for bits in of.bits[::-1][:2] for size in lists]


def _factory(of: Set) -> str:
    return f"IVF{partitions(of.rows)},PQ{of.dim // 8}x4fs,RFlat"


def _sample(of: Set, cut: Callable[[Matrix], Matrix]) -> Matrix:
    count = min(of.rows, max(TRAIN_ROWS, TRAIN_EACH * partitions(of.rows)))
    return cut(unit(of.corpus[np.sort(np.random.default_rng(0).choice(of.rows, count, replace=False))]))


def _built(of: Set, index: Any, cut: Callable[[Matrix], Matrix], file: Path) -> dict[str, float]:
    """Train and add by blocks, then write."""
    import faiss

    faiss.omp_set_num_threads(of.threads)
    start = time.perf_counter()
    if not index.is_trained:
        index.train(_sample(of, cut))
    trained = time.perf_counter()
    for _, rows in of.blocks():
        index.add(cut(rows))
    added = time.perf_counter()
    faiss.write_index(index, str(file))
    return {"train": trained - start, "add": added - trained, "write": time.perf_counter() - added}


def _make_full(of: Set, folder: Path) -> dict[str, float]:
    import faiss

    index = faiss.index_factory(of.dim, _factory(of), faiss.METRIC_INNER_PRODUCT)
    return _built(of, index, lambda rows: rows, folder / FILE)


def _maker(factory: Callable[[Set], str], careful: int = 0) -> Callable[[Set, Path], dict[str, float]]:
    def make(of: Set, folder: Path) -> dict[str, float]:
        import faiss

        index = faiss.index_factory(of.short, factory(of), faiss.METRIC_INNER_PRODUCT)
        if careful:
            index.hnsw.efConstruction = careful
        return _built(of, index, of.cutter(of.short), folder / FILE)

    return make


def _make_binary(of: Set, folder: Path) -> dict[str, float]:
    """Packed signs of the longest binary prefix, and of the shorter ones."""
    for bits in of.bits:
        np.save(folder / f"{bits}.npy", np.packbits(of.prefixes(bits) > 0, axis=1))
    return {}


def _opened(of: Set, folder: Path) -> Any:
    import faiss

    faiss.omp_set_num_threads(of.threads)
    return faiss.read_index(str(folder / FILE))


def _start_full(of: Set, folder: Path) -> Search:
    index = _opened(of, folder)
    import faiss

    space = faiss.ParameterSpace()

    def search(queries: Matrix, setting: Setting) -> Matrix:
        faiss.omp_set_num_threads(setting["threads"] if len(queries) == 1 else of.threads)
        space.set_index_parameter(index, "nprobe", setting["nprobe"])
        index.k_factor = setting["k_factor"]
        return index.search(queries, K)[1]

    return search


def _threads(of: Set, queries: Matrix) -> None:
    """One for a single query, which these indexes do not divide: a second one only waits at each barrier."""
    import faiss

    faiss.omp_set_num_threads(1 if len(queries) == 1 else of.threads)


def _start_prefix(of: Set, folder: Path) -> Search:
    index, rescore, cut = _opened(of, folder), Rescorer(of), of.cutter(of.short)

    def search(queries: Matrix, setting: Setting) -> Matrix:
        _threads(of, queries)
        if "nprobe" in setting:
            index.nprobe = setting["nprobe"]
        else:
            index.hnsw.efSearch = setting["efSearch"]
        return rescore(queries, index.search(cut(queries), setting["shortlist"])[1])

    return search


def _start_binary(of: Set, folder: Path) -> Search:
    import faiss

    rescore, opened = Rescorer(of), {}

    def search(queries: Matrix, setting: Setting) -> Matrix:
        _threads(of, queries)
        bits = setting["bits"]
        if bits not in opened:
            index = faiss.IndexBinaryFlat(bits)
            index.add(np.load(folder / f"{bits}.npy"))
            opened[bits] = (index, of.cutter(bits))
        index, cut = opened[bits]
        codes = np.packbits(cut(queries) > 0, axis=1)
        return rescore(queries, index.search(codes, setting["shortlist"])[1].astype(np.int64))

    return search


def _start_kernel(of: Set, folder: Path) -> Search:
    """The scan alone, without rescoring: what a coarse level may be compared with."""
    import faiss

    codes = {bits: np.load(folder / f"{bits}.npy") for bits in of.bits}
    cuts = {bits: of.cutter(bits) for bits in of.bits}

    def search(queries: Matrix, setting: Setting) -> Matrix:
        _threads(of, queries)
        bits = setting["bits"]
        packed = np.packbits(cuts[bits](queries) > 0, axis=1)
        return faiss.knn_hamming(packed, codes[bits], setting["shortlist"])[1]

    return search
