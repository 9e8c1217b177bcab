"""The storage seam and the lock, by hand: real files, and a simulated disk where the power goes."""

import ast
import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pipeline import lock, storage
from pipeline.errors import DamageError, LockedError, SpecError
from pipeline.lock import Owner
from pipeline.storage import ASIDE, DRAFTS, KEPT, Disk, Root, read_signed, signed, to_json
from tests.faults import crash_states
from tests.seam import Quicker, flipped, simulated

ELSEWHERE = Owner("elsewhere", "", 1, "")
NAMES_THAT_LEAD_OUT = [
    "../x", "/etc/x", "a/../b", "a//b", "a/", "./a", ".", "..", "", "a\\b", "C:x", "s3://b/x", "a\0b",
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    made = Root(tmp_path / "root", fence=1)
    storage.prepare(made)
    return made


def drafts(root):
    return [path for path in (root.path / DRAFTS).rglob("*") if path.is_file()]


# The seam


def test_a_file_is_written_replaced_and_deleted(root):
    root.write("a/b/c.txt", b"one")
    assert (root.path / "a/b/c.txt").read_bytes() == b"one" == root.read("a/b/c.txt")
    root.write("a/b/c.txt", b"four")
    assert (root.read("a/b/c.txt"), root.size("a/b/c.txt"), root.names("a/b")) == (b"four", 4, ["c.txt"])
    root.delete("a/b/c.txt")
    root.delete("a/b/c.txt")
    assert (root.read("a/b/c.txt"), root.size("a/b/c.txt"), root.names("a/b")) == (None, None, [])
    root.write("plain", b"")
    assert root.read("plain/below") is None and root.names("plain/below") == [] and root.names("nowhere") == []
    assert not drafts(root)


def test_a_file_is_made_once(root):
    assert root.create("a.json", b"first") and not root.create("a.json", b"second")
    assert root.read("a.json") == b"first" and not drafts(root)


def test_bytes_are_kept_under_their_sha256_and_mended_when_kept_again(root):
    digest = root.keep(b"bytes")
    assert digest == "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9" == root.keep(b"bytes")
    assert root.kept(digest) == b"bytes" and root.has(digest) and not root.has("0" * 64)
    (root.path / KEPT / digest).write_bytes(b"bytez")
    assert not root.has(digest)
    with pytest.raises(DamageError, match=f"{digest} is not what was written; run the job again"):
        root.kept(digest)
    root.keep(b"bytes")
    assert root.kept(digest) == b"bytes"
    with pytest.raises(DamageError):
        root.kept("0" * 64)


def test_a_draft_is_adopted_or_kept_and_what_is_left_is_dropped_by_number(root):
    folder, other = root.draft_folder(), replace(root, fence=2).draft_folder()
    for name in ("one", "two", "three"):
        (folder / name).write_bytes(name.encode())
    (other / "four").write_bytes(b"four")
    root.adopt(folder / "one", "data/one")
    digest = root.keep_file(folder / "two")
    assert root.read("data/one") == b"one" and root.kept(digest) == b"two"
    assert [path.name for path in folder.iterdir()] == ["three"]
    root.drop_drafts(1)
    assert not folder.exists() and (other / "four").exists()
    nobody = replace(root, fence=0)
    draft = nobody._draft(b"x")
    root.drop_drafts(0)
    assert not draft.exists() and draft.parent.exists()  # others may be about to use it


def test_what_is_damaged_is_set_aside(root):
    root.write("a/x.bin", b"damaged")
    root.write("b/x.bin", b"also")
    root.set_aside("a/x.bin")
    root.set_aside("b/x.bin")
    assert root.read("a/x.bin") is None
    assert sorted(root.read(f"{ASIDE}/{name}") for name in root.names(ASIDE)) == [b"also", b"damaged"]


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_OUT)
@pytest.mark.parametrize("call", ["write", "create", "read", "size", "names", "delete", "set_aside", "adopt"])
def test_names_that_lead_out_are_refused(root, name, call, tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    more = {"write": (b"",), "create": (b"",)}.get(call, ())
    arguments = (tmp_path / "x", name) if call == "adopt" else (name, *more)
    with pytest.raises(DamageError, match="no name of a file below a root"):
        getattr(root, call)(*arguments)
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_nothing_is_deleted_through_a_link(root, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x").write_bytes(b"mine")
    (root.path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DamageError, match="by a link; nothing was deleted"):
        root.delete("link/x")
    folder = root.draft_folder()
    (folder / "link").symlink_to(tmp_path / "outside/x")
    root.drop_drafts(1)
    assert (tmp_path / "outside/x").read_bytes() == b"mine"


@pytest.mark.parametrize("path", ["s3://bucket/x", "plain/root"])
def test_a_root_that_cannot_be_written_is_refused(tmp_path, path):
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(SpecError, match="object stores are named by a text|cannot write to root"):
        storage.prepare(Root(Path(path) if "://" in path else tmp_path / path))


class Failing(Disk):
    """Fails at one kind of step, before it is done."""

    def __init__(self, step):
        self.step = step

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "step"):
            return lambda *arguments: self.fail(name, *arguments)
        return object.__getattribute__(self, name)

    def fail(self, name, path, data=b""):
        if name == "put":
            path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "no space", str(path))


