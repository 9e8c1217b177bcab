"""`submit` against a head that this file starts, its processes beside ours; and what comes back from a job's end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import submit, verify
from pipeline.errors import PipelineError, SpecError
from pipeline.spec import JobSpec
from tests.conftest import corpus_frame

REPOSITORY = Path(__file__).parent.parent
START_SECONDS = 60
TOKEN = "0123456789abcdef" * 4
CANARY = "c4n4ry-of-the-submitter"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def asked(url):
    """What an address of the head answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read().decode()


def answers(url):
    with suppress(OSError):
        return bool(asked(url))
    return False


@dataclass(frozen=True)
class Head:
    """Where a head answers: jobs, its cluster, Prometheus."""

    jobs: str
    cluster: str
    metrics: str


@pytest.fixture(scope="module")
def head():
    """A head with a dashboard and two cores."""
    temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets below it, whose paths must be short
    port, cluster, metrics = free_port(), free_port(), free_port()
    options = [
        "--head", "--block", f"--port={cluster}", f"--metrics-export-port={metrics}", "--num-cpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--temp-dir={temporary}", f"--object-store-memory={100 * 2**20}", "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PATH": path, "HF_HUB_OFFLINE": "1", "RAY_metrics_report_interval_ms": "500"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    log = (temporary / "start.log").open("w+b")
    started = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
        env=environment, cwd=temporary, stdout=log, stderr=log,
    )  # fmt: skip
    made = Head(f"http://127.0.0.1:{port}", f"127.0.0.1:{cluster}", f"http://127.0.0.1:{metrics}/metrics")
    try:
        until = time.monotonic() + START_SECONDS
        while not answers(f"{made.jobs}/api/version"):
            log.seek(0)
            assert started.poll() is None and time.monotonic() < until, log.read().decode()[-3000:]
            time.sleep(0.3)
        yield made
    finally:
        end(started, temporary)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def end(started, folder):
    """End a head and all of its processes, by their ids: they name its folder, or are below one that does."""
    mine = {one.pid: one for one in psutil.process_iter() if str(folder) in " ".join(arguments_of(one))}
    with suppress(psutil.NoSuchProcess):
        mine |= {one.pid: one for one in psutil.Process(started.pid).children(recursive=True)}
    started.terminate()
    with suppress(subprocess.TimeoutExpired):
        started.wait(15)
    for process in mine.values():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait(15)


def arguments_of(process):
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()
    return []


def command(*arguments, address=None, **environment):
    """The command line of `submit`, and the environment for it."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    where = [] if address is None else ["--address", address]
    call = [sys.executable, "-m", "pipeline", "submit", *map(str, arguments), *where]
    return call, own | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_TOKEN": TOKEN} | environment


def called(*arguments, address=None, **environment):
    call, variables = command(*arguments, address=address, **environment)
    return subprocess.run(call, env=variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def job(tmp_path_factory, model):
    """A spec of three shards on a root of its own."""
    folder = tmp_path_factory.mktemp("submitted")
    corpus_frame().write_parquet(folder / "corpus.parquet")
    path = folder / "words.yaml"
    values = {
        "name": "words",
        "root": str(folder / "root"),
        "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": ["title", "text"], "shard_rows": 40},
        "model": {"name": str(model), "precision": "float32"},
        "prefixes": [{"dim": 8, "precision": "binary"}],
        "evaluate": {"shortlists": []},
        "workers": {"count": 1},
    }
    path.write_text(json.dumps(values))
    return path


def ended(address, name):
    """How a job ended, within two minutes."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        status = json.loads(asked(f"{address}/api/jobs/{name}"))["status"]
        if status not in ("PENDING", "RUNNING"):
            return status
        time.sleep(0.5)
    raise AssertionError(f"{name} is still {status}")


