"""The independent checker: whole roots are whole, every damage is found and named, and the next run mends it."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import lance
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline import JobSpec, run, store, verify
from pipeline.errors import StaleError
from pipeline.storage import signed, to_json
from pipeline.tables import METADATA_KEY, combined_digest, logical_digest
from pipeline.transform import digest as artefact_digest
from tests.conftest import DIM, corpus_frame, making_pages
from tests.faults import flips


@pytest.fixture(scope="module", autouse=True)
def _two_fragments():
    """Of 120 rows in shards of 50: two shards are merged, the third stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "FRAGMENT_ROWS", 100)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A finished root with every kind of file."""
    folder = tmp_path_factory.mktemp("made")
    with making_pages():
        flips.make(folder, model)
    return folder


@pytest.fixture
def job(made, tmp_path):
    """A copy of it, and the spec that made it."""
    shutil.copytree(made / "root", tmp_path / "root")
    given = json.loads((made / "root" / "manifest.json").read_text())["spec"]
    return JobSpec.of({**given, "root": str(tmp_path / "root")})


@pytest.fixture
def root(job):
    return Path(job.root)


@pytest.fixture(scope="module")
def other(tmp_path_factory, model):
    """A finished root without ids, texts repeated, float32 vectors, nothing fitted but scales."""
    folder = tmp_path_factory.mktemp("other")
    frame = corpus_frame(60)
    pl.concat([frame, frame[:3]]).write_parquet(folder / "corpus.parquet")
    values = flips.values(folder / "root", folder / "corpus.parquet", model)
    values["corpus"] |= {"id": None, "keep": [], "filter": []}
    values |= {"transform": {"kind": "none", "accept_loss": True}, "embed": {"vectors": "float32"}}
    values["prefixes"] = [{"dim": 32, "precision": "float16"}, {"dim": 16, "precision": "binary", "rotation": "none"}]
    run(JobSpec.of(values))
    return folder / "root"


@pytest.fixture
def plain(other, tmp_path):
    shutil.copytree(other, tmp_path / "plain")
    return tmp_path / "plain"


def manifest(root):
    return json.loads((root / "manifest.json").read_text())


def resign(root, change=lambda generation: None):
    """Publish the newest generation anew, with the files as they are now, and a change."""
    generation = manifest(root)
    folders = tuple(f"lancedb/{name}.lance/" for name in generation["tables"])
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    names = {*generation["files"], *(name for name in there if name.startswith(folders))} & there.keys()
    generation["files"] = {name: hashlib.sha256(there[name].read_bytes()).hexdigest() for name in names}
    for name in generation["copies"]:
        shutil.copy(root / name, root / "_state" / "kept" / generation["files"][name])
    change(generation)
    data = to_json(signed(generation))
    (root / "manifest.json").write_bytes(data)
    (root / "generations" / f"{generation['generation']}.json").write_bytes(data)


def rewrite(root, name, change, index=True):
    """Change a table's content and make every digest fit it."""
    path = str(root / "lancedb" / f"{name}.lance")
    before = lance.dataset(path)
    table = change(before.to_table())
    lance.write_dataset(table, path, mode="overwrite", data_storage_version="2.2")
    opened = lance.dataset(path)
    if index and name == "documents":
        opened.create_scalar_index("row", "BTREE")
        opened.create_scalar_index("id", "BTREE")
    if index and name == "prefix_16_float16":
        opened.create_index("vector", "IVF_FLAT", metric="dot", num_partitions=2)
    files = [file for fragment in opened.get_fragments() for file in fragment.metadata.files]

    def told(generation):
        entry = generation["tables"][name]
        digest = logical_digest(table)
        entry |= {"version": lance.dataset(path).version, "rows": table.num_rows, "parts": [[table.num_rows, digest]]}
        if name != "parameters":
            entry["digest"] = combined_digest([digest])
        entry["bytes"] = sum(file.file_size_bytes for file in files)

    resign(root, told)


