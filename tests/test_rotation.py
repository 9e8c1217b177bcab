"""Rotations before the signs: orthogonal where they say so, repeatable, and worth their name."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pipeline import rotation
from pipeline.vectors import Codec, unit


def prefixes(seed, rows=600, dim=16):
    return unit(np.random.default_rng(seed).standard_normal((rows, dim)) * np.arange(1, dim + 1) ** -1.0)


@given(st.integers(0, 30), st.sampled_from([8, 16, 24]))
def test_random_and_itq_only_turn(seed, dim):
    for matrix in (rotation.random(dim, seed), rotation.itq(prefixes(seed, 100, dim), seed)):
        assert np.allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)


def test_a_rotation_repeats_itself_and_follows_its_seed():
    rows = prefixes(0)
    assert np.array_equal(rotation.whitened_itq(rows, 3), rotation.whitened_itq(rows, 3))
    assert not np.array_equal(rotation.random(8, 1), rotation.random(8, 2))


def quantization_error(rows, matrix):
    turned = rows @ matrix
    return float(((np.sign(turned) / np.sqrt(rows.shape[1]) - turned) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("seed", range(5))
def test_itq_brings_rows_nearer_to_their_signs_than_a_random_rotation(seed):
    """The loss that Gong & Lazebnik (2011) minimise."""
    rows = prefixes(seed)
    assert quantization_error(rows, rotation.itq(rows, seed)) < quantization_error(rows, rotation.random(16, seed))


def test_each_round_of_itq_lowers_its_loss(monkeypatch):
    rows, losses = prefixes(0), []
    for rounds in (0, 1, 3, 10, 50):
        monkeypatch.setattr(rotation, "ITQ_STEPS", rounds)
        losses.append(quantization_error(rows, rotation.itq(rows, 0)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_whitening_evens_out_strong_and_weak_axes_and_itq_does_not():
    rows = prefixes(0)

    def spread(turned):
        variances = np.linalg.eigvalsh(np.cov(turned.T))
        return variances[-1] / variances[0]

    assert spread(rows @ rotation.itq(rows, 0)) == pytest.approx(spread(rows), rel=1e-3)
    assert spread(rows @ rotation.whitened_itq(rows, 0)) == pytest.approx(
        spread(rows) ** (1 - rotation.WHITENING), rel=1e-2
    )


def neighbours_kept(rows, codec):
    codes = codec.encode(rows)
    full, found = rows @ rows.T, codec.scores(rows, codes, "hamming")
    truth, got = (np.argsort(-one, axis=1, kind="stable")[:, 1:11] for one in (full, found))
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, got, strict=True)]))


def test_bits_keep_more_neighbours_turned_than_plain():
    """Strong and weak axes: plain signs waste bits on the weak."""
    kept = np.zeros(3)
    for seed in range(5):
        rows = prefixes(seed)
        turned = (None, rotation.itq(rows, seed), rotation.whitened_itq(rows, seed))
        kept += [neighbours_kept(rows, Codec("binary", rotation=matrix)) for matrix in turned]
    assert kept[0] < kept[1]
    assert kept[0] < kept[2]


def test_rows_that_are_all_equal_are_turned_without_a_complaint():
    rows = np.tile(unit(np.ones((1, 8))), (20, 1))
    assert np.isfinite(rotation.whitened_itq(rows, 0)).all()
