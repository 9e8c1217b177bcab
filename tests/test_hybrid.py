"""Hybrid search: the fusion by hand, both lists under one filter, texts that look like query syntax."""

import asyncio
from pathlib import Path

import lance
import lancedb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline import hybrid, open_index, report, reread, run, verify
from pipeline.errors import QueryError, SpecError
from pipeline.levels import Hits
from pipeline.spec import JobSpec
from pipeline.storage import Root
from tests.conftest import DIM, corpus_frame

ZEBRA, TWINS = 77, 40
"""The row of a word that the model does not know; the first rows, which have one text."""


def with_zebra() -> pl.DataFrame:
    row = pl.int_range(120)
    text = pl.when(row == ZEBRA).then(pl.lit("w007 w008 Zébra")).when(row < TWINS).then(pl.lit("w001 w002"))
    return corpus_frame().with_columns(text=text.otherwise("text"))


def job(folder, model, **sections) -> JobSpec:
    made = {
        "name": "hybrid",
        "root": str(folder / "root"),
        "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": "text", "filter": ["lang"]},
        "model": {"name": str(model)},
        "prefixes": [{"dim": 8, "precision": "binary"}, {"dim": 16, "precision": "float16"}],
        "index": {"text": True},
        "evaluate": {"shortlists": []},
        "workers": {"count": 0},
    }
    return JobSpec.of(made | sections)


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("hybrid")
    with_zebra().write_parquet(folder / "corpus.parquet")
    run(job(folder, model))
    return folder / "root"


@pytest.fixture(scope="module")
def index(root):
    return open_index(root)


@pytest.fixture
def made(tmp_path, model):
    """A job over the same corpus in a folder of its own, with other sections."""
    with_zebra().write_parquet(tmp_path / "corpus.parquet")
    return lambda **sections: job(tmp_path, model, **sections)


def listed(*rows: int) -> Hits:
    known = np.array([rows])
    return Hits(known, known, np.zeros(known.shape, np.float32))


