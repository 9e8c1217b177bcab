"""Hostile input: bombs, damage and lies in corpus files, specs and model folders cost a sentence, not the machine."""

import gzip
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import corpus, limits, lines, parquet, rows, sources
from pipeline.encoders import models
from pipeline.encoders.batches import encode_rows
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.errors import DataError, SpecError
from pipeline.section import MAX_SPEC_BYTES
from pipeline.spec import Corpus, JobSpec
from tests.conftest import WORDS, texts
from tests.faults import mutants

TABLE = pa.table({"_id": [str(row) for row in range(200)], "text": texts(200)})


def read(path, columns=("_id", "text"), start=0, stop=None):
    """Rows of a file as a corpus file, with `bad` at their positions in the file."""
    (file,) = sources.resolve([str(path)])
    found, bad = {name: [] for name in columns}, {}
    for raw in sources.Reader(columns).read(file, start, stop):
        for name in columns:
            values = raw.columns[name]
            found[name] += values if isinstance(values, list) else values.to_pylist()
        bad |= {raw.start + at: why for at, why in raw.bad.items()}
    return found, bad


def footer_of(data: bytes) -> int:
    """Where a Parquet file's footer begins."""
    return mutants.parts(data)["footer"][0]


# Parquet


def test_damaged_files_are_refused_or_read_as_they_were():
    answers = mutants.batch(7, 0, 200)
    assert set(answers) <= {"refused", "same", "different_undetectable"}
    assert len(answers["refused"]) > 120 and len(answers["same"]) > 5


def test_a_mutant_that_kills_its_reader_is_named(monkeypatch):
    died = subprocess.CompletedProcess([], -11, "", "")

    def run(command, **_):
        start, stop = map(int, command[-2:])
        fine = subprocess.CompletedProcess([], 0, json.dumps({"same": [str(n) for n in range(start, stop)]}), "")
        return died if start <= 5 < stop else fine

    monkeypatch.setattr(mutants.subprocess, "run", run)
    answers = mutants.batch(0, 0, 16)
    assert [one.split()[0] for one in answers["crashes"]] == ["5"]
    assert sorted(map(int, answers["same"])) == [n for n in range(16) if n != 5]


def test_what_pyarrow_dies_of_is_refused(tmp_path):
    # Two bits of a level histogram, in a footer that is otherwise sound: pyarrow 26 aborts in `column()`.
    path = tmp_path / "c.parquet"
    path.write_bytes(mutants.mutant(0, 9724)[3])
    program = "import pyarrow.parquet as pq, sys; f = pq.ParquetFile(sys.argv[1]).metadata.row_group(0); f.column(3)"
    ended = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, check=False)
    assert ended.returncode == -6, "pyarrow has mended this: look whether pipeline/parquet.py still needs _Footer"
    with pytest.raises(DataError, match=r"cannot read .*c\.parquet: Definition level histogram"):
        mutants.read(path)


@pytest.mark.parametrize("options", [{}, {"write_page_checksum": True}, {"compression": "zstd"}])
def test_sound_files_read_with_checksums_and_without(tmp_path, options):
    pq.write_table(TABLE, tmp_path / "c.parquet", row_group_size=77, **options)
    assert read(tmp_path / "c.parquet") == (TABLE.to_pydict(), {})
    assert read(tmp_path / "c.parquet", start=70, stop=160) == (TABLE.slice(70, 90).to_pydict(), {})


def test_a_page_is_read_only_where_its_checksum_holds(tmp_path):
    path = tmp_path / "c.parquet"
    pq.write_table(TABLE, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(TABLE["text"][100].as_py().encode())] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        read(path)


def test_a_constant_column_of_a_million_rows_is_no_bomb(tmp_path):
    count = 1_000_000
    constant = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["the same text in every row"])
    pq.write_table(pa.table({"text": constant.cast(pa.string()), "typed": constant}), tmp_path / "c.parquet")
    (file,) = sources.resolve([str(tmp_path / "c.parquet")])
    assert file.size < 20_000
    assert sum(raw.count for raw in sources.Reader(["text", "typed"]).read(file)) == count


PARQUET_BOMBS = {
    "columns": ("MAX_COLUMNS", 1, "2 columns, at most 1"),
    "rows": ("MAX_ROWS", 150, "200 rows in"),
    "footer": ("MAX_FOOTER_BYTES", 300, "bytes of its footer"),
    "thrift": ("MAX_THRIFT_ITEMS", 2, "deserialize|Exceeded size limit"),
    "group": ("MAX_GROUP_BYTES", 1000, "row group 0 unpacks to"),
}


