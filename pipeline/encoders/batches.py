"""Batches by tokens: order by token count then row, fill up to a budget, halve what fails.

Which rows share a batch depends on the rows given alone, so that a shard repeats itself exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import MIN_NORM, Matrix, unit

Role = Literal["document", "query"]
UNIT_TOLERANCE = 1e-3


class Encoder(Protocol):
    """A loaded model. `max_tokens` is None where it has no limit."""

    dim: int
    max_tokens: int | None

    def count_tokens(self, texts: Sequence[str], prompt: str) -> NDArray[np.int64]:
        """Tokens of each text with its prompt, before any cut."""

    def encode(self, texts: Sequence[str], role: Role, prompt: str) -> Matrix:
        """One batch through the model: float32[len(texts), dim]."""


@dataclass
class Encoded:
    """float32[n, dim] unit rows; rows in `failed` are zero, with (reason, detail)."""

    vectors: Matrix
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    tokens: int = 0
    padded_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    halvings: int = 0
    renormalised: int = 0


def plan(tokens: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Rows of each batch: shortest first, ties by row, longest x rows within `budget` (one row always fits)."""
    order = np.argsort(tokens, kind="stable")
    batches, start = [], 0
    for position in range(1, len(order) + 1):
        full = position == len(order) or (position + 1 - start) * max(int(tokens[order[position]]), 1) > budget
        if full:
            batches.append(order[start:position])
            start = position
    return batches


def encode_rows(
    encoder: Encoder,
    texts: Sequence[str],
    role: Role,
    prompt: str,
    budget: int,
    on_batch: "OnBatch | None" = None,
) -> Encoded:
    """Embed texts of any number; every vector is checked for dimension, finiteness and length."""
    out = Encoded(np.zeros((len(texts), encoder.dim), np.float32))
    if not texts:
        return out
    counts = encoder.count_tokens(texts, prompt)
    kept = counts if encoder.max_tokens is None else np.minimum(counts, encoder.max_tokens)
    out.tokens, out.cut_tokens, out.cut_rows = int(kept.sum()), int((counts - kept).sum()), int((counts > kept).sum())
    for rows in plan(kept, budget):
        _encode_batch(encoder, texts, rows, role, prompt, kept, out)
        if on_batch is not None:
            on_batch(len(rows), int(kept[rows].sum()))
    return out


class OnBatch(Protocol):
    """Told after each batch how many rows and tokens it held."""

    def __call__(self, rows: int, tokens: int) -> None:
        """Called once a batch."""


def _encode_batch(
    encoder: Encoder,
    texts: Sequence[str],
    rows: NDArray[np.int64],
    role: Role,
    prompt: str,
    tokens: NDArray[np.int64],
    out: Encoded,
) -> None:
    try:
        vectors = encoder.encode([texts[row] for row in rows], role, prompt)
    except Exception as error:  # whatever a model raises (out of memory, a bad row): halve until it is one row
        if len(rows) == 1:
            out.failed[int(rows[0])] = ("model_error", f"{type(error).__name__}: {error}"[:200])
            return
        out.halvings += 1
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            _encode_batch(encoder, texts, half, role, prompt, tokens, out)
        return
    out.padded_tokens += int(tokens[rows].max()) * len(rows)
    if vectors.shape != (len(rows), encoder.dim):
        raise RuntimeError(f"the model returned {vectors.shape} for {len(rows)} texts, not {(len(rows), encoder.dim)}")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
    bad = ~np.isfinite(norms) | (norms < MIN_NORM)
    for number in np.flatnonzero(bad):
        reason = "zero_norm" if np.isfinite(norms[number]) else "non_finite"
        out.failed[int(rows[number])] = (reason, f"vector length {norms[number]}")
        vectors[number] = 0
    off = ~bad & (np.abs(norms - 1) > UNIT_TOLERANCE)
    if off.any():
        out.renormalised += int(off.sum())
        vectors = unit(vectors)
    out.vectors[rows] = vectors
