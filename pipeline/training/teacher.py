"""What a teacher says of each training text: its full vectors, computed once and kept in the work folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.encoders import models
from pipeline.encoders.batches import Role
from pipeline.errors import DataError
from pipeline.training.data import told_as
from pipeline.training.spec import Teacher
from pipeline.vectors import Matrix

log = logging.getLogger(__name__)

FOLDER = "teacher"
TEXTS_AT_ONCE = 4_096
"""Texts of one file; what a killed run had finished is not computed again."""
BATCH_TOKENS = 4_096
"""Of one batch, padding included (assumed, as in queries)."""
ROLES: dict[str, Role] = {"anchor": "query", "positive": "document", "negative": "document"}


def resolve(teacher: Teacher) -> models.ModelFolder:
    """The teacher's files; SpecError where there is no such model."""
    with told_as("objective.teacher.model", "model.name"), told_as("objective.teacher.revision", "model.revision"):
        return models.resolve(teacher.model, teacher.revision)


def labelled(teacher: Teacher, folder: models.ModelFolder, pairs: pl.DataFrame, work: Path) -> pl.DataFrame:
    """The pairs with a column `label`: for each of their texts the place of its target among `vectors`."""
    read = pairs.columns if teacher.reads == "each" else [teacher.reads]
    texts = {role: sorted({text for name in read if ROLES[name] == role for text in pairs[name]})
             for role in ("query", "document")}  # fmt: skip
    begin = {"query": 0, "document": len(texts["query"])}
    _compute(folder, texts, work / FOLDER)
    places = {
        name: begin[ROLES[name]] + np.searchsorted(np.array(texts[ROLES[name]], object), pairs[name].to_numpy())
        for name in read
    }
    label = np.stack([places[name if teacher.reads == "each" else teacher.reads] for name in pairs.columns], axis=1)
    return pairs.with_columns(pl.Series("label", label.astype(np.int64).tolist(), pl.List(pl.Int64)))


def vectors(work: Path) -> NDArray[np.float16]:
    """Unit float16[texts, width of the teacher]."""
    return np.concatenate([np.load(path) for path in sorted((work / FOLDER).glob("*.npy"))])


def _compute(folder: models.ModelFolder, texts: dict[Any, list[str]], place: Path) -> None:
    place.mkdir(exist_ok=True)
    parts = [
        (role, some[start : start + TEXTS_AT_ONCE])
        for role, some in texts.items()
        for start in range(0, len(some), TEXTS_AT_ONCE)
    ]
    missing = [number for number in range(len(parts)) if not _file(place, number).exists()]
    if not missing:
        return
    read = _reader(folder)
    for number in missing:
        draft = place / "draft"
        with draft.open("wb") as file:
            np.save(file, read(*parts[number]))
        draft.replace(_file(place, number))
        log.info("teacher texts=%d part=%d of %d", len(parts[number][1]), number + 1, len(parts))


def _file(place: Path, number: int) -> Path:
    return place / f"{number:05d}.npy"


def _reader(folder: models.ModelFolder) -> Any:
    from pipeline.encoders.batches import encode_rows
    from pipeline.encoders.choose import REFERENCE, build
    from pipeline.encoders.sentence import SentenceEncoder

    base = SentenceEncoder(folder, None, None, None)

    def read(role: Role, texts: Sequence[str]) -> Matrix:
        encoder = build(base, REFERENCE, base.prompts[role])
        encoded = encode_rows(encoder, list(texts), role, base.prompts[role], BATCH_TOKENS)
        if len(encoded.failed) == len(texts):
            raise DataError(f"objective.teacher: {folder.name} has no vector for any of {len(texts)} texts")
        return np.asarray(encoded.vectors, np.float16)

    return read
