"""Training from a spec to a folder: what is learnt, what the folder says, what is gone on with, what is refused."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import JobSpec, open_index, run
from pipeline.encoders import models
from pipeline.errors import DataError, FloorError, SpecError, StaleError
from pipeline.training import data, engine, measure, objectives, run as training
from pipeline.training.spec import Objective, TrainSpec
from tests.conftest import save_model
from tests.training import pairs, quality, toy, transformer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The toy, trained once: its folder and record."""
    folder = tmp_path_factory.mktemp("toy")
    record, is_new = training.run(toy(folder))
    assert is_new
    return folder, record


def test_what_could_not_be_found_before_is_found_after_at_every_prefix(trained):
    _, record = trained
    before, after = quality(record, "before"), quality(record)
    assert max(before.values()) < 0.2
    assert after[32] > 0.9
    assert after[8] > 0.9
    for row in record["evaluation"]:
        assert row["ndcg_low"] <= row["ndcg"] <= row["ndcg_high"]
    assert record["probe"]["says"] == "trained"


def test_the_folder_says_what_it_was_trained_for(trained):
    folder, record = trained
    output = folder / "trained"
    assert models.resolve(str(output)).matryoshka_dims == (32, 8)
    assert sorted(path.suffix for path in output.rglob("*") if path.suffix in models.EXECUTABLE) == []
    assert json.loads((output / "evaluation.json").read_text()) == record["evaluation"]
    assert pl.read_parquet(output / "evaluation.parquet").to_dicts() == record["evaluation"]
    card = (output / "README.md").read_text()
    assert "Trained prefixes: 32, 8" in card
    assert f"| 8 | {quality(record)[8]:.4f} (" in card
    content = record["fingerprint"]["content"]
    assert content["pairs"] + content["held_out_queries"] == len(pairs())
    assert content["digest"] in card
    curve = pl.read_parquet(output / "curve.parquet")
    assert {"loss", "loss_32", "loss_8", "ndcg_32", "ndcg_8"} <= set(curve["name"])
    first, last = (curve.filter(pl.col("name") == "loss_8")["value"][place] for place in (0, -1))
    assert last < first / 2
    assert not (folder / "trained.work" / "checkpoints").exists()


def test_any_client_loads_it_and_a_job_embeds_with_it(trained, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder, _ = trained
    vectors = SentenceTransformer(str(folder / "trained"), truncate_dim=8, device="cpu").encode(["w001 w041"])
    assert vectors.shape == (1, 8)
    rows = pairs()
    rows.with_row_index("id").write_parquet(tmp_path / "corpus.parquet")
    job = {
        "name": "found",
        "root": str(tmp_path / "root"),
        "corpus": {"source": str(tmp_path / "corpus.parquet"), "id": "id", "text": "positive"},
        "model": {"name": str(folder / "trained")},
        "prefixes": [{"dim": 8, "precision": "float16"}],
        "evaluate": {"shortlists": []},
        "workers": {"count": 0},
    }
    generation = run(JobSpec.of(job))
    assert generation["transform"]["kind"] == "none"  # auto: the measurement agrees with what the folder says
    assert generation["transform"]["verdict"]["declared"] == [32, 8]
    hits = open_index(str(tmp_path / "root")).search(rows["anchor"][5], k=1)
    assert hits["text"].to_list() == [rows["positive"][5]]


def test_a_finished_training_does_nothing_and_another_spec_is_refused(trained, monkeypatch):
    folder, record = trained
    monkeypatch.setattr(engine, "run", None)
    assert training.run(toy(folder)) == (record, False)
    with pytest.raises(StaleError, match=r"begun with another epochs: 10.* then, 5.* now; set it back"):
        training.run(toy(folder, epochs=5))
    with pytest.raises(StaleError, match="another objective.temperature"):
        training.run(toy(folder, objective={"temperature": 0.1}))
    rows = folder / "pairs.parquet"
    kept = rows.read_bytes()
    pairs(699).write_parquet(rows)
    try:
        with pytest.raises(StaleError, match=r"another content\.documents: \d+ then, \d+ now"):
            training.run(toy(folder))
    finally:
        rows.write_bytes(kept)


KILLED = """
import os, sys
from pathlib import Path
from pipeline.training import engine, run
from tests.training import toy

def ends(model, *given):
    ends.calls += 1
    if ends.calls == 4:  # before, two checkpoints, and amid the third
        os._exit(9)
    return kept(model, *given)

ends.calls = 0
from pipeline.training import measure
kept, measure.encode = measure.encode, ends
run.run(toy(Path(sys.argv[1])))
"""


def test_a_killed_training_goes_on_from_its_last_checkpoint(trained, tmp_path, caplog):
    _, undisturbed = trained
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 9, ended.stderr
    whole = sorted((tmp_path / "trained.work" / "checkpoints").glob("checkpoint-*"), key=lambda path: len(path.name))
    assert len(whole) == 2
    torn = whole[0].with_name("checkpoint-9999")
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with caplog.at_level("INFO", "pipeline"):
        record, is_new = training.run(toy(tmp_path))
    assert is_new
    assert f"going on from {engine_name(whole)}" in caplog.text
    assert "leaving checkpoint-9999 out" in caplog.text
    assert quality(record, "before") == quality(undisturbed, "before")
    for dim, value in quality(undisturbed).items():
        assert quality(record)[dim] == pytest.approx(value, abs=0.01)
    assert record["steps"] == undisturbed["steps"]


def engine_name(paths):
    return max(paths, key=lambda path: int(path.name.rpartition("-")[2])).name


def test_prefixes_that_were_not_trained_are_told_and_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "weights", lambda settings, dims: [1.0 if dim == 32 else 0.0 for dim in dims])
    with pytest.raises(FloorError, match="prefixes do not hold: at 8 of 32 dimensions"):
        training.run(toy(tmp_path))
    assert not (tmp_path / "trained").exists()
    assert (tmp_path / "trained.work" / "model" / "model.safetensors").is_file()


