"""The index stage: scalar indexes on `documents`, full text where asked for, ANN indexes where they pay.

Comes in: published tables. After a build every row must be indexed and the query plan must use the index, or the
job fails. What is there and complete is left alone.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import segments, store
from pipeline.errors import PipelineError
from pipeline.ledger import Ledger
from pipeline.spec import Index, IndexKind, Prefix
from pipeline.storage import Root
from pipeline.tables import DOCUMENTS, vector_matrix
from pipeline.workers import Pool

log = logging.getLogger(__name__)

RQ_BITS = 4
"""Bits per dimension of IVF_RQ where the spec names none (measured: recall of IVF_SQ at half its bytes)."""
CGROUP = Path("/sys/fs/cgroup")
NAMES = {"ivf_flat": "IVF_FLAT", "ivf_sq": "IVF_SQ", "ivf_rq": "IVF_RQ", "hnsw_sq": "IVF_HNSW_SQ"}
TRAINED_PER_PARTITION = 256
"""Rows that Lance trains on, for each partition."""
PROBED_SHARE, MIN_PROBES = 0.4, 20
"""Partitions that a search looks at (measured: recall 0.993 of a 128-d prefix at 200 of 512)."""

TOKENIZER = "icu/split"
"""Finds words of languages without spaces too (measured on 1,000 SQuAD questions: nDCG@10 0.885, `simple` 0.887)."""


@dataclass(frozen=True)
class Indexed:
    """A table's version after indexing, and its ANN index: kind, partitions and nprobes of a segment (None: none)."""

    version: int
    index: Mapping[str, Any] | None


def run(settings: Index, prefixes: Sequence[Prefix], rows: int, root: Root, pool: Pool) -> dict[str, Indexed]:
    """Build what is missing; segments on the workers. PipelineError where an index is incomplete or not used."""
    import lancedb  # takes a second, which workers need not spend
    from lancedb.index import FTS, BTree

    database = lancedb.connect(str(root / "lancedb"))
    documents = database.open_table(DOCUMENTS)
    built = {tuple(found.columns): found.name for found in documents.list_indices()}
    for column in ("row", "id"):
        if (column,) not in built:
            documents.create_index(column, config=BTree())
    if settings.text and ("text",) not in built:
        documents.create_index("text", config=FTS(base_tokenizer=TOKENIZER))
    if not settings.text and ("text",) in built:
        documents.drop_index(built["text",])
    _check_complete(documents)
    store.sync_table(root, DOCUMENTS)
    done = {DOCUMENTS: Indexed(int(documents.version), None)}
    for prefix in prefixes:
        kind, why = choose(prefix, settings, rows)
        log.info("index table=%s kind=%s because=%s", prefix.table, kind, why)
        done[prefix.table] = _ann(database.open_table(prefix.table), prefix, kind, rows, root, settings, pool)
        store.sync_table(root, prefix.table)
    return done


def choose(prefix: Prefix, settings: Index, rows: int) -> tuple[IndexKind, str]:
    """The kind of index for a prefix table, and the reason."""
    if prefix.index.kind != "auto":
        return prefix.index.kind, "the spec says so"
    if prefix.blocks:
        return "none", "its blocks are scanned, each level the ones it needs"
    if prefix.precision == "int8":
        return "none", "LanceDB cannot index int8; it is scanned with its scales"
    if rows < settings.min_rows:
        return "none", f"{rows} rows are below index.min_rows {settings.min_rows}; a scan is exact and quick"
    if prefix.precision == "binary":
        return "ivf_flat", "the kind LanceDB has for hamming"
    return ("ivf_rq", "small and quick to build") if prefix.dim % 8 == 0 else ("ivf_sq", "ivf_rq needs dim % 8 == 0")


def partitions(rows: int) -> int:
    """About the square root of the rows, a power of two."""
    return int(min(4096, max(1, 2 ** round(math.log2(max(rows, 1)) / 2))))


