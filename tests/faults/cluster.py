"""A cluster of several processes on this machine, an S3 server, and a job that loses nodes while it embeds.

    python -m tests.faults.cluster --corpus FILE --kills 10

A head and two nodes are started as processes of their own. The job is submitted as a user does, its root in a bucket;
the same job in a folder on this machine is what it must equal, table by table. Then one node after another is killed
by the ids of its processes, at seeded instants; last the whole cluster, and the job goes on in another. Before all
that the job runs on this machine with its root behind a proxy that breaks a tenth of the requests, or loses answers.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
import yaml

from tests.faults.s3proxy import Proxy

CHECKOUT = Path(__file__).parents[2]
START_SECONDS, JOB_SECONDS = 90, 900
SHARD, BEGAN, DIED = r"embed shard=\d+ rows", r"worker began", r"worker died"
BROKEN = {
    "whole": {}, "errors": dict.fromkeys(("error500", "error503", "reset", "truncated"), 0.025), "lost": {"lost": 0.3},
}  # fmt: skip
"""Shares of requests that a proxy breaks, by part."""
WRITTEN = "PUT /roots/{}/lancedb/documents.lance/data/"
PASSED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "XDG_CACHE_HOME")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except HTTPError:  # who is asked for a token is answered
        return True
    except OSError:
        return False


def wait_until(true: Any, what: str, seconds: float = START_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} took longer than {seconds:.0f} s")
        time.sleep(0.2)


class Process:
    """A process that was started here, and all that it starts."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._log = (folder / f"{time.monotonic_ns()}.log").open("w+b")
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=self._log, stderr=self._log)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def count(self, what: str) -> int:
        """How often its output tells of something."""
        return len(re.findall(what, Path(self._log.name).read_text(errors="replace")))

    def all(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Every process at once, by id."""
        found = self.all()
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, 10)
        self._process.wait(10)


class Cluster:
    """A head without cores for workers, and nodes of one core each."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.port, self.jobs_port = folder, free_port(), free_port()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }
        temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets below it, whose paths must be short
        self._temporary = temporary
        self.head = self._start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.jobs_port}", f"--temp-dir={temporary}",
        )  # fmt: skip
        wait_until(lambda: answers(f"{self.address}/api/version"), "the head")
        self.nodes = [self.join() for _ in range(nodes)]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.jobs_port}"

    def join(self, cores: int = 1) -> Process:
        """One node more."""
        return self._start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cores}")

    def tend(self) -> None:
        """Start again what did not begin: on few cores a node may time out."""
        self.nodes = [self.join() if one.has_ended else one for one in self.nodes]

    def _start(self, *options: str) -> Process:
        common = [
            "--block", "--disable-usage-stats", "--object-store-memory=100000000", "--min-worker-port=0",
            "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common]
        return Process(command, self.folder, self.environment)

    def end(self) -> None:
        for one in [*self.nodes, self.head]:
            one.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextmanager
def bucket(folder: Path) -> Iterator[tuple[str, Process]]:
    """A bucket and its S3 server, a process of its own; credentials of nobody stand in the environment."""
    import boto3

    port = free_port()
    server = Process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder, {**os.environ})
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/moto-api"), "the S3 server")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="roots")
        yield "s3://roots", server
    finally:
        server.kill()


