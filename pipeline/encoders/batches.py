"""Batches by tokens: order by token count then row, fill up to a budget; a row that fails is set aside.

Which rows share a batch depends on the usable rows alone: a batch in which one failed is formed anew without it, so a
shard repeats itself exactly, and a poison row changes no bit of its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DeviceLost
from pipeline.vectors import MIN_NORM, Matrix, unit

Role = Literal["document", "query"]
Failures = dict[int, tuple[str, str]]
UNIT_TOLERANCE = 1e-3
OUT_OF_MEMORY = ("out of memory", "alloc_failed")
"""How CUDA says it, and its libraries (CUBLAS_STATUS_ALLOC_FAILED)."""


class Encoder(Protocol):
    """A loaded model. `max_tokens` is None where it has no limit."""

    dim: int
    max_tokens: int | None

    def count_tokens(self, texts: Sequence[str], prompt: str) -> NDArray[np.int64]:
        """Tokens of each text with its prompt, before any cut (of a huge text: at least `max_tokens`)."""

    def encode(self, texts: Sequence[str], role: Role, prompt: str) -> Matrix:
        """One batch through the model: float32[len(texts), dim]."""


@dataclass
class Encoded:
    """float32[n, dim] unit rows; rows in `failed` are zero, with (reason, detail), and in none of the counts.

    `cut_tokens` is a lower bound: of a huge text an encoder counts the start alone.
    """

    vectors: Matrix
    failed: Failures = field(default_factory=dict)
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
    while start < len(order):
        batches.append(_first(order[start:], tokens, budget))
        start += len(batches[-1])
    return batches


def _first(order: NDArray[np.int64], tokens: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The first batch of rows that stand in order; no row behind it has a say in it."""
    count = 1
    while count < len(order) and (count + 1) * max(int(tokens[order[count]]), 1) <= budget:
        count += 1
    return order[:count]


class OnBatch(Protocol):
    """Told after each batch how many rows and tokens it held."""

    def __call__(self, rows: int, tokens: int) -> None:
        """Called once a batch."""


def encode_rows(
    encoder: Encoder,
    texts: Sequence[str],
    role: Role,
    prompt: str,
    budget: int,
    on_batch: OnBatch | None = None,
) -> Encoded:
    """Embed texts of any number; every vector is checked for dimension, finiteness and length.

    Raises DeviceLost where the device and not a row is at fault.
    """
    out = Encoded(np.zeros((len(texts), encoder.dim), np.float32))
    counts, uncounted = _counted(encoder, texts, prompt)
    kept = counts if encoder.max_tokens is None else np.minimum(counts, encoder.max_tokens)
    out.failed.update(uncounted)
    work = _Work(encoder, texts, role, prompt, kept)
    order = np.argsort(kept, kind="stable")
    order = order[~np.isin(order, list(uncounted))]
    while len(order):
        rows = _first(order, kept, budget)
        batch, failed = work.encode(rows)
        if failed:
            out.failed.update(failed)
            order = order[~np.isin(order, list(failed))]
            continue
        order = order[len(rows) :]
        out.vectors[rows] = batch.vectors
        out.padded_tokens += batch.padded_tokens
        out.halvings += batch.halvings
        out.renormalised += batch.renormalised
        out.tokens += int(kept[rows].sum())
        out.cut_tokens += int((counts - kept)[rows].sum())
        out.cut_rows += int((counts > kept)[rows].sum())
        if on_batch is not None:
            on_batch(len(rows), int(kept[rows].sum()))
    return out


def _counted(encoder: Encoder, texts: Sequence[str], prompt: str) -> tuple[NDArray[np.int64], Failures]:
    """Tokens of each text, and the rows that the tokenizer refuses."""
    try:
        return encoder.count_tokens(texts, prompt) if texts else np.zeros(0, np.int64), {}
    except Exception:  # whatever a tokenizer raises: the texts one by one say which it was
        counts, failed = np.zeros(len(texts), np.int64), {}
        for row, text in enumerate(texts):
            try:
                counts[row] = encoder.count_tokens([text], prompt)[0]
            except Exception as error:
                failed[row] = _model_error(error)
        return counts, failed


