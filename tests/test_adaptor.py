"""The learned adaptor: better short prefixes than PCA where neighbourhoods are not where the variance is."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import adaptor, probe, run
from pipeline.spec import JobSpec
from pipeline.transform import Moments, pca
from pipeline.vectors import unit
from tests.conftest import WORDS

DIM = 24


def clustered(rows=1_500, seed=0):
    """Neighbours differ along weak axes: every row has a strong random part that no neighbour shares."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((60, 8)) * 0.8
    near = centres[rng.integers(0, 60, rows)] + 0.15 * rng.standard_normal((rows, 8))
    noise = rng.standard_normal((rows, DIM - 8)) * np.linspace(0.5, 0.05, DIM - 8)
    basis = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    return np.asarray(unit(np.hstack([near, noise]) @ basis), np.float32)


@pytest.fixture(scope="module")
def learned():
    rows = clustered()
    return rows, adaptor.train(rows[300:], [4, 8], seed=0)


def kept(rows, transform, dim):
    (found,) = probe.measure(rows, 300, None, {"way": transform}, [dim])
    return float(found.neighbours.mean())


def test_it_keeps_more_of_unseen_rows_neighbours_than_pca(learned):
    rows, transform = learned
    moments = Moments(DIM)
    moments.add(rows[300:])
    plain = pca(moments)[0]
    assert kept(rows, transform, 4) > kept(rows, plain, 4)
    assert transform.kind == "adaptor"
    assert transform.stacked().shape == (DIM + 1, DIM)


def test_equal_rows_and_seed_give_equal_bits(learned, monkeypatch):
    rows, _ = learned
    monkeypatch.setattr(adaptor, "STEPS", 5)
    one, two = (adaptor.train(rows[:400], [4, 8], seed=1).stacked() for _ in range(2))
    assert np.array_equal(one, two)


def test_it_leaves_torch_with_as_many_threads_as_before(monkeypatch):
    import torch

    monkeypatch.setattr(adaptor, "STEPS", 1)
    monkeypatch.setattr(adaptor, "THREADS", 1)
    before = torch.get_num_threads()
    adaptor.train(clustered(200), [4], seed=0)
    assert torch.get_num_threads() == before


def test_a_job_keeps_the_better_of_adaptor_and_pca_and_says_by_how_much(values, tmp_path, monkeypatch):
    """Signs are taken of the PCA all the same; the tables say which transform is theirs."""
    monkeypatch.setattr(adaptor, "STEPS", 40)
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS[at % 50 : at % 50 + 12], 5)) for at in range(1_400)]
    frame = pl.DataFrame({"_id": [f"d{n}" for n in range(len(rows))], "title": [""] * len(rows), "text": rows})
    frame.write_parquet(tmp_path / "rows.parquet")
    job = JobSpec.of(values(corpus__source=str(tmp_path / "rows.parquet"), corpus__text="text"))
    generation = run(job)
    compared = generation["transform"]["compared"]
    assert compared["kept"] == generation["transform"]["kind"] == max(("pca", "adaptor"), key=lambda way: compared[way])
    assert f"the adaptor keeps {compared['adaptor']:.1%}, PCA {compared['pca']:.1%}" in compared["because"]
    import lancedb

    database = lancedb.connect(str(Path(job.root) / "lancedb"))
    kinds = {
        name: json.loads(database.open_table(name).schema.metadata[b"matryoshka"])["transform"]["kind"]
        for name in ("prefix_8_binary", "prefix_16_int8", "prefix_16_float16")
    }
    won = compared["kept"]
    assert kinds == {"prefix_8_binary": "pca", "prefix_16_int8": won, "prefix_16_float16": won}
    assert run(job) == generation
