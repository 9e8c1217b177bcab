"""What each objective, schedule and base is for, on toys whose answer is known."""

import logging

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from pipeline import JobSpec, open_index, run
from pipeline.encoders import models
from pipeline.errors import FloorError, SpecError, StaleError
from pipeline.training import bases, data, engine, heads, measure, objectives, output, run as training, teacher
from tests.conftest import DIM, WORDS, save_model
from tests.training import CONCEPTS, pairs, quality, toy, transformer

FIRST = 2
"""Row of w000 in the stand-in's table."""


def knowing(folder, columns=slice(0, DIM)):
    """A teacher: one vector for each concept, whichever of its two words says it; `columns` of them carry it."""
    weights = save_model(folder, seed=5) / "model.safetensors"
    table = np.nan_to_num(load_file(weights)["embedding.weight"])
    table[FIRST + CONCEPTS : FIRST + 2 * CONCEPTS] = table[FIRST : FIRST + CONCEPTS]
    save_file({"embedding.weight": np.ascontiguousarray(table)}, weights)
    return str(folder)


def distilled(folder, model, reads="each", **changes):
    objective = {"kind": "distill", "teacher": {"model": model, "reads": reads}, "temperature": 0.1}
    return toy(folder, objective=objective, checkpoint_steps=99, **changes)


def test_a_student_takes_over_its_teachers_cosines_at_every_prefix(tmp_path):
    spec = distilled(tmp_path, knowing(tmp_path / "teacher"), epochs=8)
    record, _ = training.run(spec)
    assert max(quality(record, "before").values()) < 0.2
    assert quality(record)[32] > 0.9
    assert quality(record)[8] > 0.8
    curve = pl.read_parquet(tmp_path / "trained" / "curve.parquet")
    for name in ("loss_32", "loss_8"):
        values = curve.filter(pl.col("name") == name)["value"]
        assert values[-1] < values[0] / 3
    assert not (tmp_path / "trained.work" / "teacher").exists()
    with pytest.raises(StaleError, match=r"another objective.teacher.model.*also teacher_digest"):
        training.run(distilled(tmp_path, str(tmp_path / "base"), epochs=8))


