"""Search over a finished root: every way to ask gives the same answer, checked against plain NumPy."""

import asyncio

import numpy as np
import polars as pl
import pytest

from pipeline import open_index, run
from pipeline.errors import DamageError, DataError, QueryError, StaleError
from pipeline.spec import JobSpec
from pipeline.tables import vector_matrix
from pipeline.transform import Transform
from pipeline.vectors import truncate, unit
from tests.conftest import DIM, corpus_frame

CASCADE = [("prefix_8_binary", 80), ("prefix_16_int8", 30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """A finished root of 120 rows with filter columns."""
    folder = tmp_path_factory.mktemp("search")
    corpus_frame().write_parquet(folder / "corpus.parquet")
    job = {
        "name": "search",
        "root": str(folder / "root"),
        "corpus": {
            "source": str(folder / "corpus.parquet"), "id": "_id", "text": "text", "keep": ["title"],
            "filter": ["lang", "year"],
        },
        "model": {"name": str(model)},
        "prefixes": [
            {"dim": 8, "precision": "binary"},
            {"dim": 16, "precision": "int8"},
            {"dim": 16, "precision": "float16"},
            {"dim": 24, "precision": "float32"},
        ],
        "workers": {"count": 0},
    }  # fmt: skip
    run(JobSpec.of(job))
    return folder / "root"


@pytest.fixture(scope="module", params=["lance", "resident"])
def index(root, request):
    return open_index(root, engine=request.param)


@pytest.fixture(scope="module")
def full(index):
    """Full vectors by row as they are stored, in float32."""
    return vector_matrix(index.documents.table.to_table(columns=["vector"]).column("vector")).astype(np.float32)


def test_exact_is_the_cosine_of_numpy(index, full):
    queries = np.random.default_rng(1).standard_normal((5, DIM)).astype(np.float32)
    hits = index.exact(queries, k=7)
    scores = unit(queries) @ unit(full).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    assert hits["row"].to_numpy().reshape(5, 7).tolist() == best.tolist()
    assert np.allclose(hits["score"].to_numpy().reshape(5, 7), np.take_along_axis(scores, best, 1), atol=1e-6)


@pytest.mark.parametrize("cascade", [None, [], CASCADE, [("prefix_24_float32", 40)]])
def test_text_list_and_array_agree(index, cascade):
    texts = ["w001 w002 w003", "w010", "w099 w100"]
    listed = index.search(texts, k=6, cascade=cascade)
    arrayed = index.search(index.embed(texts), k=6, cascade=cascade)
    assert listed.columns[0] == "query"
    assert listed.equals(arrayed)
    for number, text in enumerate(texts):
        alone = index.search(text, k=6, cascade=cascade)
        assert alone.equals(listed.filter(pl.col("query") == number).drop("query"))
        assert index.search([text], k=6, cascade=cascade)["query"].to_list() == [0] * 6


def test_scores_are_of_full_vectors_whatever_found_the_rows(index):
    whole = index.exact("w001 w002", k=120)
    by_row = dict(zip(whole["row"], whole["score"], strict=True))
    for cascade in (CASCADE, [("prefix_16_float16", 50)]):
        hits = index.search("w001 w002", k=10, cascade=cascade)
        assert all(
            by_row[row] == pytest.approx(score, abs=1e-6) for row, score in zip(hits["row"], hits["score"], strict=True)
        )
        assert hits["score"].is_sorted(descending=True)


def test_a_shortlist_of_everything_is_exact(index):
    texts = ["w001 w002 w003", "w010"]
    assert index.search(texts, cascade=[("prefix_8_binary", 120)]).equals(index.exact(texts))


@pytest.mark.parametrize("name", ["prefix_16_int8", "prefix_8_binary", "prefix_16_float16", "prefix_24_float32"])
def test_a_level_ranks_by_its_own_codes(index, full, name):
    view, transform = index.opened.views[name], index.opened._transform(index.opened.views[name])
    query = unit(np.random.default_rng(3).standard_normal((1, DIM)))
    hits, _ = index.rank(query, 5, None, [(name, 5)], rescore=False)
    prefix = truncate(transform.apply(query), view.info.dim)
    stored = vector_matrix(view.table.to_table(columns=["vector"]).column("vector"))
    codes = view.codec.encode(truncate(transform.apply(full), view.info.dim))
    assert np.allclose(codes, stored, atol=1e-3 if "float" in name else 0.51)  # BLAS may round the last bit apart
    expected = np.argsort(-view.codec.scores(prefix, stored)[0], kind="stable")[:5]
    assert hits.rows[0].tolist() == expected.tolist()


def test_ties_go_to_the_lower_row(index):
    hits, _ = index.rank(np.ones((1, DIM), np.float32), 120, None, [("prefix_8_binary", 120)], rescore=False)
    scores, rows = hits.scores[0], hits.rows[0]
    assert all(rows[i] < rows[i + 1] for i in range(119) if scores[i] == scores[i + 1])


@pytest.mark.parametrize("count", [101, 40])
def test_equal_texts_tie_by_row_in_every_search(spec, corpus_file, count):
    frame = corpus_frame().with_columns(
        text=pl.when(pl.int_range(120) < count).then(pl.lit("w001 w002")).otherwise("text")
    )
    frame.write_parquet(corpus_file)
    job = spec(corpus__text="text")
    run(job)
    index = open_index(job.root)
    for cascade in ([], [("prefix_16_float16", 120)]):
        for k in (3, 30):
            hits = index.search("w001 w002 w003", k=k, cascade=cascade)
            assert hits["row"].to_list() == list(range(k))
            assert hits["score"].n_unique() == 1


@pytest.mark.parametrize("cascade", [[], CASCADE])
def test_where_keeps_only_matching_rows(index, cascade):
    hits = index.search("w001 w002", k=200, where="lang = 'de' AND year >= 2000", cascade=cascade or [])
    wanted = corpus_frame().with_row_index("row").filter((pl.col("lang") == "de") & (pl.col("year") >= 2000))
    assert set(hits["id"]) <= set(wanted["_id"])
    assert cascade or len(hits) == len(wanted)
    assert set(hits["lang"]) == {"de"}


def test_where_that_matches_nothing_gives_no_rows(index):
    hits = index.search("w001", where="lang = 'xx'")
    assert len(hits) == 0
    assert hits.columns == index.search("w001").columns


def test_k_beyond_the_corpus_gives_every_row(index):
    assert len(index.exact("w001", k=1000)) == 120


def test_explain_tells_of_every_level(index):
    steps = index.explain("w001", k=10, cascade=[("prefix_8_binary", 5), ("prefix_16_int8", 5)])
    assert [step["table"] for step in steps] == ["prefix_8_binary", "prefix_16_int8", "documents"]
    assert [step["shortlist"] for step in steps] == [10, 10, 10]
    assert steps[0]["note"] == "shortlist raised from 5 to k"
    assert (steps[0]["rows"], steps[0]["bytes"], steps[1]["rows"]) == (120, 120, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("w001", 0), "k must be at least 1, not 0"),
        (("w001", 2.5), "k must be a whole number"),
        (("w001", None), "k must be a whole number"),
        (("w001", 5, 7), "where must be a text"),
        (("  ",), "query 0 is blank"),
        ((["w001", ""],), "query 1 is blank"),
        ((["w001", 3],), "a query is a text"),
        ((np.ones((2, DIM + 1)),), rf"shape \(n, {DIM}\)"),
        ((np.full((1, DIM), np.nan),), "NaN or infinity"),
        ((np.zeros((1, DIM)),), "length 0"),
        ((np.array([["a"] * DIM]),), "must be numbers"),
        (("zzz unknown",), "zero_norm"),
        (("w001", 10, "nope = 1"), "no filter column 'nope'"),
        (("w001", 10, None, [("prefix_9_binary", 10)]), "did you mean 'prefix_8_binary'"),
        (("w001", 10, None, [("prefix_8_binary", 10), ("prefix_16_int8", 20)]), "shortlist rises"),
        (("w001", 10, None, [("documents", 10)]), "no table 'documents'"),
    ],
)
def test_a_wrong_query_is_a_value_error(index, arguments, words):
    with pytest.raises(QueryError, match=words) as raised:
        index.search(*arguments)
    assert isinstance(raised.value, ValueError)


