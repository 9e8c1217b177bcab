"""PCA: fitted from a stream, the same whatever its batches, with a fixed sign."""

import numpy as np
from hypothesis import given, strategies as st

from pipeline.transform import Moments, Transform, digest, order, pca


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


def test_order_puts_the_dimensions_that_carry_the_whole_first_and_turns_nothing():
    rows = np.random.default_rng(0).standard_normal((400, 4)) * [0.1, 3, 0.5, 2]
    transform = order(moments_of(rows + 7))  # what all rows share tells them apart no better
    assert transform.matrix.argmax(axis=0).tolist() == [1, 3, 2, 0]
    assert transform.apply(np.array([[10, 20, 30, 40]])).tolist() == [[20, 40, 30, 10]]


def test_order_takes_a_new_dimension_before_a_copy_of_one_it_has():
    base = np.random.default_rng(0).standard_normal((400, 2)) * [3, 2.9]
    assert order(moments_of(base[:, [0, 0, 1]])).matrix.argmax(axis=0).tolist() == [0, 2, 1]


@given(st.integers(0, 50))
def test_moments_without_some_rows_are_those_of_the_rest(seed):
    rows = np.random.default_rng(seed).standard_normal((30, 3))
    left = moments_of(rows).without(rows[20:])
    assert np.allclose(left.covariance(), np.cov(rows[:20].T, bias=True))
    assert np.allclose(left.mean(), rows[:20].mean(axis=0))
