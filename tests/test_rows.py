"""The rule for rows: batches that are clean as they are pass quickly, to the same end as row by row."""

import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from pipeline import rows
from pipeline.errors import DataError
from pipeline.sources import RawBatch
from pipeline.spec import Corpus

TEXT = st.none() | st.sampled_from(["", " ", "\x1c\u2003", "a", "b\nc", "日本", "\x00"]) | st.text(max_size=5)


def made(names, columns, bad):
    arrays = {f"t{number}": pa.array(values, pa.string()) for number, values in enumerate(columns)}
    if names is not None:
        arrays["id"] = pa.array(names, pa.string())
    return RawBatch(7, len(columns[0]), arrays, bad)


@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_the_quick_way_ends_as_the_slow_one(data, count, width, named):
    def column(values):
        return data.draw(st.lists(values, min_size=count, max_size=count))

    columns = [column(TEXT) for _ in range(width)]
    names = column(st.sampled_from(["a", "b", "", None]) if data.draw(st.booleans()) else st.text("xyz", min_size=1))
    raw = made(names if named else None, columns, data.draw(st.sampled_from([{}, {}, {}, {0: "no"}])))
    corpus = Corpus(source="x", id="id" if named else None, text=[f"t{number}" for number in range(width)])
    quick, slow = rows.Rows("f"), rows.Rows("f")
    try:
        kept = rows._one_by_one(slow, raw, corpus)
    except DataError:
        assert rows._quickly(quick, raw, corpus) is None
        return
    taken = rows._quickly(quick, raw, corpus)
    assert (taken is None) == bool(slow.rejected)
    if taken is not None:
        assert (taken, quick) == (kept, slow)


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"a\xc3"])
def test_what_must_be_repaired_is_not_quick(text):
    column = pa.array([b"fine", text], pa.binary()).view(pa.string())
    raw = RawBatch(0, 2, {"t": column}, {})
    corpus = Corpus(source="x", text="t")
    assert rows._quickly(rows.Rows("f"), raw, corpus) is None
    clean = rows.clean(raw, "f", corpus, {})
    assert (clean.repaired, clean.texts[0]) == (1, "fine")
    assert "\ufffd" in clean.texts[1]
