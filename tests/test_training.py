"""Training from a spec to a folder: what is learnt, what the folder says, what is gone on with, what is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from pipeline import JobSpec, open_index, run
from pipeline.encoders import models
from pipeline.errors import DataError, FloorError, SpecError, StaleError
from pipeline.training import data, engine, measure, objectives, run as training
from pipeline.training.spec import Objective, TrainSpec
from pipeline.vectors import truncate, unit
from tests.conftest import save_model
from tests.training import pairs, quality, toy, transformer, with_tests


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


def test_other_prefixes_are_measured_too_and_pca_of_the_base_beside_them(tmp_path):
    record, _ = training.run(toy(tmp_path, dims=[], measure={"dims": [8, 16]}))
    assert [row["dim"] for row in record["evaluation"] if row["when"] == "after"] == [32, 16, 8]
    before, turned = quality(record, "before"), quality(record, "pca")
    assert turned[32] == pytest.approx(before[32], abs=0.02)  # a turn, and a shift by the mean
    assert set(turned) == {32, 16, 8}


def test_pca_keeps_what_plain_prefixes_lose():
    """All differences lie in the last two of eight dimensions."""
    rng = np.random.default_rng(0)
    vectors = np.zeros((40, 8), np.float32)
    vectors[:, 6:] = rng.normal(size=(40, 2))
    queries, documents = measure.turned(unit(vectors[:5]), unit(vectors))
    assert np.abs(documents[:, 2:]).max() < 1e-5
    assert (np.argmax(truncate(queries, 2) @ truncate(documents, 2).T, axis=1) == np.arange(5)).all()


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
    assert "dims: [32, 8]" in card
    assert str(folder) not in card
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
import os, signal, sys
from pathlib import Path
from pipeline.training import measure, run
from tests.training import toy

def ends(kept, last):
    calls = []
    def called(*given, **named):
        calls.append(1)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(*given, **named)
    return called

if sys.argv[2] == "watching":  # before, two checkpoints, and amid the third
    measure.encode = ends(measure.encode, 4)
else:  # all of the third checkpoint but its last file is written
    from transformers import TrainerState
    TrainerState.save_to_json = ends(TrainerState.save_to_json, 3)
run.run(toy(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("amid", ["watching", "saving"])
def test_a_training_ended_by_sigkill_goes_on_from_its_last_whole_checkpoint(trained, tmp_path, caplog, amid):
    _, undisturbed = trained
    command = [sys.executable, "-c", KILLED, str(tmp_path), amid]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=with_tests())
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    checkpoints = tmp_path / "trained.work" / "checkpoints"
    whole = sorted(checkpoints.glob(f"checkpoint-*/{engine.STATE}"), key=lambda path: path.stat().st_mtime_ns)
    assert len(whole) == 2
    torn = [path.name for path in checkpoints.glob("checkpoint-*") if not (path / engine.STATE).exists()]
    assert len(torn) == (amid == "saving")
    with caplog.at_level("INFO", "pipeline"):
        record, is_new = training.run(toy(tmp_path))
    assert is_new
    assert f"going on from {whole[1].parent.name}" in caplog.text
    assert all(f"leaving {name} out: it is not whole" in caplog.text for name in torn)
    assert record["steps"] == undisturbed["steps"]
    assert quality(record, "before") == quality(undisturbed, "before")
    assert quality(record) == quality(undisturbed)
    one, other = (load_file(Path(found["output"]) / "model.safetensors") for found in (record, undisturbed))
    assert all(np.array_equal(one[name], other[name]) for name in other)


def test_prefixes_that_were_not_trained_are_told_and_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "weights", lambda settings, dims: [1.0 if dim == 32 else 0.0 for dim in dims])
    with pytest.raises(FloorError, match="prefixes do not hold: at 8 of 32 dimensions"):
        training.run(toy(tmp_path))
    assert not (tmp_path / "trained").exists()
    assert (tmp_path / "trained.work" / "model" / "model.safetensors").is_file()


def test_early_stopping_ends_and_never_measures_on_what_it_watched(tmp_path):
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
        ({"objective": {"gate": True}, "workers": 2}, SpecError, "workers: distillation and gates are trained in one"),
        ({"precision": "bfloat16"}, SpecError, "precision: a static model only adds vectors up, in float32"),
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
    weights = load_file(Path(folder.path) / "model.safetensors")["embeddings.word_embeddings.weight"]
    mean = weights[5:105].mean(axis=0)
    assert np.allclose(model.encode([" ".join(words)])[0], mean / np.linalg.norm(mean), atol=1e-5)
    assert bases.kind(spec.base, folder) == "static"
    assert bases.kind(toy(tmp_path, base={"model": folder.path}).base, folder) == "transformer"
    with pytest.raises(SpecError, match="base.max_tokens: a static model reads texts of any length"):
        bases.resolve(toy(tmp_path, base={"model": folder.path, "kind": "static", "max_tokens": 8}).base)


def test_bfloat16_trains_a_transformer_whose_weights_and_figures_are_float32(tmp_path, monkeypatch):
    base = {"model": str(transformer(tmp_path / "bert"))}
    import torch

    weights, measured, encode = [], [], measure.encode
    monkeypatch.setattr(measure, "encode", lambda model, *rest: measured.append(model) or encode(model, *rest))
    for precision in ("float32", "bfloat16"):
        changes = {"output": str(tmp_path / precision), "precision": precision, "dims": [], "epochs": 1}
        spec = toy(tmp_path, base=base, learning_rate=0.001, batch_size=16, **changes)
        pairs(150).write_parquet(tmp_path / "pairs.parquet")
        training.run(spec)
        weights.append(load_file(tmp_path / precision / "model.safetensors"))
    assert {values.dtype for values in weights[1].values()} <= {np.dtype("float32"), np.dtype("int64")}
    assert measured[-1].encode(["w001"], convert_to_tensor=True).dtype == torch.float32
    assert not hasattr(measured[-1].forward, "__wrapped__")  # by autocast
    name = "embeddings.word_embeddings.weight"
    assert 0 < np.abs(weights[0][name] - weights[1][name]).max() < 0.01
    with pytest.raises(SpecError, match="precision: float16 needs a GPU; use bfloat16 or float32"):
        training.run(toy(tmp_path, base=base, precision="float16", output=str(tmp_path / "half")))


def test_a_transformer_learns_the_toy_too_and_both_configs_name_its_dims(tmp_path):
    base = {"model": str(transformer(tmp_path / "bert"))}
    record, _ = training.run(toy(tmp_path, base=base, epochs=12, learning_rate=0.003))
    assert quality(record)[32] > quality(record, "before")[32] + 0.3
    for name in ("config.json", "config_sentence_transformers.json"):
        assert json.loads((tmp_path / "trained" / name).read_text())["matryoshka_dimensions"] == [32, 8]