@pytest.mark.parametrize(
    ("call", "step"), [(call, step) for call in ("write", "create", "keep") for step in ("put", "sync")]
    + [("create", "link"), ("write", "replace"), ("keep", "replace")],
)  # fmt: skip
def test_an_error_leaves_nothing_half_made(root, call, step):
    failing = replace(root, disk=Failing(step))
    with pytest.raises(OSError, match="no space"):
        failing.keep(b"data") if call == "keep" else getattr(failing, call)("a/x", b"data")
    assert root.names("a") == [] and root.names(KEPT) == []
    if step == "replace":
        root.drop_drafts(1)
    assert not drafts(root)


@pytest.mark.parametrize("step", ["sync", "replace"])
def test_one_without_a_number_writes_on_while_a_job_takes_the_root(root, step, monkeypatch):
    real, taken = getattr(Disk, step), []

    def once(disk, *arguments):
        if not taken:
            taken.append(root.drop_drafts(0))
        real(disk, *arguments)

    monkeypatch.setattr(Disk, step, once)
    replace(root, fence=0).write("report.html", b"page")
    assert taken and root.read("report.html") == b"page" and not drafts(root)


@pytest.mark.parametrize("case", crash_states.CASES)
def test_a_power_cut_leaves_what_was_there_before_or_after(case):
    found = crash_states.enumerate_states(*crash_states.CASES[case])
    assert found["states"] > 10 and not found["wrong"]


def test_what_was_moved_is_durable():
    root = simulated()

    def durable(name):
        return Path(name).name in root.disk._folder(root / str(Path(name).parent)).durable

    draft = root._draft(b"one")
    root.adopt(draft, "data/one")
    assert durable("data/one")
    root.disk._folder(root / "data").names["two"] = root.disk._folder(root / "data").names["one"]
    root.disk._folder(root / "data").durable["two"] = root.disk._folder(root / "data").names["one"]
    root.set_aside("data/two")
    assert not durable("data/two")
    digest = root.keep(b"kept")
    held = root.disk._folder(root / KEPT)
    held.durable, held.pending = {}, [(digest, held.names[digest])]  # as another process leaves it in the middle
    assert root.keep(b"kept") == digest and durable(f"{KEPT}/{digest}")