def test_the_fusion_by_hand():
    hits = hybrid.fused([listed(5, 3, 9), listed(9, 7, -1)], 10)
    assert hits.rows.tolist() == [[9, 5, 3, 7]]  # 3 and 7 are second in one list each: the lower row first
    assert hits.scores[0].tolist() == pytest.approx([1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    assert hybrid.fused([listed(5, 3, 9), listed(9, 7, -1)], 2).rows.tolist() == [[9, 5]]
    assert hybrid.fused([listed(2, 1), listed(1, 2)], 2).rows.tolist() == [[1, 2]]


def test_a_rare_word_is_found_though_its_vector_is_far(index):
    text = "w250 w251 zebra"
    assert ZEBRA not in index.search(text, k=5)["row"].to_list()
    hits = index.search(text, k=5, hybrid=True)
    assert ZEBRA in hits["row"].to_list()
    assert hits.columns == ["rank", "id", "score", "fused", "row", "text", "lang"]
    assert hits["fused"].dtype == pl.Float32
    assert hits["fused"].is_sorted(descending=True)
    cosines = dict(index.exact(text, k=120).select("row", "score").iter_rows())
    assert hits["score"].to_list() == pytest.approx([cosines[row] for row in hits["row"]], abs=1e-6)


def test_the_order_is_that_of_both_lists(index):
    text, depth = "w250 w007", hybrid.depth(6)
    by_vector = index.search(text, k=depth)["row"].to_list()
    by_text = hybrid.text_hits(index.opened, [text], depth, None)[0].rows[0].tolist()
    assert set(by_text) < set(by_vector) | {ZEBRA}
    worth = {row: sum(1 / (61 + one.index(row)) for one in (by_vector, by_text) if row in one) for row in by_vector}
    hits = index.search(text, k=6, hybrid=True)
    assert hits["row"].to_list() == sorted(worth, key=lambda row: (-round(worth[row], 12), row))[:6]
    assert hits["fused"].to_list() == pytest.approx([worth[row] for row in hits["row"]])


def test_several_texts_are_each_answered_as_if_alone(index):
    texts = ["w250 w251 zebra", "w001", "w120 w121"]
    together = index.search(texts, k=4, hybrid=True)
    for number, text in enumerate(texts):
        alone = index.search(text, k=4, hybrid=True)
        assert alone.equals(together.filter(query=number).drop("query"))
        assert alone.equals(asyncio.run(index.search_async(text, k=4, hybrid=True)))
    assert len(index.search([], hybrid=True)) == 0


@pytest.mark.parametrize("lang", ["de", "fr"])
def test_a_filter_holds_for_both_lists(index, lang):
    where = f"lang = '{lang}'"
    hits = index.search("w250 w251 zebra", k=200, where=where, hybrid=True)
    assert set(hits["lang"]) == {lang}
    assert len(hits) == 40
    assert (ZEBRA in hits["row"].to_list()) == (lang == "fr")
    found, _ = hybrid.text_hits(index.opened, ["zebra w001"], 100, index.opened.clause(where))
    assert (ZEBRA in found.rows) == (lang == "fr")


@pytest.mark.parametrize("keep", [1, 3, 30])
def test_equal_texts_tie_by_row(index, keep):
    hits, step = hybrid.text_hits(index.opened, ["w001"], keep, None)
    twins = [row for row in range(120) if row < TWINS]
    assert hits.rows[0].tolist() == twins[:keep]
    assert np.unique(hits.scores).size == 1
    assert (step.engine, step.table, step.rows) == ("fts", "documents", keep)


def test_ties_that_cross_the_cut_are_all_looked_at(index, monkeypatch):
    class Backwards:
        """One hundred equal rows, of which the last come first."""

        def __init__(self, limit: int) -> None:
            self.rows = np.arange(100)[::-1][:limit]

        def to_table(self) -> pa.Table:
            return pa.table({"row": self.rows, "_rowoffset": self.rows, "_score": np.ones(len(self.rows), np.float32)})

    monkeypatch.setattr("pipeline.store.matching", lambda table, words, limit, where: Backwards(limit))
    assert hybrid.text_hits(index.opened, ["w001"], 3, None)[0].rows.tolist() == [[0, 1, 2]]


SYNTAX = ['"', "'", '"zebra', "zebra AND NOT w007", "(zebra", "text:zebra*", "zebra~2 ^3 [a TO b]", "+zebra -w007",
          "{!} \\ / % _ ; --", "\x00 \x07", "漢字 ñ é 🦓", "\ud800", "zebra " * 30_000, "z" * 100_000]  # fmt: skip


@pytest.mark.parametrize("text", SYNTAX, ids=range(len(SYNTAX)))
def test_query_syntax_is_plain_words(index, text):
    hits = index.search(f"w250 {text}", k=5, hybrid=True)
    assert len(hits) == 5
    assert (ZEBRA in hits["row"].to_list()) == ("zebra" in text)


def test_a_long_query_is_cut_and_says_so(index):
    steps = index.explain("w250 " + "w251 " * 3_000, hybrid=True)
    assert steps[-2]["note"] == "only the first 10,000 characters of a query are looked for"
    assert not hybrid.text_hits(index.opened, ["qqq " * 3_000 + "zebra"], 3, None)[0].rows.size


def test_words_that_are_nowhere_leave_the_vectors_answer(index):
    assert index.search("w250 qqq", k=9, hybrid=True)["row"].to_list() != []
    hits, _ = hybrid.text_hits(index.opened, ["qqq", "the of"], 10, None)
    assert not (hits.rows >= 0).any()


def test_explain_tells_of_both_lists_and_the_fusion(index):
    steps = index.explain("w250 zebra", k=3, hybrid=True)
    assert [(step["table"], step["engine"]) for step in steps[-2:]] == [("documents", "fts"), ("documents", "fusion")]
    assert [step["shortlist"] for step in steps[-3:]] == [100, 100, 3]
    assert steps[-1]["rows"] == 3
    assert all(step["milliseconds"] > 0 for step in steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.ones(DIM, np.float32),), "hybrid search needs the query's text"),
        (("  ",), "query 0 is blank"),
        ((3,), "a query is a text"),
        ((["w001", 3],), "a query is a text"),
        (("w001", 0), "k must be at least 1"),
        (("w001", 2.5), "k must be a whole number"),
        (("w001", 3, "nope = 1"), "no filter column"),
    ],
)
def test_a_wrong_hybrid_query_is_one_sentence(index, arguments, words):
    with pytest.raises(QueryError, match=words):
        index.search(*arguments, hybrid=True)


