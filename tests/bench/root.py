"""A finished root from vectors alone: no texts, no model, no evaluation; every other stage is the pipeline's own.

Memory is bounded by one fragment of `documents` (1,048,576 rows as float16), whatever the corpus.

    python -m tests.bench.root corpus.npy ROOT 64:binary 128:int8 128:float16:ivf_rq
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import derive, embed, fit, index, ledger, lock, merge, repair, storage, store
from pipeline.embedder import COUNTERS, METERS, Facts, documents_columns, documents_info
from pipeline.run import _Run, ignore
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, Parent, combined_digest, logical_digest, vector_array
from pipeline.vectors import Matrix
from pipeline.workers import Pool

FRAGMENT_ROWS = 1_048_576
TYPES = {"thousandth": pa.int32()}
PART_ROWS = 65_536
"""Rows of one logical digest, which holds its rows several times over in memory."""


def build(
    corpus: Path,
    path: Path,
    prefixes: Sequence[dict[str, Any]],
    dims: Sequence[int] | None = None,
    cache: bool = False,
    shares: bool = False,
) -> dict[str, float]:
    """Build and publish a root from an .npy file of unit rows [n, D], float16 or float32; seconds of each step.

    `prefixes` are those of a job spec; `dims` are the dims that the model was trained for, where it says so; `shares`
    adds a filter column `thousandth`, 0 to 999, drawn by row.
    """
    spec = JobSpec.of(
        {
            "name": "bench",
            "root": str(path),
            "corpus": {
                "source": "corpus.npy",
                "text": "text",
                "keep_text": False,
                "filter": list(TYPES) if shares else [],
            },
            "model": {"name": "vectors"},
            "prefixes": list(prefixes),
            "search": {"cache": cache},
            "workers": {"count": 0},
        }
    )
    seconds: dict[str, float] = {}
    storage.prepare(Root(path))
    with lock.lock(Root(path)) as root, Pool(spec.workers) as pool:
        with _timed(seconds, "documents"):
            full = _documents(corpus, spec, root)
        parent = Parent(store.table_uri(root, DOCUMENTS), full.version, full.digest, full.rows, full.info, full.files)
        with _timed(seconds, "fit"):
            fits = fit.run(spec, parent, dims, root)
        with _timed(seconds, "derive"):
            derived = derive.run(spec.prefixes, parent, fits, TYPES if shares else {}, root, pool)
        with _timed(seconds, "index"):
            indexed = index.run(spec.index, spec.prefixes, full.rows, root, pool)
        with _timed(seconds, "publish"):
            _publish(_Run(spec, root, None, pool, ignore), full, fits, derived, indexed, seconds)
    return seconds


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 3)


def _documents(corpus: Path, spec: JobSpec, root: Root) -> embed.Full:
    """Write and commit `documents`, a fragment at a time."""
    rows, full_dim = np.load(corpus, mmap_mode="r").shape
    facts = Facts(
        name="vectors", revision=None, digest="sha256:none", full_dim=full_dim, backend="none",
        precision="float32", max_tokens=None, batch_tokens=0, prompts={"document": "", "query": ""}, probe={},
    )  # fmt: skip
    info = documents_info(facts, spec)
    schema = info.to_schema(documents_columns(spec, TYPES, facts))
    fragments, files, parts = [], {}, []
    for start in range(0, rows, FRAGMENT_ROWS):
        block = np.load(corpus, mmap_mode="r")[start : start + FRAGMENT_ROWS]  # mapped anew: old pages are let go
        table = _rows(start, np.ascontiguousarray(block, np.float16), schema)
        written = store.write_fragments(root, DOCUMENTS, table, schema, f"embed/{start // FRAGMENT_ROWS:07d}")
        fragments += written.fragments
        files |= written.files
        for first in range(0, len(block), PART_ROWS):
            part = table.slice(first, PART_ROWS)
            parts.append((part.num_rows, logical_digest(part)))
    counters = dict.fromkeys((*COUNTERS, *METERS, *merge.COUNTERS, "peak_memory_bytes", "repaired"), 0)
    return embed.Full(
        version=store.commit(root, DOCUMENTS, schema, fragments),
        digest=combined_digest([digest for _, digest in parts]),
        rows=rows,
        facts=facts,
        info=info,
        parts=parts,
        files=files,
        fragments=fragments,
        quarantine=root.keep(b""),
        counters={**counters, "quarantined": {}},
    )


def _rows(start: int, vectors: Matrix, schema: pa.Schema) -> pa.Table:
    """Rows as `documents` has them: `id` is the row in decimal, the digest of a text its number."""
    rows = np.arange(start, start + len(vectors))
    digests = np.stack([rows, rows], axis=1)
    columns = {
        "row": pa.array(rows),
        "id": pa.array(rows).cast(pa.string()),
        "text_digest": pa.Array.from_buffers(pa.binary(16), len(rows), [None, pa.py_buffer(digests)]),
        "vector": vector_array(vectors),
        "thousandth": pa.array(np.random.default_rng(start).integers(0, 1000, len(vectors)), pa.int32()),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _publish(job: Any, full: embed.Full, fits: Any, derived: Any, indexed: Any, seconds: dict[str, float]) -> None:
    """What the run publishes, less its evaluation."""
    scan = SimpleNamespace(rows=full.rows, digest=full.digest)
    candidate = job._candidate(scan, full, fits, derived, indexed, {})
    candidate["copies"], candidate["evaluation_key"], candidate["seconds"] = [], "", dict(seconds)
    candidate["files"] = repair.table_files(job.root, job.data_files, None)
    ledger.publish(job.root, candidate)


def main() -> None:
    """Build a root on the command line."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("corpus", type=Path, help="unit rows, .npy, float16 or float32")
    options.add_argument("root", type=Path)
    options.add_argument("prefixes", nargs="+", help="dim:precision or dim:precision:index")
    options.add_argument("--cache", action="store_true", help="also write files that searches map")
    options.add_argument("--shares", action="store_true", help="a filter column `thousandth`")
    asked = options.parse_args()
    prefixes = []
    for one in asked.prefixes:
        dim, precision, *kind = one.split(":")
        prefixes.append({"dim": int(dim), "precision": precision} | ({"index": {"kind": kind[0]}} if kind else {}))
    print(json.dumps(build(asked.corpus, asked.root, prefixes, cache=asked.cache, shares=asked.shares)))


if __name__ == "__main__":
    main()
