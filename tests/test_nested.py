"""Nested blocks: the scores of plain prefix tables, and of each finer level only the bytes that are new."""

import json
import shutil
from pathlib import Path

import lance
import lancedb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline import derive, nested, open_index, querylog, report, resident, run, verify
from pipeline.errors import QueryError, SpecError
from pipeline.levels import Hits
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.tables import METADATA_KEY, vector_matrix
from pipeline.vectors import truncate, unit
from tests.conftest import DIM, corpus_frame
from tests.test_verify import rewrite

BLOCKS = [8, 16, 24]
HALF, BYTES, SINGLE = "prefix_24_float16_nested", "prefix_24_int8_nested", "prefix_24_float32_nested"


def job_values(folder, model):
    """A spec of nested tables beside the plain ones that hold the same prefixes."""
    corpus_frame().write_parquet(folder / "corpus.parquet")
    return {
        "name": "nested",
        "root": str(folder / "root"),
        "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": "text", "filter": ["lang"]},
        "model": {"name": str(model)},
        "prefixes": [
            *({"dim": 24, "precision": kind, "blocks": BLOCKS} for kind in ("float16", "int8", "float32")),
            *({"dim": dim, "precision": "float16"} for dim in BLOCKS),
            {"dim": 8, "precision": "binary"},
            {"dim": 24, "precision": "int8"},
        ],
        "search": {
            "cascade": [
                {"table": HALF, "dim": 8, "shortlist": 60},
                {"table": HALF, "dim": 16, "shortlist": 30},
                {"table": HALF, "shortlist": 20},
            ]
        },
        "evaluate": {"shortlists": [], "k": 5},
        "workers": {"count": 0},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """A finished root of 120 rows."""
    folder = tmp_path_factory.mktemp("nested")
    run(JobSpec.of(job_values(folder, model)))
    return folder / "root"


@pytest.fixture(scope="module")
def index(root):
    return open_index(root)


@pytest.fixture(scope="module")
def queries():
    return unit(np.random.default_rng(2).standard_normal((3, DIM)))


@pytest.fixture(scope="module")
def wanted(index, queries):
    """Cosines of float32 prefixes at a dim, [q, rows]."""
    full = vector_matrix(index.documents.table.to_table(columns=["vector"]).column("vector"))
    transform = index.opened._transform(index.opened.views[HALF])
    return lambda dim: truncate(transform.apply(queries), dim) @ truncate(transform.apply(full), dim).T


def by_row(hits):
    """Scores in the order of rows."""
    return np.take_along_axis(hits.scores, np.argsort(hits.rows, axis=1), 1)


def scores(index, queries, cascade):
    """Scores of every row after the last level."""
    hits, steps = index.rank(queries, 120, None, cascade, rescore=False)
    return by_row(hits), steps


# float16 keeps 11 bits, int8 steps of 1 / 127 of the largest number of a dimension
@pytest.mark.parametrize(("table", "error"), [(HALF, 2e-3), (SINGLE, 1e-6), (BYTES, 0.03)])
@pytest.mark.parametrize("dim", BLOCKS)
def test_a_prefix_of_the_blocks_scores_as_the_prefix_of_the_vector(index, queries, wanted, table, error, dim):
    found, _ = scores(index, queries, [(table, 120, dim)])
    assert np.abs(found - wanted(dim)).max() < error


@pytest.mark.parametrize("dim", BLOCKS)
def test_scores_are_those_of_the_plain_tables(index, queries, dim):
    found, _ = scores(index, queries, [(HALF, 120, dim)])
    plain, _ = scores(index, queries, [(f"prefix_{dim}_float16", 120)])
    assert np.abs(found - plain).max() < 2e-3


def test_two_dimensions_by_hand():
    """p = (0.6, 0 | 0.8), q = (1, 1, 1) / √3: at dim 2 q.p / |p| = (0.6 / √2) / 0.6, at dim 3 1.4 / √3."""
    first, rest = np.array([[0.6, 0.0]], np.float32), np.array([[0.8]], np.float32)
    short, long = (np.full((1, n), 1 / np.sqrt(n), np.float32) for n in (2, 3))
    squares = nested.squares(first)
    coarse = nested.scores(short @ first.T, squares)
    assert coarse[0, 0] == pytest.approx(1 / np.sqrt(2))
    products = nested.products(coarse, squares, long, 2) + long[:, 2:] @ rest.T
    assert nested.scores(products, squares + nested.squares(rest))[0, 0] == pytest.approx(1.4 / np.sqrt(3))