def test_early_stopping_keeps_the_best_and_never_measures_on_what_it_watched(tmp_path):
    spec = toy(tmp_path, dims=[], epochs=60, checkpoint_steps=5, stop={"dim": 32, "patience": 2})
    record, _ = training.run(spec)
    assert record["steps"] < engine.steps(spec, record["fingerprint"]["content"]["pairs"]) / 2
    assert quality(record)[32] > 0.9
    held_out = data.prepare(spec).held_out
    watched, measured = measure.split(held_out, "static", 0)
    assert set(watched.queries["_id"]).isdisjoint(measured.queries["_id"])
    assert len(watched.queries) + len(measured.queries) == len(held_out.queries)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"dims": [16, 8]}, SpecError, "dims: .* has 32 dimensions, and 16 is the largest here"),
        ({"base": {"model": "no-such"}}, SpecError, "base.model: unknown model 'no-such'"),
        (
            {"data": {"source": "none.parquet", "anchor": "a", "positive": "b"}},
            SpecError,
            "data.source: 'none.parquet'",
        ),
        ({"objective": {"cached": True}}, SpecError, "objective.cached: a static model needs no parts"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, monkeypatch, changes, error, says):
    monkeypatch.setattr("pipeline.training.bases.build", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=says):
        training.run(toy(tmp_path, **changes))


def test_a_missing_column_and_an_output_of_someone_else(tmp_path):
    spec = toy(tmp_path)
    with pytest.raises(SpecError, match=r"data.source: .* has no column 'quest'; it has anchor, positive"):
        training.run(toy(tmp_path, data={**spec.data.model_dump(), "anchor": "quest"}))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "mine.txt").write_text("mine")
    with pytest.raises(StaleError, match="exists and is no training of this project"):
        training.run(spec)
    assert (tmp_path / "trained" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("data_section", "says"),
    [
        ({}, "data: give source with anchor and positive, or docstrings:stdlib"),
        ({"source": "a.csv"}, "data: source needs anchor and positive"),
        ({"source": "docstrings:stdlib", "anchor": "a"}, "makes its own pairs"),
        ({"source": "a.csv", "anchor": "a", "positive": "b", "queries": "q.csv"}, "not both"),
        ({"corpus": "c.csv", "queries": "q.csv"}, "all of corpus, queries and qrels"),
        ({"sauce": "a.csv"}, r"unknown field data.sauce \(did you mean 'source'\?\)"),
    ],
)
def test_data_is_of_one_form(tmp_path, data_section, says):
    with pytest.raises(SpecError, match=says):
        toy(tmp_path, data=data_section)


