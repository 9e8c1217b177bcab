"""How well work spreads: a model that sleeps, on one to eight workers, and what the driver spends on it.

    python -m tests.bench.sleepers --workers 1,2,4,8 --seconds 4 --shards 100

The job is a real one on a Ray cluster on this machine whose node says that it has eight cores; only the forward pass
sleeps in place of computing. Rates are those between the first and the last tenth of the shards, so that start-up,
which on few real cores takes as long as there are workers, is apart.
"""

import argparse
import json
import logging
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embedder import Embedder, Facts
from pipeline.encoders.batches import Encoder

CHECKOUT = Path(__file__).parents[2]
SECONDS = "SLEEPERS_SECONDS"
DIM, SHARD_ROWS = 32, 20


class Sleeping(Embedder):
    """Its device takes a second or more for a batch, and no processor."""

    def encoder(self, facts: Facts) -> Encoder:
        """The model, whose batches take as long as the environment says."""
        made: Any = super().encoder(facts)
        if not hasattr(made, "sleeps"):
            begin = made.begin

            def slowly(*values: Any) -> Any:
                time.sleep(float(os.environ[SECONDS]))
                return begin(*values)

            made.begin, made.sleeps = slowly, True
        return made


class Watch(logging.Handler):
    """When each shard was told done, and the processor time of this process then."""

    def __init__(self) -> None:
        """Nothing was told yet."""
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Count shards alone."""
        if record.getMessage().startswith("embed shard="):
            self.seen.append((time.monotonic(), time.process_time()))


def measured(folder: Path, source: Path, model: Path, workers: int, address: str) -> dict[str, Any]:
    """One job; shards per second, and the share of a core that the driver took."""
    from pipeline import embed
    from pipeline.run import run
    from pipeline.spec import JobSpec

    embed.Embedder = Sleeping  # type: ignore[misc]
    spec = JobSpec.of({
        "name": f"sleep-{workers}", "root": str(folder / f"root-{workers}"),
        "corpus": {"source": str(source), "id": "_id", "text": ["text"], "shard_rows": SHARD_ROWS},
        "model": {"name": str(model), "batch_tokens": 100_000}, "prefixes": [{"dim": 8, "precision": "int8"}],
        "workers": {"count": workers, "cpus": 1, "address": address},
    })  # fmt: skip
    watch, log = Watch(), logging.getLogger("pipeline")
    log.setLevel(logging.INFO)
    log.addHandler(watch)
    try:
        run(spec, last="embed")
    finally:
        log.removeHandler(watch)
    cut = max(1, len(watch.seen) // 10)
    (start, spent), (end, after) = watch.seen[cut], watch.seen[-cut - 1]
    count = len(watch.seen) - 2 * cut - 1
    return {
        "workers": workers,
        "shards_per_second": count / (end - start),
        "driver_cores": (after - spent) / (end - start),
    }


def main() -> None:
    """Figures as JSON lines, and the efficiency beside one worker."""
    from tests.conftest import WORDS, save_model
    from tests.faults.cluster import Cluster

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--workers", default="1,8")
    options.add_argument("--seconds", type=float, default=4)
    options.add_argument(
        "--shards", type=int, default=60, help="of the largest number of workers; of fewer in proportion"
    )
    asked = options.parse_args()
    os.environ |= {
        "PYTHONPATH": str(CHECKOUT), SECONDS: str(asked.seconds), "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
    }  # fmt: skip
    counts = [int(one) for one in asked.workers.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, cluster, alone = save_model(folder / "model", dim=DIM), Cluster(folder, 0), 0.0
        cluster.nodes.append(cluster.join(max(counts)))
        try:
            time.sleep(10)
            for count in counts:
                rows = SHARD_ROWS * max(20, asked.shards * count // max(counts))
                rng = np.random.default_rng(0)
                texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(rows)]
                source = folder / f"{count}.parquet"
                pq.write_table(pa.table({"_id": [str(row) for row in range(rows)], "text": texts}), source)
                told = measured(folder, source, model, count, f"127.0.0.1:{cluster.port}")
                alone = alone or told["shards_per_second"] / count
                told["efficiency"] = told["shards_per_second"] / count / alone
                print(json.dumps(told), flush=True)
        finally:
            cluster.end()


if __name__ == "__main__":
    main()