def with_column(table, name, values):
    at = table.schema.get_field_index(name)
    array = pa.array(values, table.schema.field(name).type) if isinstance(values, list) else values
    return table.set_column(at, table.schema.field(name), array)


def with_codes(table, change):
    """The table with its vectors changed in place."""
    column = table["vector"].combine_chunks()
    codes = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).copy()
    change(codes)
    flat = pa.array(codes.reshape(-1), column.type.value_type)
    return with_column(table, "vector", pa.FixedSizeListArray.from_arrays(flat, type=column.type))


def problems(root):
    return verify.run(root).problems


def test_a_whole_root_has_no_problem(root):
    found = verify.run(root)
    assert (found.problems, found.damaged, found.unknown, found.generation) == ((), (), (), 1)
    assert found.is_whole
    assert found.checked["rows"] == 118
    assert found.checked["quarantined"] == 2
    assert found.checked["codes"] == 4 * 118
    assert found.checked["vectors"] == 118
    assert found.checked["tables"] == 6
    assert found.checked["indexes"] == 3
    assert found.checked["artefacts"] == 2
    assert found.checked["parts"] == 3 + 1 + 4 * 2
    files = [path for path in root.rglob("*") if path.is_file() and "locks" not in path.parts]
    assert found.checked["files"] + found.checked["records"] == len(files) - 1 - (root / "report.html").is_file()
    assert found.checked["rounded"] <= 5
    assert found.checked["older"] == 0


def test_a_root_without_ids_or_transform_is_whole(plain):
    found = verify.run(plain)
    assert (found.problems, found.unknown) == ((), ())
    assert (found.checked["rows"], found.checked["quarantined"]) == (60, 3)


@pytest.mark.parametrize("kind", ["adaptor", "order", "pca"])
def test_every_transform_is_computed_again(spec, corpus_file, kind):
    corpus_frame(700).with_columns(
        when=pl.datetime(2020, 1, 1) + pl.duration(days=pl.int_range(700)), tags=pl.concat_list("lang", "title"),
        half=pl.when(pl.int_range(700) % 7 > 0).then(pl.int_range(700) / 2), old=pl.col("year") < 2000,
    ).write_parquet(corpus_file)  # fmt: skip
    job = spec(transform={"kind": kind}, corpus__keep=["when", "tags"], corpus__filter=["half", "old"])
    run(job)
    found = verify.run(Path(job.root))
    assert (found.problems, found.unknown) == ((), ())
    assert found.checked["codes"] == 3 * 700


def test_a_folder_without_a_generation_is_refused(tmp_path):
    with pytest.raises(StaleError, match="holds no finished generation"):
        verify.run(tmp_path)


def test_a_flipped_bit_is_found_in_every_file(root):
    names = flips.committed(root)
    result = flips.measure(root, seed=1, count=len(names) + 20)
    assert result["missed"] == []
    assert result["found"] == result["count"] >= len(names)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, cut, empty])
def test_a_lost_or_truncated_file_is_named(root, damage):
    names = [name for name in flips.committed(root) if name != "_state/stamps.json" or damage is not Path.unlink]
    names = [name for name in names if not (damage is Path.unlink and name.startswith("_state/report/"))]
    for group in flips.rounds(names, len(names), random.Random(0)):
        before = {root / name: ((root / name).read_bytes(), (root / name).stat()) for name in group}
        for path in before:
            damage(path)
        found = verify.run(root)
        for path, (data, stat) in before.items():
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert sorted(found.damaged) == sorted(group), found.problems
        assert all(any(name in sentence for sentence in found.problems) for name in group)
    assert verify.run(root).is_whole


def test_swapped_files_are_both_named(root):
    first, second = sorted((root / "lancedb" / "documents.lance" / "data").iterdir())[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    found = verify.run(root)
    assert set(found.damaged) == {path.relative_to(root).as_posix() for path in (first, second)}


def test_an_older_copy_is_named(job, root):
    old = (root / "evaluation.parquet").read_bytes()
    generation = (root / "manifest.json").read_bytes()
    run(job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"k": 3})}))
    assert verify.run(root).is_whole
    (root / "evaluation.parquet").write_bytes(old)
    (root / "manifest.json").write_bytes(generation)
    assert set(verify.run(root).damaged) == {"evaluation.parquet", "manifest.json"}


