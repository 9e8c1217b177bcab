"""ANN indexes through the whole job: built where they pay, complete, used, and found again."""

from pathlib import Path

import lance
import lancedb
import numpy as np
import polars as pl
import pytest

from pipeline import index, open_index, run, segments, store, verify
from pipeline.errors import PipelineError
from pipeline.index import build_bytes, choose, partitions
from pipeline.search import Index as Search
from pipeline.spec import Index, Prefix
from pipeline.storage import Root
from pipeline.tables import vector_matrix
from pipeline.vectors import unit
from tests.conftest import DIM, corpus_frame

KINDS = [
    ("float16", "ivf_flat"),
    ("float16", "ivf_sq"),
    ("float16", "ivf_rq"),
    ("float16", "hnsw_sq"),
    ("float32", "ivf_rq"),
    ("binary", "ivf_flat"),
]


@pytest.mark.parametrize(
    ("prefix", "rows", "kind"),
    [
        ({"dim": 64, "precision": "float16"}, 99, "none"),
        ({"dim": 64, "precision": "float16"}, 100, "ivf_rq"),
        ({"dim": 63, "precision": "float16"}, 100, "ivf_sq"),
        ({"dim": 64, "precision": "binary"}, 100, "ivf_flat"),
        ({"dim": 64, "precision": "int8"}, 100, "none"),
        ({"dim": 64, "precision": "float16", "index": {"kind": "hnsw_sq"}}, 5, "hnsw_sq"),
        ({"dim": 64, "precision": "float16", "index": {"kind": "none"}}, 10**9, "none"),
    ],
)
def test_choice(prefix, rows, kind):
    chosen, why = choose(Prefix(**prefix), Index(min_rows=100), rows)
    assert chosen == kind
    assert why


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1), (100, 8), (100_000, 256), (1_000_000, 1024), (10**9, 4096)])
def test_partitions(rows, wanted):
    assert partitions(rows) == wanted


def with_index(precision, kind):
    return [{"dim": 16, "precision": precision, "index": {"kind": kind}}]


@pytest.mark.parametrize(("precision", "kind"), KINDS)
def test_every_kind_is_built_used_and_finds_what_exact_search_finds(spec, precision, kind):
    job = spec(prefixes=with_index(precision, kind))
    table = f"prefix_16_{precision}"
    generation = run(job)
    assert generation["tables"][table]["index"]["kind"] == kind
    index = open_index(job.root, engine="lance")
    assert index.explain("w001 w002")[0]["engine"] == kind
    found = index.search("w001 w002", k=5, cascade=[(table, 120)])
    exact = index.exact("w001 w002", k=5)
    assert len(set(found["row"]) & set(exact["row"])) >= 4
    assert found["score"][0] == pytest.approx(exact["score"][0], abs=1e-6)
    opened = lancedb.connect(f"{job.root}/lancedb").open_table(table)
    assert [one.num_unindexed_rows for one in opened.list_indices()] == [0]


def test_a_filter_reaches_the_index(spec):
    job = spec(prefixes=with_index("float16", "ivf_flat"), corpus__filter=["lang"])
    run(job)
    hits = open_index(job.root, engine="lance").search("w001 w002", k=10, where="lang = 'de'")
    assert set(hits["lang"]) == {"de"}
    assert len(hits) == 10


@pytest.mark.parametrize(
    ("precision", "kind"), [("float16", "ivf_flat"), ("float16", "ivf_rq"), ("binary", "ivf_flat")]
)
def test_an_index_finds_every_row_a_filter_leaves(spec, corpus_file, precision, kind):
    frame = corpus_frame(3_000).with_columns(rare=pl.int_range(3_000) % 150)
    frame.write_parquet(corpus_file)
    job = spec(prefixes=with_index(precision, kind), corpus__filter=["rare"], transform={"kind": "pca"})
    run(job)
    index = open_index(job.root, engine="lance")
    queries = np.random.default_rng(0).standard_normal((20, DIM))
    hits = index.search(queries, k=20, where="rare = 77")
    assert hits.group_by("query").len()["len"].to_list() == [20] * 20
    assert len(index.search(queries[0], k=3_000)) == 3_000


