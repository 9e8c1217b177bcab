"""For tests of training: a toy whose answer is known, a base model that does not know it, a spec.

A text has four concepts; the anchor says them with words w000 to w039, the positive with w040 to w079. The base has
random vectors, so that it finds nothing; who learns which two words are one concept finds everything.
"""

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from pipeline.training.spec import TrainSpec
from tests.conftest import WORDS, save_model

CONCEPTS = 40


def pairs(count=700, seed=0):
    rng = np.random.default_rng(seed)
    drawn = [sorted(rng.choice(CONCEPTS, 4, replace=False)) for _ in range(count)]
    texts = {
        "anchor": [" ".join(WORDS[one] for one in some) for some in drawn],
        "positive": [" ".join(WORDS[CONCEPTS + one] for one in some) for some in drawn],
    }
    return pl.DataFrame(texts).unique(maintain_order=True)


def base(folder):
    """The stand-in, all of whose words are numbers, small beside what is learnt."""
    weights = save_model(folder) / "model.safetensors"
    save_file({name: np.nan_to_num(value) * 0.1 for name, value in load_file(weights).items()}, weights)


def toy(folder, **changes):
    """Plain values of a spec; files are made in `folder`."""
    if not (folder / "base").is_dir():
        base(folder / "base")
        pairs().write_parquet(folder / "pairs.parquet")
    values = {
        "name": "toy",
        "output": str(folder / "trained"),
        "base": {"model": str(folder / "base")},
        "data": {"source": str(folder / "pairs.parquet"), "anchor": "anchor", "positive": "positive"},
        "held_out": 0.3,
        "dims": [32, 8],
        "epochs": 10,
        "batch_size": 64,
        "learning_rate": 0.05,
    }
    return TrainSpec.of({**values, **changes})


def quality(record, when="after"):
    """nDCG by dim."""
    return {row["dim"]: row["ndcg"] for row in record["evaluation"] if row["when"] == when}