def test_what_no_record_names_is_listed(root):
    extra = ["note.txt", "lancedb/documents.lance/data/more.lance", "parquet/documents/part-0000009.parquet"]
    extra += ["lancedb/other.lance/data/more.lance", "generations/x.json", "_state/kept.txt", ".hidden"]
    for name in extra:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "link").symlink_to("/etc/hosts")
    found = verify.run(root)
    assert found.problems == ()
    assert set(found.unknown) == {*extra, "link"}


def test_files_of_an_older_generation_are_known(job, root):
    run(job.model_copy(update={"prefixes": job.prefixes[:2]}))
    found = verify.run(root)
    assert (found.problems, found.unknown, found.generation) == ((), (), 2)
    assert found.checked["older"] == 5 + 9  # of prefix_24_float32, and of prefix_16_float16 with its index


def test_damaged_files_are_touched_and_no_others(root):
    name = next(name for name in flips.committed(root) if "int8.lance/data" in name)
    times = {one: (root / one).stat().st_mtime_ns for one in flips.committed(root)}
    with flips.flipped(root, [name], random.Random(0)):
        os.utime(root / name, ns=(0, times[name]))
        verify.run(root)
        changed = {one for one, at in times.items() if (root / one).stat().st_mtime_ns != at}
    assert changed == {name}


def test_the_damaged_part_of_a_table_does_not_hide_another_table(root):
    rewrite(root, "prefix_8_binary", lambda table: with_codes(table, lambda codes: codes.__ixor__(255)))
    name = next(name for name in flips.committed(root) if "int8.lance/data" in name)
    with flips.flipped(root, [name], random.Random(0)):
        found = verify.run(root)
    assert len(found.problems) == 2
    assert "prefix_8_binary.lance: row 0 has another code" in found.problems[1]


# A generation whose digests fit, but which says or holds something wrong.


def nudged(at, by):
    return lambda codes: codes.__setitem__(at, codes[at] + by)


CODES = [
    ("prefix_16_int8", nudged((33, 4), 1)),
    ("prefix_16_int8", nudged((0, 15), -1)),
    ("prefix_8_binary", lambda codes: codes.__setitem__((33, 0), codes[33, 0] ^ 16)),
    ("prefix_16_float16", lambda codes: codes.view("<u2").__setitem__((33, 4), codes.view("<u2")[33, 4] ^ 2)),
    ("prefix_24_float32", nudged((117, 23), 1e-4)),
    ("prefix_24_float32", lambda codes: codes.__setitem__((2, 0), np.nan)),
]


@pytest.mark.parametrize(("name", "change"), CODES)
def test_a_wrong_code_is_found(root, name, change):
    rewrite(root, name, lambda table: with_codes(table, change))
    (told,) = problems(root)
    assert told.startswith(f"lancedb/{name}.lance: row ")
    assert told.endswith("has another code than follows from its full vector")


def test_a_wrong_code_names_its_row_and_counts_the_others(root):
    def change(codes):
        codes[10] += 1  # row 11: row 7 has no text
        codes[100:] += 1

    rewrite(root, "prefix_16_int8", lambda table: with_codes(table, change))
    (told,) = problems(root)
    assert "row 11 has another code" in told
    assert "(and 18 more rows)" in told


def same(table):
    return table


def values_of(table, name, change):
    values = table[name].to_pylist()
    change(values)
    return with_column(table, name, values)


def put(at, value):
    return lambda values: values.__setitem__(at, value)