@pytest.mark.parametrize(("name", "value", "words"), PARQUET_BOMBS.values(), ids=PARQUET_BOMBS)
def test_a_footer_keeps_within_the_limits(tmp_path, monkeypatch, name, value, words):
    pq.write_table(TABLE, tmp_path / "c.parquet")
    read(tmp_path / "c.parquet")
    monkeypatch.setattr(limits, name, value)
    with pytest.raises(DataError, match=f"cannot read .*c.parquet: .*({words})"):
        read(tmp_path / "c.parquet")


def test_a_column_that_unpacks_a_thousandfold_is_refused_by_its_footer(tmp_path):
    pq.write_table(
        pa.table({"text": [" " * 60 * 2**20] * 2}), tmp_path / "c.parquet", compression="zstd", use_dictionary=False
    )
    assert (tmp_path / "c.parquet").stat().st_size < 100_000
    with pytest.raises(
        DataError, match=r"claims 125,8\d\d,\d\d\d bytes that .* of column 'text' unpack to, at most 67"
    ):
        read(tmp_path / "c.parquet", ["text"])


def test_a_billion_rows_in_some_bytes_are_refused(tmp_path):
    path = tmp_path / "c.parquet"
    pq.write_table(TABLE, path)
    data = path.read_bytes()
    old, new = b"\x16\x90\x03", b"\x16" + b"\x80\xa8\xd6\xb9\x07"  # Thrift's 200 and 10^9
    start = footer_of(data)
    assert data.count(old, start)
    footer = data[start:-8].replace(old, new)
    path.write_bytes(data[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    for ask in (read, lambda path: sources.footer_rows(sources.resolve([str(path)])[0])):
        with pytest.raises(DataError, match="1,000,000,000 rows in"):
            ask(path)


def test_a_footer_at_odds_with_its_row_groups_is_refused(tmp_path):
    path = tmp_path / "c.parquet"
    pq.write_table(TABLE, path)
    data = path.read_bytes()
    at = data.index(b"\x16\x90\x03", footer_of(data))  # the first 200: rows of the file
    path.write_bytes(data[:at] + b"\x16\x92\x03" + data[at + 3 :])
    with pytest.raises(DataError, match="row groups have other rows than its footer's 201"):
        read(path)


def test_a_dictionary_is_not_multiplied_beyond_a_batch(tmp_path, monkeypatch):
    big = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), [WORDS[7] * 5000])
    pq.write_table(pa.table({"text": big.cast(pa.string())}), tmp_path / "c.parquet", compression="none")
    monkeypatch.setattr(limits, "BATCH_BYTES", 10 * 20_004)
    (file,) = sources.resolve([str(tmp_path / "c.parquet")])
    assert [raw.count for raw in sources.Reader(["text"]).read(file)] == [10] * 300
    monkeypatch.setattr(limits, "FREE_UNPACKED", 1000 * 20_000)
    monkeypatch.setattr(limits, "MAX_PACKING", 100)
    with pytest.raises(DataError, match="unpack to more than 100 times its size"):
        read(tmp_path / "c.parquet", ["text"])


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_the_size_of_a_dictionary_stands_in_its_header(tmp_path, use_dictionary):
    words = [f"{number:0100d}" for number in range(300)]
    pq.write_table(pa.table({"text": words}), tmp_path / "c.parquet", use_dictionary=use_dictionary)
    found = parquet.dictionary_bytes((tmp_path / "c.parquet").read_bytes()[4:20])
    assert found == (300 * 104 if use_dictionary else 0)


def test_indices_beyond_a_dictionary_are_refused():
    wild = pa.DictionaryArray.from_arrays(pa.array([0, 70_000], pa.int32()), pa.array(["a"]), safe=False)
    with pytest.raises(pa.ArrowException, match="out of bounds"):
        parquet.check(wild)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_offsets_beyond_the_data_are_refused_and_bytes_that_are_no_utf8_are_not(kind):
    width = np.int32 if kind == pa.string() else np.int64

    def array(ends):
        offsets = pa.py_buffer(np.array([0, *ends], width))
        return pa.Array.from_buffers(kind, len(ends), [None, offsets, pa.py_buffer(b"a\xff")])

    parquet.check(array([1, 2]))
    with pytest.raises(pa.ArrowInvalid):
        parquet.check(array([1, 900_000]))


