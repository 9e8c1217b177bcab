"""A few examples of the state machine over real jobs; `python -m tests.faults.machine` plays many."""

from tests.faults import machine


def test_real_jobs_in_any_order(tmp_path):
    with machine.world(tmp_path) as made:
        for seed in (0, 1):
            machine.play(made, seed, examples=5, steps=10)
    assert all(made.counts[step] for step in ("start", "crash", "race", "damage", "change_a_setting"))
