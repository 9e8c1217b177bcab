"""Few fragments: shards are joined in row order, once; their files go; what is damaged costs its own group."""

from pathlib import Path

import lance
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline import derive, embed, export, merge, run, standing, storage, store, verify
from pipeline.embedder import Embedder
from pipeline.errors import DamageError
from pipeline.ledger import Ledger
from pipeline.sources import Shard
from pipeline.storage import Root
from tests.conftest import WORDS, corpus_frame
from tests.seam import flipped

DOCUMENTS = "lancedb/documents.lance"


@pytest.fixture
def job(spec, monkeypatch):
    """120 rows in shards of 20; fragments of at most 50 rows: three groups of two shards."""
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    return spec(corpus__shard_rows=20, embed__parquet=True, corpus__filter=["lang"])


@pytest.fixture
def embedded(monkeypatch):
    """Numbers of the shards that go through the model."""
    seen, real = [], Embedder._embed
    monkeypatch.setattr(Embedder, "_embed", lambda self, work: seen.append(work.shard.number) or real(self, work))
    return seen


@pytest.fixture
def merged(monkeypatch):
    """Names of the groups that are merged."""
    seen, real = [], merge.Merger._merge
    monkeypatch.setattr(merge.Merger, "_merge", lambda self, work: seen.append(work.name) or real(self, work))
    return seen


def fragments(root, name):
    """Rows of each fragment of a table, in order."""
    opened = lance.dataset(f"{root}/lancedb/{name}.lance").get_fragments()
    return [one.to_table(columns=["row"])["row"].to_pylist() for one in opened]


def data_files(root):
    return {path.name for path in Path(root, DOCUMENTS, "data").iterdir()}


def shards(*rows):
    return [Shard(number, sum(rows[:number]), count, ()) for number, count in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "joined"),
    [
        ((), []),
        ((4, 4, 2), [[0, 1, 2]]),
        ((4, 4, 3), [[0, 1], [2]]),
        ((12, 4, 12), [[0], [1], [2]]),
        ((4, 4, 4, 4, 1), [[0, 1], [2, 3, 4]]),
    ],
)
def test_neighbours_are_joined_up_to_the_rows_of_a_fragment(monkeypatch, rows, joined):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 10)
    assert [[shard.number for shard in group.shards] for group in merge.groups(shards(*rows))] == joined


@pytest.mark.parametrize(
    ("rows", "shard_rows", "done", "twice"),
    [
        (24, 4, 0, 8),  # shards of 4, two to a fragment: three groups
        (24, 4, 2, 8),
        (24, 4, 3, 0),
        (20, 4, 2, 0),  # the last shard stays alone
        (21, 4, 2, 8),
        (6, 4, 0, 6),
        (4, 4, 0, 0),
        (100, 11, 0, 0),
        (0, 4, 0, 0),
    ],
)
def test_room_for_one_more_copy_of_a_group_while_any_is_left(tmp_path, monkeypatch, rows, shard_rows, done, twice):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 10)
    root = Root(tmp_path, fence=1)
    for number in range(done):
        Ledger(root, "merge").add(str(number), {})
    assert merge.room(root, rows, shard_rows) == twice


def test_tables_have_few_fragments_in_row_order_and_keep_their_digests(job, spec, monkeypatch, tmp_path):
    generation = run(job)
    for name in ("documents", "prefix_8_binary", "prefix_16_int8", "prefix_16_float16"):
        assert fragments(job.root, name) == [list(range(at, at + 40)) for at in (0, 40, 80)]
    named = {name.rpartition("/")[2] for name in generation["files"] if name.startswith(f"{DOCUMENTS}/data/")}
    assert data_files(job.root) == named and len(named) == 3  # nothing of the shards is left
    assert len(list(Path(job.root, "parquet/documents").iterdir())) == 3
    assert verify.run(Path(job.root)).unknown == () and verify.run(Path(job.root)).is_whole
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 1)
    alone = run(spec(corpus__shard_rows=20, corpus__filter=["lang"], root=str(tmp_path / "alone")))
    assert len(fragments(tmp_path / "alone", "documents")) == 6
    for field in ("digest", "parts", "rows"):
        assert generation["tables"]["documents"][field] == alone["tables"]["documents"][field]
    both = [lance.dataset(f"{root}/{DOCUMENTS}").to_table() for root in (job.root, tmp_path / "alone")]
    assert both[0] == both[1]
    assert (alone["embed"]["merge_seconds"], alone["embed"]["merged_bytes"]) == (0, 0)
    assert generation["embed"]["merge_seconds"] > 0
    assert generation["embed"]["merged_bytes"] == generation["tables"]["documents"]["bytes"]


