"""Separate prefix tables against one table of nested blocks: what a cascade reads, how long it takes, what is stored.

    python -m tests.bench.nested --rows 200000 --full 768 --queries 50

Made-up vectors as a model trained with the Matryoshka loss gives them: clusters whose coordinate i has standard
deviation (i + 1) ** -0.5. Written by the derive stage, searched one query at a time by the project's own search, both
ways in turn. Bytes asked of the file system are `rchar` of /proc/self/io (page cache included); cold runs drop the
tables from the page cache before each query. Prints a table, then JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import derive, storage, store
from pipeline.search import Index
from pipeline.spec import Prefix, Workers
from pipeline.storage import Root
from pipeline.tables import (
    DOCUMENTS,
    PARAMETERS,
    Fits,
    FittedPrefix,
    Parent,
    TableInfo,
    documents_schema,
    parameters_schema,
    vector_array,
)
from pipeline.transform import Transform
from pipeline.vectors import Codec, Matrix, unit
from pipeline.workers import Pool

SEED, CLUSTERS, SPREAD, NOISE = 0, 4_000, 0.7, 0.21
SHARD_ROWS = 8_192
ENDS, LENGTHS = (64, 128, 256), (1_000, 400, 200)
K = 10


def synthetic(rows: int, dim: int, queries: int) -> tuple[Matrix, Matrix]:
    """Unit float32 vectors [rows, dim], and queries that are some of them with noise."""
    rng = np.random.default_rng(SEED)
    scale = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)

    def drawn(count: int) -> Matrix:
        return np.asarray(rng.standard_normal((count, dim), dtype=np.float32) * scale)

    centres, vectors = drawn(CLUSTERS), np.empty((rows, dim), np.float32)
    for start in range(0, rows, SHARD_ROWS):
        size = min(SHARD_ROWS, rows - start)
        vectors[start : start + size] = unit(centres[rng.integers(0, CLUSTERS, size)] + SPREAD * drawn(size))
    near = vectors[rng.choice(rows, queries, replace=False)]
    return vectors, unit(near + NOISE * drawn(queries))


def documents(root: Root, vectors: Matrix) -> Parent:
    """The full vectors as the embed stage leaves them: float16, one fragment per shard."""
    full_dim = vectors.shape[1]
    info = TableInfo("made-up", None, "sha256:0", None, {"document": "", "query": ""}, full_dim, full_dim, "float16")
    schema = info.to_schema(documents_schema(full_dim, "float16", {}, {}, text=False))
    fragments: list[Mapping[str, Any]] = []
    for start in range(0, len(vectors), SHARD_ROWS):
        numbers = np.arange(start, min(start + SHARD_ROWS, len(vectors)))
        digests = [int(number).to_bytes(16, "little") for number in numbers]
        codes = vector_array(vectors[numbers].astype(np.float16))
        columns = [pa.array(numbers), pa.array(map(str, numbers)), pa.array(digests, pa.binary(16)), codes]
        shard = pa.Table.from_arrays(columns, schema=schema)
        fragments += store.write_fragments(root, DOCUMENTS, shard, schema, f"embed/{start}").fragments
    version = store.commit(root, DOCUMENTS, schema, fragments)
    store.commit(root, PARAMETERS, parameters_schema(info), [])
    return Parent(store.table_uri(root, DOCUMENTS), version, "0", len(vectors), info, {})


def derived(prefixes: Sequence[Prefix], parent: Parent, folder: Path) -> tuple[list[derive.Derived], float]:
    """Write prefix tables below a root; seconds, commits and fsyncs included."""
    root = Root(folder)
    storage.prepare(root)
    fits = Fits({one.table: FittedPrefix(Transform(), Codec(one.precision)) for one in prefixes}, 1, (), {}, {})
    start = time.perf_counter()
    with Pool(Workers(count=0)) as pool:
        tables = derive.run(prefixes, parent, fits, {}, root, pool)
    return tables, time.perf_counter() - start


def drop_cached(folder: Path) -> None:
    """Ask the system to forget the pages of every file below a folder."""
    for path in (path for path in folder.rglob("*.lance") if path.is_file()):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def counted() -> dict[str, int]:
    """Bytes that this process has asked for, and that storage has read for it."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in lines}


def searches(index: Index, cascades: Mapping[str, Any], queries: Matrix, cold: Path | None) -> Iterator[dict[str, Any]]:
    """Every query by every cascade in turn, after one to warm up."""
    for number, query in enumerate([queries[0], *queries]):
        for way, cascade in cascades.items():
            if cold is not None:
                drop_cached(cold)
            before, start = counted(), time.perf_counter()
            hits, steps = index.rank(query[None], K, None, cascade)
            seconds, after = time.perf_counter() - start, counted()
            if number:
                yield {
                    "way": way, "rows": hits.rows[0].tolist(), "ms": 1000 * seconds,
                    "needed": sum(step.bytes for step in steps), "levels": [step.bytes for step in steps],
                    "level_ms": [step.milliseconds for step in steps], "asked": after["rchar"] - before["rchar"],
                    "read": after["read_bytes"] - before["read_bytes"],
                }  # fmt: skip


