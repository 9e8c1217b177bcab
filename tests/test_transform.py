"""PCA: fitted from a stream, the same whatever its batches, with a fixed sign."""

import numpy as np
from hypothesis import given, strategies as st

from pipeline.transform import Moments, Transform, digest, pca


def moments_of(*batches):
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.add(batch)
    return moments


def test_pca_of_a_line_finds_the_line():
    points = np.array([[1.0, 1], [2, 2], [3, 3]])
    transform, variances = pca(moments_of(points))
    assert np.allclose(transform.mean, [2, 2])
    assert np.allclose(transform.matrix[:, 0], [0.5**0.5, 0.5**0.5])
    assert np.allclose(variances, [4 / 3, 0], atol=1e-9)
    assert np.allclose(transform.apply(points)[:, 0], [-(2**0.5), 0, 2**0.5], atol=1e-6)


@given(st.integers(0, 50), st.integers(1, 39))
def test_pca_does_not_depend_on_the_batches(seed, cut):
    rows = np.random.default_rng(seed).standard_normal((40, 6)) * np.arange(1, 7)
    whole, _ = pca(moments_of(rows))
    parts, _ = pca(moments_of(rows[:cut], rows[cut:]))
    assert np.allclose(whole.matrix, parts.matrix, atol=1e-5)


@given(st.integers(0, 50))
def test_pca_only_turns_and_sorts(seed):
    rows = np.random.default_rng(seed).standard_normal((60, 5)).astype(np.float32) * [1, 5, 2, 4, 3]
    transform, variances = pca(moments_of(rows))
    turned = transform.apply(rows)
    before = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    after = np.linalg.norm(turned[:, None] - turned[None], axis=2)
    assert np.allclose(before, after, atol=1e-3)
    assert (np.diff(variances) <= 0).all()
    peaks = np.abs(transform.matrix).argmax(axis=0)
    assert (transform.matrix[peaks, np.arange(5)] > 0).all()


def test_none_changes_nothing():
    rows = np.ones((2, 3), np.float32)
    assert Transform().apply(rows) is rows


def test_a_stored_transform_comes_back_and_its_name_is_its_content():
    transform, _ = pca(moments_of(np.random.default_rng(0).standard_normal((9, 3))))
    back = Transform.unstacked("pca", transform.stacked())
    assert np.array_equal(back.mean, transform.mean)
    assert np.array_equal(back.matrix, transform.matrix)
    assert digest("pca", back.stacked()) == digest("pca", transform.stacked()) != digest("pca", transform.stacked() + 1)
