"""A plan: its arithmetic by hand, what it draws of each format, and how near it comes to a real run."""

import gzip
import json
from dataclasses import replace

import lance
import numpy as np
import polars as pl
import pytest

from pipeline import figures, plan, probe, run, sample
from pipeline.embedder import Facts
from pipeline.errors import DataError, SpecError
from pipeline.run import check as run_check
from pipeline.sources import SourceFile
from pipeline.spec import JobSpec
from tests.conftest import DIM, corpus_frame

FACTS = Facts("model", None, "sha256:0", 384, "torch", "float32", 10, 4096, {"document": "", "query": ""}, {})
VERDICT = probe.Verdict("unsure", "of 0 rows", (), (), 0, 0)
DONE = figures.Embedded(FACTS, "cpu", np.array([5, 10, 25]), np.zeros((3, 384)), None, 100, 4.0, {})


def named(found):
    return {figure.name: figure.value for figure in found}


def spec_of(**sections):
    values = {
        "name": "plan",
        "root": "root",
        "corpus": {"source": "x.parquet", "text": "text"},
        "model": {"name": "model"},
        "prefixes": [{"dim": 64, "precision": "binary"}, {"dim": 128, "precision": "int8"}],
    }
    return JobSpec.of(values | sections)


def plan_of(verdict=VERDICT, **values):
    given = {"rows": 100_000_000, "sample_rows": 1_000, "usable_rows": 100_000_000, "cut_rows": 0, "cut_tokens": 0}
    listed = tuple(figures.Figure(name, value, "", "measured", "") for name, value in (given | values).items())
    return figures.Plan("plan", listed, (), verdict, (), ())


def test_tokens_are_counted_before_and_after_the_cut():
    # 5, 10 and 25 tokens, cut to 10: 25 of 40 are read, 15 of one row are lost.
    found = named(figures.token_figures(np.array([5, 10, 25]), 10, 3_000))
    assert found == {
        "tokens_per_row": pytest.approx(25 / 3),
        "tokens": pytest.approx(25_000),
        "cut_rows": pytest.approx(1 / 3),
        "cut_tokens": pytest.approx(15 / 40),
    }
    assert named(figures.token_figures(np.array([5, 10, 25]), None, 3))["tokens"] == pytest.approx(40)


def test_the_histogram_holds_every_row_once():
    buckets = figures.histogram(np.array([0, 8, 9, 16, 17, 33]))
    assert [(one.low, one.high, one.rows) for one in buckets] == [(0, 8, 2), (9, 16, 2), (17, 32, 1), (33, 64, 1)]
    assert [one.high for one in figures.histogram(np.array([3]))] == [8]


def test_time_and_money_follow_the_measured_rate():
    # 100 rows in 4 s: 25 a second; 90,000 rows take an hour, a million 11 1/9 hours.
    found = named(figures.time_figures(DONE, 90_000, 1.8))
    assert found["rows_per_second"] == 25
    assert found["tokens_per_second"] == pytest.approx(25 * 25 / 3)
    assert found["embed_seconds"] == 3_600
    assert found["machine_hours"] == 1
    assert found["cost_per_million_rows"] == pytest.approx(20)
    assert found["cost"] == pytest.approx(1.8)
    assert not [name for name in named(figures.time_figures(DONE, 90_000, None)) if "cost" in name]
    assert named(figures.time_figures(replace(DONE, device="cuda"), 90_000, None))["gpu_hours"] == 1


