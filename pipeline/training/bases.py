"""The model that training begins with: a transformer as it is, or one vector per token taken out of one."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.encoders import models
from pipeline.errors import SpecError
from pipeline.training.data import told_as
from pipeline.training.spec import Base
from pipeline.transform import Moments, pca
from pipeline.vectors import Matrix

log = logging.getLogger(__name__)

SIF = 1e-3
"""The frequency at which a token's weight is a half (smooth inverse frequency: Arora et al. 2017)."""
COUNTED = 20_000
"""About so many texts tell how frequent tokens are."""
TOKENS_AT_ONCE = 1_024
"""Through the transformer."""


def resolve(settings: Base) -> models.ModelFolder:
    """The base's files; SpecError where there is no such model."""
    with told_as("base.model", "model.name"), told_as("base.revision", "model.revision"):
        folder = models.resolve(settings.model, settings.revision)
    if settings.init == "distill" and is_static(folder):
        raise SpecError(f"base.init: {folder.name} has one vector per token already; leave init out")
    if settings.kind == "transformer" and is_static(folder):
        raise SpecError(f"base.kind: {folder.name} has one vector per token; leave kind out, or set kind: static")
    if kind(settings, folder) == "static" and settings.max_tokens is not None:
        raise SpecError("base.max_tokens: a static model reads texts of any length; leave it out")
    if folder.positions is not None and (settings.max_tokens or 0) > folder.positions:
        raise SpecError(
            f"base.max_tokens: {folder.name} has {folder.positions} positions, {settings.max_tokens} were asked for"
        )
    return folder


def kind(settings: Base, folder: models.ModelFolder) -> str:
    """`static` or `transformer`."""
    if settings.kind != "auto":
        return settings.kind
    return "static" if is_static(folder) else "transformer"


def is_static(folder: models.ModelFolder) -> bool:
    """Whether the model itself has one vector per token."""
    return models.module_kinds(folder)[:1] == ["StaticEmbedding"]


def build(settings: Base, folder: models.ModelFolder, texts: Sequence[str] = ()) -> Any:
    """A SentenceTransformer to be trained, on a GPU where there is one; `texts` tell how frequent tokens are."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(folder.path, device=device, local_files_only=True, trust_remote_code=False)
    if kind(settings, folder) == "static" and not is_static(folder):
        return _static_of(model, folder, device, settings.init, texts)
    if settings.max_tokens is not None:
        log.info("base max_tokens=%d instead of %s", settings.max_tokens, model.max_seq_length)
        model.max_seq_length = settings.max_tokens
    return model


def _static_of(model: Any, folder: models.ModelFolder, device: str, init: str, texts: Sequence[str]) -> Any:
    """One vector per token of the transformer; their mean per text is brought to length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    path = Path(folder.path) / "tokenizer.json"
    inner = getattr(model[0], "model", None)
    if inner is None or not path.is_file():
        raise SpecError(f"base.kind: {folder.name} has no token table with a tokenizer.json; use kind: transformer")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    table = inner.get_input_embeddings().weight.detach().cpu().float().clone()
    if init == "distill":
        table = _distilled(model, tokenizer, len(table), texts)
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table), Normalize()])
    return static.to(device)


def _distilled(model: Any, tokenizer: Any, rows: int, texts: Sequence[str]) -> Any:
    """float32[rows, width]: what the transformer makes of each token, by principal axis, times a / (a + frequency)."""
    import torch

    outputs = _outputs(model, tokenizer, rows)
    moments = Moments(outputs.shape[1])
    moments.add(outputs)
    turned = pca(moments)[0].apply(outputs)
    some = sorted(set(texts))
    some = some[:: max(1, len(some) // COUNTED)]
    ids = [np.array(one.ids, np.int64) for one in tokenizer.encode_batch(some, add_special_tokens=False)]
    counts = np.bincount(np.concatenate(ids), minlength=rows)[:rows] if ids else np.zeros(rows)
    weights = SIF / (SIF + counts / max(int(counts.sum()), 1))
    log.info("base distilled tokens=%d width=%d counted=%d", rows, turned.shape[1], int(counts.sum()))
    return torch.from_numpy(np.asarray(turned * weights[:, None], np.float32))


def _outputs(model: Any, tokenizer: Any, rows: int) -> Matrix:
    """The transformer's vectors of texts that are one token each, before they are brought to length 1."""
    import torch

    model.eval()
    modules = [module for module in model if type(module).__name__ != "Normalize"]
    word, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next((place for place in range(len(whole)) if whole[place : place + len(word)] == word), 0)
    before, after = whole[:begin], whole[begin + len(word) :]
    found = []
    with torch.inference_mode():
        for start in range(0, rows, TOKENS_AT_ONCE):
            ids = [[*before, number, *after] for number in range(start, min(start + TOKENS_AT_ONCE, rows))]
            given = torch.tensor(ids, device=model.device)
            features: Any = {"input_ids": given, "attention_mask": torch.ones_like(given)}
            for module in modules:
                features = module(features)
            found.append(features["sentence_embedding"].float().cpu().numpy())
    return np.concatenate(found)


def width(model: Any) -> int:
    """The dimension of a model's vectors."""
    return int(model.get_embedding_dimension() or model.encode(["a"]).shape[1])
