"""Mapped files of codes: made once, used by searches, made again where they were damaged."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import open_index, run
from pipeline.storage import Root, kept_name
from tests.conftest import DIM

TABLES = {"documents", "prefix_8_binary", "prefix_16_int8", "prefix_16_float16"}


@pytest.fixture
def generation(spec):
    return run(spec(search__cache=True))


def test_a_search_maps_them_and_answers_alike(generation, spec):
    root = spec().root
    assert set(generation["cache"]) == TABLES
    mapped, read = open_index(root, memory=1_000_000), open_index(root, engine="lance")
    queries = np.random.default_rng(0).standard_normal((5, DIM))
    assert mapped.search(queries).equals(read.search(queries))
    assert [step["engine"] for step in mapped.explain(queries[0])] == ["resident", "resident"]
    assert [step["engine"] for step in read.explain(queries[0])] == ["scan", "resident"]
    documents = mapped.opened._held["documents"].codes
    assert isinstance(documents.base, np.memmap)
    assert documents.shape == (120, DIM)


def test_a_rerun_makes_nothing_and_a_damaged_file_is_made_again(generation, spec):
    root = Root(Path(spec().root))
    path = root / kept_name(generation["cache"]["prefix_8_binary"])
    before = path.stat().st_mtime_ns
    assert run(spec(search__cache=True)) == generation
    assert path.stat().st_mtime_ns == before
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(spec(search__cache=True))["cache"] == generation["cache"]
    assert path.read_bytes() == whole