def test_packed_bytes_are_those_of_the_columns_asked_for(tmp_path):
    pq.write_table(TABLE.append_column("text.more", TABLE["text"]), tmp_path / "c.parquet", row_group_size=100)
    opened = sources.opened(sources.resolve([str(tmp_path / "c.parquet")])[0])
    group = opened.file.metadata.row_group(1)
    assert opened.packed_bytes(1, ["_id"]) == group.column(0).total_compressed_size
    assert opened.packed_bytes(1, ["_id", "text.more"]) == sum(group.column(n).total_compressed_size for n in (0, 2))


# Long texts and lines


def clean(path, **settings):
    """Texts, and what is set aside, as the scan finds them."""
    made = Corpus(source=str(path), **{"id": "_id", "text": "text", **settings})
    (file,) = corpus.check(made)
    kept, aside = [], []
    for raw in sources.Reader(rows.columns(made)).read(file):
        found = rows.clean(raw, file.path, made, {})
        kept += zip(found.offsets, found.texts, strict=True)
        aside += [(offset, reason, detail) for offset, _, reason, detail in found.rejected]
    return kept, aside


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "csv", "txt"])
def test_a_text_beyond_the_limit_costs_only_its_row(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(limits, "MAX_TEXT", 5000)
    values = ["one", "x" * 9000, "y" * 4900, "four"]
    path = tmp_path / f"c.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"_id": list("abcd"), "text": values}), path)
    elif suffix == "csv":
        path.write_text("_id,text\n" + "".join(f'{name},"{text}"\n' for name, text in zip("abcd", values, strict=True)))
    elif suffix == "txt":
        path.write_text("\n".join(values))
    else:
        data = "".join(json.dumps({"_id": n, "text": v}) + "\n" for n, v in zip("abcd", values, strict=True)).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    kept, aside = clean(path, id=None if suffix == "txt" else "_id")
    assert kept == [(0, "one"), (2, values[2]), (3, "four")]
    ((offset, reason, detail),) = aside
    assert (offset, reason) == (1, "undecodable")
    assert "9,0" in detail and "at most 5,000 are read" in detail


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", "txt"])
def test_a_text_of_ten_megabytes_is_read(tmp_path, suffix):
    text, path = "wörd " * 2_000_000, tmp_path / f"c.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"_id": ["a"], "text": [text]}), path)
    else:
        row = {"jsonl": json.dumps({"_id": "a", "text": text}), "csv": f"_id,text\na,{text}", "txt": text}[suffix]
        path.write_text(row)
    assert clean(path, id=None if suffix == "txt" else "_id") == ([(0, text)], [])


def test_an_open_quote_costs_rows_but_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_TEXT", 1000)
    (tmp_path / "c.csv").write_text('_id,text\na,"open\n' + "line\n" * 300 + "b,fine\n")
    kept, aside = clean(tmp_path / "c.csv")
    assert kept[-1][1] == "fine"
    assert "field larger than field limit" in aside[0][2]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_a_csv_ends_its_lines_in_any_way(tmp_path, ends):
    (tmp_path / "c.csv").write_bytes(f'_id,text{ends}a,"x{ends}y"{ends}b,z{ends}'.encode())
    assert clean(tmp_path / "c.csv") == ([(0, f"x{ends}y"), (1, "z")], [])


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_TEXT", 2**20)
    with (tmp_path / "c.jsonl").open("wb") as file:
        file.write(b'{"_id": "a", "text": "w001"}\n')
        for _ in range(100):
            file.write(b"[" * 2**20)
        file.write(b'\n{"_id": "b", "text": "w002"}\n')
    tracemalloc.start()
    kept, aside = clean(tmp_path / "c.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text for _, text in kept] == ["w001", "w002"]
    assert "104,857,601 characters" in aside[0][2]
    assert peak < 20 * 2**20


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_of_lines_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(limits, "FREE_UNPACKED", 2**20)
    data = b'{"_id": "a", "text": "w"}\n' * 200_000
    packed = gzip.compress(data) if suffix == "gz" else pa.Codec("zstd").compress(data, asbytes=True)
    (tmp_path / f"c.jsonl.{suffix}").write_bytes(packed)
    assert len(data) > 200 * len(packed)
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        read(tmp_path / f"c.jsonl.{suffix}")


def test_text_that_packs_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE_UNPACKED", 2**20)
    data = "".join(json.dumps({"_id": str(row), "text": "the same text, but for " + WORDS[row % 300]}) + "\n"
                   for row in range(30_000))  # fmt: skip
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    assert len(read(tmp_path / "c.jsonl.gz")[0]["_id"]) == 30_000


@pytest.mark.parametrize("depth", [60, 900, 100_000])
def test_deep_json_costs_only_its_row(tmp_path, depth):
    deep = '{"_id": "b", "text": "w", "tags": ' + "[" * depth + "]" * depth + "}\n"
    flat = '{"_id": "a", "text": "w", "tags": [' + "[]," * 500 + "[]]}\n"
    (tmp_path / "c.jsonl").write_text(flat + deep + flat.replace('"a"', '"c"'))
    found, bad = read(tmp_path / "c.jsonl", ["_id"])
    assert found == {"_id": ["a", None, "c"]}
    assert list(bad) == [1] and ("nested deeper" in bad[1] or "recursion" in bad[1])


def test_a_batch_of_long_lines_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BATCH_BYTES", 10_000)
    (tmp_path / "c.txt").write_text(("x" * 999 + "\n") * 50)
    (file,) = sources.resolve([str(tmp_path / "c.txt")])
    assert [raw.count for raw in sources.Reader(["text"]).read(file)] == [11] * 4 + [6]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_too_many_names_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(limits, "MAX_COLUMNS", 100)
    names = [f"c{number}" for number in range(200)]
    rows = {"csv": ",".join(names), "jsonl": json.dumps(dict.fromkeys(names, 1))}
    (tmp_path / f"c.{suffix}").write_text(rows[suffix])
    with pytest.raises(DataError, match="more than 100 columns"):
        sources.column_names(sources.resolve([str(tmp_path / f"c.{suffix}")])[0])


def test_a_header_that_is_no_csv_is_refused(tmp_path):
    (tmp_path / "c.csv").write_text('_id,"text" x\na,b\n')
    with pytest.raises(DataError, match=r"cannot read .*c\.csv"):
        sources.column_names(sources.resolve([str(tmp_path / "c.csv")])[0])


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("big"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad")])
def test_whatever_a_broken_file_raises_names_it(tmp_path, monkeypatch, error):
    (tmp_path / "c.txt").write_text("a")

    def fail(*_):
        raise error

    monkeypatch.setattr(lines, "records", fail)
    with pytest.raises(DataError, match=r"cannot read .*c\.txt: "):
        read(tmp_path / "c.txt", ["text"])


@pytest.mark.parametrize("change", ["other", "longer", "gone", "touched"])
def test_a_file_that_changes_in_use_is_refused(tmp_path, change):
    path = tmp_path / "c.txt"
    path.write_text("one\n")
    (file,) = sources.resolve([str(path)])
    assert [raw.count for raw in sources.Reader(["text"]).read(file)] == [1]
    {
        "other": lambda: path.write_text("two\n"),
        "longer": lambda: path.write_text("one\ntwo\n"),
        "gone": path.unlink,
        "touched": lambda: os.utime(path, (1, 1)),
    }[change]()
    with pytest.raises(DataError, match="has changed while it was in use"):
        list(sources.Reader(["text"]).read(file))


# Specs

BOMBS = {
    "flow": ("x: " + "[" * 100_000, "line 1: nested deeper than 50"),
    "closed-flow": ("[" * 100_000 + "]" * 100_000, "line 1: nested deeper than 50"),
    "mappings": ("{a: " * 100_000, "nested deeper than 50"),
    "dashes": ("- " * 100_000, "nested deeper than 50"),
    "indents": ("\n".join(" " * level + "a:" for level in range(1000)), "line 50: nested deeper than 50"),
    "alias": ("a: &a [x]\nb: *a\n", r"line 2: an alias \(\*name\) is not allowed"),
    "laughs": (
        "a: &a [x]\n" + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in ["ab", "bc"]),
        "line 2: an alias",
    ),
    "many-values": ("\n".join(f"k{number}: 1" for number in range(100_000)), "more than 10,000 values"),
    "key-twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice"),
    "key-twice-below": ("a: [{b: 1,\n b: 2}]\n", "line 2: the key 'b' stands twice"),
    "nan": ("a: 1\nseed: .nan", "line 2: .nan is not a finite number"),
    "infinity": ("seed: -.inf", "line 1: -.inf is not a finite number"),
    "overflow": ("seed: 1.0e+999", "line 1: 1.0e.999 is not a finite number"),
    "sexagesimal": ("seed: 1" + ":1" * 400_000, "line 1: a number of 800,001 characters"),
    "hexadecimal": ("seed: 0x" + "f" * 900_000, "a number of 900,002 characters"),
    "no-digits": ("seed: !!int 0x", "line 1: '0x' is no number"),
    "object": ("seed: !!python/object:os.system {}", "line 1: .*python/object:os.system"),
    "apply": ("!!python/object/apply:os.system [id]", "line 1: .*python/object/apply"),
    "large": ("#" * (MAX_SPEC_BYTES + 1), "larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("text", "words"), BOMBS.values(), ids=BOMBS)
def test_a_hostile_spec_is_refused_at_once(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(SpecError, match=words) as refusal:
        JobSpec.load(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2  # on a machine of its own: 0.5
    assert after.ru_maxrss - before.ru_maxrss < 200 * 1024
    assert "\n" not in str(refusal.value) and "job.yaml" in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_spec_larger_than_the_limit_is_not_read_whole(tmp_path):
    with (tmp_path / "job.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SpecError, match="larger than"):
        JobSpec.load(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=" + "[" * 100_000, "nested deeper"),
        ("seed=.nan", "not a finite number"),
        ("corpus.text=[&a b, *a]", "an alias"),
        ("model={name: a, name: b}", "'name' stands twice"),
        ("corpus.id" + ".a" * 100_000 + "=1", "write path.to.field=value"),
        ("prefixes.².dim=8", "nothing below"),
        ("prefixes." + "9" * 5000 + ".dim=8", "nothing below"),
    ],
)
def test_a_hostile_override_is_refused(job_file, override, words):
    with pytest.raises(SpecError, match=f"--set .*{words}") as refusal:
        JobSpec.load(job_file(), [override])
    assert len(str(refusal.value)) < 6000


# Model folders


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the stand-in model."""
    return shutil.copytree(model, tmp_path / "model")


def test_links_and_modules_keep_to_their_folder(folder, tmp_path):
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(SpecError, match=r"leads out of its folder at .*tokenizer\.json; copy"):
        models.resolve(str(folder))


def test_a_linked_folder_leads_out_too(folder, tmp_path):
    shutil.move(folder / "1_Normalize", tmp_path / "elsewhere")
    (folder / "1_Normalize").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="leads out of its folder at .*1_Normalize"):
        models.resolve(str(folder))


@pytest.mark.parametrize("place", ["../elsewhere", "/etc"])
def test_a_module_beside_the_folder_is_refused(folder, place):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = place
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SpecError, match="leads out of its folder"):
        models.resolve(str(folder))


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(model, tmp_path):
    blobs, snapshot = (tmp_path / "models--org--name" / part for part in ("blobs", "snapshots/abc123"))
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(model.rglob("*")) if path.is_file()):
        shutil.copy(file, blobs / str(number))
        linked = snapshot / file.relative_to(model)
        linked.parent.mkdir(parents=True, exist_ok=True)
        linked.symlink_to(os.path.relpath(blobs / str(number), linked.parent))
    assert models.resolve(str(snapshot)).digest == models.resolve(str(model)).digest
    assert SentenceEncoder(models.resolve(str(snapshot)), None, "cpu", 1).dim == 32


@pytest.mark.parametrize("claimed", [0, 2**63, 100_000_001, "beyond"])
def test_a_header_of_weights_that_cannot_be_is_refused(folder, claimed):
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.write(struct.pack("<Q", size - 7 if claimed == "beyond" else claimed))
        if claimed == 100_000_001:
            file.truncate(200_000_000)  # the file could hold it, the format does not
    with pytest.raises(DataError, match=r"cannot read .*model\.safetensors: its header claims .*; fetch it again"):
        models.resolve(str(folder))


@pytest.mark.parametrize("header", ["[" * 100_000, "[1]", '{"a": 1}', '{"a": {"shape": [1, "x"]}}', "{"])
def test_a_header_of_weights_that_is_no_json_object_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(DataError, match="no safetensors header"):
        models.resolve(str(folder))


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "static"])
def test_a_model_without_its_tokenizer_is_refused(folder, tmp_path, name):
    if name != "static":  # transformers would load it with a tokenizer that knows no word
        folder = shutil.copytree(models.resolve(name).path, tmp_path / name)
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(SpecError, match="has no tokenizer"):
        models.resolve(str(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "not readable JSON"),
        (" " * (2**24 + 1), "larger than"),
        ('{"matryoshka_dims": ["a"]}', "matryoshka_dims .* are no dimensions"),
        ('{"matryoshka_dims": [-1]}', "matryoshka_dims .* are no dimensions"),
    ],
)
def test_a_hostile_configuration_is_refused(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(SpecError, match=words):
        models.resolve(str(folder))


def test_a_local_folder_makes_no_network_call(model, monkeypatch):
    import huggingface_hub

    called = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: called.append(address))
    for name in (str(Path(model)), "all-MiniLM-L6-v2"):
        encoder = SentenceEncoder(models.resolve(name), None, "cpu", 1)
        assert not encode_rows(encoder, ["w001"], "document", "", 64).failed
    assert called == []
