"""The search benchmark runs, tells everything it promises, and its recalls are what the indexes can reach."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline import open_index
from tests.bench import report, roster, sets, synthetic, worker
from tests.bench.__main__ import main
from tests.bench.measure import recall
from tests.bench.root import build
from tests.bench.sets import Rescorer, Set, prepare

FIELDS = {
    "contender", "group", "kind", "setting", "label", "recall", "median_ms", "p95_ms", "p99_ms", "batch_qps", "batch",
    "medians_ms", "queries", "build_seconds", "build_peak_bytes", "disk_bytes", "open_seconds", "imports_bytes",
    "opened_bytes", "serving_bytes", "mapped_bytes", "peak_bytes",
}  # fmt: skip
NAMES = ("exact", "lancedb-flat", "lancedb-ivfrq", "faiss-hnsw-prefix", "faiss-binary", "faiss-hamming", "usearch-",
         "ours-lance-binary-64", "ours-resident-binary-64", "ours-lance-int8")  # fmt: skip
FLOORS = {"exact-blas": 1.0, "lancedb-flat": 1.0, "lancedb-ivfrq": 0.7, "faiss-hnsw-prefix": 0.95, "usearch-i8": 0.9,
          "usearch-i8-rescored": 0.95, "ours-lance-int8": 0.99}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The results of a quick run of those whose packages are here."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--rows", "2000", "--dim", "64", "--quick", "--queries", "20", "--seconds", "0.2", "--rounds", "2"]
    main([*options, "--contenders", ",".join(NAMES), "--out", str(out)])
    assert not (out / "work").exists()
    assert (out / "pareto.svg").read_text().startswith("<svg")
    return json.loads((out / "results.json").read_text())


def test_a_quick_run_tells_every_figure_of_every_contender(told):
    taken, missing = roster.chosen(NAMES, slow=False)
    assert {row["contender"] for row in told["rows"]} == {one.name for one in taken}
    assert told["left_out"] == missing
    assert {"exact-blas", "lancedb-flat", "ours-lance-int8"} <= {one.name for one in taken}
    for row in told["rows"]:
        assert set(row) == FIELDS
        assert 0 < row["median_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert len(row["medians_ms"]) == 2
        assert 10 <= row["queries"] <= 20
        assert row["batch_qps"] > 0
        assert (row["recall"] is None) == (row["kind"] == "coarse")
    assert {"search", "whole", "coarse"} == {row["kind"] for row in told["rows"]}
    assert {"cpu", "cores", "packages", "date", "commit"} <= set(told["machine"])
    assert told["machine"]["packages"]["numpy"] == np.__version__


def test_recalls_are_what_the_indexes_can_reach(told):
    best = {}
    for row in told["rows"]:
        if row["recall"] is not None:
            assert 0 <= row["recall"] <= 1
            best[row["contender"]] = max(best.get(row["contender"], 0), row["recall"])
    assert all(best[name] >= least for name, least in FLOORS.items() if name in best), best


def test_the_table_has_a_line_for_each_row_and_the_quickest_at_each_recall(told):
    lines = report.text(told).splitlines()
    searched = [row for row in told["rows"] if row["kind"] == "search"]
    assert all(any(row["contender"] in line and row["label"] in line for line in lines) for row in searched)
    assert next(line for line in lines if line.startswith("exact-blas") and " ms " in line).count("never") == 0


def test_each_step_has_a_process_of_its_own(tmp_path, capsys):
    options = ["--rows", "500", "--dim", "16", "--queries", "10", "--seconds", "0.1", "--rounds", "1"]
    main([*options, "--contenders", "exact", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["recall"] == 1.0
    assert row["imports_bytes"] > 10_000_000
    assert "exact-blas" in capsys.readouterr().out


def test_a_contender_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no contender begins with 'fais-'"):
        main(["--contenders", "fais-", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("names", "slow", "want"),
    [
        (["faiss-hnsw"], False, {"faiss-hnsw-prefix"}),
        (["faiss-hnsw"], True, {"faiss-hnsw-prefix", "faiss-hnsw-prefix-200"}),
        (["usearch-i8"], False, {"usearch-i8"}),
        (["lancedb-hnsw-full", "exact"], False, {"exact-blas", "lancedb-hnsw-full"}),
    ],
)
def test_contenders_are_named_or_begun(monkeypatch, names, slow, want):
    monkeypatch.setattr("tests.bench.measure.Contender.missing", lambda one: "")
    assert {one.name for one in roster.chosen(names, slow)[0]} == want


def test_a_package_that_is_not_there_leaves_its_contenders_out():
    flat = roster.everyone()["lancedb-flat"]
    assert flat.missing() == ""
    assert replace(flat, packages=("numpy", "no_such_package")).missing() == "no_such_package is not installed"
    assert replace(flat, needs=lambda: "too old").missing() == "too old"


def test_a_folder_of_vectors_is_taken_as_it_is(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((300, 16)).astype(np.float32)
    np.save(tmp_path / "a-corpus.npy", rows)
    np.save(tmp_path / "a-queries.npy", rows[:5] * 3)
    options = ["--vectors", str(tmp_path), "--quick", "--seconds", "0.1", "--rounds", "1", "--contenders", "exact"]
    main([*options, "--keep", "--out", str(tmp_path / "out")])
    of = Set.load(tmp_path / "out" / "work")
    assert (of.rows, of.dim, of.queries, of.prefix) == (300, 16, 5, "pca")
    assert of.truth[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.allclose(np.linalg.norm(of.corpus.astype(np.float32), axis=1), 1, atol=1e-3)
    np.save(tmp_path / "b-corpus.npy", rows)
    with pytest.raises(SystemExit, match="2 files fit"):
        main([*options, "--out", str(tmp_path / "out")])


def test_synthetic_vectors_never_change(tmp_path):
    """Worked out once with the recipe; its first number and a sum over all."""
    synthetic.write(600, 8, tmp_path)
    corpus, queries = np.load(tmp_path / "corpus.npy"), np.load(tmp_path / "queries.npy")
    assert corpus.shape == (600, 8)
    assert queries.shape == (500, 8)
    assert np.allclose(np.linalg.norm(corpus, axis=1), 1, atol=1e-6)
    assert corpus[:, 0].std() > 2 * corpus[:, 7].std()
    assert math.isclose(float(corpus[0, 0]), 0.116423, rel_tol=1e-5)
    assert math.isclose(float(np.abs(queries).sum()), 1118.875, rel_tol=1e-5)


def test_recall_counts_hits_at_any_place():
    found, truth = np.array([[3, 1, 2, -1]]), np.array([[1, 2, 3, 4]])
    assert recall(found, truth) == 0.75


def test_rescoring_orders_a_shortlist_by_cosine(tmp_path):
    angles = np.linspace(0, 1, 40)
    np.save(tmp_path / "corpus.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    np.save(tmp_path / "queries.npy", np.array([[1.0, 0.0]]))
    asked = Set(str(tmp_path / "work"), "arc", 0, 0, 1)
    of = prepare(asked, (tmp_path / "corpus.npy", tmp_path / "queries.npy"))
    best = Rescorer(of)(of.all_queries, np.array([[30, 5, 20, -1]]))
    assert best[0].tolist() == [5, 20, 30, *[-1] * 7]
    assert of.truth[0].tolist() == list(range(10))


def test_a_root_of_vectors_opens_like_any_other(tmp_path):
    rows = np.random.default_rng(0).standard_normal((200, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "corpus.npy", rows)
    seconds = build(tmp_path / "corpus.npy", tmp_path / "root", [{"dim": 8, "precision": "int8"}])
    assert list(seconds) == ["documents", "fit", "derive", "index", "publish"]
    index = open_index(tmp_path / "root")
    found = index.search(rows[[7, 150]].astype(np.float32), k=1, cascade=[("prefix_8_int8", 50)])
    assert found["row"].to_list() == [7, 150]
    assert found["id"].to_list() == ["7", "150"]


def test_ties_go_to_the_lower_row():
    rows, scores = sets.nearest(np.array([[9, 4, 7, 1]]), np.array([[0.5, 0.9, 0.9, 0.1]]), 3)
    assert rows.tolist() == [[4, 7, 9]]
    assert scores.tolist() == [[0.9, 0.9, 0.5]]


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen by the scheduler there")
def test_a_step_has_only_so_many_cores(monkeypatch):
    given = []
    monkeypatch.setattr("os.sched_setaffinity", lambda process, cores: given.append(list(cores)))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 1, 2})
    monkeypatch.setattr("os.environ", {})
    worker.limit(2)
    assert given == [[1, 2]]
