"""The spec: every job file is valid, the schema is in step, overrides reach every field."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.cli import schema_text
from pipeline.errors import SpecError
from pipeline.spec import JobSpec
from pipeline.training.spec import TrainSpec

ROOT = Path(__file__).parent.parent
TRAININGS = sorted((ROOT / "jobs").glob("train-*.yaml"))
JOBS = sorted(set((ROOT / "jobs").glob("*.yaml")) - set(TRAININGS))


def test_the_schema_file_is_in_step():
    assert (ROOT / "schemas" / "job.schema.json").read_text() == schema_text(), "run `make schemas`"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_is_valid_by_models_and_by_schema(path):
    assert JobSpec.load(path).name
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema_text()))


def test_the_schema_file_of_trainings_is_in_step():
    assert (ROOT / "schemas" / "train.schema.json").read_text() == schema_text(TrainSpec), "run `make schemas`"


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.name)
def test_every_training_is_valid_by_models_and_by_schema(path):
    assert TrainSpec.load(path).name
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema_text(TrainSpec)))


def test_five_fields_are_enough():
    job = JobSpec.of(
        {
            "name": "a",
            "root": "b",
            "corpus": {"source": "c.csv", "text": "d"},
            "model": {"name": "e"},
            "prefixes": [{"dim": 8, "precision": "binary"}],
        }
    )
    assert job.corpus.text == ("d",)
    assert job.evaluate.k == 10
    assert job.prefixes[0].table == "prefix_8_binary"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda job: job.seed == 7),
        ("prefixes.1.dim=8", lambda job: job.prefixes[1].dim == 8),
        ("prefixes.3={dim: 8, precision: int8}", lambda job: job.prefixes[3].table == "prefix_8_int8"),
        ("evaluate.floor.recall_exact=0.5", lambda job: job.evaluate.floor == {"recall_exact": 0.5}),
        ("corpus.text=[a, b]", lambda job: job.corpus.text == ("a", "b")),
        ("model.prompts={query: 'q: '}", lambda job: job.model.prompts.query == "q: "),
        ("search.cascade=[]", lambda job: job.search.cascade == ()),
        ("corpus.id=null", lambda job: job.corpus.id is None),
    ],
)
def test_overrides_are_yaml_values(job_file, override, read):
    assert read(JobSpec.load(job_file(), [override]))


def test_a_frozen_spec_cannot_be_changed(spec):
    with pytest.raises(ValueError, match="frozen"):
        spec().seed = 3


def test_only_the_first_problem_is_told_and_the_others_counted(values):
    with pytest.raises(SpecError, match=r"unknown field sed .*'seed'.*\(and 1 more problem\)"):
        JobSpec.of(values(sed=1, naem=2))
