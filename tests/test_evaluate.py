"""The measurement: metrics that can be checked by hand, floors, and nothing measured twice."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import open_index, run
from pipeline.errors import FloorError
from pipeline.metrics import METRICS, interval, judged as judged_by, recall_exact, without_own
from tests.conftest import corpus_frame


def test_recall_is_the_share_of_the_true_hits():
    truth = np.array([[1, 2], [3, 4], [5, 6], [7, -1], [-1, -1]])
    found = np.array([[2, 1], [3, 9], [8, 9], [7, 6], [-1, -1]])
    assert recall_exact(found, truth).tolist() == [1.0, 0.5, 0.0, 1.0, 1.0]


def test_a_query_is_not_counted_against_itself():
    rows = np.array([[5, 1, 2], [1, 2, 5], [1, 2, 3]])
    own = np.array([5, 5, 5])
    assert without_own(rows, rows, own, 2)[0].tolist() == [[1, 2], [1, 2], [1, 2]]
    assert without_own(np.array([[5, -1]]), np.array([[5, -1]]), own[:1], 2)[0].tolist() == [[-1, -1]]


def test_an_interval_holds_the_mean_and_repeats():
    values = np.random.default_rng(0).random(200)
    low, high = interval(values, seed=3)
    assert low < values.mean() < high
    assert (low, high) == interval(values, seed=3)
    assert interval(np.ones(5), 0) == (1.0, 1.0)


@pytest.fixture
def judged(tmp_path):
    """Queries that are texts of the corpus, each judged for its own document."""
    frame = corpus_frame()[:40]
    frame.select("_id", "text").with_columns(_id="q" + pl.col("_id")).write_parquet(tmp_path / "queries.parquet")
    qrels = frame.select(query_id="q" + pl.col("_id"), corpus_id="_id", score=pl.lit(1))
    qrels.write_parquet(tmp_path / "qrels.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("queries", "qrels")}
    return {**files, "k": 5, "shortlists": []}


def test_with_qrels_every_choice_has_every_metric(spec, judged):
    job = spec(corpus__text="text", evaluate=judged, search={"cascade": [{"table": "prefix_16_int8", "shortlist": 60}]})
    run(job)
    measured = pl.read_parquet(Path(job.root) / "evaluation.parquet")
    of_bits = [(mode, scoring) for scoring in ("asymmetric", "hamming") for mode in ("alone", "rescored", "cascade")]
    assert measured.filter(choice="prefix_8_binary").select("mode", "scoring").rows() == of_bits
    assert measured.filter(choice="prefix_16_int8").select("mode", "scoring", "shortlist").rows() == [
        ("alone", "dot", None), ("rescored", "dot", 200), ("cascade", "dot", 200),
    ]  # fmt: skip
    assert measured.filter(choice="prefix_16_float16")["mode"].to_list() == ["alone", "rescored"]  # nothing is finer
    assert measured[-2:].select("choice", "mode").rows() == [("cascade", "cascade"), ("exact", "exact")]
    exact = measured.row(-1, named=True)
    assert [exact[name] for name in METRICS] == [1.0, 1.0, 1.0, 1.0]  # each text is nearest to itself
    assert (exact["queries"], exact["k"], exact["shortlist"], exact["dim"]) == (40, 5, None, 32)
    sizes = dict(measured.filter(pl.col("mode") == "rescored").select("choice", "bytes_per_row").rows())
    assert sizes == {"prefix_8_binary": 1 + 64, "prefix_16_int8": 16 + 64, "prefix_16_float16": 32 + 64}
    bounds = [
        (row[f"{name}_low"], row[name], row[f"{name}_high"])
        for row in measured.iter_rows(named=True)
        for name in METRICS
    ]
    assert all(low <= value <= high for low, value, high in bounds)
    assert measured["median_ms"].min() > 0


def found_by_search(index, setting, query, k):
    """The rows of one setting, by the public search or, for tables alone, by their codes."""
    choice, mode, scoring, shortlist = setting
    scoring = "auto" if scoring == "dot" else scoring
    if mode == "alone":
        hits, _ = index.rank(query[None], k, None, [(choice, k, scoring)], rescore=False)
        return hits.rows[0].tolist()
    levels = {
        "rescored": [(choice, shortlist, scoring)],
        "cascade": [(choice, shortlist, scoring), ("prefix_16_float16", max(k, (shortlist or 0) // 4))],
        "exact": [],
    }
    return index.search(query, k, cascade=None if choice == "cascade" else levels[mode])["row"].to_list()


def test_the_sweep_finds_what_a_search_of_each_setting_finds(spec, judged):
    """Longer shortlists are measured once and shorter ones read off them; the answers must not differ."""
    small = {"cascade": [{"table": "prefix_8_binary", "shortlist": 40}, {"table": "prefix_16_int8", "shortlist": 9}]}
    job = spec(corpus__text="text", evaluate={**judged, "shortlists": [7, 30]}, search=small)
    run(job)
    root, index = Path(job.root), open_index(job.root)
    measured, rankings = (pl.read_parquet(root / name) for name in ("evaluation.parquet", "rankings.parquet"))
    assert sorted(set(measured["shortlist"].drop_nulls())) == [7, 30, 40, 200]
    queries = pl.read_parquet(judged["queries"])
    vectors = index.embed(queries["text"].to_list())
    for number, setting in enumerate(measured.select("choice", "mode", "scoring", "shortlist").rows()):
        found = rankings.filter(setting=number)
        assert found["query"].to_list() == queries["_id"].to_list()
        for at in (0, 17, 39):
            assert found["rows"][at].to_list() == found_by_search(index, setting, vectors[at], 5), setting


def test_metrics_can_be_computed_again_from_what_is_kept(spec, judged):
    job = spec(corpus__text="text", evaluate=judged)
    run(job)
    root = Path(job.root)
    measured, rankings = (pl.read_parquet(root / name) for name in ("evaluation.parquet", "rankings.parquet"))
    ids = dict(pl.scan_lance(str(root / "lancedb" / "documents.lance")).select("row", "id").collect().rows())
    qrels = {query: {document: score} for query, document, score in pl.read_parquet(judged["qrels"]).iter_rows()}
    truth = np.array(rankings.filter(setting=len(measured) - 1)["rows"].to_list())
    for number, row in enumerate(measured.iter_rows(named=True)):
        mine = rankings.filter(setting=number)
        rows = mine["rows"].to_list()
        assert recall_exact(np.array(rows), truth).mean() == row["recall_exact"]
        again = judged_by(mine["query"].to_list(), [[ids[one] for one in line] for line in rows], qrels, 5)
        assert {name: values.mean() for name, values in again.items()} == {name: row[name] for name in METRICS[1:]}
        assert np.median(mine["seconds"].drop_nulls()) * 1000 == row["median_ms"]


def test_the_examples_show_each_level_and_what_was_lost(spec):
    small = {"cascade": [{"table": "prefix_8_binary", "shortlist": 12}, {"table": "prefix_16_int8", "shortlist": 10}]}
    job = spec(search=small)
    run(job)
    shown = pl.read_parquet(Path(job.root) / "examples.parquet")
    assert shown["query"].n_unique() == 10
    one = shown.filter(query=shown["query"][0])
    assert one["table"].unique(maintain_order=True).to_list() == [
        "prefix_8_binary",
        "prefix_16_int8",
        "cascade",
        "exact",
    ]
    kept = set(one.filter(table="cascade")["row"])
    for row, lost in one.filter(table="exact").select("row", "lost").rows():
        assert lost == (row not in kept)
    assert shown["lost"].any()
    assert not shown.filter(pl.col("lost"))["table"].is_in(["prefix_8_binary", "cascade"]).any()


def test_without_queries_corpus_rows_are_asked(spec):
    job = spec()
    run(job)
    measured = pl.read_parquet(Path(job.root) / "evaluation.parquet")
    assert measured["queries"].unique().to_list() == [120]
    assert measured["ndcg"].null_count() == len(measured)
    assert measured.filter(pl.col("choice") == "exact")["recall_exact"].to_list() == [1.0]
    assert measured.filter(pl.col("mode") == "alone")["recall_exact"].max() < 1.0


def test_the_metric_values_are_those_of_the_definitions(spec, judged, tmp_path):
    """One query, three judged documents at known ranks of the exact answer."""
    job = spec(corpus__text="text")
    run(job)
    query = "w001 w002 w003"
    ranked = open_index(job.root).exact(query, k=5)["id"].to_list()
    pl.DataFrame({"_id": ["q"], "text": [query]}).write_parquet(judged["queries"])
    judgements = [
        ("q", ranked[1], 2),
        ("q", ranked[3], 1),
        ("q", "doc-119" if "doc-119" not in ranked else "doc-118", 1),
    ]
    pl.DataFrame(judgements, schema=["query_id", "corpus_id", "score"], orient="row").write_parquet(judged["qrels"])
    run(spec(corpus__text="text", evaluate=judged))
    exact = pl.read_parquet(Path(job.root) / "evaluation.parquet").row(-1, named=True)
    gain = 2 / np.log2(3) + 1 / np.log2(5)
    ideal = 2 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert exact["ndcg"] == pytest.approx(gain / ideal)
    assert exact["recall"] == pytest.approx(2 / 3)
    assert exact["mrr"] == pytest.approx(1 / 2)


def test_a_missed_floor_publishes_nothing_and_keeps_what_was_there(spec):
    strict = {"floor": {"recall_exact": 1.0}}
    small = {"cascade": [{"table": "prefix_8_binary", "shortlist": 10}]}
    with pytest.raises(FloorError, match=r"recall_exact 0\.\d+ < 1; nothing was published"):
        run(spec(evaluate=strict, search=small))
    root = Path(spec().root)
    assert not (root / "manifest.json").exists()
    assert (root / "evaluation.parquet").exists()
    first = run(spec(search=small))
    with pytest.raises(FloorError):
        run(spec(evaluate=strict, search=small))
    assert run(spec(search=small)) == first
    wide = {"cascade": [{"table": "prefix_8_binary", "shortlist": 120}]}
    assert run(spec(evaluate=strict, search=wide))["generation"] == 2


def test_a_rerun_measures_again_only_when_asked(spec, monkeypatch):
    from pipeline import evaluate

    first = run(spec())
    asked = []
    inner = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda *arguments: asked.append(1) or inner(*arguments))
    assert run(spec()) == first
    assert asked == []
    run(spec(), first="evaluate")
    assert asked == [1]