def test_new_folders_are_on_disk_before_their_files(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(storage, "_fsync", lambda path: calls.append(path))
    Disk().make_folder(tmp_path / "a/b")
    assert calls == [tmp_path, tmp_path / "a"]


def test_no_decision_by_wall_clock():
    for name in ("storage", "lock", "ledger", "store", "repair"):
        nodes = list(ast.walk(ast.parse((Path(storage.__file__).parent / f"{name}.py").read_text())))
        used = {one.attr for one in nodes if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "time"}
        brought = {one.name for node in nodes if isinstance(node, ast.ImportFrom | ast.Import) for one in node.names}
        assert used <= {"monotonic", "sleep"} and not brought & {"datetime", "time_ns"}, name
        assert name == "storage" or "time" not in brought, name


# Signed values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text().filter(lambda name: name != "checksum"), JSON, max_size=3), st.integers(0))
def test_any_flipped_bit_of_a_signed_value_is_seen(value, at):
    root = simulated()
    data = to_json(signed(value))
    root.write("a.json", data)
    assert read_signed(root, "a.json") == signed(json.loads(to_json(value)))
    root.write("a.json", flipped(data, at % (8 * len(data))))
    with pytest.raises(DamageError):
        read_signed(root, "a.json")


def test_every_bit_and_every_length_of_a_signed_value_counts(root):
    data = to_json(signed({"a": [1.5e-05, "ä", None], "rows": 3}))
    wounds = [flipped(data, bit) for bit in range(8 * len(data))] + [data[:size] for size in range(len(data))]
    for wound in [*wounds, data + b" ", b"[]", b"null", b'"a"', b"1", b"NaN", b"9" * 5000, b"[" * 100_000, b"\xff"]:
        (root.path / "a.json").write_bytes(wound)
        with pytest.raises(DamageError, match="a.json is not what was written; run the job again to repair it"):
            read_signed(root, "a.json")
    assert read_signed(root, "b.json") is None


# The lock


class Clock(Disk):
    """A disk whose minutes pass at once; `during` is told of each look."""

    def __init__(self, during=lambda: None):
        self.now, self.during = 0.0, during

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.during()


def beat(root, fence, count):
    root.write(f"{lock.LOCKS}/{fence}.beat", str(count).encode())


def refused(root, told="process 1 on elsewhere", me=None):
    with pytest.raises(LockedError, match=f"is held by another job .?{told}.?; wait for it to end, or stop it"):
        lock.take(root, me or Owner.me())


def test_a_released_lock_is_free_at_once_and_numbers_rise(root):
    with lock.lock(root) as first:
        assert first.fence == lock.highest(root) == 1
        lock.check(first)
        refused(root, f"process {os.getpid()} on {Owner.me().host}")
        assert not lock.took_from_elsewhere(first)
        first._draft(b"left")
    assert not drafts(root)
    with lock.lock(root) as second:
        assert second.fence == 2
        assert [name for name in root.names(lock.LOCKS) if not name.endswith("beat")] == ["2.json"]
        with pytest.raises(LockedError):
            lock.check(first)


def test_a_living_holder_beats(root):
    until = time.monotonic() + 10
    with lock.lock(root, beat=0.001) as held:
        while int(root.read(f"{lock.LOCKS}/{held.fence}.beat") or 0) < 3:
            assert time.monotonic() < until


@pytest.fixture
def child():
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.communicate()


def test_a_dead_holder_is_taken_over_at_once_also_before_it_is_reaped(root, child, caplog):
    owner = replace(Owner.me(), process=child.pid, started=lock._started(child.pid))
    claimed = lock.take(root, owner)
    claimed._draft(b"left")
    refused(root, f"process {child.pid} on {owner.host}")
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has taken notice of it yet
    assert lock._started(child.pid) is None
    with lock.lock(replace(root, disk=Clock(lambda: pytest.fail("waited")))) as held:
        assert held.fence == 2 and not lock.took_from_elsewhere(held)
        assert f"took over from process={child.pid}" in caplog.text
        assert [name for name in root.names(lock.LOCKS) if not name.endswith("beat")] == ["2.json"]
        assert not drafts(root)
        with pytest.raises(LockedError):
            lock.check(claimed)


def test_a_process_number_that_was_given_again_is_another_process(root, child):
    lock.take(root, replace(Owner.me(), process=child.pid, started="1"))
    assert lock.take(root, Owner.me()).fence == 2


def test_a_holder_elsewhere_that_stands_still_is_taken_over_and_known_as_such(root):
    clock = Clock()
    held = lock.take(root, ELSEWHERE)
    beat(root, held.fence, 7)
    taken = lock.take(replace(root, disk=clock), Owner.me())
    assert (taken.fence, clock.now) == (2, lock.PATIENCE) and lock.took_from_elsewhere(taken)
    lock.give_back(taken)
    assert not lock.took_from_elsewhere(lock.take(root, Owner.me()))


def test_a_holder_elsewhere_whose_counter_moves_is_refused(root):
    lock.take(root, ELSEWHERE)
    clock = Clock(lambda: clock.now > lock.PATIENCE - 5 and beat(root, 1, clock.now))
    refused(replace(root, disk=clock))
    assert lock.highest(root) == 1


def test_a_holder_elsewhere_that_ends_meanwhile_need_not_be_waited_for(root):
    held = lock.take(root, ELSEWHERE)
    clock = Clock(lambda: clock.now == 3 and lock.give_back(held))
    assert lock.take(replace(root, disk=clock), Owner.me()).fence == 2 and clock.now == 3


def test_a_claim_that_cannot_be_read_is_taken_over(root):
    lock.take(root, Owner.me())
    (root.path / lock.LOCKS / "1.json").write_bytes(b"")
    assert lock.take(root, Owner.me()).fence == 2


@pytest.mark.parametrize("at_once", [1, 3])
def test_many_files_are_read_side_by_side_in_order(root, monkeypatch, at_once):
    """With three at once each waits for two others, and would wait for ever alone."""
    monkeypatch.setattr(storage, "EACH", 6)
    disk, met = Disk(), threading.Barrier(at_once)
    disk.at_once = at_once

    def call(name):
        met.wait(10)
        return name * 2

    names = [str(number) for number in range(9)]
    assert list(replace(root, disk=disk).each(call, names)) == [name * 2 for name in names]


@pytest.mark.parametrize("others", [["1"], ["2"], ["1", "2"]])
def test_whoever_is_overtaken_while_it_claims_is_refused(root, others):
    """`2` alone: the quicker job's own number was cleaned away by one that took over from it."""
    claim = to_json(signed({**vars(ELSEWHERE), "presumed_dead": False}))
    act = lambda: [root.create(f"{lock.LOCKS}/{number}.json", claim) for number in others]  # noqa: E731
    refused(replace(root, disk=Quicker(act)))
    assert lock.highest(root) == int(others[-1])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTSUP])
def test_a_file_system_that_cannot_make_a_file_once_is_refused(root, number):
    def act():
        raise OSError(number, "no links here")

    with pytest.raises(SpecError, match="cannot write to root .*: no links here"):
        lock.take(replace(root, disk=Quicker(act)), Owner.me())