ROWS = [
    ("documents", lambda t: values_of(t, "id", put(4, "doc-3")), "row 4 has an id that an earlier row has"),
    ("documents", lambda t: values_of(t, "id", put(4, None)), "row 4 has no id"),
    ("documents", lambda t: values_of(t, "text", put(4, "w001")), "row 4 has a text_digest that is not that of its"),
    ("documents", lambda t: values_of(t, "text_digest", put(4, b"0" * 16)), "row 4 has a text_digest that is not"),
    ("documents", lambda t: values_of(t, "year", put(4, 1)), "prefix_8_binary.lance: row 4 has another year than"),
    ("prefix_16_int8", lambda t: values_of(t, "lang", put(4, None)), "row 4 has another lang than in documents"),
    ("prefix_16_int8", lambda t: values_of(t, "row", put(4, 99)), "row 4 is not there as in documents"),
    ("prefix_16_int8", lambda t: t.slice(0, 117), "row 119 is not there as in documents"),
    ("documents", lambda t: values_of(t, "row", put(4, 3)), "row 3 does not come after the row before it"),
    ("documents", lambda t: values_of(t, "row", put(117, 120)), "row 120 is none of the corpus' 120 rows"),
    ("documents", lambda t: values_of(t, "row", put(7, 7)), "row 7 is there more than once"),
    ("documents", lambda t: values_of(t, "row", put(7, 7)), "row 8 is in neither of them (1 rows are missing)"),
    ("documents", lambda t: with_codes(t, lambda codes: codes.__setitem__((9, 0), np.inf)), "row 10 has a vector that"),
    ("prefix_8_binary", lambda t: t.replace_schema_metadata({}), "its metadata says format None, not 1"),
    ("prefix_8_binary", lambda t: t.rename_columns(["row", "lang", "jahr", "vector"]), "has the columns"),
    ("prefix_8_binary", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "has rows after the last one of documents"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "told"), ROWS)
def test_a_wrong_row_is_found(root, name, change, told):
    rewrite(root, name, change)
    assert any(told in sentence for sentence in problems(root)), problems(root)


ALONE = [
    (lambda t: values_of(t, "id", put(4, t["id"][3].as_py())), "has an id that"),
    (lambda t: values_of(t, "id", put(4, "doc-4")), "row 4 has an id that is not the digest of its text"),
    (lambda t: with_codes(t, lambda codes: codes.__setitem__(5, codes[5] * 1.01)), "row 5 has a vector that is not of"),
]


@pytest.mark.parametrize(("change", "told"), ALONE)
def test_a_wrong_row_is_found_where_ids_are_digests(plain, change, told):
    rewrite(plain, "documents", change)
    assert problems(plain) and all(told in sentence for sentence in problems(plain))


def entry(name, **values):
    return lambda generation: generation["tables"][name].update(values)


def within(*path):
    """Set a value of the generation: all but the last are keys."""

    def change(generation):
        *keys, last, value = path
        for key in keys:
            generation = generation[key]
        generation[last] = value

    return change


GENERATIONS = [
    (entry("documents", digest="0" * 64), "documents.lance: the digests of its parts do not make the digest"),
    (within("tables", "documents", "parts", 1, [49, "0" * 64]), "documents.lance: part 1 (its rows "),
    (within("tables", "documents", "parts", [[118, "0" * 64], [1, "0" * 64]]), "the rows of its parts are not its 118"),
    (entry("prefix_16_int8", rows=117), "prefix_16_int8.lance: has 118 rows where the generation says 117"),
    (entry("prefix_16_int8", bytes=1), "prefix_16_int8.lance: its data files do not have the 1 bytes"),
    (entry("prefix_16_int8", version=9), "prefix_16_int8.lance cannot be checked"),
    (entry("prefix_16_int8", index={"kind": "ivf_sq"}), "column vector has no ivfsq index"),
    (entry("parameters", digest="0" * 64), "its artefacts are not those that the generation's digest names"),
    (within("corpus", "rows", 121), "row 120 is in neither of them"),
    (within("corpus", "rows", 10**15), "row 120 is in neither of them"),
    (within("corpus", "reasons", {"null_text": 1, "blank_text": 1}), "its reasons {'null_text': 2} are not those"),
    (within("corpus", "quarantined", 3), "quarantine.parquet: its reasons"),
    (within("model", "digest", "sha256:0"), "documents.lance: its metadata says model_digest 'sha256:"),
    (within("spec", "embed", "vectors", "float32"), "documents.lance: its metadata says precision 'float16'"),
    (within("spec", "prefixes", []), "prefix_16_int8.lance: the spec and the tables of the generation do not both"),
    (within("spec", None), "the list of tables cannot be checked: TypeError"),
    (within("format", 2), "generations/1.json is no generation 1 of format 1"),
    (within("generation", 7), "generations/7.json"),
    (within("files", []), "is no generation 1"),
    (within("tables", "parameters", "parts", []), "parameters.lance: the rows of its parts"),
]


