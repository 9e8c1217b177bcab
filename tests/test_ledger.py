"""The ledger: any order of two processes, generations of jobs that were given up, copies that are put back."""

import json
from dataclasses import replace

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline import ledger, storage
from pipeline.errors import DamageError, StaleError
from pipeline.ledger import Ledger, Slot
from pipeline.storage import Disk, Root, read_signed, signed, to_json
from tests.seam import Quicker, flipped, simulated


@pytest.fixture
def root(tmp_path):
    made = Root(tmp_path / "root", fence=1)
    storage.prepare(made)
    return made


NAMES = st.sampled_from("ab")
PROCESSES = st.integers(0, 1)


class TwoProcesses(RuleBasedStateMachine):
    """Any order of what two processes do with one ledger, against a dictionary of the editions of each name."""

    def __init__(self):
        super().__init__()
        self.root = simulated()
        self.books = [Ledger(self.root, "stage", "key") for _ in range(2)]
        self.model, self.count = {"a": [], "b": []}, 0
        self.damaged, self.unsound, self.stood = set(), set(), {}
        self.held = [{name: name for name in "ab"} for _ in range(2)]
        """The slot that each process was told last; the other may have gone on since."""

    def told(self, slot, call):
        """What a call gives that reads the record of a slot; nothing where it is damaged."""
        if slot not in self.damaged:
            return call()
        with pytest.raises(DamageError):
            call()
        return None

    def newest(self, name):
        return ledger._edition(name, max(0, len(self.model[name]) - 1))

    @rule(process=PROCESSES, name=NAMES)
    def slot(self, process, name):
        slot = self.books[process].slot(name, lambda record: record["value"] not in self.unsound)
        standing = self.model[name][-1] if self.model[name] else None
        if standing is None or self.newest(name) in self.damaged or standing["value"] in self.unsound:
            assert slot == Slot(ledger._edition(name, len(self.model[name])))  # a name that stood is never open again
        else:
            assert slot == Slot(self.newest(name), standing)
        self.held[process][name] = slot.name

    @rule(process=PROCESSES, name=NAMES)
    def add(self, process, name):
        slot, editions = self.held[process][name], self.model[name]
        self.count += 1
        edition = int(slot.partition("~")[2] or 0)
        assert edition <= len(editions)
        if edition == len(editions):
            editions.append({"value": self.count})
        assert self.told(slot, lambda: self.books[process].add(slot, {"value": self.count})) in (
            None,
            editions[edition],
        )

    @rule(name=NAMES)
    def lose(self, name):
        """What the newest record names is gone."""
        self.unsound |= {record["value"] for record in self.model[name][-1:]}

    @rule(name=NAMES, at=st.integers(0))
    def damage(self, name, at):
        path = self.root / f"_state/stage/key/{self.newest(name)}.json"
        if self.model[name] and self.newest(name) not in self.damaged:
            inode = self.root.disk._inode(path)
            inode.data = self.stood[path.name] = flipped(inode.data, at % (8 * len(inode.data)))
            self.damaged.add(self.newest(name))

    @invariant()
    def agree(self):
        files = self.root.disk._folder(self.root / "_state/stage/key").names
        slots = {ledger._edition(name, at): one for name in self.model for at, one in enumerate(self.model[name])}
        assert {f"{slot}.json" for slot in slots} == set(files)
        assert all(self.stood.setdefault(name, inode.data) == inode.data for name, inode in files.items())
        for book in self.books:
            assert all(self.told(slot, lambda: book.read(slot)) in (None, one) for slot, one in slots.items())  # noqa: B023
            assert book.names() == {name for name in self.model if self.model[name]}
            assert book.newest("ab") == [self.newest(name) for name in "ab"]


test_two_processes = TwoProcesses.TestCase
test_two_processes.settings = settings(max_examples=60, stateful_step_count=30)


def test_work_is_done_once_and_again_when_what_it_names_is_gone(root):
    book = Ledger(root, "fit")
    made = []

    def make():
        made.append(1)
        return {"number": len(made)}

    assert [book.once("a", make)["number"] for _ in range(3)] == [1, 1, 1]
    assert book.once("a", make, lambda record: record["number"] > 1)["number"] == 2
    assert book.get("a") == {"number": 2} and book.get("b") is None and len(made) == 2


