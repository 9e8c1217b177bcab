"""Ray actors: results, errors and deaths reach the driver; the sizes fit the machine."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.actor import Actor, Labels
from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.placement import Node, Plan, plan
from pipeline.spec import Workers
from pipeline.storage import Root
from pipeline.teams import SUBMITTED
from pipeline.workers import Pool, Progress

SECRET = "s3cr3t-0f-th3-w0rk3rs"


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
        ({"cpus": 1}, 4, 0, Plan(4, 1, 0)),
        ({"cpus": 3}, 8, 0, Plan(2, 3, 0)),
        ({"cpus": 2}, 16, 2, Plan(2, 2, 1)),
        ({"count": 1, "memory": "4GB"}, 8, 0, Plan(1, 8, 0, memory=4 * 10**9)),
        ({"memory": "24GB", "cpus": 1}, 8, 0, Plan(2, 1, 0, memory=24 * 10**9)),
        ({"count": {"min": 1, "max": 9}}, 8, 0, Plan(2, 4, 0, most=9)),
        ({"count": {"max": 1}}, 8, 0, Plan(1, 4, 0, most=1)),
        ({"count": {"min": 5, "max": 9}, "cpus": 8}, 8, 0, Plan(5, 8, 0, most=9)),
        ({"count": {"max": 3}, "gpus": 1, "cpus": 4}, 0, 0, Plan(1, 4, 1, most=3)),
    ],
)
def test_plan(settings, cores, gpus, wanted):
    """One node with 64 GB."""
    assert plan(Workers(**settings), [Node(cores, gpus, 64 * 10**9)]) == wanted


@pytest.mark.parametrize(
    ("settings", "nodes", "wanted"),
    [
        ({}, [Node(0), Node(6), Node(6)], Plan(2, 6, 0)),  # no worker lies on two nodes, none on the head
        ({}, [Node(8), Node(16)], Plan(6, 4, 0)),
        ({}, [Node(2), Node(16)], Plan(9, 2, 0)),
        ({"count": 3}, [Node(6), Node(6)], Plan(3, 3, 0)),
        ({}, [Node(4), Node(16, 4), Node(16, 2)], Plan(6, 4, 1)),
        ({"count": {"max": 8}}, [Node(0)], Plan(1, 4, 0, most=8)),
        ({"cpus": 4, "memory": "9GB"}, [Node(8, 0, 10**10), Node(8, 0, 2 * 10**10)], Plan(3, 4, 0, memory=9 * 10**9)),
    ],
)
def test_plan_of_several_nodes(settings, nodes, wanted):
    assert plan(Workers(**settings), nodes) == wanted


@pytest.mark.parametrize(
    "settings", [{"cpus": 9}, {"count": 2, "cpus": 9}, {"memory": "65GB"}, {"memory": "65GB", "count": 1}]
)
def test_a_worker_that_no_node_can_hold_is_refused(settings):
    with pytest.raises(SpecError, match="no node has room for one with . cores"):
        plan(Workers(**settings), [Node(8, 0, 64 * 10**9), Node(2, 0, 64 * 10**9)])


@pytest.mark.parametrize(("settings", "gpus"), [({"gpus": 1}, 0), ({"count": 3, "gpus": 1}, 2)])
def test_gpus_that_are_not_there_are_refused(settings, gpus):
    with pytest.raises(SpecError, match="GPU"):
        plan(Workers(**settings), [Node(8, gpus)])


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
        if what == "environment":
            return os.environ.get(value)
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
        patch.setenv("HF_TOKEN", SECRET)
        yield from running_pool()


def running_pool():
    with Pool(Workers(count=2)) as pool:
        yield pool


def test_every_item_is_done_once(pool):
    with pool.team(Handler) as team:
        assert team.call(("echo", 9)) == 9
        assert sorted(team.map([("echo", number) for number in range(20)])) == list(range(20))


def test_threads_are_set_before_anything_loads(pool):
    with pool.team(Handler) as team:
        for name in ("OMP_NUM_THREADS", "LANCE_CPU_THREADS", "POLARS_MAX_THREADS"):
            assert team.call(("environment", name)) == str(pool.plan.threads)


@pytest.mark.parametrize("submitted", [True, False])
def test_a_submitted_job_leaves_the_folder_that_ray_may_unpack_anew(pool, tmp_path, monkeypatch, submitted):
    monkeypatch.chdir(tmp_path)
    if submitted:
        monkeypatch.setenv(SUBMITTED, "1")
    assert Pool(Workers(count=1)).plan.count == 1  # the driver
    assert (Path.cwd() == tmp_path) is not submitted
    monkeypatch.chdir(tmp_path)
    Actor(b"", 1, Labels("words", "embed", None), 1)
    assert (Path.cwd() == tmp_path) is not submitted


def test_workers_without_room_hold_nothing_up(pool):
    many = Pool(Workers(count={"min": 2, "max": 40}, cpus=pool.plan.threads), "many")
    with many, many.team(Handler, lookahead=2) as team:
        assert sorted(team.map([("echo", number) for number in range(50)])) == list(range(50))
        assert 1 <= len(team._members) <= 2 * pool.plan.count
        assert not team._coming  # who has not come by the end is called off


def test_actors_have_names(pool):
    from ray.util import list_named_actors

    pool.stage = "embed"
    with pool.team(Handler) as team:
        team.call(("echo", 1))
        assert any(name.startswith("job embed 1 #") for name in list_named_actors())


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


def test_why_an_item_ended_is_in_its_workers_log(pool, tmp_path):
    root = Root(tmp_path / "root")
    logged = Pool(Workers(count=1), "words", root)
    logged.stage = "embed"
    with logged:
        with logged.team(Handler) as team, pytest.raises(DataError):
            list(team.map([("echo", 1), ("fail", f"{SECRET} in https://id:{SECRET}@host/x")]))
        with logged.team(Handler) as team, pytest.raises(PipelineError, match="died 3 times"):
            team.call(("die", "x"))
    text = (root / "_state/logs/embed-1.log").read_text()
    assert "INFO embed ('echo', 1) done seconds=" in text
    assert "ERROR embed ('fail'," in text
    assert "pipeline.errors.DataError: … in https://…@host/x" in text
    assert text.count("ERROR died with ('die', 'x') in hand: ") == 3
    assert SECRET not in text


def test_without_ray_the_same_work_is_done_here():
    seen = []
    with Pool(Workers(count=0)) as pool, pool.team(Handler, seen.append) as team:
        assert list(team.map([("echo", 1), ("echo", 2)])) == [1, 2]
        with pytest.raises(DataError):
            team.call(("fail", "x"))
    assert [progress.rows for progress in seen] == [1, 2]