@pytest.mark.parametrize(("change", "told"), GENERATIONS)
def test_a_generation_that_says_something_wrong_is_found(root, change, told):
    resign(root, change)
    if told.startswith("generations/7"):
        (root / "generations" / "7.json").rename(root / "generations" / "8.json")
    assert any(told in sentence for sentence in problems(root)), problems(root)


@pytest.mark.parametrize("part", ["_indices/", "data/", "_versions/"])
def test_a_file_that_the_generation_leaves_out_is_found(root, part):
    def change(generation):
        name = next(name for name in generation["files"] if name.startswith(f"lancedb/prefix_16_float16.lance/{part}"))
        folder = name.rpartition("/")[0] + "/"
        generation["files"] = {one: digest for one, digest in generation["files"].items() if not one.startswith(folder)}

    resign(root, change)
    if part == "_versions/":  # nothing but the version itself says that it is needed
        assert len(verify.run(root).unknown) == 3
        return
    told = problems(root)
    assert len(told) == (2 if part == "data/" else 1)  # one for each fragment
    assert all(part in one and "the generation does not name it" in one for one in told)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("values", lambda one: one["values"].__setitem__(3, 0.25), "does not hold the values that it is named by"),
        ("kind", lambda one: one.update(kind="order"), "does not hold the values that it is named by"),
        ("rows", lambda one: one.update(rows=1, cols=one["rows"] * one["cols"]), "does not hold the values"),
        ("digest", lambda one: one.update(digest="0" * 64), "does not hold the values that it is named by"),
    ],
)
def test_a_wrong_artefact_is_found(root, name, change, told):
    def changed(table):
        rows = table.to_pylist()
        change(rows[0])
        return pa.Table.from_pylist(rows, table.schema)

    rewrite(root, "parameters", changed)
    assert any(told in sentence for sentence in problems(root)), problems(root)


def test_an_artefact_that_is_missing_or_of_another_shape_is_found(root):
    kinds = {row["kind"]: row for row in lance.dataset(str(root / "lancedb/parameters.lance")).to_table().to_pylist()}
    rewrite(root, "parameters", lambda table: table.filter(pc.equal(table["kind"], "pca")))
    left = [kinds["pca"]["digest"]]
    resign(root, entry("parameters", digest=hashlib.sha256("\n".join(left).encode()).hexdigest()))
    (told,) = problems(root)
    assert f"its rotation {kinds['rotation']['digest']} is not in parameters as rotation of (8, 8)" in told


def test_an_artefact_that_did_not_make_the_codes_is_found(root):
    """Everything fits but the codes: the mean in `parameters` and in the metadata of one table is another one."""
    stored = lance.dataset(str(root / "lancedb/parameters.lance")).to_table().to_pylist()
    pca = next(row for row in stored if row["kind"] == "pca")
    values = np.array(pca["values"], np.float32).reshape(DIM + 1, DIM)
    values[0] += 0.01
    other = {**pca, "values": values.ravel().tolist(), "digest": artefact_digest("pca", values)}
    rewrite(root, "parameters", lambda t: pa.Table.from_pylist([*stored, other], t.schema))
    names = sorted([*(row["digest"] for row in stored), other["digest"]])
    resign(root, entry("parameters", digest=hashlib.sha256("\n".join(names).encode()).hexdigest()))

    def named(table):
        info = json.loads(table.schema.metadata[METADATA_KEY])
        info["transform"]["parameters"] = other["digest"]
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(info).encode()})

    rewrite(root, "prefix_16_int8", named)
    (told,) = problems(root)
    assert told.startswith("lancedb/prefix_16_int8.lance: row ")
    assert "has another code" in told


