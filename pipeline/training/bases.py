"""The model that training begins with: a transformer as it is, or one vector per token taken out of one."""

import logging
from pathlib import Path
from typing import Any

from pipeline.encoders import models
from pipeline.errors import SpecError
from pipeline.training.data import told_as
from pipeline.training.spec import Base

log = logging.getLogger(__name__)


def resolve(settings: Base) -> models.ModelFolder:
    """The base's files; SpecError where there is no such model."""
    with told_as("base.model", "model.name"), told_as("base.revision", "model.revision"):
        folder = models.resolve(settings.model, settings.revision)
    if settings.kind == "transformer" and is_static(folder):
        raise SpecError(f"base.kind: {folder.name} has one vector per token; leave kind out, or set kind: static")
    if kind(settings, folder) == "static" and settings.max_tokens is not None:
        raise SpecError("base.max_tokens: a static model reads texts of any length; leave it out")
    return folder


def kind(settings: Base, folder: models.ModelFolder) -> str:
    """`static` or `transformer`."""
    if settings.kind != "auto":
        return settings.kind
    return "static" if is_static(folder) else "transformer"


def is_static(folder: models.ModelFolder) -> bool:
    """Whether the model itself has one vector per token."""
    return models.module_kinds(folder)[:1] == ["StaticEmbedding"]


def build(settings: Base, folder: models.ModelFolder) -> Any:
    """A SentenceTransformer to be trained, on a GPU where there is one."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(folder.path, device=device, local_files_only=True, trust_remote_code=False)
    if kind(settings, folder) == "static" and not is_static(folder):
        return _static_of(model, folder, device)
    if settings.max_tokens is not None:
        limit = model.max_seq_length
        if folder.positions is not None and settings.max_tokens > folder.positions:
            raise SpecError(
                f"base.max_tokens: {folder.name} has {folder.positions} positions, {settings.max_tokens} were asked for"
            )
        log.info("base max_tokens=%d instead of %s", settings.max_tokens, limit)
        model.max_seq_length = settings.max_tokens
    return model


def _static_of(model: Any, folder: models.ModelFolder, device: str) -> Any:
    """The transformer's token table, its mean per text brought to length 1."""
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
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table), Normalize()])
    return static.to(device)


def width(model: Any) -> int:
    """The dimension of a model's vectors."""
    return int(model.get_embedding_dimension() or model.encode(["a"]).shape[1])
