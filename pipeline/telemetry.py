"""What workers measure, as Ray's metrics: Prometheus finds it at the metrics port of each node.

Every figure has the tags `job` and `stage`; names begin with `matryoshka_` (Ray puts `ray_` before them).
"""

import time
from collections.abc import Mapping
from typing import Any

SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0]
"""Bounds of the histogram of item times."""
COUNTED = {
    "rows": "rows of finished items",
    "tokens": "tokens through the model, padding not counted",
    "padded_tokens": "tokens through the model, padding counted",
    "waiting_seconds": "seconds that devices waited for tokens",
    "quarantined": "rows set aside",
}


def node() -> str:
    """The id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


class Meters:
    """The metrics of one worker; made in a process of Ray's."""

    def __init__(self, job: str, stage: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def made(kind: Any, name: str, text: str, **options: Any) -> Any:
            metric = kind(f"matryoshka_{name}", text, tag_keys=("job", "stage"), **options)
            return metric.set_default_tags({"job": job, "stage": stage})

        self._counters = {name: made(Counter, name, text) for name, text in COUNTED.items()}
        self._failures = made(Counter, "failures", "items that ended in an error, or with their worker")
        self._seconds = made(Histogram, "item_seconds", "seconds of an item (a shard, a merge)", boundaries=SECONDS)
        self._rate = made(Gauge, "tokens_per_second", "of the last item, since the one before it")
        self._padding = made(Gauge, "padding_share", "of the last item's tokens")
        self._waiting = made(Gauge, "waiting_items", "items that no worker has yet")
        self._workers = made(Gauge, "workers", "workers alive")
        self._before = time.perf_counter()

    def done(self, result: Any, seconds: float) -> None:
        """Count a finished item; `result` is its record, or anything else."""
        now = time.perf_counter()
        self._seconds.observe(seconds)
        if not isinstance(result, Mapping):
            self._before = now
            return
        aside = result.get("quarantined")
        counts = {name: result.get(name) for name in COUNTED} | {
            "quarantined": sum(aside.values()) if isinstance(aside, Mapping) else aside
        }
        for name, count in counts.items():
            if isinstance(count, int | float) and count > 0:
                self._counters[name].inc(count)
        tokens, padded = result.get("tokens"), result.get("padded_tokens")
        if tokens:
            self._rate.set(tokens / max(now - self._before, 1e-6))
            self._padding.set(1 - tokens / padded if padded else 0.0)
        self._before = now

    def failed(self) -> None:
        """Count an item that ended in an error, or with its worker."""
        self._failures.inc()

    def queue(self, waiting: int, workers: int) -> None:
        """How many items wait, for how many workers."""
        self._waiting.set(waiting)
        self._workers.set(workers)