def test_bytes_of_tables_are_rows_times_their_width():
    spec = spec_of(embed={"parquet": True}, corpus={"source": "x", "text": "t", "shard_rows": 500})
    found = named(figures.byte_figures(spec, 1_000, 384, sample.Line(300, 50), sample.Line(200, 4), "pca"))
    number = 1_000 * 10 // 8  # row numbers below 1,024 are packed into 10 bits
    documents = 300 + 1_000 * (50 + 384 * 2 + 16) + number  # two shards of 500, merged to one fragment
    parameters = 2_000 + 4 * (385 * 384 + 64 * 64)
    assert found == {
        "bytes.documents": documents,
        "bytes.prefix_64_binary": 200 + 1_000 * (4 + 8) + number,
        "bytes.prefix_128_int8": 200 + 1_000 * (4 + 128) + number,
        "bytes.parameters": parameters,
        "bytes.parquet": documents,
        "bytes": 2 * documents + 12_200 + 132_200 + 2 * number + parameters,
        "bytes.merging": documents,
    }
    one = spec_of(corpus={"source": "x", "text": "t", "shard_rows": 1_000})
    found = named(figures.byte_figures(one, 1_000, 384, sample.Line(300, 50), sample.Line(200, 4), "pca"))
    assert found["bytes.documents"] == documents and "bytes.merging" not in found
    large = named(figures.byte_figures(spec_of(), 3 * 2**20, 384, sample.Line(0, 50), sample.Line(0, 4), "pca"))
    assert large["bytes.merging"] == pytest.approx(large["bytes.documents"] / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "numbers"), [("none", 64**2), ("pca", 385 * 384 + 64**2), ("adaptor", 2 * 385 * 384 + 64**2)]
)
def test_parameters_hold_each_transform_once_and_a_rotation_per_binary_table(kind, numbers):
    assert figures.parameter_numbers(spec_of().prefixes, 384, kind) == numbers


def test_memory_is_that_of_the_cascade_and_the_full_vectors():
    assert named(figures.memory_figures(spec_of(), 1_000, 384)) == {
        "memory.prefix_64_binary": 8_000,
        "memory.full": 768_000,
    }
    levels = [{"table": "prefix_64_binary", "shortlist": 400}, {"table": "prefix_128_int8", "shortlist": 100}]
    two = spec_of(search={"cascade": levels}, embed={"vectors": "float32"})
    assert named(figures.memory_figures(two, 1_000, 384)) == {
        "memory.prefix_64_binary": 8_000,
        "memory.prefix_128_int8": 128_000,
        "memory.full": 1_536_000,
    }
    assert named(figures.memory_figures(spec_of(search={"cascade": []}), 10, 384)) == {"memory.full": 7_680}


@pytest.mark.parametrize(
    ("asked", "says", "declared", "rows", "kind"),
    [
        ("pca", "trained", (), 10, "pca"),
        ("auto", "trained", (), 10, "none"),
        ("auto", "unsure", (64,), 10, "none"),
        ("auto", "unsure", (), 10, "pca"),
        ("auto", "not trained", (64,), 100_000, "adaptor"),
    ],
)
def test_the_transform_follows_the_verdict(asked, says, declared, rows, kind):
    verdict = replace(VERDICT, says=says, declared=declared)
    assert figures.transform_kind(asked, verdict, rows) == kind


NOT_TRAINED = replace(VERDICT, says="not trained")


@pytest.mark.parametrize(
    ("sections", "made", "said"),
    [
        # 4,000 x 384 x 4 bytes = 6.1 MB at 10 GB/s = 0.6 ms
        ({}, plan_of(usable_rows=4_000), "4,000 rows: exact full-dimension search takes about 1 ms (estimated: rows"),
        ({}, plan_of(cut_rows=0.12, cut_tokens=0.3), "max_tokens cuts 12% of rows and 30% of all tokens"),
        ({}, plan_of(**{"quarantined.null_text": 11}), "about 1,100,000 rows cannot be used"),
        ({}, plan_of(replace(VERDICT, declared=(256,), far=(32,))), "prefix dims 32 are far from trained ones (256)"),
        ({}, plan_of(replace(NOT_TRAINED, declared=(64,))), "the model declares 64, the sample says otherwise"),
        ({"transform": {"kind": "none"}}, plan_of(NOT_TRAINED), "transform.kind: none will be refused"),
        ({"prefixes": [{"dim": 32, "precision": "int8"}]}, plan_of(), "prefix_32_int8 comes first in the cascade"),
        ({"prefixes": [{"dim": 384, "precision": "binary"}]}, plan_of(), "prefix_384_binary reads 48 bytes a row; 32"),
    ],
)
def test_advice_is_given_where_something_stands_out(sections, made, said):
    (only,) = figures.advice(spec_of(**sections), made, 384)
    assert only.startswith(said)


