"""Search against the clock: the best answer so far when the time is over.

The cascade is run level by level. The first level always runs; each finer one while time is left.
What is left of the time widens all shortlists, twice as long each round, until they hold every row. The k rows of the
answer always meet the full vectors in the end, so that scores are cosines.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.cascade import Level, Opened
from pipeline.levels import Hits, Step
from pipeline.tables import DOCUMENTS
from pipeline.vectors import Matrix

GROWTH = 2
"""How much longer the shortlists of the next round are."""
SLOWER = 1.5
"""A round is begun where this many times its expected milliseconds are left: times vary."""


@dataclass(frozen=True)
class Reached:
    """What ranked the answer: the last level's table (a nested one with its dim), and the first level's shortlist."""

    table: str
    shortlist: int


def run(
    opened: Opened, vectors: Matrix, k: int, clause: str | None, levels: Sequence[Level], milliseconds: float
) -> tuple[Hits, list[Step], Reached]:
    """Hits of unit float32 queries [n, full_dim], every step that was made, and how far the cascade came."""
    clock = Clock(milliseconds)
    hits, steps, reached = _descend(opened, vectors, k, clause, levels, clock)
    lengths = [step.shortlist for step in steps[:-1]]
    spent = clock.spent()
    while reached.table == DOCUMENTS and lengths and lengths[0] < opened.row_count:
        if clock.left() < SLOWER * GROWTH * spent:
            break
        start = clock.spent()
        lengths = [min(length * GROWTH, opened.row_count) for length in lengths]
        wider = [(table, length, how) for (table, _, how), length in zip(levels, lengths, strict=True)]
        hits, more = opened.rank(vectors, k, clause, wider)
        steps += [replace(step, note=f"widened to {lengths[0]}") for step in more]
        reached, spent = Reached(DOCUMENTS, lengths[0]), clock.spent() - start
    return hits, steps, reached


def _descend(
    opened: Opened, vectors: Matrix, k: int, clause: str | None, levels: Sequence[Level], clock: "Clock"
) -> tuple[Hits, list[Step], Reached]:
    """One way down the cascade, as far as the time lasts."""
    steps = opened.steps(k, levels, rescore=True)
    hits, done = None, list[Step]()
    for step in steps:
        if hits is not None and clock.left() <= 0:
            break
        start = clock.spent()
        hits = opened.level(step, vectors, hits, step.shortlist, clause)
        step.milliseconds = clock.spent() - start
        done.append(step)
    assert hits is not None
    table = done[-1].shown
    if table != DOCUMENTS:
        done.append(Step(DOCUMENTS, "", k, note=f"the time was over after {table}: only its best {k} rows"))
        hits = opened.level(done[-1], vectors, hits.first(k), k, clause)
    return hits, done, Reached(table, steps[0].shortlist if len(steps) > 1 else opened.row_count)


class Clock:
    """Milliseconds of one search."""

    def __init__(self, milliseconds: float) -> None:
        """Begin now."""
        self._start, self._milliseconds = time.perf_counter(), milliseconds

    def spent(self) -> float:
        """Milliseconds since the search began."""
        return (time.perf_counter() - self._start) * 1000

    def left(self) -> float:
        """Milliseconds until the time is over; negative after it."""
        return self._milliseconds - self.spent()