def test_a_teacher_of_one_language_teaches_both(tmp_path):
    model = knowing(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    table = load_file(weights)["embedding.weight"]
    table[FIRST + CONCEPTS : FIRST + 2 * CONCEPTS] = 0  # no word of the positive's
    save_file({"embedding.weight": table}, weights)
    record, _ = training.run(distilled(tmp_path, model, "anchor", epochs=8))
    assert quality(record)[32] > 0.9
    assert quality(record)[8] > 0.8


def test_what_a_teacher_says_is_computed_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(teacher, "TEXTS_AT_ONCE", 100)
    model = knowing(tmp_path / "teacher")
    spec = distilled(tmp_path, model)
    folder, rows = teacher.resolve(spec.objective.teacher), pairs(120)
    with caplog.at_level(logging.INFO, "pipeline"):
        told = teacher.labelled(spec.objective.teacher, folder, rows, tmp_path)
    assert caplog.text.count("teacher texts=") == 4  # two roles, two files each
    vectors = teacher.vectors(tmp_path)
    table = load_file(tmp_path / "teacher" / "model.safetensors")["embedding.weight"]
    for name in ("anchor", "positive"):
        row = 17
        mean = np.mean([table[FIRST + int(word[1:])] for word in rows[name][row].split()], axis=0)
        place = told["label"][row][rows.columns.index(name)]
        assert np.allclose(vectors[place], mean / np.linalg.norm(mean), atol=2e-3)
    (tmp_path / "teacher" / "00002.npy").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        again = teacher.labelled(spec.objective.teacher, folder, rows, tmp_path)
    assert caplog.text.count("teacher texts=") == 1
    assert again.equals(told)
    assert np.array_equal(teacher.vectors(tmp_path), vectors)
    one = teacher.labelled(spec.objective.teacher.model_copy(update={"reads": "anchor"}), folder, rows, tmp_path)
    assert all(first == second for first, second in one["label"])


def cut_off(spec, checkpoints):
    """Train until so many checkpoints are written."""
    encode, left = measure.encode, [1 + checkpoints]  # the first is before training

    def ends(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure, "encode", ends)
        training.run(spec)


def test_progressive_trains_small_dims_first_and_goes_on_at_its_stage(tmp_path):
    spec = toy(tmp_path, objective={"schedule": "progressive"}, dims=[32, 16, 8], epochs=9, checkpoint_steps=8)
    assert objectives.stages(spec) == [(0, (8,)), (3, (16, 8)), (6, (32, 16, 8))]
    cut_off(spec, 4)
    steps = engine.steps(spec, len(data.prepare(spec).pairs))
    begun = load_file(tmp_path / "base" / "model.safetensors")["embedding.weight"]
    kept = engine.newest(tmp_path / "trained.work" / "checkpoints")
    half = load_file(kept / "model.safetensors")["embedding.weight"]
    assert steps / 3 < int(kept.name.rpartition("-")[2]) < steps * 2 / 3
    assert np.array_equal(half[:, 16:], begun[:, 16:])
    assert not np.allclose(half[:, 8:16], begun[:, 8:16])
    record, _ = training.run(spec)
    assert quality(record)[8] > 0.9
    curve = pl.read_parquet(tmp_path / "trained" / "curve.parquet")
    told = {dim: set(curve.filter(pl.col("name") == f"loss_{dim}")["step"]) for dim in spec.dims}
    assert told[8] == set(range(1, steps + 1))
    for dim, share in ((16, 1 / 3), (32, 2 / 3)):
        assert told[dim] == {step for step in told[8] if (step - 1) / steps >= share}


@pytest.mark.parametrize("cached", [False, True])
def test_only_the_dims_that_are_on_are_told_and_their_weights_mean_one(tmp_path, cached):
    base = {"model": str(transformer(tmp_path / "bert"))} if cached else {}
    objective = {"schedule": {0: [8], 1.5: [32, 16]}, "weights": "short", "cached": cached}
    spec = toy(tmp_path, objective=objective, dims=[32, 16, 8], epochs=2, **({"base": base} if base else {}))
    model = bases.build(spec.base, bases.resolve(spec.base)).eval()
    built = objectives.build(model, spec, tmp_path)
    rows = pairs(16)
    for epoch, dims in ((0, [8]), (1.4, [8]), (1.5, [32, 16, 8])):
        built.begin(epoch)
        features = [model.preprocess(rows[name].to_list()) for name in ("anchor", "positive")]
        total, told = float(built.loss(features, None).detach()), built.told.taken()
        assert sorted(told) == sorted(f"loss_{dim}" for dim in dims)
        weights = objectives.weights(spec.objective, dims)
        assert sum(weights) == pytest.approx(len(dims))
        assert total == pytest.approx(
            sum(weight * told[f"loss_{dim}"] for weight, dim in zip(weights, dims, strict=True)), abs=1e-3
        )


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({0: [8]}, r"it adds \[8\], each of dims \[32, 8\] must come once"),
        ({1: [8], 2: [32]}, "it begins at epoch 0 and ends before epoch 10"),
        ({0: [8], 10: [32]}, "it begins at epoch 0 and ends before epoch 10"),
        ("slow", "objective.schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(tmp_path, schedule, says):
    with pytest.raises(SpecError, match=says):
        toy(tmp_path, objective={"schedule": schedule})


def test_options_that_do_not_go_together_are_refused(tmp_path):
    spec = toy(tmp_path)
    with pytest.raises(SpecError, match="stop: it could end before objective.schedule has added all dims"):
        toy(tmp_path, objective={"schedule": "progressive"}, stop={"dim": 8})
    with pytest.raises(SpecError, match="objective.gate: it orders dimensions for prefixes; give dims"):
        toy(tmp_path, objective={"gate": True}, dims=[])
    with pytest.raises(SpecError, match="objective.teacher.reads: a negative is no other way to say the same"):
        distilled(tmp_path, "a", "anchor", data={**spec.data.model_dump(), "negative": "other"})


def test_a_projection_loses_nothing_that_its_width_can_hold():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 16)).astype(np.float32) @ rng.standard_normal((16, 16)).astype(np.float32)
    cosines = vectors @ vectors.T
    for width in (16, 24):
        turned = vectors @ heads.projection(vectors, width, 0)
        assert turned.shape == (400, width)
        assert np.allclose(turned @ turned.T, cosines, atol=1e-3 * np.abs(cosines).max())
    narrow = vectors @ heads.projection(vectors, 4, 0)
    left, values, _ = np.linalg.svd(vectors, full_matrices=False)
    best = (left[:, :4] * values[:4]) @ (left[:, :4] * values[:4]).T  # no other of rank 4 is nearer
    assert np.allclose(narrow @ narrow.T, best, atol=1e-3 * np.abs(cosines).max())