def middle(found: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The median over queries, element by element where there are several."""
    return np.median([one[name] for one in found], axis=0).round(2).tolist()


def measure(rows: int, full: int, count: int, repeats: int, precision: Any, folder: Path) -> dict[str, Any]:
    """Everything, as plain values by way: separate or nested."""
    vectors, queries = synthetic(rows, full, count)
    prefixes = {
        "separate": [Prefix(dim=dim, precision=precision) for dim in ENDS],
        "nested": [Prefix(dim=ENDS[-1], precision=precision, blocks=ENDS)],
    }
    root = Root(folder / "root")
    storage.prepare(root)
    parent = documents(root, vectors)
    del vectors
    spent: dict[str, list[float]] = {way: [] for way in prefixes}
    for number in range(repeats + 1):  # the first time warms up
        for way, wanted in prefixes.items():
            spent[way].append(derived(wanted, parent, folder / f"{way}-{number}")[1])
    tables = {way: derived(wanted, parent, root.path)[0] for way, wanted in prefixes.items()}
    versions = {DOCUMENTS: parent.version, PARAMETERS: 1}
    versions |= {table.name: table.version for some in tables.values() for table in some}
    generation = {
        "tables": {name: {"version": version, "index": None, "rows": rows} for name, version in versions.items()},
        "spec": {"search": {"cascade": None, "engine": "lance", "memory": 0}, "corpus": {"filter": []}},
        "corpus": {"quarantined": 0},
        "cache": {},
    }
    index = Index(root, generation)
    cascades = {
        way: [(one.table, length, dim if one.blocks else "auto")
              for one, dim, length in zip(some * (len(ENDS) // len(some)), ENDS, LENGTHS, strict=True)]
        for way, some in prefixes.items()
    }  # fmt: skip
    warm = list(searches(index, cascades, queries, None))
    cold = list(searches(index, cascades, queries, root.path))
    exact, _ = index.rank(queries, K, None, [])
    found: dict[str, Any] = {}
    for way, some in tables.items():
        mine, colder = ([one for one in every if one["way"] == way] for every in (warm, cold))
        hits = [len(set(one["rows"]) & set(truth)) for one, truth in zip(mine, exact.rows.tolist(), strict=True)]
        found[way] = {
            "tables": {one.name: store.data_bytes(index.opened.views[one.name].table) for one in some},
            "stored_bytes": sum(store.data_bytes(index.opened.views[one.name].table) for one in some),
            "write_seconds": round(float(np.median(spent[way][1:])), 3),
            "needed_bytes": middle(mine, "needed"), "asked_bytes": middle(mine, "asked"),
            "level_bytes": middle(mine, "levels"), "level_ms": middle(mine, "level_ms"),
            "median_ms": middle(mine, "ms"),
            "cold_ms": middle(colder, "ms"), "cold_read_bytes": middle(colder, "read"),
            "recall_exact": float(np.mean(hits)) / K,
        }  # fmt: skip
    pairs = zip(*([one["rows"] for one in warm if one["way"] == way] for way in tables), strict=True)
    same = float(np.mean([len(set(left) & set(right)) / K for left, right in pairs]))
    return {
        "rows": rows, "full": full, "ends": ENDS, "shortlists": LENGTHS, "k": K, "queries": count,
        "precision": precision, "seed": SEED, "same_hits": same, **found,
    }  # fmt: skip


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rows", type=int, default=200_000)
    asked.add_argument("--full", type=int, default=768, help="numbers of a full vector")
    asked.add_argument("--queries", type=int, default=50)
    asked.add_argument("--repeats", type=int, default=3, help="writes of each way, of which the median counts")
    asked.add_argument("--precision", default="float16", choices=["float16", "float32"])
    asked.add_argument("--folder", help="where tables are written and removed again; null: the system's own")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        made = measure(given.rows, given.full, given.queries, given.repeats, given.precision, Path(folder))
    names = ["stored_bytes", "write_seconds", "needed_bytes", "asked_bytes", "median_ms", "cold_ms", "cold_read_bytes"]
    print(f"{'':16} {'separate':>16} {'nested':>16} {'nested / separate':>18}", file=sys.stderr)
    for name in [*names, "recall_exact"]:
        separate, nested = made["separate"][name], made["nested"][name]
        ratio = f"{nested / separate:.3f}" if separate else "-"
        print(f"{name:16} {separate:16,.2f} {nested:16,.2f} {ratio:>18}", file=sys.stderr)
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