def test_a_job_runs_there_and_its_exit_code_comes_back(head, job):
    done = called(job, "--env", "MATRYOSHKA_CANARY", address=head.jobs, MATRYOSHKA_CANARY=CANARY)
    root = Path(json.loads(job.read_text())["root"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "120 rows in, 0 quarantined" in done.stdout
    assert "every node of the cluster must see under the same path: root " in done.stderr
    assert json.loads((root / "manifest.json").read_text())["tables"]["documents"]["rows"] == 120
    assert CANARY not in done.stdout + done.stderr
    kept = {path.name: path.read_text() for path in (root / "_state" / "logs").iterdir()}
    assert all(f" INFO embed 000000{shard} done seconds=" in kept["embed-1.log"] for shard in range(3))
    assert CANARY not in "".join(kept.values())
    found = verify.run(root)
    assert found.is_whole
    assert not found.unknown
    # The same root with another text rule is refused there, by the code for it.
    other = called(job, "--set", "corpus.text=text", address=head.jobs)
    assert other.returncode == 4, other.stdout + other.stderr
    assert "was begun with another corpus.text: ['title', 'text'] then, ['text'] now" in other.stdout
    # Nothing is left to do, and nobody waits to be told.
    sent = called(job, "--no-wait", RAY_ADDRESS=head.jobs)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    name, hint = sent.stdout.splitlines()
    assert name.startswith("words-")
    assert f"ray job logs --follow --address {head.jobs} {name}" in hint
    assert ended(head.jobs, name) == "SUCCEEDED"


def test_who_stops_following_does_not_stop_the_job(head, job):
    call, environment = command(job, address=head.jobs)
    following = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "submitted words-" not in said:
            said = following.stderr.readline()
            assert said, "it ended"
        time.sleep(1)
        following.send_signal(signal.SIGINT)
        _, rest = following.communicate(timeout=30)
        assert following.returncode == 130
        name = said.split()[1]
        assert f"{name} goes on without this command; follow it with: ray job logs" in rest
        assert ended(head.jobs, name) == "SUCCEEDED"
    finally:
        following.kill()


MEASURED = """
import sys
from pipeline.spec import Workers
from pipeline.workers import Pool
class Handler:
    def __init__(self, threads): pass
    def __call__(self, item):
        if item == "bad": raise ValueError(item)
        aside = {"null_text": 2}
        return {"rows": 40, "tokens": 300, "padded_tokens": 400, "waiting_seconds": 0.5, "quarantined": aside}
if __name__ == "__main__":
    pool = Pool(Workers(count=1, cpus=1, address=sys.argv[1]), "measured")
    pool.stage = "embed"
    with pool, pool.team(Handler) as team:
        list(team.map(["one", "two"]))
        try:
            team.call("bad")
        except Exception:
            print("done", flush=True)
        sys.stdin.read()
"""


def scraped(address):
    """Values of this project's metrics for one stage, by name; of several processes their sum."""
    found = {}
    for line in asked(address).splitlines():
        if (
            line.startswith("ray_matryoshka_")
            and 'job="measured"' in line
            and 'stage="embed"' in line
            and "le=" not in line
        ):
            name, value = line.partition("{")[0].removeprefix("ray_matryoshka_"), float(line.rpartition(" ")[2])
            found[name] = found.get(name, 0) + value
    return found


def test_another_token_is_one_sentence(head, job):
    done = called(job, address=head.jobs, RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == 1
    assert f"the cluster at {head.jobs} wants another token" in done.stderr
    assert "Traceback" not in done.stderr


def test_prometheus_finds_what_workers_measure(head, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    working = subprocess.Popen(
        [sys.executable, script, head.cluster], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    wanted = {
        "rows_total": 80, "tokens_total": 600, "padded_tokens_total": 800, "waiting_seconds_total": 1.0,
        "quarantined_total": 4, "failures_total": 1, "item_seconds_count": 2, "padding_share": 0.25, "workers": 1,
        "waiting_items": 0,
    }  # fmt: skip
    try:
        assert working.stdout.readline() == b"done\n"
        until, found = time.monotonic() + 30, scraped(head.metrics)
        while not wanted.items() <= found.items() and time.monotonic() < until:
            time.sleep(0.5)
            found |= scraped(head.metrics)  # a gauge is forgotten unless it is set again
        assert {name: found.get(name) for name in wanted} == pytest.approx(wanted)
        assert found["tokens_per_second"] > 0
    finally:
        working.stdin.close()
        working.wait(30)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--set", "corpus.text=[]"], 2, "corpus.text"),
        (["--set", "root=output/words"], 2, "root: output/words is relative to a folder of this machine"),
        (["--set", "corpus.source=[/data/a.parquet, b.parquet]"], 2, "corpus.source: b.parquet is relative"),
        (["--set", "workers.count=0"], 2, "workers.count: 0 is one process without Ray"),
        (["--env", "NOT_SET_ANYWHERE"], 2, "--env NOT_SET_ANYWHERE: no such variable is set here"),
        (["--env", f"KEY={CANARY}"], 2, "--env KEY: give the name alone"),
        ([], 1, "no Ray cluster takes jobs at http://127.0.0.1:1:"),
    ],
)
def test_what_cannot_be_sent_is_one_sentence(arguments, code, told, job):
    done = called(job, *arguments, address="http://127.0.0.1:1")
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stderr


def test_paths_of_this_machine_are_told(values, tmp_path, monkeypatch):
    spec = values(root="s3://bucket/root", corpus__source="docstrings:stdlib", workers={})
    assert submit.check(JobSpec.of(spec)) == []
    spec["corpus"] |= {"source": ["/data/a.parquet", "s3://bucket/b.parquet"], "text": "text"}
    assert submit.check(JobSpec.of(spec)) == [
        "every node of the cluster must see under the same path: corpus.source /data/a.parquet"
    ]
    Path("here").mkdir()
    spec["model"]["name"] = "here"
    with pytest.raises(SpecError, match=r"model\.name: here is a folder of this machine"):
        submit.check(JobSpec.of(spec))


def test_what_is_packed_is_code_and_spec_alone(tmp_path, job):
    submit.pack(tmp_path, str(job), "words.yaml")
    packed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {"words.yaml"}
    code = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "pipeline").rglob("*.py")}
    assert packed == code
    assert (tmp_path / "words.yaml").read_bytes() == job.read_bytes()


class Client:
    """A cluster that tells these pieces, breaks where a piece is an error, and begins again when asked again."""

    def __init__(self, *connections, status="FAILED", code=3, message="Job entrypoint command failed"):
        self._connections = list(connections)
        self._status, self._code, self._message = status, code, message

    async def tail_job_logs(self, name):
        for piece in self._connections.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, name):
        status = SimpleNamespace(value=self._status, is_terminal=lambda: not self._connections)
        return SimpleNamespace(status=status, driver_exit_code=self._code, message=self._message)


