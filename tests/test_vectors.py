"""Unit length, truncation, codecs and top k: worked by hand, and by property."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.vectors import Codec, bytes_per_row, int8_scale, top, truncate, unit

finite = st.floats(-1e3, 1e3, width=32)


ANY_DIM = st.integers(1, 24)


def matrices(columns=ANY_DIM):
    """float32 rows; `columns` is a strategy for their dimension."""
    return columns.flatmap(
        lambda width: hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(width)), elements=finite)
    )


def test_truncate_brings_the_prefix_back_to_length_one():
    assert truncate(np.array([[3.0, 4.0, 12.0]]), 2).tolist() == [[np.float32(0.6), np.float32(0.8)]]


@pytest.mark.parametrize("dim", [0, 4, -1])
def test_truncate_refuses_a_dimension_that_is_not_there(dim):
    with pytest.raises(ValueError, match="3 dimensions"):
        truncate(np.ones((1, 3)), dim)


@given(matrices())
def test_unit_rows_have_length_one_or_none(vectors):
    lengths = np.linalg.norm(unit(vectors).astype(np.float64), axis=1)
    real = np.linalg.norm(vectors.astype(np.float64), axis=1) > 1e-6
    assert np.allclose(lengths[real], 1, atol=1e-5)
    assert (unit(np.zeros((2, 3))) == 0).all()


def test_binary_packs_the_first_dimension_into_the_highest_bit():
    codes = Codec("binary").encode(np.array([[1, -1, -1, -1, -1, -1, -1, 1.0]]))
    assert codes.tolist() == [[0b10000001]]


def test_binary_takes_zero_and_minus_zero_as_off():
    assert Codec("binary").encode(np.array([[0.0, -0.0, 1, 0, 0, 0, 0, 0]])).tolist() == [[0b00100000]]


@given(matrices(st.sampled_from([8, 16, 24])))
def test_binary_score_is_one_minus_two_hamming_over_dim(vectors):
    codec = Codec("binary")
    bits = vectors > 0
    hamming = (bits[:, None] != bits[None]).sum(axis=2)
    assert np.allclose(codec.scores(vectors, codec.encode(vectors)), 1 - 2 * hamming / vectors.shape[1])


def test_a_rotation_is_applied_to_queries_and_rows():
    swap = np.eye(8, dtype=np.float32)[::-1]
    row = np.array([[1, -1, -1, -1, -1, -1, -1, -1]], np.float32)
    assert Codec("binary", rotation=swap).encode(row).tolist() == [[1]]
    assert Codec("binary", rotation=swap).scores(row, np.array([[1]], np.uint8)).tolist() == [[1.0]]


@given(matrices())
def test_int8_is_within_half_a_step_and_never_wraps(vectors):
    codec = Codec("int8", scale=int8_scale(np.abs(vectors).max(axis=0)))
    codes = codec.encode(vectors)
    assert codes.min() >= -127
    assert (np.abs(codes * codec.scale - vectors) <= codec.scale * 0.501).all()
    assert codec.encode(vectors * 1000).max(initial=0) <= 127
    assert codec.clipped_share(vectors) == 0


def test_int8_scores_use_the_scale_of_each_dimension():
    codec = Codec("int8", scale=np.array([0.01, 0.001], np.float32))
    scores = codec.scores(np.array([[1.0, 1.0]], np.float32), np.array([[10, 0], [0, 100], [10, 100]], np.int8))
    assert np.allclose(scores, [[0.1, 0.1, 0.2]])


def test_clipped_share_counts_numbers_beyond_127_steps():
    codec = Codec("int8", scale=np.array([0.001, 0.001], np.float32))
    assert codec.clipped_share(np.array([[0.2, 0.1], [0.0, -0.5]], np.float32)) == 0.5


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 2, width=32)))
def test_scales_are_positive_short_and_large_enough(largest):
    scale = int8_scale(largest)
    assert (scale > 0).all()
    assert (largest / scale <= 127.01).all()
    assert (scale * 126.8 <= np.maximum(largest, 1e-6)).all()
    assert all(len(str(step)) <= 10 for step in scale)


@given(matrices())
def test_float16_rounds_to_three_digits(vectors):
    rows = unit(vectors)
    assert np.allclose(Codec("float16").encode(rows), rows, atol=5e-4)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 60)),
        elements=st.sampled_from([-np.inf, -1.5, -0.0, 0, 1, 2]),
    ),
    st.integers(1, 70),
)
@settings(max_examples=300)
def test_top_is_a_stable_sort_cut_at_k(scores, k):
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert np.array_equal(top(scores, k), expected)


def test_bytes_per_row():
    assert [bytes_per_row(64, precision) for precision in ("binary", "int8", "float16", "float32")] == [8, 64, 128, 256]
