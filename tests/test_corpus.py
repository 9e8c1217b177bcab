"""The corpus: every format gives the same rows, bad rows cost only themselves, shards never move."""

import gzip
import json
from pathlib import Path

import lance
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from pipeline import corpus, docstrings, ids, parquet, rows, sources, storage
from pipeline.errors import DataError
from pipeline.spec import Corpus, Workers
from pipeline.storage import Root
from pipeline.workers import Pool
from tests.conftest import corpus_frame

FORMATS = ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "lance"]


def save(frame, path):
    """A frame in the format its name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.name.partition(".")[2]:
        case "parquet":
            frame.write_parquet(path, row_group_size=37)
        case "jsonl":
            frame.write_ndjson(path)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
        case "jsonl.zst":
            path.write_bytes(pa.Codec("zstd").compress(frame.write_ndjson().encode(), asbytes=True))
        case "csv":
            frame.write_csv(path)
        case "lance":
            lance.write_dataset(frame.to_arrow(), str(path))
    return path


@pytest.fixture
def scan(tmp_path):
    """Scan a corpus in this process."""
    root = Root(tmp_path / "scan-root")
    storage.prepare(root)

    def run(source, **settings):
        settings = {"id": "_id", "text": ["title", "text"], **settings}
        made = Corpus(source=source, **settings)
        with Pool(Workers(count=0)) as pool:
            return corpus.run(made, root, pool), made, root

    return run


def cleaned(found, settings, root):
    """Every usable row of every shard, as the embedding reads them."""
    reader = sources.Reader(rows.columns(settings))
    out = []
    for shard in corpus.shards(found, settings, root):
        for part in shard.parts:
            for raw in reader.read(part.file, part.start, part.stop):
                clean = rows.clean(raw, part.file.path, settings, found.types)
                clean.first_row = part.first_row - part.start
                clean.drop(shard.dropped)
                extras = zip(*(array.to_pylist() for array in clean.extras.values()), strict=True)
                extras = list(extras) or [()] * len(clean.ids)
                numbers = [clean.first_row + offset for offset in clean.offsets]
                out += zip(numbers, clean.ids, clean.texts, extras, strict=True)
    return out


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, scan, suffix):
    frame = corpus_frame()
    path = save(frame, tmp_path / f"c.{suffix}")
    found, settings, root = scan(str(path), filter=["lang", "year"], shard_rows=50)
    assert found.rows == 120
    assert found.types == {"lang": pa.string(), "year": pa.int64()}
    assert cleaned(found, settings, root) == [
        (number, row["_id"], f"{row['title']}\n{row['text']}", (row["lang"], row["year"]))
        for number, row in enumerate(frame.iter_rows(named=True))
    ]


def test_a_text_file_is_a_row_a_line(tmp_path, scan):
    path = tmp_path / "c.txt"
    path.write_text("one\ntwo\n\nthree")
    found, settings, root = scan(str(path), id=None, text="text")
    assert [(row, text) for row, _, text, _ in cleaned(found, settings, root)] == [(0, "one"), (1, "two"), (3, "three")]
    assert found.reasons == {"blank_text": 1}


@pytest.mark.parametrize("source", ["c", "c/*.parquet", "c/**/*.parquet", ["c/a.parquet", "c/b.parquet"], "file"])
def test_folder_glob_list_and_uri_find_the_files_in_order(tmp_path, scan, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = corpus_frame()
    save(frame[:70], tmp_path / "c" / "a.parquet")
    save(frame[70:], tmp_path / "c" / "b.parquet")
    (tmp_path / "c" / "README.md").write_text("not a corpus file")
    (tmp_path / "c" / ".hidden.parquet").write_text("not one either")
    found, settings, root = scan(f"file://{tmp_path}/c" if source == "file" else source, shard_rows=33)
    assert [name for _, name, _, _ in cleaned(found, settings, root)] == frame["_id"].to_list()
    assert [shard.rows for shard in corpus.shards(found, settings, root)] == [33, 33, 33, 21]


def test_a_lance_folder_among_files_is_one_table(tmp_path, scan):
    save(corpus_frame()[:60], tmp_path / "c" / "a.lance")
    save(corpus_frame()[60:], tmp_path / "c" / "b.parquet")
    found, _, _ = scan(str(tmp_path / "c"))
    assert found.counts == (60, 60)


def test_bad_json_rows_cost_only_themselves(tmp_path, scan):
    lines = [json.dumps({"_id": str(number), "text": f"text {number}"}) for number in range(8)]
    lines[1] = "{not json"
    lines[2] = "[1]"
    lines[3] = json.dumps({"_id": "3", "text": 5})
    lines[4] = json.dumps({"_id": "4", "text": None})
    lines[5] = json.dumps({"_id": "5", "text": " \t "})
    lines[6] = '{"_id": "6", "text": "lone \\ud800 surrogate"}'
    data = "\n".join(lines).encode().replace(b"text 7", b"bad \xff byte")
    (tmp_path / "c.jsonl").write_bytes(data + b"\n\n")
    found, settings, root = scan(str(tmp_path / "c.jsonl"), text="text")
    assert found.rows == 8
    assert found.reasons == {"undecodable": 3, "null_text": 1, "blank_text": 1}
    assert found.repaired == 2
    assert [(row, text) for row, _, text, _ in cleaned(found, settings, root)] == [
        (0, "text 0"),
        (6, "lone \ufffd surrogate"),
        (7, "bad \ufffd byte"),
    ]


def test_bad_csv_rows_cost_only_themselves(tmp_path, scan):
    (tmp_path / "c.csv").write_text('_id,text\n1,"a, b\nc"\n2\n3,x,y\n4,"open" quote\n5,fine\n')
    found, settings, root = scan(str(tmp_path / "c.csv"), text="text")
    assert found.reasons == {"undecodable": 3}
    assert [(row, name, text) for row, name, text, _ in cleaned(found, settings, root)] == [
        (0, "1", "a, b\nc"),
        (4, "5", "fine"),
    ]


def test_invalid_utf8_in_parquet_is_replaced_and_counted(tmp_path, scan):
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"a\xffb")]
    )
    table = pa.table({"_id": ["1"], "text": broken})

    pq.write_table(table, tmp_path / "c.parquet")
    found, settings, root = scan(str(tmp_path / "c.parquet"), text="text")
    assert (found.repaired, cleaned(found, settings, root)[0][2]) == (1, "a\ufffdb")


def test_nulls_are_left_out_of_a_joined_text(tmp_path, scan):
    frame = pl.DataFrame(
        {"_id": ["1", "2"], "title": [None, "t"], "text": ["x", None]}, schema_overrides={"title": pl.String}
    )
    found, settings, root = scan(str(save(frame, tmp_path / "c.parquet")))
    assert [text for _, _, text, _ in cleaned(found, settings, root)] == ["x", "t"]


def test_without_an_id_the_text_is_the_id_and_later_copies_are_set_aside(tmp_path, scan):
    texts = ["a", "b", "a", "c", "b", "a"]
    path = save(pl.DataFrame({"text": texts}), tmp_path / "c.parquet")
    found, settings, root = scan(str(path), id=None, text="text", shard_rows=2)
    assert found.reasons == {"duplicate_text": 3}
    kept = cleaned(found, settings, root)
    assert [(row, text) for row, _, text, _ in kept] == [(0, "a"), (1, "b"), (3, "c")]
    assert len({name for _, name, _, _ in kept}) == 3
    assert corpus.known_ids(root, found, settings, [kept[0][1], "nope", "00" * 16]) == [True, False, False]


def test_large_integer_ids_are_exact(tmp_path, scan):
    ids = [2**63 - 1, -(2**63), 2**53 + 1]
    path = save(pl.DataFrame({"_id": ids, "text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    found, settings, root = scan(str(path), text="text")
    assert [name for _, name, _, _ in cleaned(found, settings, root)] == [str(one) for one in ids]


def test_column_types_are_agreed_over_all_files(tmp_path, scan):
    (tmp_path / "a.csv").write_text("_id,text,n,s\n1,x,1,5\n2,y,,6\n")
    (tmp_path / "b.csv").write_text("_id,text,n,s\n3,x,2.5,7\n4,y,1e3,8\n")
    found, settings, root = scan(
        [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], text="text", filter=["n"], keep=["s"]
    )
    assert found.types == {"s": pa.int64(), "n": pa.float64()}
    assert [extras for *_, extras in cleaned(found, settings, root)] == [(5, 1.0), (6, None), (7, 2.5), (8, 1000.0)]


def test_a_csv_number_with_leading_zeros_stays_text(tmp_path, scan):
    (tmp_path / "a.csv").write_text("_id,text,code,n\n1,x,007,1\n2,y,,2\n")
    (tmp_path / "b.csv").write_text("_id,text,code,n\n3,x,AB1,x\n")
    found, settings, root = scan(f"{tmp_path}/*.csv", text="text", keep=["code", "n"])
    assert [extras for *_, extras in cleaned(found, settings, root)] == [("007", "1"), (None, "2"), ("AB1", "x")]


def test_a_column_of_lists_may_be_null_for_a_whole_batch(tmp_path, scan):
    lines = [json.dumps({"_id": str(n), "text": f"t {n}", "tags": ["a"] if n < 10 else None}) for n in range(5_000)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    found, settings, root = scan(str(tmp_path / "c.jsonl"), text="text", keep=["tags"])
    kept = cleaned(found, settings, root)
    assert (kept[3][3], kept[4_999][3]) == ((["a"],), (None,))


def test_invalid_utf8_in_a_kept_column_is_replaced(tmp_path, scan):
    ends = pa.py_buffer(np.array([0, 3, 4], np.int32))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"a\xffbc")])
    pq.write_table(pa.table({"_id": ["1", "2"], "text": ["x", "y"], "k": broken}), tmp_path / "c.parquet")
    found, settings, root = scan(str(tmp_path / "c.parquet"), text="text", keep=["k"])
    assert [extras for *_, extras in cleaned(found, settings, root)] == [("a\ufffdb",), ("c",)]


@pytest.mark.parametrize("source", ["x[1].parquet", "x [1]", "*.parquet", "."])
def test_brackets_in_paths_are_brackets(tmp_path, scan, monkeypatch, source):
    folder = tmp_path / "work [2]"
    save(corpus_frame(5), folder / "x[1].parquet")
    save(corpus_frame(5), folder / "x [1]" / "y.parquet")
    save(corpus_frame(5), folder / ".hidden" / "y.parquet")
    monkeypatch.chdir(folder)
    found, _, _ = scan(source, **({"id": None} if source == "." else {}))
    assert found.rows == (10 if source == "." else 5)


def test_an_unchanged_file_is_not_read_again(tmp_path, scan, monkeypatch):
    a, b = save(corpus_frame(60), tmp_path / "a.parquet"), tmp_path / "b.parquet"
    monkeypatch.setattr(corpus, "UNIT_FILES", 1)
    frame = corpus_frame(90)[60:]
    save(frame, b)
    scan([str(a), str(b)])
    read = []
    inner = sources.Reader.read
    monkeypatch.setattr(
        sources.Reader, "read", lambda self, file, *rest: read.append(file.path) or inner(self, file, *rest)
    )
    scan([str(a), str(b)])
    assert read == []
    save(frame[:29], b)
    found, _, _ = scan([str(a), str(b)])
    assert (set(read), found.rows) == ({str(b)}, 89)


def test_duplicates_are_found_in_several_passes(tmp_path, scan, monkeypatch):
    monkeypatch.setattr(ids, "HASHES_AT_ONCE", 10)
    frame = corpus_frame(100)
    doubled = pl.concat([frame, frame[41:42]])
    path = save(doubled, tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"duplicate id 'doc-41': .* row 41 and .* row 100 \(1 repeated"):
        scan(str(path))


SHARD_ROWS = {10: 8192, 1_000_000: 8192, 10_000_000: 4096, 50_000_000: 32768, 10**10: 262_144}


@pytest.mark.parametrize(("total", "wanted"), SHARD_ROWS.items())
def test_shard_rows(total, wanted):
    assert corpus.shard_rows(total, Corpus(source="x", text="y")) == wanted


def test_line_formats_are_read_onward(tmp_path):
    path = save(corpus_frame(), tmp_path / "c.jsonl")
    reader = sources.Reader(["_id"])
    file = sources.resolve([str(path)])[0]
    ranges = [(0, 50), (50, 70), (90, 120), (10, 12), (100, None)]
    got = [[name for raw in reader.read(file, *one) for name in raw.columns["_id"]] for one in ranges]
    ids = corpus_frame()["_id"].to_list()
    assert got == [ids[start:stop] for start, stop in ranges]


@given(
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    cuts=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120) | st.none()), min_size=1, max_size=6),
    in_order=st.booleans(),
)
def test_any_ranges_of_a_parquet_file_are_the_rows_asked_for(tmp_path_factory, groups, cuts, in_order):
    path = tmp_path_factory.mktemp("ranges") / "c.parquet"
    names = [f"d{number}" for number in range(sum(groups))]
    write_groups(path, names, groups)
    ranges = [(start, stop) for start, stop in cuts if stop is None or start < stop <= len(names)]
    reader, file = sources.Reader(["_id"]), sources.resolve([str(path)])[0]
    for start, stop in sorted(ranges, key=lambda one: one[0]) if in_order else ranges:
        got = list(reader.read(file, start, stop))
        assert [name for raw in got for name in raw.columns["_id"].to_pylist()] == names[start:stop]
        assert [raw.start for raw in got][:1] == [start][: len(got)]


def write_groups(path, names, groups):
    table, first = pa.table({"_id": names}), 0
    with pq.ParquetWriter(path, table.schema) as writer:
        for rows in groups:
            writer.write_table(table.slice(first, rows), row_group_size=rows)
            first += rows


def test_a_row_group_is_decoded_once_for_all_shards_of_one_worker(tmp_path, monkeypatch):
    path, names = tmp_path / "c.parquet", [f"d{number}" for number in range(3 * parquet.BATCH_ROWS)]
    write_groups(path, names, [len(names)])
    decoded = []
    batches = parquet.Parquet.batches

    def counted(self, groups, columns):
        for batch in batches(self, groups, columns):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.Parquet, "batches", counted)
    reader, file = sources.Reader(["_id"]), sources.resolve([str(path)])[0]
    for start in range(0, len(names), 1000):
        stop = min(start + 1000, len(names))
        assert sum(raw.count for raw in reader.read(file, start, stop)) == stop - start
    assert sum(decoded) == len(names)


@pytest.mark.parametrize("lie", [-1, 1])
@pytest.mark.parametrize("one_reader", [True, False])
def test_a_row_group_of_other_rows_than_its_footer_says_is_found_where_it_ends(tmp_path, monkeypatch, lie, one_reader):
    path = tmp_path / "c.parquet"
    write_groups(path, [f"d{number}" for number in range(80)], [40, 40])
    init = parquet.Parquet.__init__

    def lying(self, handle, name):
        init(self, handle, name)
        self.groups = [40 + lie, 40 - lie]

    monkeypatch.setattr(parquet.Parquet, "__init__", lying)
    reader, file = sources.Reader(["_id"]), sources.resolve([str(path)])[0]
    with pytest.raises(DataError, match="row group 0 has 40 rows, its footer says"):
        for start, stop in [(0, 20), (20, 40 + lie)]:
            reader = reader if one_reader else sources.Reader(["_id"])
            list(reader.read(file, start, stop))


def test_docstrings_are_found_by_reading(tmp_path, monkeypatch):
    long = "A docstring that is long enough to be taken, because it has at least eighty characters in it."
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(f'"""{long}"""\nraise SystemExit("imported")\n')
    (tmp_path / "pkg" / "a.py").write_text(
        f'class C:\n    """{long}"""\n    def _m(self):\n        """{long}"""\n'
        f'if True:\n    def f():\n        """{long}"""\n'
        f'else:\n    def f():\n        """{long}"""\ndef short():\n    """Short."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text(f'"""{long}"""')
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    docstrings.stdlib.cache_clear()
    found = docstrings.stdlib()
    docstrings.stdlib.cache_clear()
    assert [row["id"] for row in found] == ["pkg", "pkg.a.C", "pkg.a.C._m", "pkg.a.f", "pkg.a.f@9"]
    assert {row["module"] for row in found} == {"pkg", "pkg.a"}
    assert Path(found[0]["title"]).name == "pkg"
