"""Lance's files through the ledger: commits, clean-up, repair, a worker, and whole jobs that others disturb."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lance
import pyarrow as pa
import pytest

from pipeline import embed, index, ledger, lock, repair, run, storage, store
from pipeline.embedder import Embedder, Work
from pipeline.errors import DamageError, DataError, LockedError
from pipeline.ledger import Ledger
from pipeline.lock import Owner
from pipeline.sources import Shard
from pipeline.storage import ASIDE, Disk, Root, read_signed, signed, to_json
from tests.seam import flipped, simulated

ELSEWHERE = Owner("elsewhere", "", 1, "")


@pytest.fixture
def root(tmp_path):
    made = Root(tmp_path / "root", fence=1)
    storage.prepare(made)
    return made


# Lance's files

SCHEMA = pa.schema([("row", pa.int64())])


def fragments(root, *rows, record="embed/0"):
    """One fragment of these rows, which no reader sees."""
    return store.write_fragments(root, "t", pa.table({"row": pa.array(rows, pa.int64())}), SCHEMA, record)


def rows(root):
    return lance.dataset(str(root / "lancedb/t.lance")).to_table()["row"].to_pylist()


def test_a_commit_is_made_once_and_made_again_where_others_changed_the_table(root):
    one, two = fragments(root, 1, 2), fragments(root, 3)
    both = [*one.fragments, *two.fragments]
    first = store.commit(root, "t", SCHEMA, one.fragments)
    assert store.commit(root, "t", SCHEMA, one.fragments) == first and rows(root) == [1, 2]
    second = store.commit(root, "t", SCHEMA, both)
    assert second > first and rows(root) == [1, 2, 3]
    assert [store.holds(root, "t", at, both) for at in (first, second)] == [False, True]
    lance.dataset(str(root / "lancedb/t.lance")).delete("row < 2")
    assert not store.holds(root, "t", second + 1, both)
    third = store.commit(root, "t", SCHEMA, both)
    assert rows(root) == [1, 2, 3] and third == second + 2
    assert store.commit(root, "t", SCHEMA, both, afresh=True) == third + 1


@pytest.mark.parametrize("landed", [True, False])
def test_the_reply_of_a_commit_may_be_lost(root, monkeypatch, landed):
    written, real = fragments(root, 1), store._overwrite

    def overwrite(*arguments):
        if landed:
            real(*arguments)
        raise OSError("lost")

    monkeypatch.setattr(store, "_overwrite", overwrite)
    if landed:
        assert store.commit(root, "t", SCHEMA, written.fragments) == 1 and rows(root) == [1]
    else:
        with pytest.raises(OSError, match="lost"):
            store.commit(root, "t", SCHEMA, written.fragments)


def test_rows_that_lance_did_not_write_are_missed(root, monkeypatch):
    monkeypatch.setattr(store, "lance_write_fragments", lambda *_, **__: [SimpleNamespace(physical_rows=1)])
    with pytest.raises(OSError, match="Lance wrote 1 of 2 rows"):
        fragments(root, 1, 2)
    assert root.names(store.MOVES) == []


def test_files_are_noted_before_they_are_moved(root):
    class Looking(Disk):
        def replace(self, source, target):
            notes = [read_signed(root, f"{store.MOVES}/{name}") for name in root.names(store.MOVES)]
            seen.append([note["files"] for note in notes] == [[target.name]])
            super().replace(source, target)

    seen = []
    fragments(replace(root, disk=Looking()), 1)
    assert seen == [True]


@pytest.mark.parametrize("wound", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_no_commit_names_a_file_that_is_gone_or_cut_short(root, wound):
    written = fragments(root, 1)
    (path,) = (root / "lancedb/t.lance/data").iterdir()
    wound(path)
    assert not store.is_whole(root, "t", written.fragments)
    with pytest.raises(DamageError, match="gone or cut short; run the job again"):
        store.commit(root, "t", SCHEMA, written.fragments)


def test_a_damaged_data_file_is_set_aside(root):
    written = fragments(root, 1)
    store.check_files(root, "t", written.files)
    ((path, digest),) = written.files.items()
    name = store.data_name("t", path)
    (root / name).write_bytes(flipped(root.read(name), 40))
    with pytest.raises(DamageError, match="it was set aside, run again to redo its rows"):
        store.check_files(root, "t", written.files)
    assert root.size(name) is None and len(root.names(ASIDE)) == 1


def test_only_files_that_a_standing_record_does_not_name_are_dropped(root):
    book = Ledger(root, "embed")
    lost, kept, open_ = fragments(root, 1), fragments(root, 2), fragments(root, 3, record="embed/1")
    store.drop_leftovers(root)
    assert len(root.names("lancedb/t.lance/data")) == 3  # no record stands yet
    book.add("0", kept.to_json())
    late = root / store.data_name("t", *lost.files)
    away = late.rename(root.path / "away")
    store.drop_leftovers(root)
    assert len(root.names(store.MOVES)) == 2  # of the open one, and of what may still be moved in
    away.rename(late)
    store.drop_leftovers(root)
    assert {*root.names("lancedb/t.lance/data")} == {*kept.files, *open_.files} and len(root.names(store.MOVES)) == 1


def test_a_note_goes_only_when_its_files_are_gone_for_sure():
    root = simulated()
    note = {"table": "t", "files": ["x"], "record": "embed/0"}
    root.create(f"{store.MOVES}/1.json", to_json(signed(note)))
    root.write("lancedb/t.lance/data/x", b"rows")
    Ledger(root, "embed").add("0", {"files": {"y": ""}})
    folder, records = (root.disk._folder(root / name) for name in ("lancedb/t.lance/data", "_state/embed"))
    records.durable, records.pending = {}, list(records.names.items())  # as a worker leaves it in the middle
    deleted, delete = [], root.disk.delete
    root.disk.delete = lambda path: (deleted.append((path.name, *folder.durable, *records.durable)), delete(path))
    store.drop_leftovers(root)
    assert deleted == [("x", "x", "0.json"), ("1.json", "0.json")]


def test_what_was_damaged_is_set_aside_before_a_run(root):
    names = ("lancedb/t.lance/data/a", "lancedb/u.lance/data/b", "parquet/c")
    for name in names:
        root.write(name, b"bytes")
    files = {name: storage.sha256(root / name) for name in (*names, "lancedb/gone.lance/data/d") if root.size(name)}
    digest = root.keep(b"kept")
    Ledger(root, "embed").add("0", {"rows": 1})
    published = ledger.publish(root, {"files": files, "copies": []})
    assert repair.run(root) == set()
    repair.remember(root)
    for name in ("lancedb/t.lance/data/a", "parquet/c", f"_state/kept/{digest}", "_state/embed/0.json"):
        data = root.read(name)
        (root / name).write_bytes(data[:-1])
    (root / "lancedb/u.lance/data/b").unlink()
    assert repair.run(root) == {"t", "u"} and len(root.names(ASIDE)) == 4
    assert ledger.newest_generation(root) == published
    (root / "generations/1.json").write_bytes(b"")
    assert repair.run(root) == set() and ledger.newest_generation(root) is None


# A worker


class Worker(Embedder):
    """Without a model."""

    def __init__(self, root):
        self._root, self._reading = root, lambda work, *values: (work(*values), 0.0)

    def encoder(self, facts):
        return None

    def _read(self, shard):
        return iter([])


def test_a_shard_that_is_done_is_not_done_again(root):
    Ledger(root, "embed").add("0000000", {"rows": 1})
    work = Work(Shard(0, 0, 2, ()), SimpleNamespace(precision="float32"), "0000000")
    assert Worker(root)(work) == {"rows": 1}


def test_a_shard_that_has_other_rows_than_when_it_was_scanned_is_refused(root):
    work = Work(Shard(0, 0, 2, ()), SimpleNamespace(precision="float32"), "0000000")
    with pytest.raises(
        DataError, match="shard 0000000 had 2 rows when it was scanned and has 0 now; the corpus changed"
    ):
        Worker(root)(work)


# Whole jobs


class Synced:
    """What is on disk for sure: each file's bytes and each folder's names when they were last synced."""

    def __init__(self, patch):
        self.known, self.real = {}, storage._fsync
        patch.setattr(storage, "_fsync", self.fsync)

    def fsync(self, path):
        self.real(path)
        names = {one.name: one.stat().st_ino for one in path.iterdir()} if path.is_dir() else path.read_bytes()
        self.known[path.stat().st_ino] = names

    def missing(self, folder):
        """Files and folders that a power cut may lose or tear."""
        found = [path for path in folder.rglob("*") if storage.DRAFTS not in path.as_posix()]
        named = self.known.get
        return [
            path for path in found
            if named(path.parent.stat().st_ino, {}).get(path.name) != path.stat().st_ino
            or (path.is_file() and named(path.stat().st_ino) != path.read_bytes())
        ]  # fmt: skip


def test_everything_is_on_disk_before_what_names_it(spec, monkeypatch):
    synced, real, looked = Synced(monkeypatch), Disk.link, []

    def link(disk, source, target):
        root = Path(job.root)
        if target.parent.name == "generations":
            looked.append("generation")
            assert not synced.missing(root)
        elif target.suffix == ".json":
            assert not [path for path in synced.missing(root) if "data" in path.parts]
        real(disk, source, target)

    monkeypatch.setattr(Disk, "link", link)
    job = spec(prefixes=[{"dim": 16, "precision": "float16", "index": {"kind": "ivf_flat"}}])
    newest = run(job)
    assert looked == ["generation"] and not synced.missing(Path(job.root))
    assert json.loads(Path(job.root, "manifest.json").read_text()) == newest


@pytest.fixture
def during(monkeypatch):
    """Do something just after a function of `pipeline` returned."""

    def patch(module, name, act):
        real = getattr(module, name)

        def patched(*arguments, **options):
            result = real(*arguments, **options)
            return act(result) or result

        monkeypatch.setattr(module, name, patched)

    return patch


def test_a_job_that_was_overtaken_publishes_nothing(spec, during):
    job = spec()
    root = Root(Path(job.root))
    claim = to_json(signed({**vars(ELSEWHERE), "presumed_dead": False}))
    during(repair, "table_files", lambda _: root.create("_state/locks/7.json", claim) and None)
    with pytest.raises(LockedError, match="process 1 on elsewhere"):
        run(job)
    assert ledger.newest_generation(root) is None


def test_a_table_that_others_changed_meanwhile_is_not_published(spec, during):
    job = spec()

    def change(indexed):
        documents = lance.dataset(f"{job.root}/lancedb/documents.lance")
        documents.delete("row < 5")
        return {**indexed, "documents": replace(indexed["documents"], version=documents.version)}

    during(index, "run", change)
    with pytest.raises(DamageError, match="documents: another job changed it meanwhile; run again"):
        run(job)


def test_after_a_takeover_from_elsewhere_the_same_is_published_under_the_higher_number(spec, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0)
    job = spec()
    assert [run(job)["generation"] for _ in range(2)] == [1, 1]
    held = lock.take(Root(Path(job.root)), ELSEWHERE)
    again = run(job)
    assert again["generation"] == 2 and again["fence"] > held.fence
    assert run(job)["generation"] == 2


def test_damage_is_mended_and_what_is_whole_starts_no_model(spec, monkeypatch):
    job = spec(corpus__shard_rows=50)
    first = run(job)
    root = Root(Path(job.root))
    before = lance.dataset(str(root / "lancedb/documents.lance")).to_table()
    path = min((root / "lancedb/documents.lance/data").iterdir())
    path.write_bytes(flipped(path.read_bytes(), 800))
    again = run(job)
    assert again["tables"]["documents"]["digest"] == first["tables"]["documents"]["digest"]
    assert lance.dataset(str(root / "lancedb/documents.lance")).to_table() == before
    for name in root.names("_state/embed"):
        if name.startswith("sealed"):
            root.delete(f"_state/embed/{name}")
    monkeypatch.setattr(embed, "Embedder", lambda *arguments: pytest.fail("a model was loaded"))
    assert run(job)["tables"] == again["tables"]


@pytest.mark.parametrize("reader", ["fit", "derive"])
def test_nothing_is_made_of_damaged_vectors(spec, reader):
    job = spec()
    root = Root(Path(run(job)["spec"]["root"]))
    fitted = root.names("_state/fit")
    (path,) = (root / "lancedb/documents.lance/data").iterdir()
    before = path.stat()
    path.write_bytes(flipped(path.read_bytes(), 800))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that only the vectors' reader can tell
    if reader == "derive":
        (path,) = (root / "lancedb/prefix_16_float16.lance/data").iterdir()
        path.unlink()
    with pytest.raises(DamageError, match="documents.lance/data/.* is not what was written; it was set aside"):
        run(job if reader == "derive" else spec(seed=5))
    assert root.names("_state/fit") == fitted