def test_what_a_root_was_begun_with_is_read_from_either_copy(root):
    assert ledger.begun(root) is None and ledger.restore(root) is None
    assert ledger.begin(root, {"dim": 4, "texts": ("a",)}) == signed({"dim": 4, "texts": ["a"]})
    for name in (ledger.JOB, ledger.JOB_COPY):
        for wound in (lambda path: path.unlink(), lambda path: path.rename(path.with_suffix(".away"))):
            wound(root / name)
            assert ledger.begun(root) == ledger.restore(root) == signed({"dim": 4, "texts": ["a"]})
            assert read_signed(root, name) == ledger.begun(root)
    (root / ledger.JOB).write_bytes(b"torn")
    assert ledger.begin(root, {"dim": 4})["texts"] == ["a"]
    (root / ledger.JOB_COPY).write_bytes(b"torn")
    with pytest.raises(DamageError):
        ledger.begun(root)


def test_other_settings_are_refused_in_a_sentence(root):
    ledger.begin(root, {"a": 1, "b": "x" * 200, "c": [1]})
    with pytest.raises(StaleError) as told:
        ledger.begin(root, {"a": 1, "b": "y", "c": [2]})
    was = "'" + "x" * 76 + "..."
    assert str(told.value) == (
        f"{root.path} was begun with another b: {was} then, 'y' now (also c); set it back, or choose another root"
    )
    assert ledger.begun(root)["c"] == [1]


def generation(root, fence, **copies):
    """Publish under a number, with files beside the manifest."""
    files = {name: root.keep(data) for name, data in copies.items()}
    return ledger.publish(replace(root, fence=fence), {"files": files, "copies": list(copies)})


def test_a_generation_of_a_job_that_was_given_up_is_void(root):
    assert ledger.newest_generation(root) is None
    assert generation(root, 3)["generation"] == 1
    second = generation(root, 5)
    generation(root, 4)
    assert ledger.newest_generation(root) == second and ledger.generation_numbers(root) == [1, 2, 3]
    fourth = generation(root, 5)
    assert ledger.newest_generation(root) == fourth == signed({**fourth, "generation": 4, "fence": 5})


def test_two_jobs_that_publish_at_once_get_two_numbers(root):
    slow = replace(root, disk=Quicker(lambda: generation(root, 2)))
    assert ledger.publish(slow, {"files": {}, "copies": []})["generation"] == 2
    assert ledger.generation_numbers(root) == [1, 2]


class PutsBack(Disk):
    """A job that was given up replaces a file just after this one has settled another, or the same."""

    def __init__(self, after, name):
        self.after, self.name = after, name

    def replace(self, source, target):
        super().replace(source, target)
        if target.name == self.after:
            self.after = None
            (target.parent / self.name).write_bytes(b"old")


@pytest.mark.parametrize("name", ["note", "manifest.json"])
@pytest.mark.parametrize("after", ["note", "manifest.json"])
@pytest.mark.parametrize("known", [True, False])
def test_what_a_given_up_job_puts_back_is_settled_again(root, after, name, known):
    generation(root, 1, note=b"old")
    ledger.settle(root)
    assert root.read("note") == b"old"
    newest = generation(root, 2, note=b"new")
    if known:  # the manifest is right already, the file beside it is not
        root.write("manifest.json", to_json(newest))
    ledger.settle(replace(root, disk=PutsBack(after, name)))
    assert root.read("note") == b"new" and json.loads(root.read("manifest.json")) == newest


def test_an_edition_that_was_moved_aside_leaves_the_later_ones_standing(tmp_path):
    book = Ledger(Root(tmp_path), "embed")
    for slot in ("a", "a~1", "a~2"):
        book.add(slot, {"made": slot})
    book.root.set_aside("_state/embed/a~1.json")
    assert book.slot("a").record == {"made": "a~2"}
    assert book.newest(["a"]) == ["a~2"]