def test_what_is_held_out_does_not_depend_on_the_order_of_rows(tmp_path):
    spec = toy(tmp_path)
    first = data.prepare(spec)
    pairs().reverse().write_parquet(tmp_path / "pairs.parquet")
    second = data.prepare(spec)
    assert set(first.held_out.queries["text"]) == set(second.held_out.queries["text"])
    assert set(first.held_out.queries["text"]).isdisjoint(second.pairs["anchor"])
    assert 0.2 < len(first.held_out.queries) / len(pairs()) < 0.4
    assert first.fingerprint["digest"] != second.fingerprint["digest"]
    other = data.prepare(toy(tmp_path, seed=1))
    assert set(first.held_out.queries["text"]) != set(other.held_out.queries["text"])


def test_judgements_make_pairs_and_held_out_queries_are_not_among_them(tmp_path):
    rows = pairs(60)
    names = [f"d{number}" for number in range(len(rows))]
    pl.DataFrame({"_id": names, "title": [None, *rows["positive"][1:]], "text": "w200"}).write_parquet(
        tmp_path / "corpus.parquet"
    )
    asked = pl.DataFrame({"_id": [f"q{number}" for number in range(len(rows))], "text": rows["anchor"]})
    asked.write_parquet(tmp_path / "queries.parquet")
    qrels = pl.DataFrame({"query_id": asked["_id"], "corpus_id": names, "score": [0, *[1] * (len(rows) - 1)]})
    qrels.write_parquet(tmp_path / "qrels.parquet")
    asked[:5].write_parquet(tmp_path / "few.parquet")
    qrels[:5].write_parquet(tmp_path / "few-qrels.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("corpus", "queries", "qrels")}
    shared = data.prepare(toy(tmp_path, data=files))
    assert len(shared.pairs) + len(shared.held_out.queries) == len(rows) - 1
    assert len(shared.held_out.documents) == len(rows)
    held = {"queries": str(tmp_path / "few.parquet"), "qrels": str(tmp_path / "few-qrels.parquet")}
    given = data.prepare(toy(tmp_path, data=files, held_out=held))
    assert given.held_out.queries["_id"].to_list() == ["q1", "q2", "q3", "q4"]  # q0 has nothing relevant
    assert len(given.pairs) == len(rows) - 5
    assert given.pairs["positive"][0] == f"{rows['positive'][5]}\nw200"
    few = given.held_out.among(6, 0)
    assert {"d1", "d2", "d3", "d4"} < set(few.documents["_id"])
    assert len(few.documents) == 6
    pl.DataFrame({"query_id": ["q1"], "corpus_id": ["d999"], "score": [1]}).write_parquet(tmp_path / "qrels.parquet")
    with pytest.raises(DataError, match=r"data.qrels: .* judges document 'd999', which is not in the corpus"):
        data.prepare(toy(tmp_path, data=files))


def test_docstrings_pair_summary_with_rest_and_name_with_docstring():
    found = data.prepare(
        TrainSpec.of({"name": "a", "output": "b", "base": {"model": "c"}, "data": {"source": "docstrings:stdlib"},
                      "dims": [8]})
    )  # fmt: skip
    rows = dict(found.pairs.select("anchor", "positive").iter_rows()) | {
        text: found.held_out.documents.filter(pl.col("_id") == next(iter(found.held_out.qrels[name])))["text"][0]
        for name, text in found.held_out.queries.iter_rows()
    }
    assert rows["Return the median (middle value) of numeric data."].startswith("When the number of data points")
    assert "middle value" in rows["statistics.median"]
    assert len(found.pairs) > 5_000


def test_weights_mean_one_and_lean_as_they_say():
    dims = [32, 16, 8]
    given = {kind: objectives.weights(Objective(weights=kind, alpha=0.5), dims) for kind in objectives.WEIGHTS}
    assert given["uniform"] == [1, 1, 1]
    assert np.allclose(given["geometric"], np.array([1, 0.5, 0.25]) * 3 / 1.75)
    assert np.allclose(given["short"], np.array([1, 2**0.5, 2]) * 3 / (3 + 2**0.5))


@pytest.mark.parametrize("cached", [False, True])
def test_losses_are_told_of_each_dim_without_their_weights(tmp_path, cached):
    from pipeline.training import bases

    base = {"model": str(transformer(tmp_path / "bert"))}
    objective = {"weights": "short", "cached": cached, "cached_rows": 4, "temperature": 0.1}
    spec = toy(tmp_path, base=base, objective=objective)
    model = bases.build(spec.base, bases.resolve(spec.base)).eval()
    built = objectives.build(model, spec, tmp_path)
    loss, told = built.loss, built.told
    rows = pairs(16)
    features = [model.preprocess(rows[name].to_list()) for name in ("anchor", "positive")]
    total = float(loss(features, None).detach())
    means = told.taken()
    asked, found = (model.encode(rows[name].to_list(), convert_to_tensor=True) for name in ("anchor", "positive"))
    for dim, weight in zip(spec.dims, objectives.weights(spec.objective, spec.dims), strict=True):
        one, other = (vectors[:, :dim] / vectors[:, :dim].norm(dim=1, keepdim=True) for vectors in (asked, found))
        logits = one @ other.T / 0.1
        assert means[f"loss_{dim}"] == pytest.approx(float((logits.logsumexp(1) - logits.diag()).mean()), abs=1e-4)
        total -= weight * means[f"loss_{dim}"]
    assert total == pytest.approx(0, abs=1e-3)
    assert told.taken() == {}


def test_a_base_whose_weights_are_no_numbers_is_refused(tmp_path):
    save_model(tmp_path / "other")  # one of its words is no number
    with pytest.raises(DataError, match=r"base.model: .*other holds weights that are no numbers"):
        training.run(toy(tmp_path, base={"model": str(tmp_path / "other")}))


def test_the_share_kept_is_that_of_the_same_queries():
    full, part = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.5, 0.0, 1.0, 0.0])
    other = {"recall": full, "mrr": full}
    table = measure.table("after", {32: {"ndcg": full, **other}, 8: {"ndcg": part, **other}}, 10, 0)
    assert table["kept"].to_list() == [1.0, 0.5]
    assert table["kept_low"][0] == table["kept_high"][0] == 1
    assert table["kept_low"][1] <= 0.5 <= table["kept_high"][1]