def test_a_group_of_one_stays_as_its_worker_wrote_it(spec, monkeypatch, merged):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 100)
    generation = run(spec(corpus__shard_rows=50))
    assert [len(rows) for rows in fragments(generation["spec"]["root"], "documents")] == [100, 20]
    assert merged == ["0000000-0000001"]
    (path,) = Ledger(Root(Path(generation["spec"]["root"])), "embed").slot("0000002").done["files"]
    assert f"{DOCUMENTS}/data/{path}" in generation["files"]
    assert generation["embed"]["merged_bytes"] < generation["tables"]["documents"]["bytes"]


def test_every_value_and_null_survives_and_no_batch_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "READ_ROWS", 7)
    root = Root(tmp_path / "root", fence=1)
    storage.prepare(root)
    vectors = np.arange(80, dtype=np.float16).reshape(20, 4)
    vectors[3] = [np.nan, np.inf, -0.0, 6e-8]
    columns = {
        "row": pa.array(range(20)),
        "id": pa.array([f"é{number}" for number in range(20)]),
        "text": pa.array([None if number % 3 else "a" * number for number in range(20)]),
        "year": pa.array([None if number % 2 else number for number in range(20)], pa.int16()),
        "share": pa.array([None, float("nan"), *[0.1] * 18]),
        "flag": pa.array([None, True, *[False] * 18]),
        "tags": pa.array(
            [None, [], ["a", None], *[["b"] * (number % 4) for number in range(17)]], pa.list_(pa.string())
        ),
        "when": pa.array([None, *range(19)], pa.timestamp("us", "UTC")),
        "place": pa.array([None, *[{"x": number, "y": None} for number in range(19)]]),
        "text_digest": pa.array([bytes([number] * 16) for number in range(20)], pa.binary(16)),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4),
    }
    whole = pa.table(columns)
    schema = whole.schema.with_metadata({b"matryoshka": b"{}"})
    book, places = Ledger(root, "embed"), ((0, 9), (9, 9), (9, 20))  # the shard in the middle has no row
    for number, (start, stop) in enumerate(places):
        written = store.write_fragments(root, "documents", whole.slice(start, stop - start), schema, f"embed/{number}")
        book.add(str(number), {"rows": stop - start, **written.to_json()})
    files = [path for number in range(3) for path in book.slot(str(number)).done["files"]]
    batches = list(store.Stored([root / store.data_name("documents", one) for one in files], 20).reader(schema))
    assert [batch.num_rows for batch in batches] == [7, 2, 7, 4]
    record = merge.Merger(root, 1)(merge.Work("0", ("0", "1", "2"), schema))
    assert len(record["files"]) == len(record["fragments"]) == 1 and record["rows"] == 20
    store.commit(root, "documents", schema, record["fragments"])
    opened = lance.dataset(str(root / DOCUMENTS))
    assert opened.schema.metadata == schema.metadata and opened.data_storage_version == store.LANCE_FORMAT
    again = opened.to_table()
    assert [repr(again[name].to_pylist()) for name in columns] == [repr(whole[name].to_pylist()) for name in columns]
    assert again["vector"].combine_chunks().flatten().to_numpy().tobytes() == vectors.tobytes()


def stops(monkeypatch, module, name, times=1):
    """A function fails so many times, after it did its work."""
    left, real = [times], getattr(module, name)

    def stopped(*arguments, **options):
        result = real(*arguments, **options)
        left[0] -= 1
        if left[0] >= 0:
            raise KeyboardInterrupt(name)
        return result

    monkeypatch.setattr(module, name, stopped)


