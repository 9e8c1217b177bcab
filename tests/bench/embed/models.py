"""Models that are measured: a folder's shape, and a static model made of a transformer's token table."""

import json
from pathlib import Path

from tests.bench.embed.serve import quiet


def is_static(folder: Path) -> bool:
    """Whether a folder is a static embedding model."""
    file = folder / "modules.json"
    return file.is_file() and any("StaticEmbedding" in one["type"] for one in json.loads(file.read_text()))


def static(model: Path, folder: Path) -> Path:
    """A StaticEmbedding of the model's token table and tokenizer, as sentence-transformers files."""
    if is_static(model):
        return model
    quiet()
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    tables = load_file(model / "model.safetensors")
    table = next(value for name, value in tables.items() if name.endswith("word_embeddings.weight"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    made = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table), Normalize()], device="cpu")
    made.save(str(folder), create_model_card=False)
    return folder