@dataclass(frozen=True)
class _Batch:
    """Vectors of some rows, and what they cost."""

    vectors: Matrix
    padded_tokens: int
    halvings: int = 0
    renormalised: int = 0

    def and_then(self, other: "_Batch") -> "_Batch":
        return _Batch(
            np.concatenate([self.vectors, other.vectors]),
            self.padded_tokens + other.padded_tokens,
            self.halvings + other.halvings + 1,
            self.renormalised + other.renormalised,
        )


NOTHING = _Batch(np.zeros((0, 0), np.float32), 0)


@dataclass(frozen=True)
class _Work:
    """What all batches of one call share."""

    encoder: Encoder
    texts: Sequence[str]
    role: Role
    prompt: str
    tokens: NDArray[np.int64]

    def encode(self, rows: NDArray[np.int64]) -> tuple[_Batch, Failures]:
        """The vectors of a batch, or the rows to form it without.

        What raises is halved: that finds the row at fault, or batches that are small enough, which then are kept.
        """
        vectors, failure = self._forward(rows)
        if vectors is not None:
            return self._checked(rows, vectors)
        if len(rows) == 1:
            return NOTHING, {int(rows[0]): failure}
        half = len(rows) // 2
        (left, failed), (right, more) = self.encode(rows[:half]), self.encode(rows[half:])
        return (NOTHING, failed | more) if failed or more else (left.and_then(right), {})

    def _forward(self, rows: NDArray[np.int64]) -> tuple[Matrix | None, tuple[str, str]]:
        """The model's answer, or why there is none, without the traceback, which would hold the batch in memory."""
        try:
            return self.encoder.encode([self.texts[row] for row in rows], self.role, self.prompt), ("", "")
        except Exception as error:  # whatever a model raises
            if _of_device(error):
                what = _model_error(error)[1].partition("\n")[0]
                raise DeviceLost(f"the device was lost ({what}); run again to go on") from error
            return None, _model_error(error)

    def _checked(self, rows: NDArray[np.int64], vectors: Matrix) -> tuple[_Batch, Failures]:
        wanted = (len(rows), self.encoder.dim)
        if vectors.shape != wanted:
            raise RuntimeError(f"the model returned {vectors.shape} for {len(rows)} texts, not {wanted}")
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(vectors, axis=1)
        bad = ~np.isfinite(norms) | (norms < MIN_NORM)
        if bad.any():
            return NOTHING, self._unusable(rows[bad], norms[bad], alone=len(rows) == 1)
        off = np.abs(norms - 1) > UNIT_TOLERANCE
        if off.any():
            vectors = np.where(off[:, None], unit(vectors), vectors)
        return _Batch(vectors, int(self.tokens[rows].max()) * len(rows), renormalised=int(off.sum())), {}

    def _unusable(self, rows: NDArray[np.int64], norms: Matrix, alone: bool) -> Failures:
        """Those rows that have no direction when they are alone either; all of them where there is none such."""
        failed: Failures = {}
        for row in () if alone else rows:
            failed |= self.encode(np.array([row]))[1]
        return failed or {
            int(row): ("zero_norm" if np.isfinite(norm) else "non_finite", f"vector length {norm}")
            for row, norm in zip(rows, norms, strict=True)
        }


def _model_error(error: Exception) -> tuple[str, str]:
    detail = f"{type(error).__name__}: {error}"[:200]
    return "model_error", detail.encode("utf-8", "replace").decode()


def _of_device(error: Exception) -> bool:
    """A CUDA error, but for lack of memory, which is over with the call. torch is no import here, so names must do."""
    said, names = str(error).lower(), {kind.__name__ for kind in type(error).__mro__}
    return ("AcceleratorError" in names or "cuda error" in said) and not any(words in said for words in OUT_OF_MEMORY)
