"""sentence-transformers models on torch: their own modules run as they are.

In bfloat16 only the transformer runs at half precision; pooling and what follows stay float32.
"""

import copy
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.encoders.batches import Role, plan
from pipeline.encoders.models import ModelFolder, folder_digest
from pipeline.errors import DataError, SpecError
from pipeline.vectors import Matrix, unit

log = logging.getLogger(__name__)

TorchPrecision = Literal["float32", "bfloat16"]
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names sentence-transformers itself tries for a document's prompt, in its order."""
HUGE = 100_000
"""Characters from which a text is read no further than it must be: 10 MB take a tokenizer 2 to 25 s and 0.5 to 5 GB
(measured, by its kind)."""
HEAD = 64
"""Characters read of a huge text for each token of the limit (English has four); four times as many if they are few."""
WORTH_IT = 1.15
"""`auto` leaves float32 only for at least this speed-up, so that noise does not decide (assumed)."""


class SentenceEncoder:
    """A loaded sentence-transformers model on one device."""

    backend = "torch"

    def __init__(self, folder: ModelFolder, max_tokens: int | None, device: str | None, threads: int | None) -> None:
        """Load from files only. DataError where they are not those that were resolved."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import torch
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if folder_digest(Path(folder.path)) != folder.digest:
            raise DataError(
                f"{folder.path} holds other files than the job resolved; use one copy of the model everywhere"
            )
        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = SentenceTransformer(
                folder.path,
                device=self.device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
        except SafetensorError as error:
            raise DataError(f"cannot read the weights of {folder.name}: {error}; fetch the model again") from None
        except (RuntimeError, MemoryError):  # of the device, not of the folder
            raise
        except Exception as error:  # whatever the libraries raise for files they cannot use
            if getattr(error, "errno", None):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SpecError(f"model.name: {folder.name} cannot be loaded: {reason}") from error
        self._model.eval()
        self.precision: TorchPrecision = "float32"
        self.max_tokens = self._limit(folder, max_tokens)
        self.dim = int(self._model.get_embedding_dimension() or self._measured_dim())
        stored = self._model.prompts or {}
        self.prompts: dict[str, str] = {
            "document": next((stored[name] for name in DOCUMENT_PROMPTS if stored.get(name)), ""),
            "query": stored.get("query") or "",
        }

    def _limit(self, folder: ModelFolder, wanted: int | None) -> int | None:
        own = self._model.max_seq_length
        limit = None if own is None or own == float("inf") else int(own)
        if wanted is None:
            return limit
        if folder.positions is not None and wanted > folder.positions:
            raise SpecError(
                f"model.max_tokens: {folder.name} has {folder.positions} positions, {wanted} were asked for"
            )
        if limit is None:
            raise SpecError(f"model.max_tokens: {folder.name} reads texts of any length; leave max_tokens null")
        self._model.max_seq_length = wanted
        return wanted

    def _measured_dim(self) -> int:
        return int(self._forward(["a"], "document", "").shape[1])

    def count_tokens(self, texts: Sequence[str], prompt: str) -> NDArray[np.int64]:
        """Tokens of each text with its prompt, before any cut."""
        whole = [prompt + text for text in self._heads(texts, prompt)]
        counts: list[int] = []
        for start in range(0, len(whole), 1024):
            counts += [len(one) for one in self._ids(whole[start : start + 1024])]
        return np.array(counts, np.int64)

    def _ids(self, whole: Sequence[str]) -> list[list[int]]:
        tokenizer = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch_fast"):  # a bare `tokenizers` one, as in static models
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(whole, add_special_tokens=False)]
        ids = tokenizer(whole, verbose=False, return_attention_mask=False, return_token_type_ids=False)
        return list(ids["input_ids"])

    def _heads(self, texts: Sequence[str], prompt: str) -> list[str]:
        """The texts; of huge ones as much as holds the first `max_tokens` tokens, which are all that is read."""
        if self.max_tokens is None or getattr(self._model.tokenizer, "truncation_side", "right") != "right":
            return list(texts)
        return [self._head(text, prompt, self.max_tokens) if len(text) > HUGE else text for text in texts]

    def _head(self, text: str, prompt: str, limit: int) -> str:
        """A start of a text whose first tokens are the text's: a shorter start has the same ones.

        Where none has tokens enough (one word of a megabyte) it is the whole text.
        """
        size = HEAD * limit
        while size < len(text):
            (short,) = self._ids([prompt + text[: size * 3 // 4]])
            if len(short) >= 2 * limit and short[:limit] == self._ids([prompt + text[:size]])[0][:limit]:
                return text[:size]
            size *= 4
        return text

    def encode(self, texts: Sequence[str], role: Role, prompt: str) -> Matrix:
        """One batch through the model: float32[len(texts), dim]."""
        heads = self._heads(texts, prompt)
        return np.array(self._forward(heads, role, prompt).float().cpu().numpy(), dtype=np.float32)

    def _forward(self, texts: Sequence[str], role: Role, prompt: str) -> Any:
        from sentence_transformers.util import batch_to_device

        with self._torch.inference_mode():
            features = self._model.preprocess(list(texts), prompt=prompt or None, task=role)
            return self._model(batch_to_device(features, self.device), task=role)["sentence_embedding"]

    @property
    def has_half(self) -> bool:
        """Whether a bfloat16 version exists: only transformers gain from one."""
        return type(self._model[0]).__name__ == "Transformer"

    def use(self, precision: TorchPrecision) -> None:
        """Switch to a precision; from bfloat16 there is no way back."""
        if precision == self.precision:
            return
        if not self.has_half:
            raise SpecError("model.precision: this model has no transformer to run in bfloat16; use float32 or auto")
        self._model[0] = self._halved(self._model[0])
        self.precision = precision

    def _halved(self, module: Any) -> Any:
        module = module.to(self._torch.bfloat16)
        module.register_forward_hook(
            lambda _module, _inputs, out: {key: self._full(value) for key, value in out.items()}
        )
        return module

    def _full(self, value: Any) -> Any:
        is_half = isinstance(value, self._torch.Tensor) and value.is_floating_point()
        return value.float() if is_half else value

    def probe(self, texts: Sequence[str], prompt: str, budget: int, min_cosine: float) -> dict[str, Any]:
        """Time float32 and bfloat16 on real rows and switch to the faster that loses at most `min_cosine`.

        Returns the figures: rows per second of each, their mean cosine, the choice.
        """
        figures: dict[str, Any] = {"rows": len(texts), "precision": "float32"}
        if not texts or not self.has_half:
            return figures
        full, figures["float32_rows_per_second"] = self._timed(texts, prompt, budget)
        original = self._model[0]
        self._model[0] = self._halved(copy.deepcopy(original))
        half, figures["bfloat16_rows_per_second"] = self._timed(texts, prompt, budget)
        figures["cosine"] = float(np.mean(np.sum(unit(full) * unit(half), axis=1)))
        faster = figures["bfloat16_rows_per_second"] > WORTH_IT * figures["float32_rows_per_second"]
        if faster and figures["cosine"] >= min_cosine:
            self.precision = figures["precision"] = "bfloat16"
        else:
            self._model[0] = original
        return figures

    def _timed(self, texts: Sequence[str], prompt: str, budget: int) -> tuple[Matrix, float]:
        counts = self.count_tokens(texts, prompt)
        batches = plan(counts if self.max_tokens is None else np.minimum(counts, self.max_tokens), budget)
        self.encode([texts[row] for row in batches[0]], "document", prompt)  # warm-up
        vectors = np.zeros((len(texts), self.dim), np.float32)
        start = time.perf_counter()
        for rows in batches:
            vectors[rows] = self.encode([texts[row] for row in rows], "document", prompt)
        return vectors, len(texts) / (time.perf_counter() - start)