@pytest.mark.parametrize(
    "made",
    [
        plan_of(),
        plan_of(usable_rows=1_000_000),
        plan_of(cut_rows=0.05),
        plan_of(**{"quarantined.duplicate_text": 500, "quarantined.null_text": 10}),
        plan_of(replace(VERDICT, declared=(64,))),
    ],
)
def test_no_advice_where_nothing_stands_out(made):
    assert figures.advice(spec_of(), made, 384) == []


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(1234567, "rows", "1,234,567 rows"), (2.5, "s", "2.5 s"), (0.056, "share", "5.6%"), (4.2e9, "bytes", "4.2 GB"),
     (999, "bytes", "999 bytes"), (0, "bytes", "0 bytes")],
)  # fmt: skip
def test_figures_are_shown_with_their_unit(value, unit, shown):
    assert figures.Figure("name", value, unit, "measured", "").shown == shown


def block(number, rows, size):
    return sample.Window(str(number), SourceFile(str(number), "parquet", size, ""), 0, rows, size)


def test_blocks_to_read_are_bounded_seeded_and_in_order():
    blocks = [block(number, 10_000, 2**20) for number in range(1_000)]
    windows = sample.chosen(blocks, 0)
    assert len(windows) == 64
    assert {window.stop for window in windows} == {65_536 // 64}
    assert [int(window.path) for window in windows] == sorted(int(window.path) for window in windows)
    assert sample.chosen(blocks, 0) == windows != sample.chosen(blocks, 1)
    assert len(sample.chosen([block(number, 10_000, 2**27) for number in range(9)], 0)) == 2
    assert sample.chosen([block(0, 100_000, 2**40)], 0) == [replace(block(0, 100_000, 2**40), stop=65_536)]
    assert sample.chosen([block(0, 0, 0)], 0) == []


def test_positions_are_distinct_and_within_their_window():
    first, second = sample.positions([3, 97], 50, 0)
    assert len(first) + len(second) == 50
    assert len(set(second.tolist())) == len(second) and second.max() < 97
    assert [places.tolist() for places in sample.positions([2, 1], 50, 0)] == [[0, 1], [0]]


@pytest.fixture
def frame():
    return corpus_frame(120).with_columns(pl.when(pl.col("_id") == "doc-7").then(None).otherwise("text").alias("text"))


def write(frame, path):
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
    elif path.suffix == ".txt":
        path.write_text("\n".join(text or "" for text in frame["text"]) + "\n")
    elif path.suffix == ".lance":
        lance.write_dataset(frame.to_arrow(), str(path))
    else:
        getattr(frame, {".parquet": "write_parquet", ".jsonl": "write_ndjson", ".csv": "write_csv"}[path.suffix])(path)
    return str(path)


FORMATS = ["parquet", "jsonl", "jsonl.gz", "csv", "txt", "lance"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_small_corpus_of_any_format_is_looked_at_whole(spec, frame, tmp_path, suffix):
    corpus = {"source": write(frame, tmp_path / f"c.{suffix}"), "text": "text"}
    if suffix != "txt":
        corpus |= {"id": "_id", "filter": ["lang", "year"], "keep": ["title"]}
    made = plan.run(spec(corpus=corpus))
    found = {figure.name: figure for figure in made.figures}
    assert (found["rows"].value, found["rows"].origin) == (120, "measured")
    assert (found["usable_rows"].value, found["usable_rows"].origin) == (119, "measured")
    assert made["quarantined." + ("blank_text" if suffix == "txt" else "null_text")] == 1
    assert "all rows" in found["sample_rows"].how
    assert made.verdict.says == "unsure"


def test_lines_are_estimated_from_the_bytes_that_were_read(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "READ_BYTES", 8 * 2**16)  # 64 kB of lines
    monkeypatch.setattr(sample, "BLOCKS", 2)
    for number in range(4):
        write(corpus_frame(1_000, number), tmp_path / f"{number}.jsonl")
    write(corpus_frame(1_000, 4), tmp_path / "5.jsonl.gz")
    for source, count, near in (("*.jsonl", 4_000, 0.02), ("*.jsonl.gz", 1_000, 0.15)):
        made = plan.run(spec(corpus__source=str(tmp_path / source)))
        rows, looked_at = made.figures[:2]
        assert (rows.unit, rows.origin) == ("rows", "estimated")
        assert rows.value == pytest.approx(count, rel=near)
        assert "bytes of all files x " in rows.how
        assert looked_at.value < count
        assert {figure.name: figure.origin for figure in made.figures}["usable_rows"] == "estimated"


def test_a_row_longer_than_what_is_read_is_read_to_its_end(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "READ_BYTES", 8 * 100)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"_id": "a", "title": "w001", "text": "w002 " * 1_000}) + "\n")
    assert plan.run(spec(corpus__source=str(path)))["rows"] == 1


