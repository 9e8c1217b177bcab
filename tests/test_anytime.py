"""Deadlines, with a clock that the test turns: level by level, then wider and wider, always the best so far."""

import numpy as np
import pytest

from pipeline import anytime, open_index, run
from pipeline.errors import QueryError
from pipeline.vectors import unit
from tests.conftest import DIM

CASCADE = [("prefix_8_binary", 30), ("prefix_16_int8", 15)]


@pytest.fixture(scope="module")
def queries():
    return unit(np.random.default_rng(0).standard_normal((4, DIM)))


@pytest.fixture
def index(spec):
    job = spec()
    run(job)
    return open_index(job.root)


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock takes one millisecond."""
    looks = iter(range(10_000))

    def spent(self):
        return float(next(looks))

    monkeypatch.setattr(anytime.Clock, "spent", spent)


def tables(index, query, deadline):
    return [(step["table"], step["shortlist"]) for step in index.explain(query, 5, None, CASCADE, deadline_ms=deadline)]


def test_the_first_level_always_runs_and_its_best_meet_the_full_vectors(index, queries, clock):
    assert tables(index, queries[0], 0.1) == [("prefix_8_binary", 30), ("documents", 5)]


def test_finer_levels_run_while_time_is_left(index, queries, clock):
    # a level looks twice, and once more before it: the second begins at 2, the third at 5
    assert tables(index, queries[0], 3) == [("prefix_8_binary", 30), ("prefix_16_int8", 15), ("documents", 5)]


def test_then_the_shortlists_widen_until_they_hold_every_row(index, queries, clock):
    seen = tables(index, queries[0], 10_000)
    assert [size for table, size in seen if table == "prefix_8_binary"] == [30, 60, 120]
    assert [size for table, size in seen if table == "prefix_16_int8"] == [15, 30, 60]


def test_all_the_time_in_the_world_is_exact(index, queries):
    hits = index.search(queries, 5, cascade=[("prefix_8_binary", 30)], deadline_ms=60_000)
    assert hits.drop("level", "shortlist").equals(index.exact(queries, 5))
    assert set(hits["level"]) == {"documents"}
    assert set(hits["shortlist"]) == {120}


def test_scores_are_cosines_however_early_it_ends(index, queries, monkeypatch):
    monkeypatch.setattr(anytime.Clock, "left", lambda self: -1.0)
    hits = index.search(queries[0], 5, cascade=CASCADE, deadline_ms=1)
    exact = dict(index.exact(queries[0], 120).select("row", "score").iter_rows())
    assert hits["score"].to_list() == [exact[row] for row in hits["row"]]
    assert hits["score"].is_sorted(descending=True)
    assert set(hits["level"]) == {"prefix_8_binary"}


@pytest.mark.parametrize("deadline", [0, -1, "1", True, float("nan")])
def test_a_deadline_is_a_number_above_zero(index, queries, deadline):
    with pytest.raises(QueryError, match="deadline_ms must be a number above 0"):
        index.search(queries[0], deadline_ms=deadline)
