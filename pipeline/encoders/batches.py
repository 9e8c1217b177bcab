"""Batches by tokens: longest texts first, filled up to a budget; a row that fails is set aside.

Which rows share a batch depends on the usable rows alone: a batch in which one failed is formed anew without it, so a
shard repeats itself exactly, and a poison row changes no bit of its neighbours.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.encoders.tokens import Tokenizer, Tokens, joined
from pipeline.errors import DeviceLost
from pipeline.vectors import MIN_NORM, Matrix, unit

Role = Literal["document", "query"]
Failures = dict[int, tuple[str, str]]
Rows = NDArray[np.int64]
Ending = Callable[[], Matrix]
UNIT_TOLERANCE = 1e-3
OUT_OF_MEMORY = ("out of memory", "alloc_failed", "bad_alloc", "allocate")
"""How CUDA says it, its libraries (CUBLAS_STATUS_ALLOC_FAILED), C++, and others."""


class Encoder(Protocol):
    """A loaded model. `max_tokens` is None where it has no limit."""

    dim: int
    max_tokens: int | None
    tokenizer: Tokenizer | None
    """Who makes the ids; None where the model itself does."""

    @property
    def in_flight(self) -> int:
        """Batches that may have begun before the first one is ended."""

    @property
    def pads(self) -> bool:
        """Whether a batch costs its longest text times its rows; else the sum of its tokens, in any order."""

    def tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        """The ids of each text with its prompt."""

    def begin(self, tokens: Tokens, role: Role, prompt: str) -> Ending:
        """Start one batch through the model; the call of what is returned gives float32[len(tokens), dim]."""

    def flops(self) -> tuple[float, float]:
        """Operations per token, and per squared length of a text; zeros where nothing is multiplied."""


@dataclass(frozen=True)
class Prepared:
    """The tokens of the different texts, which one each row has (`places`), and the rows no tokenizer takes."""

    tokens: Tokens
    places: Rows
    failed: Failures
    seconds: float

    @property
    def repeats(self) -> int:
        """Rows whose text an earlier row has."""
        return len(self.places) - len(self.tokens)


@dataclass
class Encoded:
    """float[n, dim] unit rows; rows in `failed` are zero, with (reason, detail), and in none of the counts.

    A text that several rows share is counted once, in `repeats` but for its first. `cut_tokens` is a lower bound: of a
    huge text an encoder counts the start alone. `squared_tokens` is the sum of lengths squared, what attention costs.
    `batch_tokens` is the budget at the end, halved where memory ran out.
    """

    vectors: Matrix
    batch_tokens: int
    failed: Failures = field(default_factory=dict)
    tokens: int = 0
    squared_tokens: int = 0
    padded_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    halvings: int = 0
    renormalised: int = 0
    repeats: int = 0
    forward_seconds: float = 0.0


def first(order: Rows, tokens: Rows, budget: int, pads: bool) -> Rows:
    """The first batch of rows that stand in order, by their tokens; one row always fits.

    Longest first, the first row says how many there may be; no row behind the batch has a say in it.
    """
    if pads:
        return order[: max(1, budget // max(int(tokens[order[0]]), 1))]
    return order[: max(1, int(np.searchsorted(np.cumsum(tokens[order]), budget, side="right")))]


def ordered(tokens: Rows, pads: bool) -> Rows:
    """All rows as batches take them: longest first, ties by row; by row where nothing is padded."""
    return np.argsort(-tokens, kind="stable") if pads else np.arange(len(tokens))


def plan(tokens: Rows, budget: int, pads: bool = True) -> list[Rows]:
    """Rows of each batch."""
    order, batches = ordered(tokens, pads), []
    while len(order):
        batches.append(first(order, tokens, budget, pads))
        order = order[len(batches[-1]) :]
    return batches


class OnBatch(Protocol):
    """Told after each batch how many rows and tokens it held."""

    def __call__(self, rows: int, tokens: int) -> None:
        """Called once a batch."""


def prepare(encoder: Encoder, texts: Sequence[str], prompt: str) -> Prepared:
    """Tokens of texts, each different one once."""
    start = time.perf_counter()
    numbers: dict[str, int] = {}
    places = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int64, len(texts))
    tokens, refused = _tokenized(encoder, list(numbers), prompt)
    return Prepared(tokens, places, refused, time.perf_counter() - start)


def _tokenized(encoder: Encoder, texts: Sequence[str], prompt: str) -> tuple[Tokens, Failures]:
    """Tokens of each text; those that the tokenizer refuses have none."""
    try:
        return encoder.tokenize(texts, prompt), {}
    except Exception:  # whatever a tokenizer raises: the texts one by one say which it was
        parts, failed = [], Failures()
        for row, text in enumerate(texts):
            try:
                parts.append(encoder.tokenize([text], prompt))
            except Exception as error:
                parts.append(Tokens(np.zeros(0, np.int32), np.zeros(2, np.int64), np.zeros(1, np.int64), [text]))
                failed[row] = _model_error(error)
        return joined(parts), failed


def encode_rows(
    encoder: Encoder, texts: Sequence[str], role: Role, prompt: str, budget: int, on_batch: OnBatch | None = None
) -> Encoded:
    """Embed texts of any number; every vector is checked for dimension, finiteness and length.

    Raises DeviceLost where the device and not a row is at fault.
    """
    return encode(encoder, prepare(encoder, texts, prompt), role, prompt, budget, on_batch)


def encode(
    encoder: Encoder,
    prepared: Prepared,
    role: Role,
    prompt: str,
    budget: int,
    on_batch: OnBatch | None = None,
    dtype: str = "float32",
) -> Encoded:
    """As `encode_rows`, of texts whose tokens are known; vectors of `dtype`."""
    start = time.perf_counter()
    out = Encoded(np.zeros((len(prepared.tokens), encoder.dim), dtype), budget, dict(prepared.failed))
    _Work(encoder, prepared.tokens, role, prompt, out, on_batch).run()
    if prepared.repeats:
        out.vectors = out.vectors[prepared.places]
        out.failed = {
            row: out.failed[place] for row, place in enumerate(prepared.places.tolist()) if place in out.failed
        }
        out.repeats = prepared.repeats - len(out.failed) + len(set(prepared.places[list(out.failed)]))
    out.forward_seconds = time.perf_counter() - start
    return out


@dataclass(frozen=True)
class _Batch:
    """Vectors of some rows, and what they cost."""

    vectors: Matrix
    padded_tokens: int
    halvings: int = 0
    renormalised: int = 0
    memory: bool = False

    def and_then(self, other: "_Batch", memory: bool) -> "_Batch":
        return _Batch(
            np.concatenate([self.vectors, other.vectors]),
            self.padded_tokens + other.padded_tokens,
            self.halvings + other.halvings + 1,
            self.renormalised + other.renormalised,
            self.memory or other.memory or memory,
        )


NOTHING = _Batch(np.zeros((0, 0), np.float32), 0)


class _Work:
    """The batches of one call, `in_flight` of them at once."""

    def __init__(
        self, encoder: Encoder, tokens: Tokens, role: Role, prompt: str, out: Encoded, on_batch: OnBatch | None
    ) -> None:
        self._encoder, self._tokens, self._role, self._prompt = encoder, tokens, role, prompt
        self._lengths, self._out, self._on_batch = tokens.lengths, out, on_batch

    def run(self) -> None:
        order = self._without(ordered(self._lengths, self._encoder.pads), self._out.failed)
        begun: deque[tuple[Rows, Ending]] = deque()
        while len(order):
            ahead = sum(len(rows) for rows, _ in begun)
            while ahead < len(order) and len(begun) < self._encoder.in_flight:
                rows = first(order[ahead:], self._lengths, self._out.batch_tokens, self._encoder.pads)
                begun.append((rows, self._begin(rows)))
                ahead += len(rows)
            rows, ending = begun.popleft()
            batch, failed = self._ended(rows, ending)
            if failed or batch.memory:  # those that have begun are formed anew
                while begun:
                    self._let_go(begun.popleft()[1])
            if failed:
                self._out.failed.update(failed)
                order = self._without(order, failed)
                continue
            order = order[len(rows) :]
            self._keep(rows, batch)

    @staticmethod
    def _without(order: Rows, failed: Failures) -> Rows:
        return order[~np.isin(order, list(failed))] if failed else order

    def _keep(self, rows: Rows, batch: _Batch) -> None:
        out, tokens = self._out, self._lengths[rows]
        cut = self._tokens.counts[rows] - tokens
        out.vectors[rows] = batch.vectors
        out.padded_tokens += batch.padded_tokens
        out.halvings += batch.halvings
        out.renormalised += batch.renormalised
        out.tokens += int(tokens.sum())
        out.squared_tokens += int((tokens * tokens).sum())
        out.cut_tokens += int(cut.sum())
        out.cut_rows += int((cut > 0).sum())
        if batch.memory:
            out.batch_tokens = max(1, out.batch_tokens // 2)
        if self._on_batch is not None:
            self._on_batch(len(rows), int(tokens.sum()))

    def _begin(self, rows: Rows) -> Ending:
        """What is raised here is raised when the batch is ended."""
        try:
            return self._encoder.begin(self._part(rows), self._role, self._prompt)
        except Exception as error:  # whatever a model raises
            return _Raising(error)

    def _part(self, rows: Rows) -> Tokens:
        start, count = int(rows[0]), len(rows)
        in_order = int(rows[-1]) - start == count - 1 and not self._encoder.pads
        return self._tokens.slice(start, start + count) if in_order else self._tokens.take(rows)

    @staticmethod
    def _let_go(ending: Ending) -> None:
        try:
            ending()
        except Exception as error:  # the batch is formed anew, and raises again
            if _of_device(error):
                raise _lost(error) from error

    def _ended(self, rows: Rows, ending: Ending) -> tuple[_Batch, Failures]:
        """The vectors of a batch, or the rows to form it without.

        What raises is halved: that finds the row at fault, or batches that are small enough, which then are kept.
        """
        vectors, failure, memory = self._outcome(ending)
        if vectors is not None:
            return self._checked(rows, vectors)
        if len(rows) == 1:
            return NOTHING, {int(rows[0]): failure}
        half = len(rows) // 2
        (left, failed), (right, more) = (self._ended(part, self._begin(part)) for part in (rows[:half], rows[half:]))
        return (NOTHING, failed | more) if failed or more else (left.and_then(right, memory), {})

    @staticmethod
    def _outcome(ending: Ending) -> tuple[Matrix | None, tuple[str, str], bool]:
        """The model's answer, or why there is none, without the traceback, which would hold the batch in memory."""
        try:
            return ending(), ("", ""), False
        except Exception as error:  # whatever a model raises
            if _of_device(error):
                raise _lost(error) from error
            return None, _model_error(error), _of_memory(error)

    def _checked(self, rows: Rows, vectors: Matrix) -> tuple[_Batch, Failures]:
        wanted = (len(rows), self._encoder.dim)
        if vectors.shape != wanted:
            raise RuntimeError(f"the model returned {vectors.shape} for {len(rows)} texts, not {wanted}")
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        bad = ~np.isfinite(norms) | (norms < MIN_NORM)
        if bad.any():
            return NOTHING, self._unusable(rows[bad], norms[bad], alone=len(rows) == 1)
        off = np.abs(norms - 1) > UNIT_TOLERANCE
        if off.any():
            vectors = np.where(off[:, None], unit(vectors), vectors)
        lengths = self._lengths[rows]
        padded = int(lengths.max()) * len(rows) if self._encoder.pads else int(lengths.sum())
        return _Batch(vectors, padded, renormalised=int(off.sum())), {}

    def _unusable(self, rows: Rows, norms: Matrix, alone: bool) -> Failures:
        """Those rows that have no direction when they are alone either; all of them where there is none such."""
        failed: Failures = {}
        for row in () if alone else rows:
            one = np.array([row])
            failed |= self._ended(one, self._begin(one))[1]
        return failed or {
            int(row): ("zero_norm" if np.isfinite(norm) else "non_finite", f"vector length {norm}")
            for row, norm in zip(rows, norms, strict=True)
        }


class _Raising:
    """An ending that raises what the beginning did, without the traceback, which would hold the batch in memory."""

    def __init__(self, error: Exception) -> None:
        self._error = error.with_traceback(None)

    def __call__(self) -> Matrix:
        raise self._error


def _model_error(error: Exception) -> tuple[str, str]:
    detail = f"{type(error).__name__}: {error}"[:200]
    return "model_error", detail.encode("utf-8", "replace").decode()


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _of_device(error: Exception) -> bool:
    """A CUDA error, but for lack of memory, which is over with the call. torch is no import here, so names must do."""
    said, names = str(error).lower(), {kind.__name__ for kind in type(error).__mro__}
    return ("AcceleratorError" in names or "cuda error" in said) and not _of_memory(error)


def _lost(error: Exception) -> DeviceLost:
    what = _model_error(error)[1].partition("\n")[0]
    return DeviceLost(f"the device was lost ({what}); run again to go on")