@pytest.mark.parametrize("suffix", ["parquet", "lance"])
def test_a_large_corpus_is_not_read_whole(spec, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(sample, "READ_ROWS", 640)
    monkeypatch.setattr(sample, "BLOCKS", 8)
    path = tmp_path / f"large.{suffix}"
    frame = corpus_frame(5_000)
    if suffix == "parquet":
        frame.write_parquet(path, row_group_size=250)
    else:
        write(frame, path)
    made = plan.run(spec(corpus__source=str(path), corpus__filter=["lang"]))
    found = {figure.name: figure for figure in made.figures}
    assert (found["rows"].value, found["rows"].origin) == (5_000, "measured")
    assert found["sample_rows"].value == 640
    assert f"the beginnings of 8 of {20 if suffix == 'parquet' else 63} row groups" in found["sample_rows"].how


def test_parquet_and_lines_share_the_sample_by_their_rows(spec, tmp_path):
    sources = [write(corpus_frame(1_500), tmp_path / "a.parquet"), write(corpus_frame(500), tmp_path / "b.jsonl")]
    files = plan.check(spec(corpus__source=sources))[0]
    drawn = sample.draw(spec(corpus__source=sources, corpus__id=None), files, tmp_path)
    assert (drawn.rows.count, drawn.drawn) == (2_000, 1_000)
    assert drawn.reasons.keys() == {"duplicate_text"}  # b repeats a
    assert drawn.documents.column_names == ["id", "text"]


def test_the_plan_of_some_thousand_rows_comes_true(spec, tmp_path):
    path = write(corpus_frame(6_000), tmp_path / "some.parquet")
    job = spec(corpus__source=path, corpus__filter=["lang", "year"], transform={"kind": "pca"})
    made = plan.run(job)
    assert not (tmp_path / "root").exists()
    done = run(job)
    assert made["rows"] == made["usable_rows"] == done["corpus"]["rows"] == 6_000
    assert made["tokens"] == pytest.approx(done["embed"]["tokens"], rel=0.05)
    for name, table in done["tables"].items():
        assert made[f"bytes.{name}"] == pytest.approx(table["bytes"], rel=0.1), name
    assert made["memory.prefix_8_binary"] == 6_000
    assert made.verdict.says == done["transform"]["verdict"]["says"]


def test_a_plan_repeats_itself_except_for_the_clock(spec, corpus_file):
    corpus_frame(2_000).write_parquet(corpus_file)
    first, second = plan.run(spec()), plan.run(spec())
    # Lance trains its packing of strings on rows of its own choice.
    timed = ("rows_per_second", "tokens_per_second", "embed_seconds", "machine_hours", "bytes.documents", "bytes")
    kept = [[one for one in made.figures if one.name not in timed] for made in (first, second)]
    assert kept[0] == kept[1]
    assert first["bytes.documents"] == pytest.approx(second["bytes.documents"], rel=0.1)
    assert (first.histogram, first.verdict, first.advice) == (second.histogram, second.verdict, second.advice)
    assert json.loads(json.dumps(first.to_json()))["verdict"]["rows"] == 1_000


def test_queries_of_the_evaluation_are_probed(spec, corpus_file, tmp_path):
    corpus_frame(600).write_parquet(corpus_file)
    pl.DataFrame({"_id": [str(n) for n in range(300)], "text": [f"w{n:03d}" for n in range(300)]}).write_csv(
        tmp_path / "queries.csv"
    )
    made = plan.run(spec(evaluate__queries=str(tmp_path / "queries.csv")))
    assert made.verdict.queries == 200
    assert {one.of for one in made.kept} == {"rows", "queries"}


def test_embedding_stops_when_its_time_is_spent(spec, corpus_file, monkeypatch):
    corpus_frame(900).write_parquet(corpus_file)
    monkeypatch.setattr(plan, "EMBED_SECONDS", 1e-9)
    made = plan.run(spec())
    assert made["sample_rows"] == 900
    assert made.verdict.rows == plan.FIRST_ROWS


def test_rows_that_the_model_cannot_embed_are_counted(spec, corpus_file):
    frame = corpus_frame()
    frame[3, "text"], frame[3, "title"] = "broken", None
    frame[4, "text"], frame[4, "title"] = "unknown", None
    frame.write_parquet(corpus_file)
    made = plan.run(spec())
    assert (made["quarantined.non_finite"], made["quarantined.zero_norm"], made["usable_rows"]) == (1, 1, 118)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"corpus__source": "nowhere/*.parquet"}, SpecError, "matches no file"),
        ({"corpus__text": "body"}, SpecError, "has no column 'body'"),
        ({"model__name": "no-such-model"}, SpecError, "unknown model"),
        ({"prefixes": [{"dim": DIM + 8, "precision": "int8"}]}, SpecError, f"more than the {DIM} dimensions"),
        ({"evaluate__queries": "none.csv"}, SpecError, "there is no file"),
    ],
)
def test_wrong_specs_are_refused_as_validate_refuses_them(spec, overrides, error, said):
    with pytest.raises(error, match=said) as mine:
        plan.run(spec(**overrides))
    with pytest.raises(error) as validated:
        run_check(spec(**overrides))
    assert str(mine.value) == str(validated.value)


