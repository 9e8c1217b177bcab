"""A whole job, in this process, with the stand-in model."""

import polars as pl
import pytest

from pipeline import open_index, run


def test_a_job_leaves_every_table_with_every_row(spec):
    job = spec(corpus__keep=["title"], corpus__filter=["lang", "year"])
    generation = run(job)
    assert generation["generation"] == 1
    names = {"documents", "parameters", "prefix_8_binary", "prefix_16_int8", "prefix_16_float16"}
    assert set(generation["tables"]) == names
    assert {generation["tables"][name]["rows"] for name in names - {"parameters"}} == {120}
    index = open_index(job.root)
    hits = index.search("w001 w002", k=5)
    assert hits.columns == ["rank", "id", "score", "row", "text", "title", "lang", "year"]
    assert hits["rank"].to_list() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", ["parquet"])
def test_quarantine_is_there_and_empty(spec, suffix):
    job = spec()
    run(job)
    assert pl.read_parquet(f"{job.root}/quarantine.parquet").height == 0
