"""LanceDB on full vectors and on a prefix, through its own call and through the `lance` scanner."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.index import partitions
from pipeline.vectors import Matrix
from tests.bench.measure import Contender, Search, Setting
from tests.bench.sets import K, Rescorer, Set

TABLE = "vectors"
BATCH_ROWS = 10_000
Config = Callable[[Set], Any]


def contenders() -> list[Contender]:
    """No index, IVF_PQ at its defaults and tuned, IVF_RQ, HNSW_SQ on the prefix (and on everything: slow)."""

    def tuned(name: str, kind: str, built: Callable[[Set], dict[str, Any]], slow: bool = False) -> Contender:
        return _full(name, lambda of: _config(kind, **built(of)), partial(_pq_settings, built), slow)

    def pq(share: float, width: int) -> Callable[[Set], dict[str, Any]]:
        return lambda of: {
            "num_partitions": max(1, int(partitions(of.rows) * share)), "num_sub_vectors": of.dim // width,
        }  # fmt: skip

    return [
        _full("lancedb-flat", None, _flat_settings),
        _full("lancedb-ivfpq-defaults", lambda of: _config("IvfPq"), _default_settings),
        tuned("lancedb-ivfpq", "IvfPq", pq(1, 8)),
        tuned("lancedb-ivfpq-fine", "IvfPq", pq(1, 4)),
        tuned("lancedb-ivfpq-few", "IvfPq", pq(0.25, 8), slow=True),
        tuned("lancedb-ivfrq", "IvfRq", lambda of: {"num_partitions": partitions(of.rows), "num_bits": 1}),
        _full("lancedb-hnsw-full", lambda of: _config("HnswSq", num_partitions=1), _hnsw_full_settings, slow=True),
        _contender("lancedb-hnsw-prefix", _make_prefix, _start_prefix, _hnsw_settings),
    ]


def _contender(name: str, make: Any, start: Any, settings: Any, slow: bool = False) -> Contender:
    return Contender(name, "LanceDB", name, make, start, settings, ("lancedb", "lance"), slow)


def _full(name: str, config: Config | None, settings: Any, slow: bool = False) -> Contender:
    def make(of: Set, folder: Path) -> dict[str, float]:
        steps = _written(of, folder)
        return steps if config is None else steps | _indexed(folder, config(of))

    return _contender(name, make, _start, settings, slow)


def _config(kind: str, **values: Any) -> Any:
    from lancedb import index

    return getattr(index, kind)(distance_type="cosine", **values)


def _calls(of: Set) -> tuple[str, ...]:
    """The scanner is quicker; LanceDB's own call is what most people use."""
    return ("lance",) if of.quick else ("lancedb", "lance")


def _flat_settings(of: Set) -> list[Setting]:
    return [{"call": call, "index": "none", "column": "float32"} for call in _calls(of)]


def _default_settings(of: Set) -> list[Setting]:
    return [{"call": "lancedb", "index": "IVF_PQ defaults"}]


def _pq_settings(built: Callable[[Set], dict[str, Any]], of: Set) -> list[Setting]:
    """Which partitions are looked at, and how many hits are scored again with the stored vectors.

    Everything through the scanner, which is quicker; what that costs through LanceDB's own call is seen at four.
    """
    count = partitions(of.rows)
    probes = sorted({min(probe, count) for probe in ((20,) if of.quick else (10, 20, 40, 80, 160, 320))})
    refines = (10,) if of.quick else (None, 10, 20, 50)
    every = [("lance", probe, refine) for probe in probes for refine in refines]
    some = [] if of.quick else [("lancedb", probe, refine) for probe in probes[1:4:2] for refine in (None, 20)]
    return [
        {"call": call, **built(of), "nprobes": probe, "refine_factor": refine} for call, probe, refine in every + some
    ]


def _hnsw_settings(of: Set) -> list[Setting]:
    wide = (200,) if of.quick else (100, 200, 300, 500)
    lists = (100,) if of.quick else (100, 200)
    return [
        {"call": call, "index": "HNSW_SQ", "ef": ef, "shortlist": size}
        for call in _calls(of)
        for size in lists
        for ef in wide
        if ef >= size
    ]


def _hnsw_full_settings(of: Set) -> list[Setting]:
    return [
        {"call": call, "index": "HNSW_SQ", "ef": ef, "refine_factor": refine}
        for call in _calls(of)
        for refine in (None, 5)
        for ef in ((100,) if of.quick else (50, 100, 200, 400))
    ]