def test_wrong_data_and_prices_are_refused(spec, corpus_file, tmp_path):
    with pytest.raises(SpecError, match="price: -1"):
        plan.run(spec(), price=-1)
    corpus_frame(3).with_columns(pl.lit(None, pl.String).alias("text")).write_parquet(corpus_file)
    with pytest.raises(DataError, match=r"none of 3 sampled rows can be used \(null_text 3\)"):
        plan.run(spec(corpus__text="text"))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(corpus_frame().write_ndjson().encode())[:-20])
    with pytest.raises(DataError, match=r"cannot read .*broken\.jsonl\.gz"):
        plan.run(spec(corpus__source=str(broken)))
    corpus_frame(3).drop("lang").write_parquet(tmp_path / "a.parquet")
    corpus_frame(3).write_parquet(tmp_path / "A.parquet")
    with pytest.raises(DataError, match="has no column 'lang'"):
        plan.run(spec(corpus__source=[str(tmp_path / "A.parquet"), str(tmp_path / "a.parquet")], corpus__filter="lang"))


def test_the_demo_corpus_is_counted(spec):
    made = plan.run(spec(corpus={"source": "docstrings:stdlib", "id": "id", "text": ["title", "text"]}))
    assert made.figures[0].origin == "measured"
    assert 2_000 < made["rows"] < 10_000
    assert made["sample_rows"] == 1_000
