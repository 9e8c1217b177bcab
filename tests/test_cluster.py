"""Several nodes on this machine: workers come with a node and go with one, and no item is blamed for it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.spec import Workers
from pipeline.workers import Died, Pool, RayTeam, _Try

SECONDS = 0.3


class Sleeper:
    """Does an item as a device would: it waits; tells on which node."""

    def __init__(self, threads):
        pass

    def __call__(self, item):
        import ray

        time.sleep(SECONDS)
        Path(item).touch()
        return item, ray.get_runtime_context().get_node_id()


@pytest.fixture(scope="module")
def cluster():
    """A head with one core."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # workers must find Sleeper
        patch.setenv("RAY_health_check_initial_delay_ms", "1000")
        patch.setenv("RAY_health_check_period_ms", "500")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
        )
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def pool(cluster):
    settings = Workers(count={"min": 1, "max": 2}, cpus=1, address=cluster.address)
    with Pool(settings, "words") as pool:
        yield pool


def joined(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


def items(folder, count):
    return [str(folder / f"{number:03d}") for number in range(count)]


def test_a_node_that_comes_gets_items_and_one_that_goes_costs_none(cluster, pool, tmp_path):
    wanted, nodes, node = items(tmp_path, 60), [], None
    with pool.team(Sleeper, lookahead=2) as team:
        begun = time.monotonic()
        for number, outcome in enumerate(team.outcomes(wanted, tries=1)):
            assert not isinstance(outcome, Died), outcome.reason
            nodes.append(outcome)
            if number == 2:
                assert len({where for _, where in nodes}) == 1
                node = joined(cluster)
            elif node is not None and len({where for _, where in nodes}) == 2 and number > 20:
                cluster.remove_node(node, allow_graceful=False)
                node = None
                lost_at = time.monotonic()
        took = time.monotonic() - begun
    assert node is None, f"the second node did nothing in {took:.1f} s"
    assert sorted(item for item, _ in nodes) == wanted
    assert len({where for _, where in nodes}) == 2
    assert time.monotonic() - lost_at < 45
    assert all(Path(item).exists() for item in wanted)


@pytest.mark.parametrize(
    ("lost", "tries", "blamed"),
    [
        (["a"], 3, False),
        (["a", "a", "a"], 3, True),
        (["gone"] * 3, 3, False),
        (["gone", "a", "b", "a"], 3, True),
        (["gone", "a", "b"], 3, False),
        (["gone"], 1, False),
        (["gone"] * 9, 3, True),  # so many nodes do not end by chance
        (["a", "a", "dying"], 3, False),  # which Ray has not heard of yet
        (["a", "a", ""], 3, False),
    ],
)
def test_an_item_is_to_blame_for_workers_whose_nodes_live_on(lost, tries, blamed):
    nodes = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": True}, {"NodeID": "gone", "Alive": False}]
    nodes.append({"NodeID": "dying", "Alive": True})
    team = object.__new__(RayTeam)
    team._ray = SimpleNamespace(nodes=lambda: nodes)
    team._lives = lambda node: node in ("a", "b")
    assert team._is_to_blame(_Try("item", tuple(lost)), tries) == blamed
