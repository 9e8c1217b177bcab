"""The adaptive shortlist: what it promises of queries it has not seen, and what it saves."""

import numpy as np
import pytest

from pipeline import margin, open_index, run
from pipeline.margin import Line, Seen, Stopping
from tests.conftest import corpus_frame, texts

K, WIDTH = 10, 400


def lists(queries, seed):
    """Coarse scores in order and cosines that scatter about them; every query has a level and scatter of its own."""
    rng = np.random.default_rng(seed)
    coarse = -np.sort(-rng.normal(0.5, 0.1, (queries, WIDTH)), axis=1)
    scatter = rng.uniform(0.01, 0.06, (queries, 1))
    full = 0.8 * coarse + 0.1 + rng.normal(0, 0.02, (queries, 1)) + scatter * rng.standard_normal(coarse.shape)
    return coarse.astype(np.float32), full.astype(np.float32)


def stop(learned, threshold, coarse, full):
    """Candidates that each query rescored, and whether its best K are those of the whole list."""
    seen, start = Seen.nothing(learned.line, len(coarse), K), 0
    everyone, ends = np.ones(len(coarse), bool), np.full(len(coarse), WIDTH)
    for mark in margin.marks(WIDTH, K)[:-1]:
        seen.add(everyone, coarse[:, start:mark], full[:, start:mark])
        ends = np.minimum(ends, np.where(seen.margin(coarse[:, mark]) > threshold, mark, WIDTH))
        start = mark
    best = np.sort(full, axis=1)[:, -K]
    inside = np.arange(WIDTH) < ends[:, None]
    return ends, (np.where(inside, full, -1) >= best[:, None]).sum(axis=1) >= K


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.98])
def test_the_stated_share_of_new_queries_lose_nothing(confidence):
    learned = margin.fit(*lists(2_000, 0), K)
    ends, whole = stop(learned, learned.threshold(confidence), *lists(4_000, 1))
    assert whole.mean() >= confidence - 0.015  # three standard deviations of both samples
    assert ends.mean() < WIDTH / 2


def test_fewer_candidates_than_a_fixed_list_of_equal_recall():
    learned = margin.fit(*lists(2_000, 0), K)
    coarse, full = lists(2_000, 1)
    ends, _ = stop(learned, learned.threshold(0.9), coarse, full)
    is_best = full >= np.sort(full, axis=1)[:, -K][:, None]
    recall = (is_best & (np.arange(WIDTH) < ends[:, None])).sum() / is_best.sum()
    fixed = int(np.argmax(np.cumsum(is_best.mean(axis=0)) / K >= recall)) + 1
    assert ends.mean() < 0.8 * fixed


def test_a_margin_by_hand():
    seen = Seen.nothing(Line(2.0, 0.0, variance=0.0), 1, k=2)
    everyone = np.ones(1, bool)
    # the line says 0.8, 0.6, 0.4; it misses by 0.1, -0.1, 0: mean 0, variance 0.02 / 3
    seen.add(everyone, np.array([[0.4, 0.3]], np.float32), np.array([[0.9, 0.5]], np.float32))
    seen.add(everyone, np.array([[0.2]], np.float32), np.array([[0.4]], np.float32))
    scatter = np.sqrt(0.02 / 3 * 3 / (3 + margin.PRIOR))
    assert seen.best.tolist() == [[pytest.approx(0.5), pytest.approx(0.9)]]
    assert seen.margin(np.array([0.1]))[0] == pytest.approx((0.5 - 0.2) / scatter, rel=1e-5)
    assert seen.margin(np.array([-np.inf]))[0] == np.inf


def test_marks_begin_at_twice_k_and_end_with_the_list():
    assert margin.marks(400, 10) == [32, 48, 64, 96, 128, 192, 256, 384, 400]
    assert margin.marks(400, 50) == [100, 150, 200, 300, 400]
    assert margin.marks(20, 10) == [20]


def test_a_confidence_that_was_not_fitted_takes_the_next_higher_one():
    learned = Stopping(Line(1, 0, 1), 10, 100, 60, {"0.5": 1.0, "0.9": 2.0})
    assert [learned.threshold(c) for c in (0.5, 0.6, 0.9, 0.95)] == [1.0, 2.0, 2.0, np.inf]


def test_searches_use_it_and_say_so(spec, corpus_file):
    corpus_frame(600).write_parquet(corpus_file)
    job = spec(
        prefixes=[{"dim": 16, "precision": "binary"}, {"dim": 24, "precision": "float16"}],
        search__stop="margin",
        search__confidence=0.9,
        search__cascade=[{"table": "prefix_16_binary", "shortlist": 80}],
        evaluate__shortlists=[500],
    )
    generation = run(job)
    assert set(generation["stopping"]) == {
        "prefix_16_binary asymmetric", "prefix_16_binary hamming", "prefix_24_float16 dot",
    }  # fmt: skip
    index, read = open_index(job.root), open_index(job.root, engine="lance")
    queries = index.embed(texts(40, seed=9))
    assert index.search(queries).equals(read.search(queries))
    coarse, full = index.explain(queries[0])
    assert coarse["shortlist"] == 400
    assert 20 <= full["candidates"] <= 400
    _, steps = index.rank(queries, 10)
    wide = index.search(queries, cascade=[("prefix_16_binary", 400)], stop="fixed")
    same = (index.search(queries)["row"] == wide["row"]).to_numpy().reshape(40, 10).all(axis=1)
    assert same.mean() >= 0.75
    assert steps[-1].candidates < 40 * 400


def test_with_too_few_queries_the_shortlist_is_fixed_and_says_so(spec, corpus_file):
    corpus_frame(40).write_parquet(corpus_file)
    job = spec(search__stop="margin")
    assert run(job)["stopping"] == {}
    assert "nothing was learned of" in open_index(job.root).explain("w001")[-1]["note"]