@pytest.mark.parametrize("width", [16, 48])
def test_a_static_base_of_another_width_is_trained_and_is_a_table_still(tmp_path, width):
    spec = toy(tmp_path, project=width, dims=[width, 8], epochs=6, checkpoint_steps=99)
    record, _ = training.run(spec)
    assert record["full_dim"] == width
    assert quality(record)[width] > 0.9
    assert quality(record)[8] > 0.8
    folder = models.resolve(str(tmp_path / "trained"))
    assert (folder.dim, models.module_kinds(folder)) == (width, ["StaticEmbedding", "Normalize"])
    with pytest.raises(SpecError, match="dims: project has 64 dimensions, and 32 is the largest here"):
        training.run(toy(tmp_path, project=64))


def test_a_transformer_of_another_width_keeps_its_cosines_at_the_start_and_runs_a_job(tmp_path):
    base = {"model": str(transformer(tmp_path / "bert"))}
    spec = toy(tmp_path, base=base, project=48, dims=[48, 8], epochs=1)
    texts = pairs(50)["anchor"].to_list()
    folder = bases.resolve(spec.base)
    before, model = bases.build(spec.base, folder).encode(texts), bases.build(spec.base, folder)
    heads.add(model, spec, texts, "transformer", 2e-5)
    after = model.encode(texts)
    assert after.shape == (50, 48)
    assert np.allclose(after @ after.T, before @ before.T, atol=1e-5)
    model.save(str(tmp_path / "wide"), create_model_card=False)
    folder = models.resolve(str(tmp_path / "wide"))
    assert (folder.dim, models.module_kinds(folder)[-2:]) == (48, ["Dense", "Normalize"])
    again = bases.build(toy(tmp_path, base={"model": folder.path}, dims=[48]).base, folder)
    heads.add(again, toy(tmp_path, project=16, dims=[16]), texts, "transformer", 2e-5)
    assert (again.encode(texts).shape, len(list(again))) == ((50, 16), 5)
    pairs(60).with_row_index("id").write_parquet(tmp_path / "corpus.parquet")
    job = {
        "name": "wide",
        "root": str(tmp_path / "root"),
        "corpus": {"source": str(tmp_path / "corpus.parquet"), "id": "id", "text": "anchor"},
        "model": {"name": folder.path},
        "transform": {"kind": "none", "accept_loss": True},
        "prefixes": [{"dim": 8, "precision": "float16"}],
        "evaluate": {"shortlists": []},
        "workers": {"count": 0},
    }
    run(JobSpec.of(job))
    found = open_index(str(tmp_path / "root"), device="cpu").search(texts[7], k=1)
    assert found["text"].to_list() == [texts[7]]


def noisy(folder):
    """The toy's base, which knows every concept in its last 16 dimensions; its first 16 are noise, as loud."""
    rng = np.random.default_rng(3)
    weights = save_model(folder) / "model.safetensors"
    table = rng.standard_normal((302, DIM)).astype(np.float32)
    table[FIRST + CONCEPTS : FIRST + 2 * CONCEPTS, 16:] = table[FIRST : FIRST + CONCEPTS, 16:]
    save_file({"embedding.weight": table}, weights)
    return str(folder)


