"""What each objective, schedule and base is for, on toys whose answer is known."""

import logging

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import SpecError, StaleError
from pipeline.training import run as training, teacher
from tests.conftest import DIM, save_model
from tests.training import CONCEPTS, pairs, quality, toy

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
    return toy(folder, objective=objective, **changes)


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
