"""Ray actors: results, errors and deaths reach the driver; the sizes fit the machine."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.spec import Workers
from pipeline.workers import Plan, Pool, Progress, plan


@pytest.mark.parametrize(
    ("settings", "cores", "gpus", "wanted"),
    [
        ({}, 2, 0, Plan(1, 2, 0)),
        ({}, 16, 0, Plan(4, 4, 0)),
        ({}, 16, 2, Plan(2, 8, 1)),
        ({"gpus": 0.5}, 16, 2, Plan(4, 4, 0.5)),
        ({"gpus": 0}, 8, 2, Plan(2, 4, 0)),
        ({"count": 3}, 8, 0, Plan(3, 2, 0)),
        ({"count": 5}, 2, 0, Plan(5, 1, 0)),
        ({"count": 0}, 2, 0, Plan(0, 2, 0)),
    ],
)
def test_plan(settings, cores, gpus, wanted):
    assert plan(Workers(**settings), cores, gpus) == wanted


@pytest.mark.parametrize(("settings", "gpus"), [({"gpus": 1}, 0), ({"count": 3, "gpus": 1}, 2)])
def test_gpus_that_are_not_there_are_refused(settings, gpus):
    with pytest.raises(SpecError, match="GPU"):
        plan(Workers(**settings), 8, gpus)


class Handler:
    """Does what its item says."""

    def __init__(self, threads):
        self.progress = Progress()

    def __call__(self, item):
        what, value = item
        if what == "fail":
            raise DataError(value)
        if what == "crash":
            raise ZeroDivisionError(value)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "die once" and not Path(value).exists():
            Path(value).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.progress = Progress(self.progress.rows + 1)
        return value


@pytest.fixture(scope="module")
def pool():
    # Workers must find this file's Handler.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        yield from running_pool()


def running_pool():
    with Pool(Workers(count=2)) as pool:
        yield pool


def test_every_item_is_done_once(pool):
    with pool.team(Handler) as team:
        assert team.call(("echo", 9)) == 9
        assert sorted(team.map([("echo", number) for number in range(20)])) == list(range(20))


def test_an_error_arrives_as_it_was_raised(pool):
    with pool.team(Handler) as team, pytest.raises(DataError, match="^bad file$"):
        list(team.map([("fail", "bad file")]))


def test_a_defect_keeps_its_traceback(pool):
    with pool.team(Handler) as team, pytest.raises(Exception, match="in __call__"):
        list(team.map([("crash", "x")]))


def test_a_dead_worker_is_replaced(pool, tmp_path):
    with pool.team(Handler) as team:
        items = [("echo", "a"), ("die once", str(tmp_path / "died")), ("echo", "b")]
        assert sorted(team.map(items)) == sorted(value for _, value in items)


def test_an_item_that_kills_every_worker_ends_the_job(pool):
    with pool.team(Handler) as team, pytest.raises(PipelineError, match="died 3 times"):
        list(team.map([("die", "x")]))


def test_without_ray_the_same_work_is_done_here():
    seen = []
    with Pool(Workers(count=0)) as pool, pool.team(Handler, seen.append) as team:
        assert list(team.map([("echo", 1), ("echo", 2)])) == [1, 2]
        with pytest.raises(DataError):
            team.call(("fail", "x"))
    assert [progress.rows for progress in seen] == [1, 2]