def partitions_of(kind: IndexKind, rows: int) -> int:
    """Partitions of an index of a kind."""
    return max(1, rows // 1_000_000) if kind == "hnsw_sq" else partitions(rows)


def build_bytes(prefix: Prefix, kind: IndexKind, rows: int) -> int:
    """About the memory that a build takes on the one machine where it runs, beside what the process holds already.

    The rows it trains on as float32, and twice the stored vectors and row ids (measured with IVF_RQ, IVF_SQ and
    IVF_FLAT, 0.25 to 2 million rows: 0.6 to 1.5 times as much; not measured for larger tables).
    """
    trained = min(rows, TRAINED_PER_PARTITION * partitions_of(kind, rows))
    number_bytes = 1 / 8 if prefix.precision == "binary" else 4
    return int(trained * prefix.dim * number_bytes + 2 * rows * (prefix.bytes_per_row + 8))


def _segments(prefix: Prefix, kind: IndexKind, rows: int, settings: Index, most: int, pool: Pool) -> int:
    """In how many segments an index is built, of `most` that there can be.

    PipelineError where a build needs more memory than is free here, all workers taken to be on this machine; a kind
    that the spec names is tried anyway.
    """
    if settings.segments != "auto":
        return min(settings.segments, most)
    free = available_bytes()
    if free is None:
        return 1
    for count in range(1, most + 1):
        at_once = min(count, max(1, pool.plan.limit)) if count > 1 else 1
        needed = at_once * build_bytes(prefix, kind, -(-rows // count))
        if needed <= free:
            return count
    parts = f" in {most} segments" if most > 1 else ""
    why = (
        f"the {kind} index of {prefix.table} takes about {needed / 1e9:.1f} GB of memory to build on {rows:,} rows"
        f"{parts}, {free / 1e9:.1f} GB are free here"
    )
    if prefix.index.kind == "auto":
        raise PipelineError(
            f"{why}; run again with --from index on a machine with more, which needs the root alone, set index.kind: "
            f"none for this prefix, or index.kind: {kind} to have it tried all the same"
        )
    log.warning("index %s; tried because the spec names the kind", why)
    return most


def available_bytes() -> int | None:
    """Memory that is free for this process, by the system and by its container's limit; None where neither tells."""
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"))
    with suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["file"])  # a page cache gives way
        free.append(int((CGROUP / "memory.max").read_text()) - used)
    return min(free, default=None)


def _ann(table: Any, prefix: Prefix, kind: IndexKind, rows: int, root: Root, settings: Index, pool: Pool) -> Indexed:
    existing = [found for found in table.list_indices() if list(found.columns) == ["vector"]]
    if kind == "none":
        for found in existing:
            table.drop_index(found.name)
        return Indexed(int(table.version), None)
    bits = (prefix.index.bits or RQ_BITS) if kind == "ivf_rq" else None
    standing = next((found for found in existing if _is(found, kind, bits)), None)
    if standing is not None and _is_kept(standing, prefix, root):
        parts = standing.num_segments or 1
    else:
        parts = _built(prefix, kind, bits, rows, root, settings, pool)
        table.checkout_latest()
    _check_complete(table)
    count = partitions_of(kind, -(-rows // parts))
    index = {"kind": kind, "bits": bits, "partitions": count, "nprobes": _probes(count)} | (
        {"segments": parts} if parts > 1 else {}
    )
    _check_used(prefix, int(table.version), index, root)
    return Indexed(int(table.version), index)


def _probes(count: int) -> int:
    """Partitions that a search looks at, of so many."""
    return min(count, max(MIN_PROBES, math.ceil(PROBED_SHARE * count)))


def _built(
    prefix: Prefix, kind: IndexKind, bits: int | None, rows: int, root: Root, settings: Index, pool: Pool
) -> int:
    """Build an index; its segments. Where they find too little, one takes their place."""
    uri = store.table_uri(root, prefix.table)
    options = {
        "column": "vector",
        "index_type": NAMES[kind],
        "metric": "hamming" if prefix.precision == "binary" else "dot",
        **({"num_bits": bits} if bits else {}),
    }
    table = store.open_table(uri)
    most = len(table.get_fragments())
    parts = segments.split(table, _segments(prefix, kind, rows, settings, most, pool))
    if len(parts) > 1:
        count = partitions_of(kind, -(-rows // len(parts)))
        segments.build(uri, parts, {**options, "num_partitions": count}, pool)
        table = store.open_table(uri)
        found = segments.recall(table, _probes(count))
        log.info("index table=%s segments=%d recall=%.3f", prefix.table, len(parts), found)
        if found >= segments.MIN_RECALL:
            Ledger(root, "index").add(_slot(prefix, table), {"recall": found})
            return len(parts)
        log.warning("index %s: %d segments find too little, it is built in one", prefix.table, len(parts))
        table.drop_index(segments.NAME)
        _segments(prefix, kind, rows, Index(), 1, pool)
    # pylance: lancedb 0.40 trains on float16 four to seven times as long, for the same index
    table.create_index(**options, num_partitions=partitions_of(kind, rows), replace=True)
    return 1


def _is_kept(standing: Any, prefix: Prefix, root: Root) -> bool:
    """Whether an index may stay: segments were measured, which a job that ended early may not have come to."""
    if (standing.num_segments or 1) == 1:
        return True
    table = store.open_table(store.table_uri(root, prefix.table))
    return Ledger(root, "index").get(_slot(prefix, table)) is not None


def _slot(prefix: Prefix, table: Any) -> str:
    """Where it is recorded what the segments of a table's index find."""
    return f"{prefix.table}-{segments.mark(table)}"


def _is(found: Any, kind: IndexKind, bits: int | None) -> bool:
    same = found.index_type.lower().replace("_", "") in (kind.replace("_", ""), "ivf" + kind.replace("_", ""))
    details = found.index_details.get("compression", {}) if found.index_details else {}
    return bool(same and (bits is None or details.get("num_bits", bits) == bits))


def _check_complete(table: Any) -> None:
    for found in table.list_indices():
        stats = table.index_stats(found.name)
        if stats is None or stats.num_unindexed_rows:
            left = "unknown" if stats is None else stats.num_unindexed_rows
            raise PipelineError(f"index {found.name} of {table.name} misses {left} rows after its build; run again")


def _check_used(prefix: Prefix, version: int, index: Mapping[str, Any], root: Root) -> None:
    """A wrong metric or type makes Lance scan without a word; the plan tells."""
    table = store.open_table(store.table_uri(root, prefix.table), version)
    query = vector_matrix(table.take([0], columns=["vector"]).column("vector"))[0]
    plan = store.nearest(table, np.asarray(query), 1, index["nprobes"], None).explain_plan(True)
    if "ANN" not in plan:
        raise PipelineError(f"searches of {prefix.table} do not use its {index['kind']} index; plan: {plan[:300]}")
