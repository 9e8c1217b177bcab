"""Texts of queries to vectors, by the model and prompt that a table's metadata names; loads it when first asked."""

from collections.abc import Sequence
from threading import Lock

import numpy as np

from pipeline.encoders import models
from pipeline.encoders.batches import Encoder, encode_rows
from pipeline.errors import DataError, QueryError
from pipeline.tables import TableInfo
from pipeline.vectors import Matrix

BATCH_TOKENS = 4_096


class QueryEncoder:
    """The recorded model, always in float32; `model` names another copy of it, `device` a torch device."""

    def __init__(self, info: TableInfo, model: str | None = None, device: str | None = None) -> None:
        self._info, self._model, self._device = info, model, device
        self._encoder: Encoder | None = None
        self._lock = Lock()

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Unit float32[n, full_dim]. QueryError for a blank or unusable text, DataError for another model."""
        blank = [number for number, text in enumerate(texts) if not text.strip()]
        if blank:
            raise QueryError(f"query {blank[0]} is blank")
        if not texts:
            return np.zeros((0, self._info.full_dim), np.float32)
        with self._lock:  # threads that ask first together load it once
            self._encoder = self._encoder or self._load()
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded = encode_rows(self._encoder, texts, "query", self._info.prompts["query"], BATCH_TOKENS)
        for number, (reason, detail) in sorted(encoded.failed.items()):
            raise QueryError(f"query {number} cannot be embedded: {reason} {detail}")
        return encoded.vectors

    def _load(self) -> Encoder:
        from pipeline.encoders.sentence import SentenceEncoder

        info = self._info
        folder = models.resolve(self._model or info.model, None if self._model else info.revision)
        if folder.digest != info.model_digest:
            raise DataError(
                f"{folder.name} is {folder.digest[:19]}…, the tables need {info.model} {info.model_digest[:19]}…; "
                "give open_index the same model, or run the job again in another root"
            )
        return SentenceEncoder(folder, info.max_tokens, self._device, None)
