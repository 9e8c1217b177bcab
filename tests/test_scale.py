"""The driver's work grows with the number of shards, not faster: calls of the storage seam are counted, not seconds."""

import pytest

from pipeline import merge, store
from pipeline.listing import Listing
from pipeline.sources import Shard
from tests.bench import scale
from tests.seam import simulated

FEW, MANY = 500, 2_000
STEPS = {name: step for name, step in scale.STEPS.items() if not name.startswith(("records", "unmerged"))}
SLACK = 40
"""Calls that do not depend on the number of shards."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Calls of each step, by the number of shards; four shards to a fragment, then one."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for shards in (FEW, MANY):
            patch.setattr(store, "FRAGMENT_ROWS", 4 * scale.SHARD_ROWS)
            folder = tmp_path_factory.mktemp("scale") / "work"
            scale.build(folder, shards)
            found[shards] = {name: step(folder, shards)["calls"] for name, step in STEPS.items()}
            for name in ("unmerged: all embedded, to seal", "unmerged: all done"):
                found[shards][name] = scale.STEPS[name](folder, shards)["calls"]
    return found


def test_no_call_is_made_more_often_than_there_are_shards(calls):
    for name, many in calls[MANY].items():
        few = calls[FEW][name]
        for call in many:
            assert many[call] <= MANY / FEW * few[call] + SLACK, f"{name}: {call} {few[call]} -> {many[call]}"


def test_what_is_done_is_seen_by_listings_alone(calls):
    for name in ("rerun: all done", "unmerged: all done", "status", "plan: nothing done yet"):
        made = calls[MANY][name]
        assert sum(made[call] for call in made if call != "listed") <= SLACK, f"{name}: {made}"
        assert made["size"] == 0
        assert made["listed"] <= 5 * MANY + SLACK


def test_a_record_is_read_once_and_a_folder_listed_a_few_times(calls):
    merging = calls[MANY]["resume: all embedded, to merge and seal"]
    assert merging["get"] <= MANY + SLACK  # those of merges come from the workers
    assert merging["names"] + merging["sizes"] <= 13
    assert merging["delete"] <= MANY + SLACK
    sealing = calls[MANY]["unmerged: all embedded, to seal"]
    assert sealing["get"] <= MANY + SLACK and sealing["size"] == 0


def test_a_file_that_came_after_the_listing_is_found_by_its_name():
    root = simulated()
    root.write("folder/a", b"1")
    listing = Listing(root, "folder")
    assert listing.has("a", 1) and not listing.has("a", 2) and not listing.has("b", 2)
    root.write("folder/b", b"22")
    assert listing.has("b", 2)
    assert root.sizes("folder") == {"a": 1, "b": 2} and root.sizes("none") == {}


def test_groups_of_many_shards():
    cut = [Shard(number, number * 8_192, 8_192, ()) for number in range(1_000)]
    assert [len(group.shards) for group in merge.groups(cut)] == [128] * 7 + [104]