def test_no_query_gives_no_rows(index):
    assert len(index.search([])) == 0


def test_another_model_is_refused_for_texts(root, other_model):
    with pytest.raises(DataError, match="the same model"):
        open_index(root, model=str(other_model)).search("w001")


def test_a_copy_of_the_model_is_taken(root, model, tmp_path):
    import shutil

    copy = shutil.copytree(model, tmp_path / "copy")
    assert open_index(root, model=str(copy)).search("w001").equals(open_index(root).search("w001"))


def test_tables_out_of_step_are_noticed(index):
    hits, _ = index.rank(np.ones((1, DIM), np.float32), 5, None, [])
    assert index.opened.content(hits, ["id"])["id"].to_list() == [f"doc-{row}" for row in hits.rows[0]]
    shifted = type(hits)(hits.offsets, hits.rows + 1, hits.scores)
    with pytest.raises(DamageError, match="other rows in one place"):
        index.opened.content(shifted, ["id"])


@pytest.mark.parametrize("where", [None, "lang = 'de'", "year > 2020 AND lang != 'fr'", "lang = 'nowhere'"])
@pytest.mark.parametrize("cascade", [CASCADE, [("prefix_8_binary", 20, "hamming")], [("prefix_24_float32", 30)], []])
def test_both_engines_answer_alike(root, cascade, where):
    queries = np.random.default_rng(2).standard_normal((30, DIM))
    held, read = open_index(root, engine="resident"), open_index(root, engine="lance")
    assert held.search(queries, where=where, cascade=cascade).equals(read.search(queries, where=where, cascade=cascade))
    engines = {step["engine"] for step in held.explain(queries[0], where=where, cascade=cascade)}
    assert engines == ({"resident"} if cascade else {"scan"})


