"""A quick part of `make faults`: each suite with few of its cases, the same every time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def figures(*command: str) -> dict:
    """What a suite prints; its exit code is 0."""
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return json.loads(ended.stdout[ended.stdout.index("{") :])


def test_no_schedule_breaks_a_promise():
    found = figures("tests.faults.schedules", "--seed", "0", "--count", "400")
    assert (found["count"], found["violations"]) == (400, [])
    assert found["takeovers"] > 50  # jobs that were given up and went on
    assert found["faults"] > 1_000


def test_every_state_after_lost_power_is_before_or_after():
    found = figures("tests.faults.crash_states")
    assert found["count"] >= 100
    assert min(found["cases"].values()) >= 10


def test_a_job_killed_at_any_step_ends_as_if_it_never_was():
    found = figures("tests.faults.kills", "--count", "12")
    assert (found["count"], found["identical"]) == (12, 12)
    assert found["most_shards_done_again"] <= 1


def test_an_error_at_any_write_leaves_nothing_half_made():
    found = figures("tests.faults.errors", "--most", "10")
    assert found["count"] >= 10


def test_of_two_jobs_one_gets_the_root():
    found = figures("tests.faults.races", "--count", "60")
    assert (found["single_winners"], found["taken_over"]) == (60, 20)


@pytest.mark.parametrize("seed", [3])
def test_a_flipped_bit_is_found_and_named(seed):
    found = figures("tests.faults.flips", "--seed", str(seed), "--count", "160")
    assert (found["count"], found["found"]) == (160, 160)
