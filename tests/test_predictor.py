"""The predictor of the shortlist: it learns which queries need a long list, and keeps its promise on others."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import lessons, open_index, predictor, run
from pipeline.levels import Hits, beginnings
from pipeline.verify import run as verify
from tests.conftest import corpus_frame

K, WIDTH = 5, 160
ROWS = 1_200


def queries_of_two_kinds(count, seed, told_by="vector"):
    """Vectors, coarse scores and lengths needed: 5 to 10 for the tight half, 80 to 160 for the loose half.

    What tells them apart is the sign of a vector's first number, or how fast the scores fall.
    """
    rng = np.random.default_rng(seed)
    is_loose = rng.random(count) < 0.5
    vectors = rng.standard_normal((count, 16)).astype(np.float32)
    slopes = np.full(count, 0.002)
    if told_by == "vector":
        vectors[:, 0] = np.where(is_loose, 2, -2) + 0.3 * vectors[:, 0]
    else:
        slopes = np.where(is_loose, 0.001, 0.004)
    scores = (0.9 - slopes[:, None] * np.arange(WIDTH) + 0.01 * rng.standard_normal((count, 1))).astype(np.float32)
    needed = np.where(is_loose, rng.integers(80, WIDTH + 1, count), rng.integers(5, 11, count))
    return vectors, scores, needed, is_loose


def taught(told_by):
    """A predictor that learned from 1,200 queries of two kinds and was calibrated on 400 others."""
    vectors, scores, needed, _ = queries_of_two_kinds(1_200, 0, told_by)
    layers = predictor.fit(vectors, predictor.curve(scores, K, WIDTH), needed, K, WIDTH, seed=0)
    vectors, scores, needed, _ = queries_of_two_kinds(400, 1, told_by)
    return predictor.calibrated(layers, vectors, predictor.curve(scores, K, WIDTH), needed, K, WIDTH, "queries")


def test_the_ladder_doubles_up_to_the_widest():
    assert predictor.ladder(10, 100).tolist() == [10, 20, 40, 80, 100]
    assert predictor.ladder(10, 80).tolist() == [10, 20, 40, 80]
    assert predictor.ladder(10, 10).tolist() == [10]


@pytest.mark.parametrize("told_by", ["vector", "scores"])
def test_queries_that_need_little_get_little(told_by):
    found = taught(told_by)
    vectors, scores, needed, is_loose = queries_of_two_kinds(600, 2, told_by)
    lengths = found.lengths(vectors, scores, 0.9, K)
    fixed = np.quantile(needed, (lengths >= needed).mean(), method="higher")  # serves as many queries
    assert lengths.mean() < 0.75 * fixed
    assert np.median(lengths[~is_loose]) < 25 and np.median(lengths[is_loose]) > 120
    # the network that has no use for the vector does not look at it
    assert (found.layers[0].shape[0] == len(predictor.ladder(K, WIDTH))) == (told_by == "scores")


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95])
def test_the_confidence_holds_on_other_queries(confidence):
    found = taught("vector")
    shares = []
    for seed in range(3, 8):
        vectors, scores, needed, _ = queries_of_two_kinds(400, seed)
        shares.append((found.lengths(vectors, scores, confidence, K) >= needed).mean())
    assert confidence - 0.03 < np.mean(shares) < confidence + 0.1  # above it: lengths are whole numbers


def test_a_confidence_that_was_not_calibrated_takes_the_next_one_or_the_widest_list():
    found = taught("vector")
    vectors, scores, _, _ = queries_of_two_kinds(50, 2)
    assert np.array_equal(found.lengths(vectors, scores, 0.85, K), found.lengths(vectors, scores, 0.9, K))
    assert (found.lengths(vectors, scores, 0.999, K) == WIDTH).all()


def test_more_hits_need_longer_lists_and_never_fewer_than_k():
    found = taught("vector")
    vectors, scores, _, _ = queries_of_two_kinds(50, 2)
    once, thrice = (found.lengths(vectors, scores, 0.8, k) for k in (K, 3 * K))
    assert (np.abs(thrice - 3 * once) <= 3).all()
    assert (found.lengths(vectors, scores, 0.5, 1) >= 1).all() and (
        found.lengths(vectors, scores, 0.5, 400) >= 400
    ).all()


def test_a_query_gets_the_same_length_alone_and_among_others():
    found = taught("vector")
    vectors, scores, _, _ = queries_of_two_kinds(64, 2)
    alone = [found.lengths(vectors[i : i + 1], scores[i : i + 1], 0.9, K)[0] for i in range(64)]
    assert found.lengths(vectors, scores, 0.9, K).tolist() == alone


def test_training_repeats_itself_and_is_read_back():
    first, second = taught("vector"), taught("vector")
    data = predictor.to_bytes({"t dot": first})
    assert data == predictor.to_bytes({"t dot": second})
    back = predictor.from_bytes(data, predictor.described({"t dot": first}))["t dot"]
    vectors, scores, _, _ = queries_of_two_kinds(64, 2)
    assert np.array_equal(back.lengths(vectors, scores, 0.9, K), first.lengths(vectors, scores, 0.9, K))


def test_a_list_that_ends_early_is_read_at_its_end():
    scores = np.array([[0.9, 0.8, 0.7, -np.inf, -np.inf]], np.float32)
    assert predictor.curve(scores, 2, 16).tolist() == [[np.float32(0.8), *[np.float32(0.7)] * 3]]
    assert predictor.curve(np.full((1, 5), -np.inf, np.float32), 2, 16).tolist() == [[0, 0, 0, 0]]


def test_beginnings_keep_the_first_of_each_query():
    offsets = np.arange(8).reshape(2, 4)
    found = beginnings(Hits(offsets, offsets + 10, offsets.astype(np.float32)), np.array([1, 3]))
    assert found.offsets.tolist() == [[0, -1, -1], [4, 5, 6]]
    assert found.rows.tolist() == [[10, -1, -1], [14, 15, 16]]
    assert found.scores.tolist() == [[0, -np.inf, -np.inf], [4, 5, 6]]


CASCADE = [{"table": "prefix_16_binary", "shortlist": 40}]


@pytest.fixture(scope="module")
def job(tmp_path_factory, model):
    """Values of a job of 900 rows whose shortlist is predicted."""
    folder = tmp_path_factory.mktemp("predictor")
    corpus_frame(ROWS).write_parquet(folder / "corpus.parquet")
    return {
        "name": "predictor",
        "root": str(folder / "root"),
        "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": "text", "filter": ["lang"]},
        "model": {"name": str(model)},
        "prefixes": [{"dim": 16, "precision": "binary"}],
        "search": {"stop": "predictor", "confidence": 0.8, "cascade": CASCADE},
        "evaluate": {"k": 5, "shortlists": [40]},
        "workers": {"count": 0},
    }


@pytest.fixture(scope="module")
def root(job):
    from pipeline.spec import JobSpec

    run(JobSpec.of(job))
    return Path(job["root"])


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((300, 32)).astype(np.float32)


def met(index, queries, **how):
    """Candidates that met the full vectors, per query."""
    return [index.explain(query, k=5, **how)[-1]["candidates"] for query in queries]


def test_evaluation_measures_it_beside_the_margin(root):
    measured = pl.read_parquet(root / "evaluation.parquet")
    modes = measured.filter(choice="prefix_16_binary", scoring="asymmetric")["mode"].to_list()
    assert modes.count("predictor") == modes.count("margin") == 1
    found = measured.row(by_predicate=(pl.col("mode") == "predictor") & (pl.col("scoring") == "asymmetric"), named=True)
    assert 5 < found["candidates"] < 200


def test_each_query_of_a_batch_has_its_own_length(root, queries):
    index = open_index(root)
    alone = met(index, queries[:20])
    assert len(set(alone)) > 3 and min(alone) >= 5 and max(alone) <= 200
    _, steps = index.rank(index._vectors(queries[:20])[0], 5)
    assert steps[-1].candidates == sum(alone)
    assert "learned" not in steps[-1].note
    assert "learned for k = 5" in index.explain(queries[0], k=9)[-1]["note"]


def test_the_confidence_holds_in_searches_of_corpus_rows(root):
    """Rows that were neither learned from nor calibrated on would need a larger corpus; their noisy copies do."""
    index = open_index(root)
    full = np.stack(index.documents.table.to_table(columns=["vector"]).column("vector").to_pylist()).astype(np.float32)
    near = full[::3] + 0.05 * np.random.default_rng(0).standard_normal((ROWS // 3, 32)).astype(np.float32)
    wide = index.search(near, k=5, cascade=[("prefix_16_binary", 200)], stop="fixed")
    some = index.search(near, k=5)
    rows = [frame.group_by("query", maintain_order=True).agg("row")["row"].to_list() for frame in (wide, some)]
    assert np.mean([set(one) == set(other) for one, other in zip(*rows, strict=True)]) > 0.75
    assert np.mean(met(index, near[:60])) < 200


def test_both_engines_and_a_reopened_root_answer_alike(root, queries):
    answers = [open_index(root, engine=engine).search(queries, k=5) for engine in ("resident", "lance", "lance")]
    assert answers[0].equals(answers[1]) and answers[1].equals(answers[2])
    single = open_index(root).search(queries[7], k=5)
    assert answers[0].filter(query=7).drop("query").equals(single)


def test_what_was_not_learned_is_searched_with_the_fixed_list_and_said(root, queries):
    index = open_index(root)
    filtered = index.explain(queries[0], where="lang = 'de'")[-1]
    assert (filtered["candidates"], filtered["note"]) == (
        40, "the shortlist is fixed: nothing was learned of lists with a filter",
    )  # fmt: skip
    index.opened._predictors = {}
    nothing = index.explain(queries[0])[-1]
    assert nothing["note"] == "the shortlist is fixed: nothing was learned of prefix_16_binary asymmetric"
    assert nothing["candidates"] == 40
    assert index.search(queries, k=5).equals(index.search(queries, k=5, stop="fixed"))


def test_a_corpus_too_small_teaches_nothing(spec):
    job = spec(search={"stop": "predictor"})
    generation = run(job)
    assert generation["predictor"] == {} and predictor.FILE not in generation["files"]
    assert not (Path(job.root) / predictor.FILE).exists()
    assert "nothing was learned" in open_index(job.root).explain("w001")[-1]["note"]


def test_damage_is_found_and_made_good(root, job):
    from pipeline.spec import JobSpec

    whole = (root / predictor.FILE).read_bytes()
    assert verify(root).is_whole
    (root / predictor.FILE).write_bytes(whole[:-1] + b"x")
    assert verify(root).damaged == (predictor.FILE,)
    run(JobSpec.of(job))
    assert (root / predictor.FILE).read_bytes() == whole
    kept = next(path for path in (root / "_state/kept").iterdir() if path.read_bytes() == whole)
    kept.unlink()
    assert not verify(root).is_whole
    run(JobSpec.of(job))
    assert kept.read_bytes() == whole and verify(root).is_whole


def test_exact_neighbours_and_places_are_those_of_plain_numpy(root):
    index = open_index(root)
    documents = index.documents
    vectors, own = lessons._drawn(documents, np.random.default_rng(0), avoided := np.arange(0, ROWS, 2))
    assert not np.isin(own, avoided).any() and len(own) == ROWS // 2
    truth = lessons._exact(documents, vectors, own, 5)
    full = np.stack(documents.table.to_table(columns=["vector"]).column("vector").to_pylist()).astype(np.float64)
    cosines = full @ full.T
    np.fill_diagonal(cosines, -2)
    cosines = cosines[own]
    # texts of the same words tie; the cosines are equal whichever row is taken
    got = np.sort(np.take_along_axis(cosines, truth, 1), axis=1)
    assert np.allclose(got, np.sort(cosines, axis=1)[:, -5:], atol=2e-3)
    assert not (truth == own[:, None]).any()
    name, _, needed, held = lessons._places(
        index.opened, ("prefix_16_binary", 200, "auto"), vectors[:9], own[:9], truth[:9]
    )
    assert name == "prefix_16_binary asymmetric"
    for at in range(9):
        hits, _ = index.rank(vectors[at : at + 1], 201, None, [("prefix_16_binary", 201)], rescore=False)
        others = [row for row in hits.rows[0].tolist() if row != own[at]][:200]
        places = [others.index(row) + 1 for row in truth[at].tolist() if row in others]
        assert (max(places, default=0), len(places) == 5) == (needed[at], held[at])


def test_real_queries_calibrate_where_there_are_enough(root, queries):
    opened, tables = open_index(root).opened, [("prefix_16_binary", "auto")]
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    none = np.zeros(0, np.int64)
    name = "prefix_16_binary asymmetric"
    by_rows = lessons.run(opened, tables, 5, 200, 0, None, none)[name]
    assert (by_rows.asked, by_rows.queries, by_rows.width) == ("corpus rows", ROWS // 4, 200)
    assert lessons.run(opened, tables, 5, 200, 0, units[:49], none)[name].asked == "corpus rows"
    by_queries = lessons.run(opened, tables, 5, 200, 0, units[::2], none)[name]
    assert (by_queries.asked, by_queries.queries) == ("queries", 150)
    assert all(np.array_equal(one, other) for one, other in zip(by_rows.layers, by_queries.layers, strict=True))
    # what they promise holds for the other half of the queries
    wide, _ = opened.rank(units[1::2], 5, None, [("prefix_16_binary", 200, "auto")])
    some, steps = opened.knowing({}, {name: by_queries}).rank(
        units[1::2], 5, None, [("prefix_16_binary", 40, "auto")], stop="predictor"
    )
    assert (np.sort(wide.rows, axis=1) == np.sort(some.rows, axis=1)).all(axis=1).mean() > opened.confidence - 0.1
    assert steps[-1].candidates < 200 * 150
