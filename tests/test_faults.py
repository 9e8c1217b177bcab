"""A quick part of `make faults`: each suite with few of its cases, the same every time."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
SUITES = {
    "errors": ("--most", "10"),
    "kills": ("--count", "12"),
    "flips": ("--seed", "3", "--count", "160"),
    "schedules": ("--seed", "0", "--count", "400"),
    "races": ("--count", "60"),
    "crash_states": (),
}
"""With their arguments, the longest first."""


def figures(suite: str, *arguments: str) -> dict:
    """What a suite prints; its exit code is 0."""
    command = [sys.executable, "-m", f"tests.faults.{suite}", *arguments]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return json.loads(ended.stdout[ended.stdout.index("{") :])


@pytest.fixture(scope="module")
def suites():
    """Figures of each, to be waited for: they hardly use two cores, and run two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {suite: pool.submit(figures, suite, *arguments) for suite, arguments in SUITES.items()}


def test_an_error_at_any_write_leaves_nothing_half_made(suites):
    assert suites["errors"].result()["count"] >= 10


def test_a_job_killed_at_any_step_ends_as_if_it_never_was(suites):
    found = suites["kills"].result()
    assert (found["count"], found["identical"]) == (12, 12)
    assert found["most_shards_done_again"] <= 1


def test_a_flipped_bit_is_found_and_named(suites):
    found = suites["flips"].result()
    assert (found["count"], found["found"]) == (160, 160)


def test_no_schedule_breaks_a_promise(suites):
    found = suites["schedules"].result()
    assert (found["count"], found["violations"]) == (400, [])
    assert found["takeovers"] > 50  # jobs that were given up and went on
    assert found["faults"] > 1_000


def test_of_two_jobs_one_gets_the_root(suites):
    found = suites["races"].result()
    assert (found["single_winners"], found["taken_over"]) == (60, 20)


def test_every_state_after_lost_power_is_before_or_after(suites):
    found = suites["crash_states"].result()
    assert found["count"] >= 100
    assert min(found["cases"].values()) >= 10
