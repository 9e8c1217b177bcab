"""`jobs/cluster/`: what can be known of the manifest and the image without a cluster."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.spec import JobSpec, Range
from pipeline.values import size

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "jobs" / "cluster"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = re.sub(r"\\\n\s*", "", (FOLDER / "Dockerfile").read_text())
INSTRUCTIONS = [
    (line.split()[0], line.partition(" ")[2].strip())
    for line in DOCKERFILE.splitlines()
    if line and not line.startswith("#")
]
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD")


@pytest.fixture(scope="module")
def config():
    return documents()["ConfigMap"]


@pytest.fixture(scope="module")
def job():
    return documents()["RayJob"]


def documents():
    found = list(yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text()))
    assert len(found) == 2
    return {one["kind"]: one for one in found}


def groups(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def values_of(instruction):
    return [value for name, value in INSTRUCTIONS if name == instruction]


def test_the_rayjob_has_what_kuberay_needs(job):
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["rayVersion"] == PINNED["ray"]
    for group in groups(job):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert container["image"] == "IMAGE-NAME:TAG"
            assert container["resources"]["limits"] == container["resources"]["requests"]
    workers = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert len({group["groupName"] for group in workers}) == len(workers) > 0
    assert all(0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


def test_nobody_is_root(job):
    (user,) = values_of("USER")
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", user)
    assert INSTRUCTIONS.index(("USER", user)) > max(n for n, (name, _) in enumerate(INSTRUCTIONS) if name == "RUN")
    for group in groups(job):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == user
        assert all(one["securityContext"]["allowPrivilegeEscalation"] is False for one in pod["containers"])


def test_credentials_come_from_a_secret_and_volumes_are_there(job):
    for group in groups(job):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        secrets = [one for one in container["env"] if SECRET.search(one["name"])]
        assert len(secrets) == 2
        assert all(set(one["valueFrom"]) == {"secretKeyRef"} and "value" not in one for one in secrets)
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_the_entrypoint_runs_the_spec_that_is_mounted(job, config):
    program, file = job["spec"]["entrypoint"].rsplit(" ", 1)
    assert program == "python -m pipeline run"
    assert "run" in {command.name for command in cli.app.registered_commands}
    head = groups(job)[0]["template"]["spec"]
    (mount,) = [one for one in head["containers"][0]["volumeMounts"] if one["name"] == "job"]
    (volume,) = [one for one in head["volumes"] if one["name"] == "job"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (key,) = config["data"]
    assert file == f"{mount['mountPath']}/{key}"


def test_the_spec_is_valid_and_its_workers_fit(job, config):
    (text,) = config["data"].values()
    spec = JobSpec.of(yaml.safe_load(text))
    assert spec.workers.address == "auto"
    assert isinstance(spec.workers.count, Range)
    places = 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert size(limits["memory"] + "B") >= spec.workers.memory
        places += group["maxReplicas"] * (int(limits["cpu"]) // spec.workers.cpus)
        assert spec.model.name.startswith(
            tuple(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "models")
        )
    assert places == spec.workers.count.max
    assert all("://" in path for path in (spec.root, *spec.corpus.source))


def test_the_image_installs_what_was_tested(job):
    (base,) = values_of("FROM")
    assert re.fullmatch(r"python:3\.1[1-9]\.\d+-slim-\w+", base)  # a full version, never `latest`
    (extras,) = [value.partition("=")[2] for value in values_of("ARG")]
    assert {"cluster"} <= set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert 'python -m pip install -c constraints.txt ".[${EXTRAS}]"' in values_of("RUN")
    copied = [name for value in values_of("COPY") for name in value.split()[:-1]]
    assert "constraints.txt" in copied
    assert all((ROOT / name).exists() for name in copied)
    assert PROJECT["license-files"][0] in copied
    assert PROJECT["readme"] in copied