def test_a_row_that_begins_with_zeros_scores_zero():
    assert nested.scores(np.zeros((1, 1), np.float32), np.zeros(1, np.float32)).tolist() == [[0.0]]


@pytest.mark.parametrize("table", [HALF, SINGLE, BYTES])
def test_sums_that_are_carried_give_what_reading_everything_gives(index, queries, table):
    carried, steps = scores(index, queries, [(table, 120, 8), (table, 120, 16), (table, 120, 24)])
    at_once, whole = scores(index, queries, [(table, 120, 24)])
    assert np.abs(carried - at_once).max() < 1e-5
    assert sum(step.bytes for step in steps) == whole[0].bytes  # no block twice, none left out


def test_each_level_reads_the_new_block_alone(index, queries):
    """One query, float16: 120 rows x 8 x 2 bytes, then of 60 and of 30 rows 8 x 2 more, then 20 full vectors."""
    _, steps = index.rank(queries[:1], 5, None, None)
    assert [(step.dim, step.rows, step.bytes) for step in steps] == [
        (8, 120, 1920), (16, 60, 960), (24, 30, 480), (None, 20, 20 * DIM * 2),
    ]  # fmt: skip
    assert [step.engine for step in steps] == ["scan", "take", "take", "take"]


def test_after_another_table_all_blocks_are_read(index, queries):
    cascade = [("prefix_8_binary", 60), (HALF, 30, 16), ("prefix_24_int8", 20), (HALF, 10)]
    _, steps = index.rank(queries[:1], 5, None, cascade)
    assert [step.bytes for step in steps] == [120, 60 * 16 * 2, 30 * 24, 20 * 24 * 2, 10 * DIM * 2]


def test_many_queries_read_each_row_once_and_agree_with_one(index, queries, monkeypatch):
    cascade = [(HALF, 10, 8), (HALF, 8, 16), (HALF, 6)]
    together, steps = index.rank(queries, 4, None, cascade)
    alone = [index.rank(query[None], 4, None, cascade)[0] for query in queries]
    assert together.rows.tolist() == [hits.rows[0].tolist() for hits in alone]
    assert steps[1].bytes == steps[1].rows * 16
    assert steps[1].rows < 30
    monkeypatch.setattr("pipeline.levels.TOGETHER", 0)  # each query's shortlist is scored on its own
    assert index.rank(queries, 4, None, cascade)[0].rows.tolist() == together.rows.tolist()


def test_a_filter_is_applied_and_sums_follow_the_rows(index, queries):
    cascade = [(HALF, 50, 8), (HALF, 50)]
    hits, steps = index.rank(queries, 50, "lang = 'de'", cascade, rescore=False)
    assert (steps[0].rows, steps[0].bytes) == (40, 40 * 16)
    plain, _ = index.rank(queries, 50, "lang = 'de'", [(HALF, 50)], rescore=False)
    assert hits.rows.shape == (3, 40)
    assert np.abs(by_row(hits) - by_row(plain)).max() < 1e-5


def test_places_without_a_hit_stay_empty(index, queries):
    """A query with fewer hits than the others has -1, on every level."""
    first, _ = index.rank(queries, 5, None, [(HALF, 5, 8)], rescore=False)
    offsets = np.where(np.arange(5) < 3, first.offsets, -1)
    squares = np.where(offsets < 0, 0, first.lengths.squares).astype(np.float32)
    short = Hits(offsets, first.rows, np.where(offsets < 0, -np.inf, first.scores).astype(np.float32), first.lengths)
    short = Hits(short.offsets, short.rows, short.scores, nested.Lengths(HALF, 8, squares))
    step = index.opened.steps(5, [(HALF, 5, 16)], rescore=False)[0]
    found = index.opened.level(step, queries, short, 5, None)
    assert (found.offsets[:, 3:] == -1).all()
    assert np.isneginf(found.scores[:, 3:]).all()
    assert np.isfinite(found.scores[:, :3]).all()