def test_a_finished_index_is_left_alone_and_another_kind_replaces_it(spec):
    first = run(spec(prefixes=with_index("float16", "ivf_flat")))
    assert run(spec(prefixes=with_index("float16", "ivf_flat"))) == first
    second = run(spec(prefixes=with_index("float16", "ivf_sq")))
    assert second["tables"]["prefix_16_float16"]["index"]["kind"] == "ivf_sq"
    assert second["tables"]["prefix_16_float16"]["version"] > first["tables"]["prefix_16_float16"]["version"]
    third = run(spec(prefixes=with_index("float16", "none")))
    assert third["tables"]["prefix_16_float16"]["index"] is None


def test_an_index_that_is_not_used_fails_the_job(spec, monkeypatch):
    class Unused:
        def explain_plan(self, verbose):
            return "KNNVectorDistance: metric=dot"

    monkeypatch.setattr("pipeline.store.nearest", lambda *arguments: Unused())
    with pytest.raises(PipelineError, match="do not use its ivf_flat index"):
        run(spec(prefixes=with_index("float16", "ivf_flat")))


def test_rows_that_the_index_does_not_cover_are_scanned_and_that_is_said(spec):
    job = spec(prefixes=with_index("float16", "ivf_flat"))
    generation = run(job)
    uri = f"{job.root}/lancedb/prefix_16_float16.lance"
    table = lance.dataset(uri)
    first = table.take([0])
    grown = lance.write_dataset(first.set_column(0, "row", [[120]]), uri, mode="append")
    generation["tables"]["prefix_16_float16"]["version"] = grown.version
    index = Search(Root(Path(job.root)), generation, engine="lance")
    query = vector_matrix(index.documents.table.take([0]).column("vector"))[0]
    hits, steps = index.rank(unit(query[None]), 2, cascade=[("prefix_16_float16", 2)], rescore=False)
    assert sorted(hits.rows[0]) == [0, 120]
    assert steps[0].note == "1 rows are not in its index and are scanned"


@pytest.mark.parametrize(
    ("rows", "count", "wanted"),
    [
        ([5], 3, [(0,)]),
        ([10, 10, 10, 10], 2, [(0, 1), (2, 3)]),
        ([10, 10, 10, 10], 9, [(0,), (1,), (2,), (3,)]),
        ([1, 1, 1, 97], 2, [(0, 1, 2), (3,)]),
        ([0, 0], 2, [(0, 1)]),
    ],
)
def test_fragments_in_groups_of_about_as_many_rows(rows, count, wanted):
    assert segments.groups(rows, count) == wanted


@pytest.mark.parametrize(
    ("precision", "kind", "workers"),
    [*((*one, 0) for one in KINDS), ("binary", "ivf_flat", 2), ("float16", "ivf_rq", 2)],
)
def test_an_index_in_segments_finds_what_exact_search_finds(spec, monkeypatch, precision, kind, workers):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    job = spec(
        corpus__shard_rows=40, prefixes=with_index(precision, kind), index__segments=8, workers={"count": workers}
    )
    generation = run(job)
    built = generation["tables"][f"prefix_16_{precision}"]
    assert len(built["parts"]) == built["index"]["segments"] == 3
    assert built["index"]["partitions"] == index.partitions_of(kind, 40)
    opened = open_index(job.root, engine="lance")
    found = opened.search("w001 w002", k=10, cascade=[(f"prefix_16_{precision}", 120)])
    assert len(set(found["row"]) & set(opened.exact("w001 w002", k=10)["row"])) >= 9
    assert run(job) == generation


def test_segments_take_the_place_of_another_kind(spec, monkeypatch):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    run(spec(corpus__shard_rows=40, prefixes=with_index("float16", "ivf_flat")))
    job = spec(corpus__shard_rows=40, prefixes=with_index("float16", "ivf_sq"), index__segments=8)
    assert run(job)["tables"]["prefix_16_float16"]["index"]["segments"] == 3
    table = lance.dataset(f"{job.root}/lancedb/prefix_16_float16.lance")
    assert [one.index_type for one in table.describe_indices() if one.field_names == ["vector"]] == ["IVF_SQ"]