@pytest.mark.parametrize("name", ["documents", "prefix_16_float16"])
def test_a_missing_index_is_found(root, name):
    rewrite(root, name, same, index=False)
    told = problems(root)
    assert len(told) == (2 if name == "documents" else 1)
    assert all("which the generation promises" in sentence for sentence in told)


def test_an_incomplete_index_is_found(root):
    path = str(root / "lancedb" / "prefix_16_float16.lance")
    table = lance.dataset(path).to_table()
    rewrite(root, "prefix_16_float16", lambda t: t.slice(0, 100))
    lance.write_dataset(table.slice(100), path, mode="append")
    opened = lance.dataset(path)
    size = sum(file.file_size_bytes for one in opened.get_fragments() for file in one.metadata.files)
    digests = [[len(part), logical_digest(part)] for part in (table.slice(0, 100), table.slice(100))]
    told = {"digest": combined_digest([digest for _, digest in digests]), "parts": digests}
    resign(root, entry("prefix_16_float16", version=opened.version, rows=118, bytes=size, **told))
    assert problems(root) == ("lancedb/prefix_16_float16.lance: index vector_idx misses 18 rows",)


def test_deleted_rows_are_found(root):
    path = str(root / "lancedb" / "prefix_16_int8.lance")
    lance.dataset(path).delete("row = 5")
    resign(root, entry("prefix_16_int8", version=lance.dataset(path).version))
    assert any("has deleted rows" in sentence for sentence in problems(root))


def changed_quarantine(root, change):
    table = pq.read_table(root / "quarantine.parquet")
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), root / "quarantine.parquet")
    resign(root)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: [{**rows[0], "reason": "no_reason"}, rows[1]], "'no_reason' is no reason"),
        (lambda rows: rows[:1], "row 60 is in neither of them"),
        (lambda rows: [*rows, rows[0]], "row 7 is there more than once"),
        (lambda rows: [*rows, {**rows[0], "row": 0}], "row 0 is there more than once"),
        (lambda rows: [{**rows[0], "row": -1}, rows[1]], "row -1 is none of the corpus' 120 rows"),
    ],
)
def test_wrong_quarantine_is_found(root, change, told):
    changed_quarantine(root, change)
    assert any(told in sentence for sentence in problems(root)), problems(root)


ATTACKS = [
    "x" * 300 + "/..",
    "../outside",
    "/etc/passwd",
    "a/../../outside",
    "..\\outside",
    "C:evil",
    "file:///etc/passwd",
    "",
    "a//b",
    "./a",
]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_path_that_leads_out_is_refused_and_not_read(root, name, monkeypatch):
    (root.parent / "outside").write_text("secret")
    before = (root.parent / "outside").stat().st_mtime_ns
    resign(root, lambda generation: generation["files"].update({name: "0" * 64}))
    opened = []
    monkeypatch.setattr(verify._Files, "_digest", watching(verify._Files._digest, opened))
    (told,) = problems(root)
    assert told == f"generation 1 names {name!r}, which is no file below a root"
    assert name not in opened
    assert (root.parent / "outside").stat().st_mtime_ns == before


def watching(function, seen):
    def call(self, name):
        seen.append(name)
        return function(self, name)

    return call


