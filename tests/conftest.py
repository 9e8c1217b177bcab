"""Shared by all tests: a stand-in model that is real sentence-transformers files, a small corpus, a spec.

The stand-in averages one fixed random vector per word, so that its answers can be worked out by hand. A text of
unknown words has length zero; the word `broken` is not a number.
"""

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from hypothesis import settings

from pipeline.spec import JobSpec

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

DIM = 32
WORDS = [f"w{number:03d}" for number in range(300)]


LONG = {"test_readme", "test_training_workers", "test_submit", "test_resume", "test_bucket", "test_index"}
"""Files of few long tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that two processes end together."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def save_model(folder: Path, seed: int = 0, dim: int = DIM, falling: bool = False) -> Path:
    """A static embedding model of WORDS, written as sentence-transformers files.

    `falling`: each dimension weighs less than the one before, as in a model trained for its prefixes.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    names = ["[UNK]", "broken", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(seed).standard_normal((len(names), dim)).astype(np.float32)
    if falling:
        weights *= np.arange(1, dim + 1, dtype=np.float32) ** -1.0
    weights[0], weights[1] = 0, np.nan
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights), Normalize()], device="cpu"
    )
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in model."""
    return save_model(tmp_path_factory.mktemp("model") / "stand-in")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in with other weights."""
    return save_model(tmp_path_factory.mktemp("model") / "other", seed=1)


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of 3 to 8 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)]


def corpus_frame(count: int = 120, seed: int = 0) -> pl.DataFrame:
    """Rows _id, title, text, lang, year."""
    return pl.DataFrame(
        {
            "_id": [f"doc-{number}" for number in range(count)],
            "title": [WORDS[number % 300] for number in range(count)],
            "text": texts(count, seed),
            "lang": [("en", "de", "fr")[number % 3] for number in range(count)],
            "year": [1990 + number % 40 for number in range(count)],
        }
    )


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A Parquet corpus of 120 rows."""
    path = tmp_path / "corpus.parquet"
    corpus_frame().write_parquet(path)
    return path


SpecValues = Callable[..., dict[str, Any]]


@pytest.fixture
def values(tmp_path: Path, corpus_file: Path, model: Path) -> SpecValues:
    """Plain values of a spec that runs in this process; keyword `section__field=value` overrides."""

    def make(**overrides: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "name": "test",
            "root": str(tmp_path / "root"),
            "corpus": {"source": str(corpus_file), "id": "_id", "text": ["title", "text"]},
            "model": {"name": str(model)},
            "prefixes": [
                {"dim": 8, "precision": "binary"},
                {"dim": 16, "precision": "int8"},
                {"dim": 16, "precision": "float16"},
            ],
            "evaluate": {"shortlists": []},
            "workers": {"count": 0},
        }
        for path, value in overrides.items():
            section, _, field = path.partition("__")
            if field:
                made.setdefault(section, {})[field] = value
            else:
                made[section] = value
        return made

    return make


@pytest.fixture
def spec(values: SpecValues) -> Callable[..., JobSpec]:
    """A checked spec with overrides, as `values`."""
    return lambda **overrides: JobSpec.of(values(**overrides))


@pytest.fixture
def job_file(values: SpecValues, tmp_path: Path) -> Callable[..., Path]:
    """A spec on disk (JSON is YAML), with overrides, as `values`."""

    def make(**overrides: Any) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps(values(**overrides)))
        return path

    return make


@pytest.fixture(scope="session", autouse=True)
def _quick_ends() -> Iterator[None]:
    """No test looks at milliseconds or widths of intervals; a run made in this process makes no page.

    Nor can it lose power: fsync is asked for, and does nothing.
    """
    job = importlib.import_module("pipeline.run")._Run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sweep.TIMED_QUERIES", 3)
        patch.setattr("pipeline.metrics.RESAMPLES", 50)
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(job, "_page", job._report, raising=False)
        patch.setattr(job, "_report", lambda run, generation: None)
        yield


@contextmanager
def making_pages() -> Iterator[None]:
    """Runs in this process make their page too."""
    job = importlib.import_module("pipeline.run")._Run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_report", job._page)
        yield


@pytest.fixture
def pages() -> Iterator[None]:
    """Runs in this process make their page too."""
    with making_pages():
        yield


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths must not reach the checkout, nor verdicts of probes the user's cache, nor a log level others."""
    logging.getLogger("pipeline").setLevel(logging.NOTSET)  # a command or worker run by an earlier test asked for more
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