def test_a_table_of_a_transformer_reads_long_texts_whole(tmp_path):
    from pipeline.training import bases

    spec = toy(tmp_path, base={"model": str(transformer(tmp_path / "bert")), "kind": "static"})
    folder = bases.resolve(spec.base)
    model = bases.build(spec.base, folder)
    words = [f"w{number:03d}" for number in range(100)]
    from safetensors.numpy import load_file

    weights = load_file(Path(folder.path) / "model.safetensors")["embeddings.word_embeddings.weight"]
    mean = weights[5:105].mean(axis=0)
    assert np.allclose(model.encode([" ".join(words)])[0], mean / np.linalg.norm(mean), atol=1e-5)
    assert bases.kind(spec.base, folder) == "static"
    assert bases.kind(toy(tmp_path, base={"model": folder.path}).base, folder) == "transformer"
    with pytest.raises(SpecError, match="base.max_tokens: a static model reads texts of any length"):
        bases.resolve(toy(tmp_path, base={"model": folder.path, "kind": "static", "max_tokens": 8}).base)


def test_a_transformer_learns_the_toy_too_and_both_configs_name_its_dims(tmp_path):
    start = time.perf_counter()
    base = {"model": str(transformer(tmp_path / "bert"))}
    record, _ = training.run(toy(tmp_path, base=base, epochs=12, learning_rate=0.003))
    assert quality(record)[32] > quality(record, "before")[32] + 0.3
    for name in ("config.json", "config_sentence_transformers.json"):
        assert json.loads((tmp_path / "trained" / name).read_text())["matryoshka_dimensions"] == [32, 8]
    assert time.perf_counter() - start < 200