def test_columns_and_metadata(root):
    for name, kind in ((HALF, "halffloat"), (BYTES, "int8"), (SINGLE, "float")):
        table = lance.dataset(str(root / "lancedb" / f"{name}.lance"))
        columns = ["row", "lang", "vector_0_8", "vector_8_16", "vector_16_24"]
        assert table.schema.names == columns
        assert [str(table.schema.field(one).type) for one in columns[2:]] == [f"fixed_size_list<item: {kind}>[8]"] * 3
        info = json.loads(table.schema.metadata[METADATA_KEY])
        assert (info["dim"], info["blocks"], info["metric"]) == (24, BLOCKS, "cosine")
    plain = lance.dataset(str(root / "lancedb" / "prefix_24_int8.lance"))
    assert "blocks" not in json.loads(plain.schema.metadata[METADATA_KEY])
    scales = [
        json.loads(lance.dataset(str(root / "lancedb" / f"{one}.lance")).schema.metadata[METADATA_KEY])["codec"]
        for one in (BYTES, "prefix_24_int8")
    ]
    assert scales[0] == scales[1]


@pytest.mark.parametrize(("name", "plain"), [(HALF, "prefix_24_float16"), (BYTES, "prefix_24_int8")])
def test_blocks_side_by_side_are_the_plain_table(root, name, plain):
    table, other = (lance.dataset(str(root / "lancedb" / f"{one}.lance")).to_table() for one in (name, plain))
    blocks = [vector_matrix(table.column(f"vector_{end - 8}_{end}")) for end in BLOCKS]
    assert np.array_equal(np.hstack(blocks), vector_matrix(other.column("vector")))


def test_plain_lancedb_searches_the_first_block(root, index, queries):
    """Its cosine distance, of a query in half precision, is 1 - the score of the first level."""
    table = lancedb.connect(str(root / "lancedb")).open_table(HALF)
    transform = index.opened._transform(index.opened.views[HALF])
    query = truncate(transform.apply(queries[:1]), 8)[0]
    found = table.search(query, vector_column_name="vector_0_8").distance_type("cosine").limit(5).to_list()
    hits, _ = index.rank(queries[:1], 5, None, [(HALF, 5, 8)], rescore=False)
    assert [one["row"] for one in found] == hits.rows[0].tolist()
    assert np.abs(1 - np.array([one["_distance"] for one in found]) - hits.scores[0]).max() < 5e-4


def test_the_sweep_measures_every_block_end(root):
    measured = pl.read_parquet(root / "evaluation.parquet").filter(pl.col("mode") != "margin", choice=HALF)
    full = DIM * 2
    finest = 24 * 4  # prefix_24_float32_nested
    assert measured.select("mode", "dim", "bytes_per_row").rows() == [
        *((mode, dim, dim * 2 + more) for dim in BLOCKS for mode, more in
          (("alone", 0), ("rescored", full), ("cascade", finest + full))),
    ]  # fmt: skip
    rows = pl.read_parquet(root / "evaluation.parquet").filter(choice=SINGLE)
    assert rows.filter(mode="cascade").select("dim", "bytes_per_row").rows() == [
        (8, finest + full),
        (16, finest + full),
    ]
    mine = pl.read_parquet(root / "evaluation.parquet").filter(choice="cascade").row(0, named=True)
    assert (mine["dim"], mine["bytes_per_row"]) == (8, 24 * 2 + full)
    plain = pl.read_parquet(root / "evaluation.parquet").filter(choice="prefix_16_float16", mode="alone")
    nested_rows = measured.filter(mode="alone", dim=16)
    assert nested_rows["recall_exact"][0] == pytest.approx(plain["recall_exact"][0], abs=0.01)


def test_without_a_cascade_the_first_block_is_scanned(index, tmp_path, model):
    values = job_values(tmp_path, model) | {"search": {}}
    values["prefixes"] = values["prefixes"][:1]
    run(JobSpec.of(values))
    assert open_index(tmp_path / "root").opened.cascade(5) == [(HALF, 200, 8)]
    assert index.opened.default_cascade(5) == [("prefix_8_binary", 200, "auto")]


def test_a_rerun_does_nothing_and_other_blocks_are_derived_anew(tmp_path, model):
    values = job_values(tmp_path, model) | {"search": {}}
    values["prefixes"] = values["prefixes"][:1]
    first = run(JobSpec.of(values))
    assert run(JobSpec.of(values)) == first
    values["prefixes"][0]["blocks"] = [8, 24]
    second = run(JobSpec.of(values))
    assert second["generation"] == first["generation"] + 1
    table = lance.dataset(str(tmp_path / "root" / "lancedb" / f"{HALF}.lance"))
    assert table.schema.names[2:] == ["vector_0_8", "vector_8_24"]
    assert verify.run(tmp_path / "root").is_whole