def test_a_gate_finds_the_dimensions_that_matter_and_leaves_a_plain_model(tmp_path):
    base = {"model": noisy(tmp_path / "noisy")}
    changes = {"base": base, "learning_rate": 0.001, "epochs": 6, "dims": [32, 16, 8]}
    spec = toy(tmp_path, objective={"gate": True}, **changes)
    cut_off(spec, 4)  # and goes on with what the gate had learnt
    gated, _ = training.run(spec)
    with pytest.raises(FloorError, match="prefixes do not hold"):
        training.run(toy(tmp_path, output=str(tmp_path / "plain"), **changes))
    plain = output.read(tmp_path / "plain.work" / "model")
    assert quality(gated, "before")[8] == quality(plain, "before")[8] < 0.2
    assert quality(gated)[8] > quality(plain)[8] + 0.2
    folder = models.resolve(str(tmp_path / "trained"))
    assert models.module_kinds(folder) == ["StaticEmbedding", "Normalize"]
    before, after = (
        load_file(tmp_path / name / "model.safetensors")["embedding.weight"] for name in ("noisy", "trained")
    )
    near = np.abs(np.corrcoef(after[:82].T, before[:82].T)[:DIM, DIM:]).argmax(axis=1)
    assert (near[:16] >= 16).mean() > 0.9


def test_a_gate_is_baked_into_a_transformers_layer_without_a_change(tmp_path):
    import torch

    base = {"model": str(transformer(tmp_path / "bert"))}
    spec = toy(tmp_path, base=base, objective={"gate": True}, epochs=1)
    folder, texts = bases.resolve(spec.base), pairs(50)["anchor"].to_list()
    model = bases.build(spec.base, folder)
    heads.add(model, spec, texts, "transformer", 2e-5)
    gate = heads.gate_of(model)
    before = model.encode(texts)
    features = model.preprocess(texts)
    for module in list(model)[:-2]:
        features = module(features)
    gate.train()(features)
    gate.grown.data += torch.linspace(0, 0.001, DIM)
    gate.settle()
    gate.eval()
    gated = model.encode(texts)
    assert gate.order.tolist() != list(range(DIM))
    assert not np.allclose(gated, before, atol=0.01)
    heads.bake(model)
    assert heads.gate_of(model) is None
    assert np.allclose(model.encode(texts), gated, atol=1e-5)


def test_a_distilled_table_holds_what_the_transformer_makes_of_each_token(tmp_path):
    base = {"model": str(transformer(tmp_path / "bert")), "kind": "static", "init": "distill"}
    spec = toy(tmp_path, base=base)
    folder = bases.resolve(spec.base)
    texts = ["w001 w002", "w001 w003", "w001", "w001 w004 w005"]
    table = bases.build(spec.base, folder, texts)[0].embedding.weight.detach().numpy()
    model = bases.build(spec.base.model_copy(update={"kind": "transformer", "init": "tokens"}), folder)
    words = ["w001", "w002", "w100", "w101"]
    features = model.preprocess(words)
    for module in list(model)[:-1]:
        features = module(features)
    wanted = features["sentence_embedding"].detach().numpy()
    frequency = np.array([4 / 8, 1 / 8, 0, 0])
    rows = table[[5 + int(word[1:]) for word in words]] * (1 + frequency / bases.SIF)[:, None]
    for one in range(4):  # principal axes turn and centre: distances stay
        distances = (np.linalg.norm(vectors - vectors[one], axis=1) for vectors in (rows, wanted))
        assert np.allclose(*distances, rtol=1e-3, atol=1e-4)
    variances = table[10:].var(axis=0)
    assert (np.diff(variances) <= 2e-3).all()  # of all but a few tokens
    with pytest.raises(SpecError, match="init: distill makes a static model; set kind: static too"):
        toy(tmp_path, base={"model": "a", "init": "distill"})
    with pytest.raises(SpecError, match="base.init: .* has one vector per token already"):
        training.run(toy(tmp_path, base={"model": str(tmp_path / "base"), "kind": "static", "init": "distill"}))


