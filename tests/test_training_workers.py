"""Training in several workers by Ray Train: what they do together is what one does, also after a SIGKILL."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.placement import Plan
from pipeline.training import distributed, engine, run as training
from tests.training import quality, toy, with_tests

KILLED = """
import sys
from pathlib import Path
from pipeline.training import run
from tests.training import toy

run.run(toy(Path(sys.argv[1]), epochs=20, workers=2))
"""


def test_two_workers_ended_by_sigkill_come_to_the_weights_of_one(tmp_path, caplog):
    one, _ = training.run(toy(tmp_path, epochs=20, output=str(tmp_path / "one")))
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=with_tests())
    checkpoints = tmp_path / "trained.work" / "checkpoints"
    end = time.monotonic() + 120
    while engine.newest(checkpoints) is None and started.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    started.kill()
    _, told = started.communicate()
    assert started.returncode == -signal.SIGKILL, told
    seen = []
    with caplog.at_level("INFO", "pipeline"):
        two, _ = training.run(toy(tmp_path, epochs=20, workers=2), lambda stage, of, done: seen.append((of, done.rows)))
    assert "train going on from checkpoint-" in caplog.text  # told by a worker
    assert caplog.text.count("train step=140 of 140 loss=") == 1
    assert seen[-1][0] == seen[-1][1] < 140 * 64
    assert quality(two) == pytest.approx(quality(one), abs=0.01)
    assert two["steps"] == one["steps"] == 140
    weights = [load_file(Path(record["output"]) / "model.safetensors") for record in (one, two)]
    for name, values in weights[0].items():
        assert np.allclose(values, weights[1][name], atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "trained.work").iterdir() if path.is_dir()) == ["_state"]
    again, is_new = training.run(toy(tmp_path, epochs=20, workers=1))  # who trains does not make another training
    assert (again, is_new) == (two, False)


def test_what_several_workers_need_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "has", lambda name: name != "pandas")
    with pytest.raises(SpecError, match=r"training needs pandas, which come.* with the extra \[train\]"):
        training.run(toy(tmp_path, workers=2))
    training.check(toy(tmp_path))


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        (3, "batch_size: 64 is no multiple of 3 workers"),
        (0, "workers.count"),
        ({"count": {"min": 1, "max": 2}}, "workers.count"),
        ({"number": 2}, "unknown field workers.number"),
    ],
)
def test_workers_are_refused_by_name(tmp_path, workers, says):
    with pytest.raises(SpecError, match=says):
        toy(tmp_path, workers=workers)


def test_one_worker_needs_no_ray_but_on_a_cluster(tmp_path):
    assert not toy(tmp_path).workers.spread
    assert not toy(tmp_path, workers={"count": 1, "cpus": 2}).workers.spread
    assert toy(tmp_path, workers={"address": "auto"}).workers.spread


def test_the_failure_of_a_worker_is_one_sentence():
    error = Exception("all of it")
    error.worker_failures = {1: RuntimeError("Traceback …\n  deep\nValueError: no such thing"), 2: KeyError("later")}
    found = distributed._mendable(error)
    assert type(found) is PipelineError
    assert str(found) == ("worker 1 failed: ValueError: no such thing; run again to go on from the last checkpoint")
    error.worker_failures = {0: RuntimeError("Connection closed by peer"), 1: RuntimeError("The actor is dead.")}
    assert str(distributed._mendable(error)).startswith("worker 1 failed: The actor is dead; run again")
    error.worker_failures = {0: DataError("data: too few")}
    assert str(distributed._mendable(error)) == "data: too few"


def test_more_workers_than_cores_are_refused_here_and_waited_for_on_a_cluster(monkeypatch, caplog):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    distributed._check_room(Plan(2, 1, 0), None)
    with pytest.raises(SpecError, match="workers: 3 with 1 cores each need more than the 2 of this machine"):
        distributed._check_room(Plan(3, 1, 0), None)
    assert not caplog.records
    distributed._check_room(Plan(3, 1, 0), "auto")
    assert "workers waiting for nodes: 3 with 1 cores each, 2 are there" in caplog.text


def test_what_rank_0_tells_is_read_in_whole_lines_and_ends_with_its_folder(tmp_path):
    path = tmp_path / "told.jsonl"
    path.write_text('{"rows": 1, "of": 3}\n{"rows"')
    told = distributed._told(path)
    assert [next(told), next(told), next(told)] == [{"rows": 1, "of": 3}, None, None]
    with path.open("a") as file:
        file.write(': 2, "of": 3}\n')
    assert next(told) == {"rows": 2, "of": 3}
    teller = distributed._Teller(path)
    teller.step(3, 3)
    assert json.loads(path.read_text().splitlines()[-1]) == {"rows": 3, "of": 3}
    path.unlink()
    with pytest.raises(PipelineError, match="another run of this training has begun"):
        teller.step(3, 3)