@pytest.mark.parametrize(
    ("module", "name", "again"),
    [
        (store, "write_fragments", 3),  # a shard's file was written, its record not
        (merge.Merger, "_merge", 3),  # a group's file was written, its record not
        (merge, "_drop_shards", 2),  # the first group was merged, the files of its shards deleted
        (merge, "run", 0),
        (embed, "_sealed", 0),
        (store, "commit", 0),
    ],
)
def test_a_run_that_stops_goes_on_where_it_was(job, spec, tmp_path, monkeypatch, embedded, merged, module, name, again):
    golden = run(spec(**job.model_dump(exclude={"root"}), root=str(tmp_path / "golden")))
    embedded.clear()
    merged.clear()
    stops(monkeypatch, module, name)
    with pytest.raises(KeyboardInterrupt, match=name):
        run(job)
    merged.clear()
    generation = run(job)
    assert sorted(embedded) == sorted([*range(6), *[0] * (name == "write_fragments")])
    assert len(merged) == again
    for table in golden["tables"]:
        assert generation["tables"][table]["digest"] == golden["tables"][table]["digest"]
    assert len(data_files(job.root)) == 3 and verify.run(Path(job.root)).is_whole
    assert not Root(Path(job.root)).names(store.MOVES)


def test_a_run_that_stops_while_shards_are_deleted_embeds_none_again(job, monkeypatch, embedded):
    real, deleted = storage.Disk.delete, []

    def delete(disk, path):
        if path.parent.name == "data":
            deleted.append(path)
            if len(deleted) == 2:
                raise KeyboardInterrupt
        real(disk, path)

    monkeypatch.setattr(storage.Disk, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert len(data_files(job.root)) == 6  # five shards and what two of them were merged to
    run(job)
    assert sorted(embedded) == list(range(6)) and len(data_files(job.root)) == 3


def wound(path, how):
    if how == "flip":
        path.write_bytes(flipped(path.read_bytes(), 800))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_damaged_fragment_costs_the_shards_of_its_group_only(job, embedded, how):
    first = run(job)
    opened = lance.dataset(f"{job.root}/{DOCUMENTS}")
    before = opened.to_table()
    path = Path(job.root, DOCUMENTS, "data", opened.get_fragments()[1].metadata.files[0].path)
    embedded.clear()
    wound(path, how)
    again = run(job)
    assert embedded == [2, 3]
    assert lance.dataset(f"{job.root}/{DOCUMENTS}").to_table() == before
    assert again["tables"]["documents"]["digest"] == first["tables"]["documents"]["digest"]
    assert len(data_files(job.root)) == 3 and verify.run(Path(job.root)).is_whole
    assert run(job)["generation"] == again["generation"] and embedded == [2, 3]


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_shard_that_is_damaged_before_it_is_merged_is_embedded_again(job, monkeypatch, embedded, how):
    stops(monkeypatch, embed, "_check_budget")
    with pytest.raises(KeyboardInterrupt):
        run(job)
    (name,) = Ledger(Root(Path(job.root)), "embed").slot("0000003").done["files"]
    embedded.clear()
    wound(Path(job.root, DOCUMENTS, "data", name), how)
    if how == "flip":
        with pytest.raises(DamageError, match="is not what was written; it was set aside, run again to redo its rows"):
            run(job)
    run(job)
    assert embedded == [3] and verify.run(Path(job.root)).is_whole


def test_a_shard_that_goes_while_it_is_merged_is_told(job, monkeypatch):
    real = store.check_files

    def check_files(root, table, files):
        (root / store.data_name(table, next(iter(files)))).unlink()
        real(root, table, files)

    monkeypatch.setattr(store, "check_files", check_files)
    with pytest.raises(DamageError, match=r"\.lance is gone; run again to redo its rows"):
        run(job)


def test_a_merge_stands_without_the_records_of_its_shards(job, monkeypatch):
    first = run(job)
    root = Root(Path(job.root))
    for name in root.names("_state/embed"):
        root.delete(f"_state/embed/{name}")
    for worker in ((embed, "Embedder"), (merge, "Merger")):
        monkeypatch.setattr(*worker, lambda *arguments: pytest.fail("work was done again"))
    again = run(job)
    assert again["tables"] == first["tables"] and again["embed"] == first["embed"]


def test_shards_that_are_not_merged_yet_are_unfinished_work(job, monkeypatch):
    stops(monkeypatch, embed, "_check_budget")
    with pytest.raises(KeyboardInterrupt):
        run(job)
    root = Root(Path(job.root))
    assert len(embed.finished(root)) == 6 and standing.run(root)["embed"] == "unfinished"
    run(job)
    assert standing.run(root)["embed"] == "done"


def test_a_merge_that_is_done_is_not_done_again(tmp_path):
    root = Root(tmp_path / "root", fence=1)
    storage.prepare(root)
    standing = Ledger(root, "merge").add("0", {"group": "0", "rows": 1})
    assert merge.Merger(root, 1)(merge.Work("0", ("0", "1"), pa.schema([]))) == standing
    with pytest.raises(AssertionError, match="0 has no record"):
        merge.Merger(root, 1)(merge.Work("1", ("0", "1"), pa.schema([])))


def test_shards_go_only_when_the_merge_is_on_disk_for_sure(job, monkeypatch):
    steps, disk = [], storage.Disk
    for name in ("delete", "sync_folder", "link"):
        real = getattr(disk, name)

        def spied(self, *paths, real=real, name=name):
            steps.append((name, paths[-1].parent.name, paths[-1].name))
            real(self, *paths)

        monkeypatch.setattr(disk, name, spied)
    run(job)
    deletes = [at for at, (name, folder, _) in enumerate(steps) if (name, folder) == ("delete", "data")]
    assert len(deletes) == 6
    for at in deletes:
        made = max(i for i, step in enumerate(steps[:at]) if step[:2] == ("link", "merge"))
        assert ("sync_folder", "_state", "merge") in steps[made:at]
    sealed = next(at for at, step in enumerate(steps) if step[0] == "link" and step[2].startswith("sealed-"))
    assert deletes[-1] < sealed and ("sync_folder", "documents.lance", "data") in steps[deletes[-1] : sealed]


def test_codes_are_put_by_in_parts_and_end_in_one_fragment(spec, monkeypatch, tmp_path):
    whole = run(spec(root=str(tmp_path / "whole")))
    monkeypatch.setattr(derive, "PART_ROWS", 32)
    monkeypatch.setattr(derive, "BATCH_ROWS", 10)
    parts = run(spec())
    for name in ("prefix_8_binary", "prefix_16_int8", "prefix_16_float16"):
        assert [rows for rows, _ in parts["tables"][name]["parts"]] == [30, 30, 30, 30]
        assert len(whole["tables"][name]["parts"]) == 1
        both = [lance.dataset(f"{one['spec']['root']}/lancedb/{name}.lance") for one in (whole, parts)]
        assert len(both[1].get_fragments()) == 1 and both[0].to_table() == both[1].to_table()
    root = Path(parts["spec"]["root"])
    assert verify.run(root).is_whole and not list(root.glob("_state/drafts/*/*"))


def test_row_groups_have_the_same_size_however_rows_come(monkeypatch):
    monkeypatch.setattr(export, "GROUP_ROWS", 4)
    schema = pa.schema([("row", pa.int64())])
    batches = [pa.record_batch([pa.array(range(*ends))], schema=schema) for ends in ((0, 3), (3, 12), (12, 13))]
    found = [group["row"].to_pylist() for group in export.groups(batches, schema)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]


def test_quarantined_rows_of_merged_shards_are_kept(job, spec, tmp_path):
    texts = ["broken" if number in (5, 25, 119) else f"{WORDS[number]} w001" for number in range(120)]
    path = tmp_path / "some.parquet"
    corpus_frame().with_columns(pl.Series("text", texts)).write_parquet(path)
    generation = run(spec(corpus={**job.corpus.model_dump(), "source": str(path), "text": "text"}))
    assert generation["corpus"]["quarantined"] == 3
    assert [len(rows) for rows in fragments(job.root, "documents")] == [38, 40, 39]
    assert verify.run(Path(job.root)).is_whole


def test_slots_name_the_merge_or_the_only_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 10)
    root, grouped = Root(tmp_path, fence=1), merge.groups(shards(4, 4, 4))
    assert merge.newest(root, grouped) == ["merge/0000000-0000001", "0000002"]
    for stage, name in (("embed", "0000000~2"), ("embed", "0000002~1"), ("merge", "0000000-0000001~3")):
        Ledger(root, stage).add(name, {})
    assert merge.newest(root, grouped) == ["merge/0000000-0000001~3", "0000002~1"]


def test_other_groups_than_before_take_no_merge_for_theirs(job, monkeypatch, embedded):
    first = run(job)
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 70)
    again = run(job)
    assert [len(rows) for rows in fragments(job.root, "documents")] == [60, 60]
    assert sorted(embedded) == sorted([*range(6)] * 2)
    assert again["tables"]["documents"]["digest"] == first["tables"]["documents"]["digest"]
