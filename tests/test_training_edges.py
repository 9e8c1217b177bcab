"""Training at its edges: too little, too late, another time, and what a base brings with it."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from pipeline.encoders import models
from pipeline.errors import DataError, PipelineError, SpecError, StaleError
from pipeline.training import bases, data, engine, measure, page, run as training
from tests.training import base, pairs, quality, toy, transformer


class Ended(Exception):
    """In place of a kill."""


def ends_before_measuring(patch):
    """The run ends when all is trained and only the last measurement is left."""

    def measured(kept):
        def called(self, when, *given):
            if when == "after":
                raise Ended
            return kept(self, when, *given)

        return called

    patch.setattr(training._Run, "_measured", measured(training._Run._measured))


@pytest.mark.parametrize("changes", [{"epochs": 5.5}, {"epochs": 60, "checkpoint_steps": 5, "stop": {"dim": 8}}])
def test_a_training_that_had_come_to_its_end_takes_no_step_more(tmp_path, monkeypatch, changes):
    undisturbed, _ = training.run(toy(tmp_path, **changes, output=str(tmp_path / "one")))
    with monkeypatch.context() as patch:
        ends_before_measuring(patch)
        with pytest.raises(Ended):
            training.run(toy(tmp_path, **changes))
    record, _ = training.run(toy(tmp_path, **changes))
    assert record["steps"] == undisturbed["steps"]
    assert quality(record) == quality(undisturbed)
    one, other = (load_file(Path(found["output"]) / "model.safetensors") for found in (record, undisturbed))
    assert all(np.array_equal(one[name], other[name]) for name in other)
    curves = [pl.read_parquet(Path(found["output"]) / "curve.parquet") for found in (record, undisturbed)]
    assert curves[0].to_dicts() == curves[1].to_dicts()


def test_early_stopping_publishes_the_best_of_its_checkpoints(tmp_path, monkeypatch):
    scores, seen = [0.1, 0.9, 0.5, 0.4], []

    def watched(self, model):
        seen.append(model[0].embedding.weight.detach().clone().numpy())
        return {"ndcg_8": scores[len(seen) - 1]}

    monkeypatch.setattr(measure.Watch, "__call__", watched)
    spec = toy(tmp_path, dims=[], checkpoint_steps=2, stop={"dim": 8, "patience": 2})
    record, _ = training.run(spec)
    assert len(seen) == 4
    (weights,) = load_file(Path(record["output"]) / "model.safetensors").values()
    assert np.array_equal(weights, seen[1])
    assert not np.array_equal(weights, seen[3])


def test_a_full_disk_is_told_and_the_last_checkpoint_gone_on_from(tmp_path, monkeypatch, caplog):
    from transformers import Trainer

    save, usage = Trainer._save_optimizer_and_scheduler, engine.shutil.disk_usage(tmp_path)

    def full(self, folder):
        if folder.endswith("checkpoint-28"):
            raise RuntimeError("unexpected pos 448 vs 342")  # what torch says
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(RuntimeError, match="unexpected pos"):
            training.run(toy(tmp_path))
        patch.setattr(engine.shutil, "disk_usage", lambda folder: usage._replace(free=0))
        with pytest.raises(PipelineError, match="checkpoints: the disk is full; make room, and run again"):
            training.run(toy(tmp_path))
    with caplog.at_level("INFO", "pipeline"):
        record, _ = training.run(toy(tmp_path))
    assert "going on from checkpoint-21" in caplog.text
    assert quality(record)[8] > 0.9


def test_pairs_that_fill_no_batch_are_told(tmp_path):
    spec = toy(tmp_path, batch_size=2_000)
    rows = pairs()
    same = rows.with_columns(pl.lit(rows["positive"][0]).alias("positive"))
    pl.concat([same, rows[:200]]).write_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="too few distinct texts for a batch of 2000, which holds none twice; lower"):
        training.run(spec)
    assert not (tmp_path / "trained").exists()


def test_a_prefix_above_half_is_not_judged_by_shorter_ones(tmp_path):
    record, _ = training.run(toy(tmp_path, dims=[32, 24]))
    assert record["probe"]["says"] == "unsure"
    assert "no trained prefix is at most half of 32 dimensions" in record["probe"]["because"]


def test_before_anything_is_trained_another_spec_begins_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", lambda *given: (_ for _ in ()).throw(Ended))
        with pytest.raises(Ended):
            training.run(toy(tmp_path, measure={"k": 3}))
    record, _ = training.run(toy(tmp_path))
    assert {row["k"] for row in record["evaluation"]} == {10}  # what was measured before is measured again


def test_after_a_rate_that_is_too_high_a_lower_one_begins_anew(tmp_path):
    with pytest.raises(PipelineError, match="weights that are no numbers; lower learning_rate"):
        training.run(toy(tmp_path, learning_rate=1e38))
    record, _ = training.run(toy(tmp_path))
    assert quality(record)[8] > 0.9


def test_an_anchor_with_several_positives_is_on_one_side(tmp_path):
    spec = toy(tmp_path)
    rows = pairs()
    pl.concat([rows, rows.with_columns(pl.col("positive") + " w200")]).write_parquet(tmp_path / "pairs.parquet")
    found = data.prepare(spec)
    assert set(found.held_out.queries["text"]).isdisjoint(found.pairs["anchor"])
    assert found.fingerprint["skipped"] > 0


def judged(folder, rows, name, texts):
    pl.DataFrame({"_id": [f"q{number}" for number in range(len(rows))], "text": texts}).write_parquet(
        folder / f"{name}.parquet"
    )
    qrels = {"query_id": [f"q{number}" for number in range(len(rows))], "corpus_id": list(rows), "score": 1}
    pl.DataFrame(qrels).write_parquet(folder / f"{name}-qrels.parquet")
    return {"queries": str(folder / f"{name}.parquet"), "qrels": str(folder / f"{name}-qrels.parquet")}


def test_held_out_queries_are_known_whatever_space_is_around_them(tmp_path):
    rows = pairs(60)
    names = [f"d{number}" for number in range(len(rows))]
    pl.DataFrame({"_id": names, "text": rows["positive"]}).write_parquet(tmp_path / "corpus.parquet")
    corpus = {"corpus": str(tmp_path / "corpus.parquet")}
    trained = {**corpus, **judged(tmp_path, names, "all", rows["anchor"].to_list())}
    held = judged(tmp_path, names[:5], "few", [f" {text}\n" for text in rows["anchor"][:5]])
    found = data.prepare(toy(tmp_path, data=trained, held_out=held))
    assert set(found.pairs["anchor"]) == set(rows["anchor"][5:])
    pl.DataFrame({"query_id": ["q999"], "corpus_id": ["d1"], "score": [1]}).write_parquet(held["qrels"])
    with pytest.raises(DataError, match=r"held_out.qrels: .* judges query 'q999', which is not in .*few.parquet"):
        data.prepare(toy(tmp_path, data=trained, held_out=held))


@pytest.mark.parametrize("dims", [[], [32, 8]])
def test_what_a_base_says_of_its_prefixes_is_not_handed_on(tmp_path, dims):
    base(tmp_path / "base")
    pairs().write_parquet(tmp_path / "pairs.parquet")
    config = tmp_path / "base" / "config_sentence_transformers.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "matryoshka_dims": [32, 16, 4]}))
    assert models.resolve(str(tmp_path / "base")).matryoshka_dims == (32, 16, 4)
    record, _ = training.run(toy(tmp_path, dims=dims, measure={"dims": [8]}))
    assert models.resolve(record["output"]).matryoshka_dims == (tuple(dims) or None)
    card = (Path(record["output"]) / "README.md").read_text()
    assert ("feature-extraction, matryoshka]" in card) == bool(dims)


def test_documents_get_the_prompt_that_a_job_gives_them(tmp_path):
    model = bases.build(toy(tmp_path).base, bases.resolve(toy(tmp_path).base))
    model.prompts = {"query": "w100 ", "passage": "w101 ", "document": ""}
    held = data.prepare(toy(tmp_path)).held_out
    asked, documents = measure.encode(model, held, "static")
    for found, frame, prompt in ((asked, held.queries, "w100 "), (documents, held.documents, "w101 ")):
        wanted = model.encode([prompt + text for text in frame["text"][:3]], prompt="")
        assert np.allclose(found[:3], wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    given = engine._arguments(model, toy(tmp_path), "static", 480, tmp_path)
    assert given.prompts == {"anchor": "w100 ", "positive": "w101 ", "negative": "w101 "}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output": "s3://bucket/model"}, "output: s3://bucket/model is no folder of this machine"),
        ({"objective": {"weights": "short", "alpha": 2_000}}, "objective.alpha"),
    ],
)
def test_what_the_spec_alone_shows_to_be_wrong(tmp_path, changes, says):
    with pytest.raises(SpecError, match=says):
        toy(tmp_path, **changes)


def test_what_is_wrong_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "trained").symlink_to(tmp_path / "there")
    with pytest.raises(SpecError, match="trained is a link or a mount point"):
        training.run(toy(tmp_path))
    bert = {"model": str(transformer(tmp_path / "bert"))}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for changes, says in (
        ({"precision": "float16", "base": bert}, "precision: float16 needs a GPU"),
        ({"base": {**bert, "max_tokens": 999}}, "base.max_tokens: .* has 32 positions, 999 were asked for"),
    ):
        with pytest.raises(SpecError, match=says):
            training.run(toy(tmp_path, **changes, output=str(tmp_path / "new")))
        assert not (tmp_path / "new.work").exists()


def test_a_page_of_an_unfinished_training_is_refused(tmp_path):
    with pytest.raises(StaleError, match="is no finished training"):
        page.write(tmp_path, tmp_path)