def test_a_negative_is_pushed_away(tmp_path):
    from sentence_transformers import SentenceTransformer

    rows, rng = pairs(), np.random.default_rng(1)
    others = [WORDS[CONCEPTS + one] for one in rng.integers(0, CONCEPTS, len(rows))]
    near = [f"{text[: -len('w000')]}{other}" for text, other in zip(rows["positive"], others, strict=True)]
    rows = rows.with_columns(pl.Series("negative", near)).filter(pl.col("negative") != pl.col("positive"))
    spec = toy(tmp_path, epochs=2, dims=[])  # makes the base's folder
    rows.write_parquet(tmp_path / "triplets.parquet")
    margins = {}
    for negative in (None, "negative"):
        given = {"source": str(tmp_path / "triplets.parquet"), "anchor": "anchor", "positive": "positive"}
        spec = toy(
            tmp_path, data={**given, "negative": negative}, output=str(tmp_path / f"{negative}"), dims=[], epochs=3
        )
        training.run(spec)
        held = rows.filter(pl.col("anchor").is_in(data.prepare(spec).held_out.queries["text"].to_list()))
        model = SentenceTransformer(spec.output, device="cpu")
        anchors, found, wrong = (model.encode(held[name].to_list()) for name in held.columns)
        margins[negative] = float(((found - wrong) * anchors).sum(axis=1).mean())
    assert margins["negative"] > margins[None] + 0.05


def test_a_cached_batch_has_the_gradients_of_a_whole_one_and_trains(tmp_path, monkeypatch):
    base = {"model": str(transformer(tmp_path / "bert"))}
    rows, gradients = pairs(48), {}
    for cached in (False, True):
        objective = {"cached": cached, "cached_rows": 16, "weights": "short"}
        spec = toy(
            tmp_path, base=base, objective=objective, epochs=5, learning_rate=0.01, batch_size=48, checkpoint_steps=99
        )
        model = bases.build(spec.base, bases.resolve(spec.base)).eval()
        built = objectives.build(model, spec, tmp_path)
        built.loss([model.preprocess(rows[name].to_list()) for name in ("anchor", "positive")], None).backward()
        gradients[cached] = model[0].model.embeddings.word_embeddings.weight.grad.numpy()
    assert np.abs(gradients[True]).max() > 1e-3
    assert np.allclose(gradients[True], gradients[False], rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(training._Run, "_judge", lambda *given: None)  # a few steps make no model
    pairs(200).write_parquet(tmp_path / "pairs.parquet")
    training.run(spec)
    curve = pl.read_parquet(tmp_path / "trained" / "curve.parquet")
    for name in ("loss_32", "loss_8"):
        values = curve.filter(pl.col("name") == name)["value"]
        assert values[-1] < 0.7 * values[0]


def test_a_transformer_teaches_with_its_own_vectors(tmp_path):
    model = str(transformer(tmp_path / "bert"))
    spec, rows = distilled(tmp_path, model), pairs(40)
    told = teacher.labelled(spec.objective.teacher, teacher.resolve(spec.objective.teacher), rows, tmp_path)
    wanted = bases.build(toy(tmp_path, base={"model": model}).base, models.resolve(model)).encode(
        rows["positive"].to_list()
    )
    places = [label[rows.columns.index("positive")] for label in told["label"]]
    assert np.allclose(teacher.vectors(tmp_path)[places], wanted, atol=2e-3)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"kind": "distill"}, "kind distill needs a teacher"),
        ({"teacher": {"model": "a"}}, "kind distill needs a teacher, and no other kind has one"),
        ({"kind": "distill", "teacher": {"model": "a"}, "cached": True}, "cached: distill has no such form"),
    ],
)
def test_fields_of_another_objective_are_refused(tmp_path, objective, says):
    with pytest.raises(SpecError, match=says):
        toy(tmp_path, objective=objective)
