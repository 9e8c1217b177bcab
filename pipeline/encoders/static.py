"""Static embedding models (`StaticEmbedding`, model2vec): ids, gather, mean, without a loop over rows in Python."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.encoders.batches import Ending, Role
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.tokens import Tokenizer, Tokens


class StaticEncoder:
    """The mean of one vector per token, brought to length 1 where the model does so."""

    pads, in_flight = False, 1
    max_tokens: int | None = None

    def __init__(self, base: SentenceEncoder, tokenizer: Tokenizer) -> None:
        """Take the table and the tokenizer out of a loaded model for which `fits` holds."""
        self._torch = base._torch
        self.tokenizer: Tokenizer | None = tokenizer
        self._table = base.model[0].embedding.weight.detach().cpu()
        self._unit = len(base.model) == 2
        self.dim = base.dim

    @classmethod
    def of(cls, base: SentenceEncoder) -> "StaticEncoder | None":
        """None where a model is more than a table, or its tokenizer is none of `tokenizers`."""
        kinds = [type(module).__name__ for module in base.model]
        inner = getattr(base.model[0], "tokenizer", None)
        if kinds[0] != "StaticEmbedding" or kinds[1:] not in ([], ["Normalize"]) or not hasattr(inner, "to_str"):
            return None
        tokenizer = Tokenizer.of(inner, special=False, limit=None, threads=base.threads)
        return None if tokenizer is None else cls(base, tokenizer)

    def flops(self) -> tuple[float, float]:
        """Nothing is multiplied."""
        return 0.0, 0.0

    def tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        """The ids of each text with its prompt."""
        assert self.tokenizer is not None
        return self.tokenizer(texts, prompt)

    def begin(self, tokens: Tokens, role: Role, prompt: str) -> Ending:
        """The means of a batch."""
        torch = self._torch
        with torch.inference_mode():
            ids, offsets = (torch.from_numpy(part) for part in (tokens.ids, tokens.offsets[:-1].astype(np.int32)))
            means: Any = torch.nn.functional.embedding_bag(ids, self._table, offsets, mode="mean")
            means = means.float()
            if self._unit:
                means = torch.nn.functional.normalize(means, dim=1)
        vectors: NDArray[np.float32] = means.numpy()
        return lambda: vectors
