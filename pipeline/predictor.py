"""How long a shortlist a query needs: a small network that predicts it before any full vector is read.

It sees the coarse scores at the head, middle and end of the query's list, and the query's vector where that helps on
rows set aside. It gives the chance of each level of a ladder of lengths; the length taken is where their sum, read
along the ladder, passes a threshold. The corpus teaches it (`lessons`).

The threshold is a split-conformal quantile (as in `margin`): of queries like those it was calibrated on, at least the
stated share gets all of the top k that the widest list holds.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.margin import CONFIDENCES
from pipeline.vectors import Matrix

FILE = "predictor.npz"
"""The weights, beside the evaluation in the root."""
HIDDEN = 32
"""Numbers between the two layers."""
STEPS, BATCH, RATE, DECAY = 1_500, 128, 1e-3, 0.1
"""Steps of Adam, queries in each, its first rate (it falls to 0), weight decay."""
VECTOR = 0.3
"""What a number of the vector counts beside a coarse score, both brought to deviation 1: there are so many more."""
ROUNDING = 1e-6
"""A product of the same vector alone and among others differs by less; a length is not to change by it."""

Lengths = NDArray[np.int64]


def ladder(k: int, width: int) -> Lengths:
    """The levels: k, 2 k, 4 k, … and the widest list."""
    doubled = k * 2 ** np.arange(max(1, int(np.ceil(np.log2(max(width / k, 1))))))
    return np.append(doubled[doubled < width], width).astype(np.int64)


@dataclass(frozen=True)
class Predictor:
    """What was learned for one table and scoring.

    `layers` are weights and biases in turn, float32 [inputs, h], [h], [h, levels + 1], [levels + 1]; the last class are
    queries for which the widest list is too short. `thresholds` by confidence; `asked` says what calibrated them.
    """

    layers: tuple[Matrix, ...]
    k: int
    width: int
    queries: int
    asked: str
    thresholds: Mapping[str, float]

    def threshold(self, confidence: float) -> float:
        """The threshold of the least confidence that was calibrated and is not below the wanted one."""
        fitted = sorted((float(name), value) for name, value in self.thresholds.items())
        return next((value for name, value in fitted if name >= confidence - 1e-9), np.inf)

    def lengths(self, vectors: Matrix, scores: Matrix, confidence: float, k: int) -> Lengths:
        """How many candidates each unit query [q, D] needs for its best k, int64[q], by its coarse scores [q, width].

        For more than the k that it was trained for, in proportion (assumed); never fewer than k.
        """
        rising = chances(self.layers, vectors, curve(scores, self.k, self.width))
        found = _read(rising, _steps(self.k, self.width), self.threshold(confidence))
        longer = max(1.0, k / self.k)
        return np.maximum(np.ceil(np.exp2(found) * longer * (1 - ROUNDING)), k).astype(np.int64)


def curve(scores: Matrix, k: int, width: int) -> Matrix:
    """Coarse scores [q, n], best first, at the levels of the ladder; the last one there is where a list ends before."""
    at = np.minimum(ladder(k, width), scores.shape[1]) - 1
    lowest = np.where(np.isfinite(scores), scores, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    known = np.where(np.isfinite(scores[:, at]), scores[:, at], lowest)
    return np.asarray(np.where(np.isfinite(known), known, 0), np.float32)


def fit(vectors: Matrix, curves: Matrix, needed: Lengths, k: int, width: int, seed: int) -> tuple[Matrix, ...]:
    """Layers learned from unit queries [n, D], their curves, and the lengths they need (above `width`: more than that).

    One network sees the curve alone, another the vector too; of both, the one that does better on a fifth set aside.
    """
    order = np.random.default_rng(seed).permutation(len(needed))
    aside, rest = order[: len(order) // 5], order[len(order) // 5 :]
    wanted = np.searchsorted(ladder(k, width), needed)
    best: tuple[Matrix, ...] = ()
    least = np.inf
    for seen in (curves, np.concatenate([curves, vectors], axis=1)):
        layers = _trained(seen[rest], curves.shape[1], wanted[rest], len(ladder(k, width)) + 1, seed)
        loss = -np.log(_outputs(layers, seen[aside])[np.arange(len(aside)), wanted[aside]] + 1e-9).mean()
        if loss < least:
            best, least = layers, loss
    return best


def _trained(seen: Matrix, scores: int, wanted: NDArray[np.int64], classes: int, seed: int) -> tuple[Matrix, ...]:
    """Minimise the cross-entropy of classes by Adam, from inputs [n, scores + …]; equal bits for equal input, seed."""
    rng = np.random.default_rng(seed)
    weight = np.where(np.arange(seen.shape[1]) < scores, 1.0, VECTOR)
    mean, scale = seen.mean(axis=0, dtype=np.float64), weight / np.maximum(seen.std(axis=0, dtype=np.float64), 1e-4)
    inputs = ((seen - mean) * scale).astype(np.float32)
    layers: list[Matrix] = []
    for wide, narrow in ((inputs.shape[1], HIDDEN), (HIDDEN, classes)):
        layers += [(rng.standard_normal((wide, narrow)) * (2 / wide) ** 0.5).astype(np.float32)]
        layers += [np.zeros(narrow, np.float32)]
    moments = [(np.zeros_like(layer), np.zeros_like(layer)) for layer in layers]
    with threadpool_limits(1):
        for step, batch in enumerate(_batches(len(inputs), rng), 1):
            rate = np.float32(RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS)))
            slopes = _slopes(layers, inputs[batch], wanted[batch])
            for layer, slope, (first, second) in zip(layers, slopes, moments, strict=True):
                first += 0.1 * (slope - first)
                second += 0.001 * (slope**2 - second)
                moved = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                layer -= rate * (moved + DECAY * layer * (layer.ndim > 1))
    # what brings inputs to deviation 1 becomes part of the first layer
    turned = layers[0] * scale[:, None]
    bias = layers[1] - mean @ turned
    return turned.astype(np.float32), bias.astype(np.float32), layers[2], layers[3]


def _batches(count: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """`STEPS` batches: pass after pass over everything, each in an order of its own."""
    left = np.zeros(0, np.int64)
    for _ in range(STEPS):
        while len(left) < BATCH:
            left = np.append(left, rng.permutation(count))
        yield left[:BATCH]
        left = left[BATCH:]


def _slopes(layers: Sequence[Matrix], inputs: Matrix, wanted: NDArray[np.int64]) -> list[Matrix]:
    """Derivatives of the mean cross-entropy by each layer."""
    first, bias, second, last = layers
    hidden = np.maximum(inputs @ first + bias, 0)
    error = _softmax(hidden @ second + last)
    error[np.arange(len(wanted)), wanted] -= 1
    error /= len(wanted)
    back = (error @ second.T) * (hidden > 0)
    return [inputs.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


def _softmax(raw: Matrix) -> Matrix:
    grown = np.exp(raw - raw.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True))


def _outputs(layers: Sequence[Matrix], seen: Matrix) -> Matrix:
    """The chance of each class for inputs [q, …], float64[q, levels + 1]."""
    first, bias, second, last = (layer.astype(np.float64) for layer in layers)
    return _softmax(np.maximum(seen @ first + bias, 0) @ second + last)


def chances(layers: Sequence[Matrix], vectors: Matrix, curves: Matrix) -> Matrix:
    """The chance that each level, or a lower one, is enough: float64[q, levels], rising."""
    sees_curve_only = layers[0].shape[0] == curves.shape[1]
    seen = curves if sees_curve_only else np.concatenate([curves, vectors], axis=1)
    return np.asarray(np.cumsum(_outputs(layers, seen), axis=1)[:, :-1])


def calibrated(
    layers: tuple[Matrix, ...],
    vectors: Matrix,
    curves: Matrix,
    needed: Lengths,
    k: int,
    width: int,
    asked: str,
    confidences: Sequence[float] = CONFIDENCES,
) -> Predictor:
    """The predictor, its thresholds set by queries [n, D] that it was not trained on; `asked` says which.

    `needed` are the lengths, at most `width`, that hold all of what the widest list holds.
    """
    steps, at = _steps(k, width), np.log2(np.maximum(needed, 1))
    rising = chances(layers, vectors, curves)
    reached = [np.interp(place, steps, [0.0, *row]) for place, row in zip(at, rising, strict=True)]
    ordered = np.sort(reached)
    places = {confidence: int(np.ceil((len(needed) + 1) * confidence)) for confidence in confidences}
    found = {f"{c:g}": float(ordered[place - 1]) for c, place in places.items() if place <= len(needed)}
    return Predictor(layers, k, width, len(needed), asked, found)


def _steps(k: int, width: int) -> Matrix:
    """log2 of where the levels begin and end; the first one begins a level below."""
    ends = np.log2(ladder(k, width))
    return np.concatenate([[ends[0] - 1], ends])


def _read(rising: Matrix, steps: Matrix, threshold: float) -> Matrix:
    """log2 of the length at which the chances [q, levels] pass the threshold; the widest where they do not."""
    padded = np.concatenate([np.zeros((len(rising), 1)), rising], axis=1)
    level = np.minimum((rising < threshold).sum(axis=1), rising.shape[1] - 1)
    low, high = (np.take_along_axis(padded, (level + more)[:, None], 1)[:, 0] for more in (0, 1))
    share = np.clip((threshold - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.asarray(steps[level] + share * (steps[level + 1] - steps[level]))


def to_bytes(predictors: Mapping[str, Predictor]) -> bytes:
    """The weights of predictors by name, as an .npz file."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{name}/{number}": layer for name, one in predictors.items() for number, layer in enumerate(one.layers)
    }
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def described(predictors: Mapping[str, Predictor]) -> dict[str, dict[str, Any]]:
    """All but the weights, as it stands in a generation."""
    return {
        name: {part: value for part, value in vars(one).items() if part != "layers"} for name, one in predictors.items()
    }


def from_bytes(data: bytes, told: Mapping[str, Mapping[str, Any]]) -> dict[str, Predictor]:
    """The predictors of `to_bytes` and `described`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {
            name: Predictor(tuple(arrays[f"{name}/{number}"] for number in range(4)), **rest)
            for name, rest in told.items()
        }
