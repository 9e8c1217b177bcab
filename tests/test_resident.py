"""Codes in memory: whatever the kernels round, the answer is that of `Codec.scores` over every row."""

import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pipeline import cores, cosines, resident
from pipeline.resident import Held
from pipeline.vectors import Codec, int8_scale, top, unit

ROWS = 3_000


@pytest.fixture(autouse=True, params=[1, 2**30], ids=["parts", "whole"])
def _parts(monkeypatch, request):
    """A table in two parts, as a large one is on two cores, or whole."""
    monkeypatch.setattr(resident, "PART_BYTES", request.param)
    monkeypatch.setattr(resident, "THREADS", 2)
    monkeypatch.setattr(cores, "THREADS", 2)


def codec_of(kind, dim, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "int8":
        return Codec(kind, scale=int8_scale(rng.uniform(0.05, 0.5, dim)))
    if kind == "binary":
        return Codec(kind, rotation=np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32))
    return Codec(kind)


def vectors(dim, seed, spectrum=0.0, repeated=False):
    """Unit rows, the first dimensions larger by `spectrum`; `repeated`: each row stands ten times."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, dim)).astype(np.float32) * np.arange(1, dim + 1) ** -spectrum
    rows = unit(rows[np.arange(ROWS) % (ROWS // 10)] if repeated else rows)
    return rows, unit(rows[rng.integers(0, ROWS, 12)] + 0.1 * rng.standard_normal((12, dim)))


@given(
    dim=st.sampled_from([8, 24, 64, 128]),
    seed=st.integers(0, 99),
    spectrum=st.sampled_from([0.0, 0.5, 2.0]),
    repeated=st.booleans(),
    keep=st.sampled_from([1, 7, 100, 700]),
    scoring=st.sampled_from(["asymmetric", "hamming"]),
)
def test_bits_are_ranked_as_by_the_codec(dim, seed, spectrum, repeated, keep, scoring):
    rows, queries = vectors(dim, seed, spectrum, repeated)
    codec = codec_of("binary", dim, seed)
    codes = codec.encode(rows)
    offsets, scores = Held(codes, codec, dim).nearest(queries, keep, scoring)
    wanted = codec.scores(queries, codes, scoring)
    assert np.array_equal(offsets, top(wanted, keep))
    assert np.array_equal(scores, np.take_along_axis(wanted, offsets, 1))


@pytest.mark.parametrize("kind", ["int8", "float16", "float32"])
def test_numbers_are_ranked_as_by_the_codec_up_to_rounding(kind):
    rows, queries = vectors(64, 1)
    codec = codec_of(kind, 64)
    codes = codec.encode(rows)
    offsets, scores = Held(codes, codec, 64).nearest(queries, 50, "dot")
    wanted = codec.scores(queries, codes)
    assert np.allclose(scores, np.sort(wanted, axis=1)[:, ::-1][:, :50], atol=1e-6)
    assert np.allclose(scores, np.take_along_axis(wanted, offsets, 1), atol=1e-6)


def test_a_subset_finds_only_its_rows():
    rows, queries = vectors(64, 2)
    codec, places = codec_of("binary", 64), np.arange(5, ROWS, 2)
    codes = codec.encode(rows)
    held = Held(codes, codec, 64, rows=np.arange(ROWS) * 3)
    part = held.subset("odd", places)
    assert held.subset("odd", places) is part
    found, scores = part.nearest(queries, 20, "asymmetric")
    wanted = codec.scores(queries, codes)[:, places]
    assert np.array_equal(part.offsets(found), places[top(wanted, 20)])
    assert np.array_equal(part.rows(part.offsets(found)), 3 * places[top(wanted, 20)])
    assert np.array_equal(scores, -np.sort(-wanted, axis=1)[:, :20])


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("numkong", [True, False])
def test_cosines_of_each_querys_own_rows(kind, numkong, monkeypatch):
    monkeypatch.setattr(cosines, "has", lambda package: numkong)
    rows, queries = vectors(384, 3)
    stored = (rows * 1.0005).astype(kind)
    offsets = np.random.default_rng(0).integers(0, ROWS, (12, 40))
    wanted = np.take_along_axis(queries.astype(np.float64) @ unit(stored).astype(np.float64).T, offsets, 1)
    assert np.abs(cosines.cosines(queries, stored, offsets) - wanted).max() < cosines.ROUNDING / 2
    assert np.abs(cosines.exact_cosines(queries, stored[offsets[:, 0]]) - wanted[:, 0]).max() < 1e-7


def test_what_is_missing_is_named(monkeypatch):
    cores.has.cache_clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(cores, "find_spec", lambda package: None if package == "faiss" else True)
    assert resident.available() == "faiss not installed (pip install 'matryoshka-pipeline[resident]')"
    cores.has.cache_clear()