class Trial:
    """One corpus and model; jobs with other roots are all the same job."""

    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.folder = folder
        self.values = {
            "corpus": {
                "source": str(asked.corpus), "id": "_id", "text": ["title", "text"], "shard_rows": asked.shard_rows,
            },
            "model": {"name": asked.model, "backend": "torch", "precision": asked.precision},
            "prefixes": [{"dim": 64, "precision": "binary"}, {"dim": 128, "precision": "int8"}],
            "evaluate": {"shortlists": []},
            "workers": {"count": {"min": 2, "max": 2}, "cpus": 1},
        }  # fmt: skip

    def spec(self, name: str, root: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "root": root, **self.values}))
        return path

    def run(self, name: str, root: str) -> float:
        """On this machine; seconds."""
        return self._seconds([sys.executable, "-m", "pipeline", "run", str(self.spec(name, root))], name)

    def submitted(self, cluster: Cluster, name: str, root: str) -> subprocess.Popen[bytes]:
        """On its way on a cluster."""
        options = [part for variable in PASSED if variable in os.environ for part in ("--env", variable)]
        command = [sys.executable, "-m", "pipeline", "submit", str(self.spec(name, root)), "--address", cluster.address]
        log = (self.folder / f"{name}.log").open("ab")
        return subprocess.Popen([*command, *options], cwd=CHECKOUT, stdout=log, stderr=log)

    def told(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def count(self, name: str, what: str) -> int:
        """How often its output tells of something."""
        return len(re.findall(what, self.told(name)))

    def _seconds(self, command: list[str], name: str) -> float:
        start = time.monotonic()
        with (self.folder / f"{name}.log").open("ab") as log:
            done = subprocess.run(command, cwd=CHECKOUT, stdout=log, stderr=log, check=False, timeout=JOB_SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{self.told(name)[-3000:]}")
        return time.monotonic() - start


def digests(root: str) -> dict[str, Any]:
    """Of every table of the newest generation."""
    from pipeline import ledger
    from pipeline.bucket import located

    generation = ledger.newest_generation(located(root))
    if generation is None:
        raise RuntimeError(f"{root} has no generation")
    return {name: entry["digest"] for name, entry in generation["tables"].items()}


def ended(job: subprocess.Popen[bytes], trial: Trial, name: str, cluster: Cluster) -> None:
    def is_over() -> bool:
        cluster.tend()
        return job.poll() is not None

    wait_until(is_over, name, JOB_SECONDS)
    if job.returncode != 0:
        raise RuntimeError(f"{name} ended with {job.returncode}:\n{trial.told(name)[-3000:]}")


def undisturbed(trial: Trial, cluster: Cluster, store: str, wanted: dict[str, Any], server: Process) -> dict[str, Any]:
    start = time.monotonic()
    ended(trial.submitted(cluster, "calm", f"{store}/calm"), trial, "calm", cluster)
    return {
        "seconds": time.monotonic() - start, "written": server.count(WRITTEN.format("calm")),
        "equal": digests(f"{store}/calm") == wanted,
    }  # fmt: skip


def nodes_lost(
    trial: Trial, cluster: Cluster, store: str, wanted: dict[str, Any], kills: int, seed: int, server: Process
) -> dict[str, Any]:
    """Nodes die one after another at seeded instants, each once a shard was finished since; others join.

    `in_hand`: items that dead workers were given, of which a device has one at most; `written`: files of
    vectors, those of merged shards among them.
    """
    rng, start, recovered = random.Random(seed), time.monotonic(), []
    job = trial.submitted(cluster, "lossy", f"{store}/lossy")

    def over(what: str, count: int) -> Callable[[], bool]:
        def is_over() -> bool:
            cluster.tend()
            return trial.count("lossy", what) >= count or job.poll() is not None

        return is_over

    for _ in range(kills):
        wait_until(over(SHARD, trial.count("lossy", SHARD) + 1), "the next shard", 120)
        time.sleep(rng.uniform(0, 3))
        if job.poll() is not None:
            break
        began, killed = trial.count("lossy", BEGAN), time.monotonic()
        victim = rng.randrange(len(cluster.nodes))
        cluster.nodes[victim].kill()
        cluster.nodes[victim] = cluster.join()
        wait_until(over(BEGAN, began + 1), "another worker", 120)
        recovered.append(round(time.monotonic() - killed, 1))
    ended(job, trial, "lossy", cluster)
    seconds, shards = time.monotonic() - start, trial.count("lossy", SHARD)
    return {
        "kills": len(recovered), "seconds": seconds, "seconds_to_another_worker": recovered, "shards": shards,
        "in_hand": trial.count("lossy", DIED), "written": server.count(WRITTEN.format("lossy")),
        "equal": digests(f"{store}/lossy") == wanted,
    }  # fmt: skip


def head_lost(trial: Trial, store: str, wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All of a cluster dies mid-embed; the job is submitted to another one."""
    first = Cluster(folder, 2)
    try:
        job = trial.submitted(first, "moved", f"{store}/moved")
        wait_until(lambda: trial.count("moved", SHARD) >= 5 or job.poll() is not None, "five shards", 180)
        first.head.kill()
    finally:
        first.end()
    job.kill()
    job.wait(10)
    before = trial.count("moved", SHARD)
    second = Cluster(folder, 2)
    try:
        start = time.monotonic()
        ended(trial.submitted(second, "moved", f"{store}/moved"), trial, "moved", second)
    finally:
        second.end()
    seconds, after = time.monotonic() - start, trial.count("moved", SHARD) - before
    return {
        "shards_before": before, "shards_after": after, "seconds": seconds,
        "equal": digests(f"{store}/moved") == wanted,
    }  # fmt: skip


def broken(trial: Trial, store: str, wanted: dict[str, Any], name: str, rates: dict[str, float]) -> dict[str, Any]:
    """On this machine, its root behind 20 ms and a proxy that breaks requests."""
    direct = os.environ["AWS_ENDPOINT_URL"]
    with Proxy(int(direct.rpartition(":")[2]), rates, latency=0.02) as proxy:
        proxy.only = ("PUT", "POST", "DELETE") if name == "lost" else ()
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        try:
            seconds = trial.run(name, f"{store}/{name}")
        finally:
            os.environ["AWS_ENDPOINT_URL"] = direct
    return {"seconds": seconds, "equal": digests(f"{store}/{name}") == wanted, **proxy.counts}


def main() -> None:
    """Run the trials asked for; their figures as JSON lines."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--corpus", type=Path, required=True, help="Parquet with _id, title, text")
    options.add_argument("--model", default="all-MiniLM-L6-v2")
    options.add_argument("--precision", default="float32")
    options.add_argument("--shard-rows", type=int, default=64)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parts", default="whole,errors,lost,calm,nodes,head")
    asked = options.parse_args()
    asked.corpus = asked.corpus.resolve()
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    parts = asked.parts.split(",")
    with tempfile.TemporaryDirectory() as name, bucket(Path(name)) as (store, server):
        folder = Path(name)
        trial = Trial(folder, asked)
        seconds = trial.run("local", str(folder / "local"))
        wanted = digests(str(folder / "local"))
        print(json.dumps({"part": "local", "seconds": seconds, "shards": trial.count("local", SHARD)}), flush=True)
        for part, rates in BROKEN.items():
            if part in parts:
                print(json.dumps({"part": part, **broken(trial, store, wanted, part, rates)}), flush=True)
        if {"calm", "nodes"} & set(parts):
            cluster = Cluster(folder, 2)
            try:
                if "calm" in parts:
                    print(
                        json.dumps({"part": "calm", **undisturbed(trial, cluster, store, wanted, server)}), flush=True
                    )
                if "nodes" in parts:
                    told = nodes_lost(trial, cluster, store, wanted, asked.kills, asked.seed, server)
                    print(json.dumps({"part": "nodes", **told}), flush=True)
            finally:
                cluster.end()
        if "head" in parts:
            print(json.dumps({"part": "head", **head_lost(trial, store, wanted, folder)}), flush=True)


if __name__ == "__main__":
    main()