def test_segments_that_nobody_came_to_measure_are_built_anew(spec, monkeypatch):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    job = spec(corpus__shard_rows=40, prefixes=with_index("float16", "ivf_sq"), index__segments=8)
    uri, measure = f"{job.root}/lancedb/prefix_16_float16.lance", segments.recall

    def ends(table, probes):
        raise KeyboardInterrupt

    monkeypatch.setattr(segments, "recall", ends)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    unmeasured = segments.mark(lance.dataset(uri))
    monkeypatch.setattr(segments, "recall", measure)
    generation = run(job)
    measured = segments.mark(lance.dataset(uri))
    assert measured != unmeasured
    assert run(job) == generation and segments.mark(lance.dataset(uri)) == measured
    found = verify.run(Path(job.root))
    assert found.is_whole and not [name for name in found.unknown if not name.startswith("lancedb/")]


def test_segments_that_find_too_little_give_way_to_one(spec, monkeypatch, caplog):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    monkeypatch.setattr(segments, "recall", lambda table, probes: 0.94)
    job = spec(corpus__shard_rows=40, prefixes=with_index("float16", "ivf_sq"), index__segments=2)
    assert "segments" not in run(job)["tables"]["prefix_16_float16"]["index"]
    assert "2 segments find too little, it is built in one" in caplog.text
    table = lance.dataset(f"{job.root}/lancedb/prefix_16_float16.lance")
    assert [len(one.segments) for one in table.describe_indices() if one.field_names == ["vector"]] == [1]


@pytest.mark.parametrize(("precision", "kind"), [("float16", "ivf_sq"), ("binary", "ivf_flat")])
def test_the_recall_of_an_index_is_told_by_its_own_rows(spec, monkeypatch, precision, kind):
    run(job := spec(prefixes=with_index(precision, kind)))
    table = lance.dataset(f"{job.root}/lancedb/prefix_16_{precision}.lance")
    assert segments.recall(table, 20) == 1
    whole = store.nearest
    monkeypatch.setattr(
        store, "nearest", lambda *asked: whole(*asked[:4], None if asked[3] is None else "row < 30", *asked[5:])
    )
    assert segments.recall(table, 20) < 0.7


def test_memory_of_a_build_is_what_it_trains_on_and_twice_the_vectors():
    # 10**6 rows, 1,024 partitions: 262,144 rows of 64 numbers of 4 bytes; 2 x 10**6 x (64 x 2 + 8).
    assert build_bytes(Prefix(dim=64, precision="float16"), "ivf_rq", 10**6) == 262_144 * 256 + 272 * 10**6
    assert build_bytes(Prefix(dim=64, precision="binary"), "ivf_flat", 10**6) == 262_144 * 8 + 32 * 10**6
    assert build_bytes(Prefix(dim=64, precision="float16"), "ivf_rq", 100) == 100 * 256 + 100 * 272


def test_a_build_that_does_not_fit_is_refused_before_it_begins(spec, monkeypatch, caplog):
    prefixes = [{"dim": 16, "precision": "float16"}]
    needed = 120 * 64 + 2 * 120 * 40
    monkeypatch.setattr(index, "available_bytes", lambda: needed - 1)
    with pytest.raises(
        PipelineError, match="ivf_rq index of prefix_16_float16 .* on 120 rows, .*--from index on a mach"
    ):
        run(spec(prefixes=prefixes, index={"min_rows": 100}))
    monkeypatch.setattr(index, "available_bytes", lambda: needed)
    run(spec(prefixes=prefixes, index={"min_rows": 100}))
    monkeypatch.setattr(index, "available_bytes", lambda: 0)
    tried = run(spec(prefixes=[{"dim": 24, "precision": "float16", "index": {"kind": "ivf_rq"}}]))
    assert tried["tables"]["prefix_24_float16"]["index"]["kind"] == "ivf_rq" and "tried because" in caplog.text


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CGROUP", tmp_path)
    free = index.available_bytes()
    for name, text in (("memory.max", "max"), ("memory.current", "700"), ("memory.stat", "anon 200\nfile 500")):
        (tmp_path / name).write_text(text + "\n")
    assert index.available_bytes() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("1000\n")
    assert index.available_bytes() == 1000 - (700 - 500)
