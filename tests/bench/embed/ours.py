"""This project from file to committed table, as `matryoshka run --until embed` does it, and what its records tell.

python -m tests.bench.embed.ours JOB VECTORS FIGURES STARTED
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SUMS = ("tokens", "padded_tokens", "flops", "read_seconds", "tokenize_seconds", "waiting_seconds", "forward_seconds",
        "write_seconds", "repeats", "halvings")  # fmt: skip
"""Fields of the shards' records that are added up."""
BEGUN = "embed model="
"""Begins the line that the job logs when its first worker has loaded and probed the model."""


def job(
    parquet: str, model: str, root: Path, limit: int | None, prompt: str | None = None, **settings: Any
) -> dict[str, Any]:
    """The spec of one run; `settings` are fields of its model section."""
    return {
        "name": "bench-embed",
        "root": str(root),
        "corpus": {"source": parquet, "id": "_id", "text": ["text"]},
        "model": {"name": model, "max_tokens": limit, "prompts": {"document": prompt}, **settings},
        "prefixes": [{"dim": 8, "precision": "binary"}],
    }


class _Clock(logging.Handler):
    """When the model was ready and when the table was committed, by what the job logs."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = self.committed = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith(BEGUN) and np.isnan(self.ready):
            self.ready = record.created
        if line.startswith("embed done"):
            self.committed = record.created


def run(asked: Mapping[str, Any], out: str | None, started: float) -> dict[str, Any]:
    """Run a job into a fresh root, which is removed afterwards; its vectors go to `out` in row order.

    `seconds` are from the model being ready to the committed table, `startup_seconds` those before.
    """
    import pipeline
    from pipeline.ledger import Ledger, begun
    from pipeline.storage import Root

    spec, root = pipeline.JobSpec.of(asked), Path(str(asked["root"]))
    shutil.rmtree(root, ignore_errors=True)
    clock, log = _Clock(), logging.getLogger("pipeline")
    level = log.level
    log.addHandler(clock)
    log.setLevel(logging.INFO)
    try:
        pipeline.run(spec, last="embed")
    finally:
        log.removeHandler(clock)
        log.setLevel(level)
    ended = time.time()
    standing, book = begun(Root(root)), Ledger(Root(root), "embed")
    assert standing is not None
    found = [book.get(name) for name in sorted(book.names()) if not name.startswith("sealed-")]
    parts = [part for one in found if one is not None for part in one.get("shards", [one])]
    records = list({part["shard"]: part for part in parts}.values())  # a merge's record repeats those of its shards
    if out:
        np.save(out, vectors(root))
    facts = standing["facts"]
    told = {
        "seconds": clock.committed - clock.ready,
        "startup_seconds": clock.ready - started,
        "total_seconds": ended - started,
        "facts": {
            name: facts.get(name) for name in ("backend", "precision", "attention", "batch_tokens", "max_tokens")
        },
        "probe": facts.get("probe"),
        "shards": len(records),
        "shard_seconds": sum(one["seconds"] for one in records),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in records),
        **{name: sum(one[name] for one in records) for name in SUMS if all(name in one for one in records)},
    }
    shutil.rmtree(root)
    return told


def vectors(root: Path) -> np.ndarray:
    """float32[n, D] of the committed table, in row order."""
    import lance

    table = lance.dataset(str(root / "lancedb" / "documents.lance")).to_table(columns=["row", "vector"])
    column = table["vector"].combine_chunks()
    flat = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return flat[np.argsort(table["row"].to_numpy())].astype(np.float32)


def main() -> None:
    """Run a job and write its figures."""
    asked, out, figures, started = sys.argv[1:]
    Path(figures).write_text(json.dumps(run(json.loads(asked), out or None, float(started))))


if __name__ == "__main__":
    main()
