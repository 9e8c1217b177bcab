"""Unit length, truncation, codecs and top k: worked by hand, and by property."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.vectors import Codec, Magnitudes, bytes_per_row, int8_scale, top, truncate, unit

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
    assert np.allclose(codec.scores(vectors, codec.encode(vectors), "hamming"), 1 - 2 * hamming / vectors.shape[1])


def test_a_rotation_is_applied_to_queries_and_rows():
    swap = np.eye(8, dtype=np.float32)[::-1]
    row = np.array([[1, -1, -1, -1, -1, -1, -1, -1]], np.float32)
    assert Codec("binary", rotation=swap).encode(row).tolist() == [[1]]
    assert Codec("binary", rotation=swap).scores(row, np.array([[1]], np.uint8), "hamming").tolist() == [[1.0]]
    assert Codec("binary", rotation=swap).scores(unit(row), np.array([[1]], np.uint8)) == pytest.approx(1.0)


@given(st.sampled_from([8, 16, 24]).flatmap(lambda dim: st.tuples(st.just(dim), st.integers(0, 10**6))))
def test_asymmetric_score_is_the_dot_product_with_unit_signs_and_equal_codes_tie(drawn):
    dim, seed = drawn
    rng = np.random.default_rng(seed)
    queries, rows = unit(rng.standard_normal((3, dim))), unit(rng.standard_normal((40, dim)))
    codec = Codec("binary", rotation=np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32))
    codes = codec.encode(rows)
    signs = np.where(rows @ codec.rotation > 0, 1, -1) / dim**0.5
    scores = codec.scores(queries, codes)
    assert np.allclose(scores, (queries @ codec.rotation) @ signs.T, atol=1e-5)
    twice = codec.scores(queries, np.vstack([codes, codes[:1], codes]))
    assert (twice[:, :40] == twice[:, 41:]).all()
    assert (twice[:, 40] == twice[:, 0]).all()


@given(st.integers(0, 10**6))
def test_asymmetric_scores_do_not_depend_on_the_order_of_summing(seed):
    rng = np.random.default_rng(seed)
    queries, bits = unit(rng.standard_normal((2, 256))), rng.integers(0, 2, (5, 256)).astype(np.uint8)
    order = rng.permutation(256)
    plain = Codec("binary").scores(queries, np.packbits(bits, axis=1))
    turned = Codec("binary").scores(queries[:, order], np.packbits(bits[:, order], axis=1))
    assert (plain == turned).all()


@given(matrices(st.sampled_from([8, 16])))
def test_scores_of_any_finite_query_are_finite(vectors):
    codes = Codec("binary").encode(vectors)
    for scoring in ("asymmetric", "hamming"):
        assert np.isfinite(Codec("binary").scores(vectors, codes, scoring)).all()


def test_a_zero_query_scores_nothing_asymmetrically():
    assert Codec("binary").scores(np.zeros((1, 8), np.float32), np.array([[255], [0]], np.uint8)).tolist() == [[0, 0]]


@pytest.mark.parametrize("dim", [1, 7, 9, 12])
def test_bits_need_whole_bytes(dim):
    """packbits would pad with zeros, and hamming would count them as signs."""
    from pipeline.errors import SpecError
    from pipeline.spec import JobSpec

    values = {"name": "x", "root": "r", "corpus": {"source": "a.csv", "text": "t"}, "model": {"name": "m"}}
    with pytest.raises(SpecError, match=f"dim must be a multiple of 8, not {dim}"):
        JobSpec.of(values | {"prefixes": [{"dim": dim, "precision": "binary"}]})


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_a_percentile_is_the_smallest_bin_edge_that_holds_its_share(seed, parts):
    rows = unit(np.random.default_rng(seed).standard_normal((90, 5)) * [4, 1, 1, 0.1, 0])
    magnitudes = Magnitudes(5)
    for part in np.array_split(rows, parts):
        magnitudes.add(part)
    edge, step = magnitudes.percentile(0.9), 1 / Magnitudes.BINS
    assert ((np.abs(rows) <= edge + 1e-6).mean(axis=0) >= 0.9).all()
    assert ((np.abs(rows) <= edge - step - 1e-6).mean(axis=0)[:4] < 0.9).all()


def test_int8_clips_what_lies_beyond_its_scale_and_counts_it():
    codec = Codec("int8", scale=int8_scale(np.array([0.5, 0.5])))
    step = float(codec.scale[0])
    rows = np.array([[0.5, -0.5], [1.0, 0.1], [-1.0, 0.0], [0.25, 0.0], [128 * step, 127.4 * step]], np.float32)
    assert codec.encode(rows)[:, 0].tolist() == [127, 127, -127, 63, 127]
    assert codec.clipped_share(rows) == 3 / 10


@given(matrices())
def test_float16_rounds_to_eleven_bits_and_never_overflows_a_unit_row(vectors):
    rows = unit(vectors)
    codes = Codec("float16").encode(rows)
    assert np.isfinite(codes).all()
    assert (np.abs(codes.astype(np.float32) - rows) <= np.maximum(np.abs(rows) * 2**-11, 2**-25)).all()


def test_float16_keeps_numbers_down_to_its_smallest_and_then_nothing():
    codes = Codec("float16").encode(np.array([[2.0**-24, 2.0**-26, -(2.0**-24)]], np.float32))
    assert codes.tolist() == [[2.0**-24, 0.0, -(2.0**-24)]]


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
