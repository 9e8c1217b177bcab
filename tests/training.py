"""For tests of training: a toy whose answer is known, a base model that does not know it, a spec.

A text has four concepts; the anchor says them with words w000 to w039, the positive with w040 to w079. The base has
random vectors, so that it finds nothing; who learns which two words are one concept finds everything.
"""

import os
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from pipeline.training.spec import TrainSpec
from tests.conftest import WORDS, save_model

CONCEPTS = 40


def with_tests():
    """The environment of a process that imports these tests."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


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


def transformer(folder, width=32):
    """A BERT of one layer with random weights whose tokenizer cuts at 16 tokens."""
    import torch
    import transformers as hf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir()
    (plain / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **sizes)
    hf.BertModel(config).save_pretrained(plain)
    hf.BertTokenizerFast(str(plain / "vocab.txt"), model_max_length=16).save_pretrained(plain)
    inner = Transformer(str(plain), max_seq_length=16)
    model = SentenceTransformer(modules=[inner, Pooling(width), Normalize()], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder
