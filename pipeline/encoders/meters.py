"""What this machine could do at most, and the share of it that is used."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 2_048
"""Rows and columns of the matrices that are multiplied."""
SECONDS = 0.3


def peak_flops(device: str, precision: str) -> float:
    """Operations per second of a square matrix product in torch, the best of several; int8 is measured in bfloat16."""
    import torch

    dtype = getattr(torch, "bfloat16" if precision == "int8" else precision)
    left, right = (torch.ones(SIDE, SIDE, dtype=dtype, device=device) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        product: Any = left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        del product
        return time.perf_counter() - start

    once()
    end, best = time.perf_counter() + SECONDS, once()
    while time.perf_counter() < end:
        best = min(best, once())
    return 2.0 * SIDE**3 / best


@dataclass(frozen=True)
class Speed:
    """Of one worker during forward: tokens per second, and the share of `peak_flops` that texts use (None: nothing is
    multiplied). `padding`: the share of what the model was given that was none. `waiting`: the share of the device's
    time in which it had no tokens.
    """

    tokens_per_second: float
    utilisation: float | None
    padding: float
    waiting: float


def speed(counted: Mapping[str, Any], flops: Sequence[float], peak: float) -> Speed:
    """From the sums of receipts. The operations that texts ask for, padding not counted, are per_token · tokens +
    per_squared · squared tokens (`Encoder.flops`).
    """
    seconds, waiting = counted["forward_seconds"], counted["waiting_seconds"]
    asked = flops[0] * counted["tokens"] + flops[1] * counted["squared_tokens"]
    return Speed(
        counted["tokens"] / seconds if seconds else 0.0,
        asked / seconds / peak if seconds and peak and asked else None,
        1 - counted["tokens"] / counted["padded_tokens"] if counted["padded_tokens"] else 0.0,
        waiting / (seconds + waiting) if seconds + waiting else 0.0,
    )
