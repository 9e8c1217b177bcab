"""A whole job, in this process, with the stand-in model."""

from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from pipeline import JobSpec, docstrings, open_index, run
from tests.conftest import WORDS

DEMO = Path(__file__).parent.parent / "jobs" / "demo.yaml"


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


def test_the_demo_reads_the_docstrings_of_its_python(model, tmp_path, monkeypatch):
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    for number in range(12):
        text = f"{WORDS[number]} {WORDS[number + 50]} " * 10
        (stdlib / f"m{number:02d}.py").write_text(f'def {WORDS[number]}():\n    """{text}"""\n')
    monkeypatch.setattr(docstrings, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(stdlib)}))
    docstrings.stdlib.cache_clear()
    small = ["prefixes=[{dim: 8, precision: binary}]", "search.cascade=[{table: prefix_8_binary, shortlist: 12}]"]
    run(JobSpec.load(DEMO, [f"root={tmp_path / 'root'}", f"model.name={model}", "workers.count=0", *small]))
    docstrings.stdlib.cache_clear()
    found = open_index(tmp_path / "root").search("w003 w003 w053", k=12)
    assert found["id"][0] == "m03.w003"
    assert sorted(found["module"]) == [f"m{number:02d}" for number in range(12)]
