"""The query log: the deployed cascade against exact search on new queries, any time, one dated row each.

Rows are only ever added, so that drift shows.
"""

import io
from datetime import UTC, datetime

import numpy as np
import polars as pl

from pipeline import queries
from pipeline.metrics import interval, recall_exact
from pipeline.search import Index
from pipeline.storage import Root
from pipeline.sweep import Setting, timed

NAME = "query_log.parquet"
SCHEMA = pl.Schema(
    {
        "measured_at": pl.Datetime("us", "UTC"),
        "file": pl.String(),
        "queries": pl.Int64(),
        "k": pl.Int64(),
        "generation": pl.Int64(),
        "cascade": pl.String(),
        "recall_exact": pl.Float64(),
        "recall_exact_low": pl.Float64(),
        "recall_exact_high": pl.Float64(),
        "median_ms": pl.Float64(),
        "p95_ms": pl.Float64(),
    }
)


def run(path: str, index: Index, k: int, seed: int, root: Root) -> pl.DataFrame:
    """Measure the queries of a file (`_id, text`), append a row to query_log.parquet; the whole log, newest last.

    The caller holds the root's lock. SpecError or DataError for a file that cannot be used.
    """
    texts = queries.read_queries(path, "--queries")["text"].to_list()
    vectors = queries.embedded(f"--queries: {path}", texts, index.documents.info, root, index.embed)
    cascade = tuple(index.opened.cascade(k))
    steps = index.opened.steps(k, cascade, rescore=True)[:-1]
    found, _ = index.opened.rank(vectors, k, None, cascade)
    truth, _ = index.opened.rank(vectors, k, None, [])
    shares = recall_exact(found.rows, truth.rows)
    low, high = interval(shares, seed)
    seconds = timed(Setting("cascade", "cascade", cascade), vectors, k, index)
    row = {
        "measured_at": datetime.now(UTC),
        "file": path,
        "queries": len(texts),
        "k": k,
        "generation": index.generation["generation"],
        "cascade": " > ".join(f"{step.shown} {size}" for step, (_, size, _) in zip(steps, cascade, strict=True)),
        "recall_exact": float(shares.mean()),
        "recall_exact_low": low,
        "recall_exact_high": high,
        "median_ms": float(np.median(seconds)) * 1000,
        "p95_ms": float(np.percentile(seconds, 95)) * 1000,
    }
    written = root.read(NAME)
    before = [] if written is None else [pl.read_parquet(written)]
    log = pl.concat([*before, pl.DataFrame([row], schema=SCHEMA)])
    buffer = io.BytesIO()
    log.write_parquet(buffer)
    root.write(NAME, buffer.getvalue())
    return log
