"""What the GPU benchmark runs: random BERT-shaped models, a WordPiece tokenizer, texts of set lengths."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).parents[2]
VOCABULARY = 30_522
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 512
SETS = {"mixed": (5, 500), "short": (5, 30)}
"""Tokens of a text, special ones included, drawn evenly."""


@dataclass(frozen=True)
class Shape:
    """A BERT: `tokens` of mixed texts are about a second's work for a large GPU."""

    name: str
    layers: int
    width: int
    heads: int
    tokens: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("minilm", 6, 384, 12, 4_000_000),
        Shape("base", 12, 768, 12, 1_500_000),
        Shape("large", 24, 1024, 16, 500_000),
        Shape("tiny", 2, 32, 4, 3_000),
    )
}


def encoders_alone() -> None:
    """Let `pipeline.encoders` be imported without the package's own front, which brings Ray, Lance and polars."""
    if "pipeline" not in sys.modules:
        front = types.ModuleType("pipeline")
        front.__path__ = [str(CHECKOUT / "pipeline")]
        sys.modules["pipeline"] = front


def flops(shape: Shape, lengths: np.ndarray) -> float:
    """Operations of all layers, 24·L·h² for a token and 4·L·h·n more in a text of n: real tokens alone."""
    tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    return 24 * shape.layers * shape.width**2 * tokens + 4 * shape.layers * shape.width * squares


def words() -> list[str]:
    """Different words of four letters: each is one token."""
    numbers = np.arange(VOCABULARY - len(SPECIAL))
    letters = np.stack([numbers // 26**place % 26 for place in range(4)], axis=1).astype(np.uint8) + ord("a")
    return [bytes(row).decode() for row in letters]


def texts(name: str, tokens: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Different texts of about so many tokens in all, in no order, and how many tokens each has."""
    rng = np.random.default_rng(seed)
    low, high = SETS[name]
    lengths = rng.integers(low, high + 1, 2 * tokens // (low + high) + 1)
    known = np.array(words())
    drawn = np.split(known[rng.integers(0, len(known), int((lengths - 2).sum()))], np.cumsum(lengths - 2)[:-1])
    return [" ".join(part) for part in drawn], lengths


def save(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """A sentence-transformers folder: BERT with random weights, mean pooling, unit length.

    Weights are of the size at which attention is neither even nor one-hot.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    bare = folder / "bare"
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=LONGEST,
        initializer_range=shape.width**-0.5,
    )
    BertModel(config).save_pretrained(bare)
    names = {word: number for number, word in enumerate([*SPECIAL, *words()])}
    core = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{part}_token": f"[{part.upper()}]" for part in ("pad", "unk", "cls", "sep", "mask")},
    ).save_pretrained(bare)
    whole = folder / "whole"
    modules = [Transformer(str(bare)), Pooling(shape.width, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(whole), create_model_card=False)
    return whole
