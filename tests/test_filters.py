"""`where` means in Lance what it means in plain Python, and nothing outside the grammar gets through."""

import lance
import pytest
from hypothesis import given, strategies as st

from pipeline.errors import QueryError
from pipeline.filters import MAX_DEPTH, MAX_TESTS, rebuild
from tests.faults.filters import CLASSIC, check
from tests.faults.where import COLUMNS, stored


@pytest.fixture(scope="module")
def rows():
    return stored(0)[0]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return lance.write_dataset(stored(0)[1], str(tmp_path_factory.mktemp("filters") / "t.lance"))


def found(table, where):
    scanner = table.scanner(columns=["_rowoffset"], filter=rebuild(where, COLUMNS))
    return scanner.to_table()["_rowoffset"].to_pylist()


def test_conditions_mean_what_they_say():
    """A part of `python -m tests.faults.filters`: the shorter classic attacks and 300 strings made at random."""
    short = [number for number, text in enumerate(CLASSIC) if len(text) < 100_000]
    result = check(0, [*short, *range(len(CLASSIC), len(CLASSIC) + 300)])
    assert result["lines"] == []
    assert result["equal_and_neither_none_nor_all"] > 150
    assert result["refused_inside_the_grammar"] < 40


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("NOT (ok AND NOT ok)", lambda row: row["ok"] is not None),
        ("lang NOT IN ('a') OR lang NOT IN ('b')", lambda row: row["lang"] is not None),
        ("NOT (lang = 'x' AND lang IN ('y'))", lambda row: row["lang"] is not None),
        ("NOT (ratio > 1)", lambda row: row["ratio"] is not None and not row["ratio"] > 1),
        ("ratio < 1 OR ratio >= 1", lambda row: row["ratio"] is not None and row["ratio"] == row["ratio"]),
        ("ratio != 0", lambda row: row["ratio"] is not None and row["ratio"] != 0),
        ("half > 7e4", lambda row: row["half"] == float("inf")),
        ("half <= 7e4", lambda row: row["half"] is not None and row["half"] < 7e4),
        ("thin >= 3.5e38", lambda row: row["thin"] == float("inf")),
        ("thin IN (3.5e38, 0.1)", lambda row: row["thin"] is not None and 0 < row["thin"] < 1),
        ("NOT year < -9223372036854775808", lambda row: row["year"] is not None),
        ("year = -9223372036854775808", lambda row: row["year"] == -(2**63)),
        ("Big IN (18446744073709551615, 3)", lambda row: row["Big"] == 2**64 - 1),
        ("small != 300", lambda row: row["small"] is not None),
        (f"small IN ({', '.join(map(str, range(100_000)))})", lambda row: row["small"] is not None),
        ("lang LIKE 'a\\_b'", lambda row: row["lang"] == "a_b"),
        ("lang LIKE 'it''_'", lambda row: row["lang"] == "it's"),
        ("lang NOT LIKE '%'", lambda row: False),
    ],
)
def test_unknown_nan_ranges_and_patterns(table, rows, where, wanted):
    assert found(table, where) == [number for number, row in enumerate(rows) if wanted(row)]


def test_the_deepest_and_longest_conditions_are_taken_by_lance(table, rows):
    deepest = "ratio < 1"
    for number in range(MAX_DEPTH // 2):
        deepest = f"NOT (ok OR {deepest} AND lang != '{number}')"
    found(table, deepest)
    some = [number for number, row in enumerate(rows) if row["year"] == 0]
    assert found(table, " OR ".join(["year = 0"] * MAX_TESTS)) == some
    for beyond in (f"NOT ({deepest})", " OR ".join(["ok"] * (MAX_TESTS + 1))):
        with pytest.raises(QueryError, match="nested deeper|more than 1,000 tests"):
            rebuild(beyond, COLUMNS)


@pytest.mark.parametrize(
    "where",
    [
        "", " ", "lang", "1=1", "lang = 'x' --", "lang = 'x'; DROP TABLE documents", "lang = lower('X')",
        "lang = (SELECT 1)", "lang = year", "'en' = lang", "lang == 'en'", "lang = \"en\"", "lang = 'en", "lang IN ()",
        "lang ILIKE 'e%'", "lang LIKE 'e' ESCAPE '!'", "year BETWEEN 1 AND 2", "year = '2001'", "lang = 5", "ok = 1",
        "year LIKE '2%'", "year = 1e400", "year = 99999999999999999999", "year = nan", "lang = 'a' 'b'", "lang = E'a'",
        "secret = 1", "_rowid = 1", "lang = 'en' /* */", "lang = ‘en’", "NOT", "()", "((lang = 'en')", "year = 5x",
        "(" * 5000 + "ok" + ")" * 5000, "NOT " * 5000 + "ok", "lang = 'en' OR", "ok AND", "year = +1", "year = 0x10",
        "year = ١", "year = 1.١", "year = 18446744073709551616",
        "lang ıN ('en')", "lang = '\ud800'", "ok NOT", "year = 1_000", "year = 1e-99999999999999999999",
    ],
)  # fmt: skip
def test_everything_else_is_refused(where):
    with pytest.raises(QueryError, match="where") as raised:
        rebuild(where, COLUMNS)
    assert len(str(raised.value)) < 700


@given(st.text(max_size=30))
def test_any_text_is_rebuilt_or_refused(text):
    try:
        rebuilt = rebuild(text, COLUMNS)
    except QueryError:
        return
    assert rebuilt == "false" or any(f"`{column}`" in rebuilt for column in COLUMNS)