def test_hybrid_is_a_yes_or_no(index):
    with pytest.raises(QueryError, match="hybrid is true, false or null, not 'yes'"):
        index.search("w001", hybrid="yes")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"index": {}, "search": {"hybrid": True}}, "search.hybrid needs the full-text index; set index.text: true"),
        ({"corpus": {"source": "x", "text": "text", "keep_text": False}}, "set corpus.keep_text: true"),
        ({"corpus": {"source": "x", "text": "text", "keep": ["fused"]}}, "column 'fused' cannot be carried"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(made, sections, words):
    with pytest.raises(SpecError, match=words):
        made(**sections)


def test_the_spec_turns_it_on_for_texts_alone(made):
    run(made(search={"hybrid": True}))
    index = open_index(made().root)
    text = "w250 w251 zebra"
    assert "fused" in index.search(text).columns
    assert "fused" not in index.search(text, hybrid=False).columns
    assert "fused" not in index.exact(text).columns
    assert "fused" not in index.search(index.embed([text])).columns


def text_indexes(folder: str) -> list[str]:
    table = lancedb.connect(f"{folder}/lancedb").open_table("documents")
    return [found.index_type for found in table.list_indices() if list(found.columns) == ["text"]]


def test_the_index_comes_stays_and_goes_and_an_open_generation_keeps_its_own(made):
    spec = made()
    first = run(spec)
    assert text_indexes(spec.root) == ["FTS"]
    assert run(spec) == first
    assert not verify.run(Path(spec.root)).problems
    before = open_index(spec.root)
    answer = before.search("w250 zebra", hybrid=True)
    second = run(made(index={}))
    assert second["generation"] == 2
    assert second["tables"]["documents"]["digest"] == first["tables"]["documents"]["digest"]
    assert text_indexes(spec.root) == []
    assert before.search("w250 zebra", hybrid=True).equals(answer)
    assert before.refresh()
    with pytest.raises(QueryError, match="set index.text: true and run the job again"):
        before.search("w250 zebra", hybrid=True)
    assert run(spec)["generation"] == 3
    assert before.refresh()
    assert before.search("w250 zebra", hybrid=True).equals(answer)


def test_verify_misses_a_promised_index(root):
    data = lance.dataset(str(root / "lancedb/documents.lance"))
    named = reread.Table("documents", data, {"rows": 120, "index": None}, {})
    notes = reread.Notes()
    reread._check_indexes(named, True, notes)
    assert not notes.problems
    bare = reread.Table("documents", lance.dataset(data.uri, version=1), {"rows": 120, "index": None}, {})
    reread._check_indexes(bare, True, notes)
    assert any("column text has no inverted index" in problem for problem in notes.problems)


def test_evaluation_shows_whether_it_pays(made, tmp_path):
    pl.DataFrame({"_id": ["a", "b"], "text": ["w250 zebra", "w090 w091"]}).write_parquet(tmp_path / "queries.parquet")
    qrels = {"query_id": ["a", "b"], "corpus_id": [f"doc-{ZEBRA}", "doc-3"], "score": [1, 1]}
    pl.DataFrame(qrels).write_parquet(tmp_path / "qrels.parquet")
    asked = {"shortlists": [], "queries": str(tmp_path / "queries.parquet"), "qrels": str(tmp_path / "qrels.parquet")}
    spec = made(evaluate=asked)
    run(spec)
    measured = pl.read_parquet(tmp_path / "root/evaluation.parquet")
    assert measured["choice"].to_list()[-4:] == ["text", "hybrid", "cascade", "exact"]
    text, mixed, exact = (
        measured.row(by_predicate=pl.col("choice") == name, named=True) for name in ("text", "hybrid", "exact")
    )
    assert (text["mode"], mixed["mode"], text["dim"], text["scoring"]) == ("alone", "hybrid", None, "bm25")
    assert text["mrr"] == 0.5  # the zebra comes first, and doc-3 has none of the words
    assert mixed["recall"] == 0.5
    assert exact["recall"] == 0
    assert text["bytes_per_row"] > 0
    assert mixed["bytes_per_row"] > text["bytes_per_row"]
    page = report.page(report.read(Root(tmp_path / "root")))
    assert ">hybrid<" in page
    assert ">bm25<" in page
    assert f"of both fused (hybrid) {mixed['ndcg']:.3f}" in page
    assert ">full text<" in page
    run(made())
    assert not {"text", "hybrid"} & set(pl.read_parquet(tmp_path / "root/evaluation.parquet")["choice"])
