"""The verdict on prefixes, on vectors whose answer is known: sorted by importance, or the same ones turned."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import probe, run
from pipeline.errors import SpecError
from pipeline.spec import JobSpec
from pipeline.transform import Moments, Transform, pca, random_rotation
from pipeline.vectors import unit
from tests.conftest import corpus_frame, save_model

DIM = 64


def sorted_vectors(seed, rows=1_200, dim=DIM):
    """Variance falls from coordinate to coordinate, as in a model trained for its prefixes."""
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((rows, dim)) * np.arange(1, dim + 1) ** -0.5)


def turned_vectors(seed):
    return random_rotation(DIM, seed).apply(sorted_vectors(seed))


def verdict(vectors, declared=(), wanted=(16,), queries=None, anchors=300):
    moments = Moments(vectors.shape[1])
    moments.add(vectors[anchors:])
    ladder = probe.ladder(vectors.shape[1], declared)
    dims = sorted({*ladder, *wanted})
    kept = probe.compare(vectors, anchors, queries, pca(moments)[0], dims, seed=7)
    return probe.judge(kept, ladder, declared, wanted, len(vectors), vectors.shape[1])


@pytest.mark.parametrize("seed", range(10))
def test_vectors_sorted_by_importance_are_trained_ones_and_the_same_turned_are_not(seed):
    assert verdict(sorted_vectors(seed)).says == "trained"
    assert verdict(turned_vectors(seed)).says == "not trained"


@pytest.mark.parametrize("seed", range(10))
def test_vectors_without_any_order_never_count_as_trained(seed):
    even = unit(np.random.default_rng(seed).standard_normal((1_200, DIM)))
    assert verdict(even).says != "trained"


def test_too_few_rows_are_no_verdict():
    assert verdict(sorted_vectors(0)[:100], anchors=50).says == "unsure"


def test_the_reason_gives_figures_and_the_declaration():
    held = verdict(sorted_vectors(0), declared=(8, 16, 32))
    assert held.because.startswith("at 16 of 64 dimensions the plain cut keeps ")
    assert held.because.endswith(", as the model declares 8, 16, 32")
    assert verdict(turned_vectors(0), declared=(16,)).because.endswith(", yet the model declares 16")


def test_dims_far_from_trained_ones_are_named():
    assert verdict(sorted_vectors(0), declared=(16, 32), wanted=(4, 16, 24, 40, 60)).far == (4, 60)


def test_the_ladder_is_what_was_declared_or_powers_of_two_up_to_half():
    assert probe.ladder(384, ()) == [16, 32, 64, 128]
    assert probe.ladder(768, (768, 512, 256, 128)) == [128, 256]
    assert probe.ladder(32, ()) == [8, 16]
    assert probe.ladder(6, ()) == [3]


def test_what_a_cut_keeps_can_be_counted_by_hand():
    """Three groups that differ in the third number alone: two dimensions cannot tell them apart."""
    pool = unit(np.array([[1, 0, 0], [1, 0.01, 0], [0, 1, 0], [0.01, 1, 0]] * 3))
    (kept,) = probe.measure(pool, 4, None, {"plain": Transform()}, [2])
    assert kept.neighbours.tolist() == [1.0] * 4
    assert kept.errors.max() < 1e-6
    queries = np.array([[1.0, 0, 5]])
    _, asked = probe.measure(pool, 4, queries, {"plain": Transform()}, [2])
    assert (asked.of, len(asked.neighbours)) == ("queries", 1)
    assert asked.errors[0] > 0.3  # the query's third number is what the cut loses


@pytest.fixture
def many(values, tmp_path):
    """A spec over 600 rows, so that the probe has enough to tell."""

    def make(**overrides):
        corpus_frame(600).write_parquet(tmp_path / "many.parquet")
        return JobSpec.of(values(corpus__source=str(tmp_path / "many.parquet"), **overrides))

    return make


def test_a_plain_cut_of_an_untrained_model_is_refused_unless_its_loss_is_accepted(many, caplog):
    with pytest.raises(SpecError, match=r"was not trained for prefixes: at 16 of 32 .*accept_loss: true"):
        run(many(transform={"kind": "none"}))
    root = Path(many().root)
    assert not (root / "manifest.json").exists()
    embedded = sorted((root / "lancedb" / "documents.lance" / "data").iterdir())
    generation = run(many(transform={"kind": "none", "accept_loss": True}))
    assert sorted((root / "lancedb" / "documents.lance" / "data").iterdir()) == embedded
    assert generation["transform"]["kind"] == "none"
    assert set(generation["transform"]["lost"]) == {"8", "16"}
    assert "the verdict on plain prefixes is not trained" in caplog.text


def test_auto_follows_the_measurement_and_says_so(many):
    generation = run(many())
    found = generation["transform"]
    assert found["kind"] == "pca"
    assert found["verdict"]["says"] == "not trained"
    assert found["compared"]["kept"] == "pca"  # 344 rows are too few for the adaptor
    ways = {(one["way"], one["dim"]) for one in found["kept"]}
    assert ways == {(way, dim) for way in ("plain", "shuffled", "random", "pca") for dim in (8, 16)}


def test_a_declaration_against_the_measurement_is_said_aloud_and_not_followed(many, caplog):
    generation = run(many(model__matryoshka_dims=[8, 16]))
    assert generation["transform"]["kind"] == "pca"
    assert "the model declares [8, 16], the measurement says otherwise" in caplog.text


def test_a_model_with_sorted_dimensions_is_cut_as_it_is(many, tmp_path):
    """The stand-in with weights that fall from dimension to dimension is a Matryoshka model."""
    folder = save_model(tmp_path / "matryoshka", falling=True)
    generation = run(many(model__name=str(folder)))
    assert generation["transform"]["verdict"]["says"] == "trained"
    assert generation["transform"]["kind"] == "none"
    table = json.loads((Path(many().root) / "manifest.json").read_text())["transform"]
    assert table == generation["transform"]


def test_queries_are_probed_too(many, tmp_path):
    corpus_frame(30, seed=5).select("_id", "text").write_parquet(tmp_path / "queries.parquet")
    generation = run(many(evaluate={"queries": str(tmp_path / "queries.parquet")}))
    assert generation["transform"]["verdict"]["queries"] == 30
    assert {one["of"] for one in generation["transform"]["kept"]} == {"rows", "queries"}


@pytest.mark.parametrize("rows", [1, 3])
def test_a_handful_of_rows_is_fitted_too(values, tmp_path, rows):
    corpus_frame(rows).write_parquet(tmp_path / "few.parquet")
    generation = run(JobSpec.of(values(corpus__source=str(tmp_path / "few.parquet"))))
    assert generation["transform"]["verdict"]["says"] == "unsure"
    assert generation["tables"]["prefix_8_binary"]["rows"] == rows


@pytest.mark.parametrize("kind", ["order", "adaptor", "pca"])
def test_every_kind_of_transform_can_be_asked_for(many, kind):
    """344 rows are too few for an adaptor; a sample smaller than the corpus is taken by seed."""
    generation = run(many(transform={"kind": kind, "sample_rows": 500}))
    assert generation["transform"]["kind"] == {"adaptor": "pca"}.get(kind, kind)
    assert generation["transform"]["sample_rows"] == 500