@pytest.fixture
def followed(monkeypatch):
    """What following tells, and the code."""
    monkeypatch.setattr(submit, "POLL_SECONDS", 0)

    def follow(client, secrets=()):
        told = []
        code = submit.Submitted("words-1", "http://head:8265", client, secrets).follow(told.append)
        return code, "".join(told)

    return follow


def test_a_broken_connection_repeats_nothing_and_loses_nothing(followed):
    client = Client(["one\n", "two\nth", RuntimeError("closed")], ["one\n"], ["one\ntwo\n", "three\n"], ["one\ntwo\n"])
    assert followed(client) == (3, "one\ntwo\nthree\n")


def test_no_passed_value_and_no_url_with_one_is_told(followed):
    client = Client([f"key {CANARY}, s3://id:hidden@bucket/x\n"])
    assert followed(client, (CANARY,)) == (3, "key …, s3://…@bucket/x\n")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7, 130, 143])
def test_the_contracts_codes_survive(followed, code):
    assert followed(Client([], code=code))[0] == code


@pytest.mark.parametrize(
    ("client", "wanted"),
    [(Client([], status="SUCCEEDED", code=0), 0), (Client([], code=-15), 143), (Client([], status="STOPPED"), 143)],
)
def test_other_ends(followed, client, wanted):
    assert followed(client)[0] == wanted


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (Client([], code=-9), "was killed by signal 9; finished shards are kept"),
        (Client([], code=137), "was killed by signal 9; finished shards are kept"),
        (Client([], code=127), "ended with exit code 127"),
        (Client([], code=None, message="Traceback\nno worker for it"), "job words-1 did not run: no worker for it"),
    ],
)
def test_an_end_without_a_code_of_ours_is_told(followed, client, told):
    with pytest.raises(PipelineError, match=told):
        followed(client)


def test_a_lost_cluster_ends_the_wait(followed, monkeypatch):
    monkeypatch.setattr(submit, "LOST_SECONDS", 0)
    with pytest.raises(PipelineError, match=r"http://head:8265 does not answer any more \(closed\); finished shards"):
        followed(Client(["one\n", RuntimeError("closed")]))


@pytest.mark.parametrize(
    ("answers", "wanted"), [(["No available agent to submit job, please try again later."] * 2, 3), (["No disk"], 1)]
)
def test_a_head_that_has_just_begun_gets_a_while(monkeypatch, answers, wanted):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0)
    tries = []

    def submit_job(**given):
        tries.append(given)
        if len(tries) <= len(answers):
            raise RuntimeError(answers[len(tries) - 1])
        return "words-1"

    with pytest.raises(RuntimeError, match="No disk") if wanted == 1 else nullcontext():
        assert submit._sent(SimpleNamespace(submit_job=submit_job), entrypoint="x") == "words-1"
    assert len(tries) == wanted


def test_an_explicit_address_wins_and_the_environment_is_left_alone(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(PipelineError, match="no Ray cluster takes jobs at http://127.0.0.1:1:"):
        submit._client("http://127.0.0.1:1")
    assert os.environ["RAY_ADDRESS"] == "http://10.0.0.1:8265"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("ray.dashboard.modules.job.sdk.requests", None)
    with pytest.raises(SpecError, match=r"pip install 'matryoshka-pipeline\[cluster\]'"):
        submit._client("http://127.0.0.1:1")