def test_a_link_out_of_the_root_is_refused_and_not_touched(root, tmp_path):
    outside = tmp_path / "outside.parquet"
    shutil.move(root / "quarantine.parquet", outside)
    (root / "quarantine.parquet").symlink_to(outside)
    before = outside.stat().st_mtime_ns
    (told,) = problems(root)
    assert told == "quarantine.parquet is no plain file below the root"
    assert outside.stat().st_mtime_ns == before


def test_a_folder_that_is_a_link_is_refused(root, tmp_path):
    shutil.move(root / "parquet", tmp_path / "elsewhere")
    (root / "parquet").symlink_to(tmp_path / "elsewhere")
    told = problems(root)
    assert len(told) == 2
    assert all("is no plain file below the root" in sentence for sentence in told)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"null", b"{}", b'{"checksum": 1}', b"\xff\xfe", b'{"a": NaN}'])
def test_records_that_are_no_records_are_named(root, data):
    (root / "generations" / "1.json").write_bytes(data)
    assert verify.run(root).damaged == ("generations/1.json",)
    (root / "manifest.json").write_bytes(data)
    found = verify.run(root)
    assert set(found.damaged) == {"generations/1.json", "manifest.json"}
    assert found.generation == 0


def test_a_generation_of_a_job_that_was_given_up_is_void(root):
    void = {**manifest(root), "generation": 2, "fence": 0, "tables": {}}
    (root / "generations" / "2.json").write_bytes(to_json(signed(void)))
    found = verify.run(root)
    assert (found.generation, found.problems) == (1, ())


def test_a_stopped_later_run_is_no_damage(job, root):
    """It has made versions and records that no generation names yet."""
    other = job.model_copy(update={"transform": job.transform.model_copy(update={"kind": "none", "accept_loss": True})})
    assert run(other, last="derive") == {}
    found = verify.run(root)
    assert (found.problems, found.generation) == ((), 1)
    assert all("/_versions/" in name or "/_transactions/" in name for name in found.unknown)
    run(other)
    assert (verify.run(root).problems, verify.run(root).unknown) == ((), ())


DAMAGED = [
    "lancedb/documents.lance/data/", "lancedb/prefix_16_int8.lance/data/", "lancedb/prefix_16_float16.lance/data/",
    "lancedb/parameters.lance/data/", "lancedb/documents.lance/_versions/1",
    "lancedb/prefix_16_int8.lance/_versions/1", "lancedb/parameters.lance/_versions/1",
    "lancedb/documents.lance/_versions/latest", "lancedb/prefix_16_int8.lance/_transactions/",
    "lancedb/documents.lance/_indices/", "lancedb/prefix_16_float16.lance/_indices/", "_state/kept/",
    "kept: quarantine.parquet", "kept: evaluation.parquet", "_state/embed/0", "_state/embed/sealed", "_state/merge/",
    "_state/fit/pca", "_state/fit/decision", "_state/derive/prefix_16_int8", "_state/corpus/", "_state/parameters/",
    "_state/parquet/", "_state/stamps.json", "_state/job.json", "_state/job.copy.json", "generations/1.json",
    "manifest.json", "parquet/documents/part-0000001.parquet", "quarantine.parquet", "evaluation.parquet",
    "rankings.parquet", "examples.parquet",
]  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "delete"])
@pytest.mark.parametrize("start", DAMAGED)
def test_the_next_run_mends_what_was_damaged(job, root, start, damage):
    before = {name: entry["digest"] for name, entry in manifest(root)["tables"].items()}
    start = f"_state/kept/{manifest(root)['files'][start[6:]]}" if start.startswith("kept: ") else start
    names = [name for name in flips.committed(root) if name.startswith(start)]
    name = random.Random(start).choice(names)
    data = (root / name).read_bytes()
    if damage == "delete":
        (root / name).unlink()
    else:
        (root / name).write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    if damage == "flip" or name != "_state/stamps.json":
        assert verify.run(root).damaged == (name,)
    run(job)
    found = verify.run(root)
    assert (found.problems, found.unknown) == ((), ())
    assert {name: entry["digest"] for name, entry in manifest(root)["tables"].items()} == before
