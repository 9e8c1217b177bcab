"""When to stop rescoring: an adaptive shortlist.

Candidates are rescored in the order of their coarse scores. The coarse score predicts the cosine by a line, fitted on
the evaluation's queries; of the query at hand, what was rescored so far tells by how much that line is off for it, and
how far its candidates scatter. The margin is what the k-th best cosine so far lies above the prediction for the best
candidate left, in units of that scatter. Rescoring stops where the margin passes a threshold.

The threshold is a split-conformal quantile: of queries like those it was fitted on, at least the stated share gets the
same k rows as from the whole list (Vovk, Gammerman, Shafer 2005, chapter 4; Angelopoulos, Bates 2023, section 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import Matrix

CONFIDENCES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
WIDEST = 5
"""How many times its shortlist a level may hand on where the margin stays narrow."""
PRIOR = 16.0
"""Candidates that the scatter of all queries counts for beside the query's own (measured: 8 to 32 do alike)."""
FIRST = 32
"""Candidates that are rescored before the margin is looked at for the first time."""


@dataclass(frozen=True)
class Line:
    """cosine = slope * coarse score + intercept, with the variance of what it misses over all queries."""

    slope: float
    intercept: float
    variance: float

    def predicted(self, coarse: Matrix) -> Matrix:
        """What the line says."""
        return np.asarray(self.slope * coarse + self.intercept)


@dataclass
class Seen:
    """Of each query, what was rescored so far: count, sum and sum of squares of what the line missed, k best."""

    line: Line
    count: NDArray[np.float64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    best: Matrix

    @classmethod
    def nothing(cls, line: Line, queries: int, k: int) -> "Seen":
        """Before anything was rescored."""
        zeros = np.zeros((3, queries))
        return cls(line, zeros[0], zeros[1], zeros[2], np.full((queries, k), -np.inf, np.float32))

    def add(self, which: NDArray[np.bool_], coarse: Matrix, full: Matrix) -> None:
        """Take in candidates [n, m] of the n queries marked; -inf are none."""
        known = np.isfinite(full) & np.isfinite(coarse)
        missed = np.where(known, np.where(known, full, 0) - self.line.predicted(np.where(known, coarse, 0)), 0)
        self.count[which] += known.sum(axis=1)
        self.total[which] += missed.sum(axis=1)
        self.squares[which] += (missed**2).sum(axis=1)
        both = np.concatenate([self.best[which], full], axis=1)
        k = self.best.shape[1]
        self.best[which] = np.partition(both, both.shape[1] - k, axis=1)[:, both.shape[1] - k :]

    def margin(self, following: Matrix) -> Matrix:
        """The margin over candidates with these coarse scores [q], float64; inf where none is left."""
        count = np.maximum(self.count, 1)
        mean = self.total / count
        variance = np.maximum(self.squares / count - mean**2, 0)
        scatter = np.sqrt((variance * self.count + self.line.variance * PRIOR) / (self.count + PRIOR))
        left = np.isfinite(following)
        predicted = self.line.predicted(np.where(left, following, 0)) + mean
        with np.errstate(invalid="ignore"):
            margins = (self.best.min(axis=1) - predicted) / np.maximum(scatter, 1e-9)
        return np.asarray(np.where(left, margins, np.inf))


def marks(width: int, k: int) -> list[int]:
    """Where the margin is looked at: 32, 48, 64, 96, … candidates, at least 2 k, and the end."""
    found, step = [], max(FIRST, 2 * k)
    while step < width:
        found += [step, step * 3 // 2]
        step *= 2
    return [*(mark for mark in found if mark < width), width]


@dataclass(frozen=True)
class Stopping:
    """What was learned for one table: its line, and the threshold for each confidence at this k and width."""

    line: Line
    k: int
    width: int
    queries: int
    thresholds: dict[str, float]

    @classmethod
    def of(cls, learned: Mapping[str, Any]) -> "Stopping":
        """Read back what stands in a generation."""
        return cls(**{**learned, "line": Line(**learned["line"])})

    def threshold(self, confidence: float) -> float:
        """The threshold of the least confidence that was fitted and is not below the wanted one."""
        fitted = sorted((float(name), value) for name, value in self.thresholds.items())
        return next((value for name, value in fitted if name >= confidence - 1e-9), np.inf)


def fit(coarse: Matrix, full: Matrix, k: int, confidences: Sequence[float] = CONFIDENCES) -> Stopping:
    """Learn from candidates [q, width] in the order of their coarse scores, and their cosines; -inf are none."""
    known = np.isfinite(coarse) & np.isfinite(full)
    slope, intercept = np.polyfit(coarse[known].astype(np.float64), full[known].astype(np.float64), 1)
    line = Line(float(slope), float(intercept), float((full[known] - slope * coarse[known] - intercept).var()))
    queries, width = coarse.shape
    needed = np.full(queries, -np.inf)
    final = np.sort(full, axis=1)[:, ::-1][:, :k]
    seen, everyone, start = Seen.nothing(line, queries, k), np.ones(queries, bool), 0
    for mark in marks(width, k)[:-1]:
        seen.add(everyone, coarse[:, start:mark], full[:, start:mark])
        is_short = np.sort(seen.best, axis=1)[:, ::-1].sum(axis=1) < final.sum(axis=1) - 1e-7
        needed = np.where(is_short, np.maximum(needed, seen.margin(coarse[:, mark])), needed)
        start = mark
    ordered = np.sort(needed)
    places = {confidence: int(np.ceil((queries + 1) * confidence)) for confidence in confidences}
    found = {f"{c:g}": float(ordered[place - 1]) for c, place in places.items() if place <= queries}
    # JSON knows no infinity: a query list in which nothing was ever lost may stop at the first look
    finite = {name: value if np.isfinite(value) else -1e9 for name, value in found.items()}
    return Stopping(line, k, width, queries, finite)