def _written(of: Set, folder: Path, cut: Callable[[Matrix], Matrix] = lambda rows: rows) -> dict[str, float]:
    """Write `row` and `vector` float32; full vectors are written once, then linked by the others."""
    import lancedb

    start = time.perf_counter()
    database = lancedb.connect(str(folder))

    def batches() -> Iterator[pa.RecordBatch]:
        for first, rows in of.blocks():
            short = np.ascontiguousarray(cut(rows))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(short.reshape(-1)), short.shape[1])
            yield pa.record_batch({"row": pa.array(np.arange(first, first + len(rows))), "vector": vectors})

    width = cut(of.all_queries[:1]).shape[1]
    schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), width))])
    once = Path(of.folder, "lancedb-written")
    if width == of.dim and once.is_dir():
        shutil.copytree(once, folder, copy_function=os.link, dirs_exist_ok=True)
        return {"write": float((once / "seconds").read_text())}
    database.create_table(TABLE, pa.RecordBatchReader.from_batches(schema, batches()))
    seconds = time.perf_counter() - start
    if width == of.dim:
        (folder / "seconds").write_text(str(seconds))
        shutil.copytree(folder, once, copy_function=os.link)
    return {"write": seconds}


def _indexed(folder: Path, config: Any) -> dict[str, float]:
    import lancedb

    start = time.perf_counter()
    table = lancedb.connect(str(folder)).open_table(TABLE)
    table.create_index("vector", config=config)
    for found in table.list_indices():
        table.wait_for_index([found.name])
    return {"index": time.perf_counter() - start}


def _make_prefix(of: Set, folder: Path) -> dict[str, float]:
    return _written(of, folder, of.cutter(of.short)) | _indexed(folder, _config("HnswSq", num_partitions=1))


def _start(of: Set, folder: Path) -> Search:
    ask = _asker(folder)
    return lambda queries, setting: ask(queries, {**setting, "shortlist": K})


def _start_prefix(of: Set, folder: Path) -> Search:
    ask, rescore, cut = _asker(folder), Rescorer(of), of.cutter(of.short)
    return lambda queries, setting: rescore(queries, ask(cut(queries), setting))


def _asker(folder: Path) -> Search:
    """Rows int64[q, shortlist] by either call."""
    import lance
    import lancedb

    table = lancedb.connect(str(folder)).open_table(TABLE)
    dataset = lance.dataset(str(folder / f"{TABLE}.lance"))

    def ask(queries: Matrix, setting: Setting) -> Matrix:
        by = _by_lancedb if setting["call"] == "lancedb" else _by_lance
        return by(table if setting["call"] == "lancedb" else dataset, queries, setting)

    return ask


def _by_lancedb(table: Any, queries: Matrix, setting: Setting) -> Matrix:
    asked = table.search(queries[0] if len(queries) == 1 else list(queries)).distance_type("cosine")
    asked = asked.select(["row", "_distance"]).limit(setting["shortlist"])
    if setting.get("index") == "none":
        asked = asked.bypass_vector_index()
    if "nprobes" in setting:
        asked = asked.nprobes(setting["nprobes"])
    if setting.get("refine_factor"):
        asked = asked.refine_factor(setting["refine_factor"])
    if "ef" in setting:
        asked = asked.ef(setting["ef"])
    return _ordered(asked.to_arrow(), len(queries), setting["shortlist"])


def _by_lance(dataset: Any, queries: Matrix, setting: Setting) -> Matrix:
    nearest = {"column": "vector", "q": queries[0], "k": setting["shortlist"], "metric": "cosine"}
    nearest["use_index"] = setting.get("index") != "none"
    if "nprobes" in setting:
        nearest["nprobes"] = setting["nprobes"]
    nearest |= {name: setting[name] for name in ("refine_factor", "ef") if setting.get(name)}
    if len(queries) > 1:
        nearest["q"] = queries
    found = dataset.scanner(columns=["row", "_distance"], nearest=nearest).to_table()
    return _ordered(found, len(queries), setting["shortlist"])


def _ordered(found: pa.Table, queries: int, width: int) -> Matrix:
    """Hits by query and distance: a batch comes back in no promised order."""
    rows, distances = found["row"].to_numpy(), found["_distance"].to_numpy()
    asked = found["query_index"].to_numpy() if "query_index" in found.column_names else np.zeros(len(rows), np.int64)
    order = np.lexsort((rows, distances, asked))
    asked, rows = asked[order], rows[order]
    place = np.arange(len(rows)) - np.searchsorted(asked, asked)
    best = np.full((queries, width), -1, np.int64)
    best[asked[place < width], place[place < width]] = rows[place < width]
    return best