def test_what_does_not_fit_in_memory_is_read(root):
    index = open_index(root, engine="resident", memory=120 * (1 + 1 + 16 + 16))
    assert [name for name, why in index.opened.holdings.items() if not why] == ["prefix_8_binary", "prefix_16_int8"]
    first, second, last = index.explain("w001", cascade=CASCADE)
    assert (first["engine"], second["engine"], last["engine"]) == ("resident", "resident", "take")
    assert "0 MB are more than search.memory leaves" in index.opened.holdings["documents"]


def test_similar_leaves_the_row_itself_out(index):
    row = index.exact("w001 w002", k=1)
    hits = index.similar(row["id"][0], k=5, cascade=[])
    vector = full_vector(index, row["row"][0])
    assert hits["row"].to_list() == index.exact(vector, k=6)["row"].to_list()[1:]
    assert hits["rank"].to_list() == [1, 2, 3, 4, 5]
    with pytest.raises(QueryError, match="there is no id \"x' OR '1'='1\""):
        index.similar("x' OR '1'='1")


def full_vector(index, row):
    taken = index.documents.table.to_table(columns=["vector"], filter=f"row = {row}")
    return vector_matrix(taken.column("vector"))[0]


def test_a_root_of_an_earlier_version_is_refused(root, monkeypatch):
    old = {name: value for name, value in open_index(root).generation.items() if name != "cache"}
    monkeypatch.setattr("pipeline.ledger.newest_generation", lambda root: old)
    with pytest.raises(StaleError, match="finished by an earlier version"):
        open_index(root)


def test_columns_are_read_as_asked(index):
    assert index.search("w001", columns=["lang"]).columns == ["rank", "id", "score", "row", "lang"]
    assert index.search(["w001"], columns=[]).columns == ["query", "rank", "id", "score", "row"]
    with pytest.raises(QueryError, match="columns: there is no 'vector'"):
        index.search("w001", columns=["vector"])


def test_asyncio(index):
    async def many():
        return await asyncio.gather(*(index.search_async("w001 w002", k=3) for _ in range(4)))

    assert all(found.equals(index.search("w001 w002", k=3)) for found in asyncio.run(many()))


def test_searches_from_threads_agree(index):
    expected = index.search("w001 w002")

    async def many():
        return await asyncio.gather(*(asyncio.to_thread(index.search, "w001 w002") for _ in range(8)))

    assert all(found.equals(expected) for found in asyncio.run(many()))


def test_codec_of_a_table_comes_from_its_metadata(index):
    view = index.opened.views["prefix_16_int8"]
    assert view.codec.scale is not None
    assert view.codec.scale.shape == (16,)
    bits = index.opened.views["prefix_8_binary"].codec
    assert bits.kind == "binary"
    assert bits.rotation.shape == (8, 8)


def test_scores_of_codes_alone_are_cosines_of_prefixes(index):
    """The query is cut, brought back to length 1 and turned as the rows were."""
    query = unit(np.random.default_rng(0).standard_normal((1, DIM)))
    for table in ("prefix_16_float16", "prefix_16_int8"):
        view = index.opened.views[table]
        hits, _ = index.rank(query, 5, None, [(table, 5)], rescore=False)
        documents = vector_matrix(index.documents.table.to_table(columns=["vector"]).column("vector"))
        transform = Transform.unstacked("pca", index.opened._matrices[view.info.transform["parameters"]])
        wanted = truncate(transform.apply(query), 16) @ truncate(transform.apply(documents), 16).T
        assert np.allclose(hits.scores[0], np.sort(wanted[0])[::-1][:5], atol=0.02)