def test_the_independent_check_computes_every_block_again(root, index, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    assert verify.run(copy).problems == ()

    def nudged(table):
        codes = vector_matrix(table.column("vector_8_16")).copy()
        codes.view("<u2")[33, 4] ^= 2
        values = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), 8)
        return table.set_column(3, table.schema.field(3), values)

    rewrite(copy, HALF, nudged)
    assert verify.run(copy).problems == (
        f"lancedb/{HALF}.lance: row 33 has another code than follows from its full vector",
    )


def test_a_flipped_bit_is_found_and_mended(tmp_path, model):
    job = JobSpec.of(job_values(tmp_path, model))
    made = run(job)
    file = next((tmp_path / "root" / "lancedb" / f"{BYTES}.lance" / "data").iterdir())
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    assert verify.run(tmp_path / "root").damaged == (file.relative_to(tmp_path / "root").as_posix(),)
    again = run(job)
    assert again["tables"][BYTES]["digest"] == made["tables"][BYTES]["digest"]
    assert verify.run(tmp_path / "root").is_whole


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ({"blocks": [16, 8, 24]}, "blocks are ends that rise up to dim 24, like .*, not .16, 8, 24."),
        ({"blocks": [8, 8, 24]}, "blocks are ends that rise up to dim 24"),
        ({"blocks": [8, 16]}, "blocks are ends that rise up to dim 24, like .*, not .8, 16."),
        ({"blocks": [8, 32]}, "blocks are ends that rise up to dim 24"),
        ({"blocks": [0, 24]}, r"blocks\[0\]: must be greater than or equal to 1, given 0"),
        ({"blocks": 8}, "blocks: must be a list, given 8"),
        ({"blocks": [8, 24], "precision": "binary"}, "binary has no blocks: each binary prefix is turned on its own"),
        ({"blocks": [8, 24], "index": {"kind": "ivf_sq"}}, "blocks are scanned, without an index; leave ivf_sq"),
    ],
)
def test_a_wrong_table_is_refused(values, prefix, told):
    with pytest.raises(SpecError, match=told):
        JobSpec.of(values(prefixes=[{"dim": 24, "precision": "float16", **prefix}]))


LEVEL = {"table": HALF, "shortlist": 9}


@pytest.mark.parametrize(
    ("cascade", "told"),
    [
        ([LEVEL | {"dim": 12}], f"{HALF} cannot be read at dim 12: its blocks end at 8, 16, 24"),
        ([{"table": "prefix_8_float16", "shortlist": 9, "dim": 8}], "dim 8: it has no blocks; leave dim out"),
        ([LEVEL | {"dim": 16}, LEVEL | {"dim": 8}], f"dim goes from 16 to 8 at {HALF}; each level must go further"),
        ([LEVEL, LEVEL | {"dim": 24}], "dim goes from 24 to 24"),
        ([LEVEL | {"dim": 0}], "dim: must be greater than or equal to 1, given 0"),
    ],
)
def test_a_wrong_level_is_refused(values, index, cascade, told):
    prefixes = [{"dim": 24, "precision": "float16", "blocks": BLOCKS}, {"dim": 8, "precision": "float16"}]
    with pytest.raises(SpecError, match=told):
        JobSpec.of(values(prefixes=prefixes, search={"cascade": cascade}))


@pytest.mark.parametrize(
    ("cascade", "told"),
    [
        ([(HALF, 9, 12)], "cannot be read at dim 12: its blocks end at 8, 16, 24"),
        ([("prefix_8_float16", 9, 8)], "it has no blocks"),
        ([(HALF, 9, 16), (HALF, 9, 16)], "each level must go further"),
        ([(HALF, 9, "sixteen")], "scoring is auto, asymmetric or hamming, not 'sixteen'"),
    ],
)
def test_a_wrong_level_of_a_query_is_refused(index, queries, cascade, told):
    with pytest.raises(QueryError, match=told):
        index.search(queries, cascade=cascade)


def test_a_filter_column_cannot_have_the_name_of_a_block(values):
    prefixes = [{"dim": 24, "precision": "float16", "blocks": BLOCKS}]
    with pytest.raises(SpecError, match="has a column vector_8_16 of its own; rename the filter"):
        JobSpec.of(values(prefixes=prefixes, corpus__filter=["vector_8_16"]))


def test_a_row_of_a_block_is_read_without_its_neighbours(index):
    """Lance packs short vectors into chunks unless it is told not to; this setting is what takes of a block rest on."""
    for name in (HALF, BYTES, SINGLE):
        for column in index.opened.views[name].columns:
            settings = index.opened.views[name].table.schema.field(column).metadata
            assert settings == {b"lance-encoding:structural-encoding": b"fullzip"}


def test_the_page_names_the_dims_of_the_cascade(root):
    page = report.run(Root(root)).read_text(encoding="utf-8")
    words = [f"{HALF}[:8] (shortlist 60)", f"{HALF}[:16] (shortlist 30)", f"{HALF} (shortlist 20)", "full vectors"]
    assert " → ".join(words) in page
    assert "float16 nested" in page
    assert "binary asymmetric" in page


def test_explain_and_the_query_log_name_the_dims(root, index, tmp_path):
    steps = index.explain(np.ones(DIM))
    assert [step["dim"] for step in steps] == [8, 16, 24, None]
    corpus_frame(4).select("_id", "text").write_parquet(tmp_path / "queries.parquet")
    copy = Root(Path(shutil.copytree(root, tmp_path / "root")))
    log = querylog.run(str(tmp_path / "queries.parquet"), open_index(copy.path), 3, 0, copy)
    assert log["cascade"].to_list() == [f"{HALF}[:8] 60 > {HALF}[:16] 30 > {HALF}[:24] 20"]


def test_a_run_that_was_stopped_between_tables_goes_on(root, tmp_path, model, monkeypatch):
    job = JobSpec.of(job_values(tmp_path, model))
    write = derive._Codes.write

    def stopped(self, slot):
        if self.table.name == SINGLE:
            raise OSError("no space left")
        return write(self, slot)

    with monkeypatch.context() as patch:
        patch.setattr(derive._Codes, "write", stopped)
        with pytest.raises(OSError, match="no space left"):
            run(job)
    first = next((tmp_path / "root" / "lancedb" / f"{HALF}.lance" / "data").iterdir())
    made = run(job)
    assert [one.name for one in (tmp_path / "root" / "lancedb" / f"{HALF}.lance" / "data").iterdir()] == [first.name]
    there = json.loads((root / "manifest.json").read_text())["tables"]
    digests = {name: entry["digest"] for name, entry in made["tables"].items()}
    assert digests == {name: there[name]["digest"] for name in digests}
    assert verify.run(tmp_path / "root").is_whole


def test_metadata_that_names_other_blocks_is_found(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "root"))

    def renamed(table):
        info = json.loads(table.schema.metadata[METADATA_KEY]) | {"blocks": [8, 24]}
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(info).encode()})

    rewrite(copy, HALF, renamed)
    told = f"lancedb/{HALF}.lance: its metadata says blocks [8, 24], not [8, 16, 24]"
    assert told in verify.run(copy).problems


@pytest.mark.parametrize("engine", ["lance", "auto", "resident"])
def test_blocks_are_read_whatever_engine_serves_the_others(root, index, queries, engine):
    if engine == "resident" and resident.available():
        pytest.skip(resident.available())
    opened = open_index(root, engine=engine)
    assert opened.opened.holdings[HALF] == "its blocks are read as they are needed"
    for cascade in (None, [("prefix_8_binary", 60), (HALF, 30, 16), (HALF, 20)]):
        assert opened.search(queries, 5, cascade=cascade).equals(index.search(queries, 5, cascade=cascade))


def test_files_for_mapping_leave_nested_tables_out(tmp_path, model):
    values = job_values(tmp_path, model)
    values["search"]["cache"] = True
    made = run(JobSpec.of(values))
    assert {"documents", "prefix_24_int8"} <= made["cache"].keys()
    assert not {HALF, BYTES, SINGLE} & made["cache"].keys()
    assert verify.run(tmp_path / "root").is_whole


def test_a_deadline_ends_between_blocks_too(index, queries):
    hits = index.search(queries, 5, deadline_ms=1e-9)
    assert set(hits["level"]) == {f"{HALF}[:8]"}
    assert index.search(queries, 5, deadline_ms=60_000)["level"].unique().to_list() == ["documents"]
