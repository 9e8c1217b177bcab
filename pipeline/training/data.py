"""Training data: pairs or triplets of texts, and what is held out of them to measure on.

What is held out is decided by a hash of each document (or query) and the seed, so that the order of rows means nothing.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import docstrings, queries, sources
from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.training.spec import Data, HeldOutFiles, TrainSpec

log = logging.getLogger(__name__)

MIN_PAIRS = 2
Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Judged:
    """Queries and documents (`_id, text`), and the grades of documents by query; every query has a relevant one."""

    queries: pl.DataFrame
    documents: pl.DataFrame
    qrels: Qrels

    def asked(self, ids: Sequence[str]) -> "Judged":
        """The same documents with some of the queries."""
        kept = self.queries.filter(pl.col("_id").is_in(list(ids)))
        return Judged(kept, self.documents, {name: self.qrels[name] for name in kept["_id"]})

    def among(self, count: int | None, seed: int) -> "Judged":
        """The same queries over at most `count` documents: those that are judged, then others by hash."""
        if count is None or count >= len(self.documents):
            return self
        judged = {document for grades in self.qrels.values() for document in grades}
        needed = self.documents["_id"].is_in(list(judged)).to_numpy()
        places = np.lexsort((_shares(self.documents["_id"], seed), ~needed))
        kept = np.sort(places[: max(count, int(needed.sum()))])
        return Judged(self.queries, self.documents[kept], self.qrels)


@dataclass(frozen=True)
class Prepared:
    """`pairs` are `anchor, positive` and maybe `negative`; `fingerprint` is JSON."""

    pairs: pl.DataFrame
    held_out: Judged
    fingerprint: dict[str, Any]


@contextmanager
def told_as(field: str, *known: str) -> Iterator[None]:
    """Errors that name a job's field name this training's instead."""
    try:
        yield
    except PipelineError as error:
        text = str(error)
        for name in known:
            text = text.replace(name, field)
        raise type(error)(text) from None


def check(settings: Data, held_out: float | HeldOutFiles) -> None:
    """SpecError where a file or column is missing; reads no rows."""
    if settings.source:
        _files("data.source", settings.source, [] if _is_stdlib(settings) else _columns(settings))
    if settings.corpus:
        _files("data.corpus", settings.corpus, ["_id", "text"])
    if isinstance(held_out, HeldOutFiles) and held_out.corpus:
        _files("held_out.corpus", held_out.corpus, ["_id", "text"])
    judgements = [(settings.queries, settings.qrels, "data")]
    if isinstance(held_out, HeldOutFiles):
        judgements.append((held_out.queries, held_out.qrels, "held_out"))
    for asked, graded, where in judgements:
        if asked and graded:
            _judgements(asked, graded, where)


def prepare(spec: TrainSpec) -> Prepared:
    """Read everything and hold out; DataError where what is left is too little."""
    settings = spec.data
    frame, documents, skipped = _judged_pairs(settings) if settings.corpus else _pairs(settings)
    frame = frame.with_columns(pl.Series("share", _shares(frame["key"], spec.seed)))
    if isinstance(spec.held_out, HeldOutFiles):
        held, train = _held_files(spec.held_out, documents), frame
    else:
        is_held = frame["share"] < spec.held_out
        held, train = _held_share(frame.filter(is_held), documents), frame.filter(~is_held)
    seen = train["anchor"].is_in(held.queries["text"].str.strip_chars().to_list())
    if not settings.corpus and not isinstance(spec.held_out, HeldOutFiles):  # of pairs each text is a document
        seen |= train["positive"].is_in(frame.filter(is_held)["positive"].to_list())
    train = train.filter(~seen)
    skipped += int(seen.sum())
    if len(train) < MIN_PAIRS or not len(held.queries):
        raise DataError(
            f"data: {len(train)} pairs to train on and {len(held.queries)} queries held out are too few of each; "
            "give more rows, or set held_out"
        )
    pairs = train.select(name for name in ("anchor", "positive", "negative") if name in train.columns)
    fingerprint: dict[str, Any] = {
        "pairs": len(pairs),
        "skipped": skipped,
        "held_out_queries": len(held.queries),
        "documents": len(held.documents),
        "digest": _digest(pairs, held.queries, held.documents),
    }
    log.info(
        "data pairs=%d skipped=%d held_out_queries=%d documents=%d digest=%s",
        *(fingerprint[name] for name in ("pairs", "skipped", "held_out_queries", "documents")),
        str(fingerprint["digest"])[:12],
    )
    return Prepared(pairs, held, fingerprint)


def _is_stdlib(settings: Data) -> bool:
    return settings.source == (sources.STDLIB,)


def _columns(settings: Data) -> list[str]:
    return [name for name in (settings.anchor, settings.positive, settings.negative) if name]


def _files(field: str, source: Sequence[str], columns: Sequence[str]) -> list[sources.SourceFile]:
    """The files of a source; SpecError where one lacks a column."""
    with told_as(field, "corpus.source"):
        files = sources.resolve(source)
        for file in files:
            known = sources.column_names(file)
            for name in columns:
                if name not in known:
                    raise SpecError(f"{field}: {file.path} has no column {name!r}; it has {', '.join(known[:20])}")
    return files


def _read(field: str, source: Sequence[str], columns: Sequence[str]) -> dict[str, list[str | None]]:
    """Texts by column, in order; what is no text is None (a DataError where the whole column is of another type)."""
    found: dict[str, list[str | None]] = {name: [] for name in columns}
    for file in _files(field, source, []):
        with told_as(field, "corpus.source"):
            for batch in sources.Reader(columns).read(file):
                for name in columns:
                    found[name] += _texts(field, file.path, name, batch.columns[name])
    return found


def _texts(field: str, path: str, name: str, column: Any) -> list[str | None]:
    if isinstance(column, pa.Array):
        if pa.types.is_integer(column.type) and name == "_id":
            column = column.cast(pa.string())
        if not (pa.types.is_string(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"{field}: column {name!r} of {path} holds {column.type}, not text")
        column = column.to_pylist()
    if name == "_id":
        column = [str(value) if isinstance(value, int) else value for value in column]
    return [value.strip() or None if isinstance(value, str) else None for value in column]


def _pairs(settings: Data) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Pairs with the key of their document, one document per key, and rows left out."""
    if _is_stdlib(settings):
        return (*_docstring_pairs(), 0)
    names = _columns(settings)
    frame = pl.DataFrame(_read("data.source", settings.source, names), dict.fromkeys(names, pl.String))
    whole = frame.drop_nulls()
    if not len(whole):
        raise DataError(f"data.source: none of {len(frame)} rows has text in {' and '.join(names)}")
    whole = whole.select(
        pl.col(name).alias(role) for name, role in zip(names, ("anchor", "positive", "negative"), strict=False)
    ).unique(maintain_order=True)
    keys = [_key(text) for text in whole["positive"]]
    whole = whole.with_columns(pl.Series("key", keys, pl.String))
    return whole, _documents(whole), len(frame) - len(whole)


def _docstring_pairs() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Summary line and rest, then qualified name and docstring; a docstring of one paragraph has the latter alone."""
    rows: list[dict[str, str]] = []
    for row in docstrings.stdlib():
        text, key = row["text"].strip(), _key(row["text"].strip())
        summary, _, rest = (part.strip() for part in text.partition("\n"))
        if summary and rest:
            rows.append({"anchor": summary, "positive": rest, "key": key})
        rows.append({"anchor": row["id"], "positive": text, "key": key})
    frame = pl.DataFrame(rows).unique(maintain_order=True)
    return frame, _documents(frame)


def _documents(frame: pl.DataFrame) -> pl.DataFrame:
    """`_id, text`: the first positive of each key, which holds no anchor of its own."""
    first = frame.unique("key", keep="first", maintain_order=True)
    return first.select(pl.col("key").alias("_id"), pl.col("positive").alias("text"))


def _held_share(held: pl.DataFrame, documents: pl.DataFrame) -> Judged:
    """Each held-out anchor asks for its documents among all."""
    qrels: Qrels = {}
    texts: dict[str, str] = {}
    for anchor, target in held.select("anchor", "target" if "target" in held.columns else "key").iter_rows():
        name = _key(anchor)
        texts[name] = anchor
        qrels.setdefault(name, {})[target] = 1
    asked = pl.DataFrame({"_id": list(texts), "text": list(texts.values())}, {"_id": pl.String, "text": pl.String})
    return Judged(asked, documents, qrels)


def _judged_pairs(settings: Data) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """A pair for each query and relevant document, held out by query; the documents; judgements left out."""
    assert settings.queries and settings.qrels
    asked, qrels = _judgements(settings.queries, settings.qrels, "data")
    documents = _corpus("data.corpus", settings.corpus)
    texts = dict(documents.iter_rows())
    _check_known(qrels, texts, settings.qrels, "data")
    rows = [
        {"anchor": text, "positive": texts[document], "key": _key(text), "target": document}
        for name, text in asked.select("_id", "text").iter_rows()
        for document, grade in qrels.get(name, {}).items()
        if grade > 0
    ]
    schema = dict.fromkeys(("anchor", "positive", "key", "target"), pl.String)
    return pl.DataFrame(rows, schema), documents, sum(map(len, qrels.values())) - len(rows)


def _held_files(held_out: HeldOutFiles, documents: pl.DataFrame) -> Judged:
    asked, qrels = _judgements(held_out.queries, held_out.qrels, "held_out")
    if held_out.corpus:
        documents = _corpus("held_out.corpus", held_out.corpus)
    _check_known(qrels, set(documents["_id"]), held_out.qrels, "held_out")
    wanted = {name: grades for name, grades in qrels.items() if max(grades.values()) > 0}
    asked = asked.filter(pl.col("_id").is_in(list(wanted)))
    return Judged(asked, documents, {name: wanted[name] for name in asked["_id"]})


def _judgements(asked: str, graded: str, where: str) -> tuple[pl.DataFrame, Qrels]:
    with told_as(f"{where}.qrels", "evaluate.qrels"):
        qrels = queries.read_qrels(graded)
    frame = queries.read_queries(asked, f"{where}.queries")
    known = set(frame["_id"])
    for name in qrels:
        if name not in known:
            raise DataError(f"{where}.qrels: {graded} judges query {name!r}, which is not in {asked}")
    return frame, qrels


def _check_known(qrels: Qrels, known: Any, path: str, where: str) -> None:
    for grades in qrels.values():
        for document in grades:
            if document not in known:
                raise DataError(f"{where}.qrels: {path} judges document {document!r}, which is not in the corpus")


def _corpus(field: str, source: Sequence[str]) -> pl.DataFrame:
    """`_id, text`, the title and the text joined by a newline; rows without either are left out."""
    titled = all("title" in sources.column_names(file) for file in _files(field, source, ["_id", "text"]))
    found = _read(field, source, ["_id", "title", "text"] if titled else ["_id", "text"])
    frame = pl.DataFrame(found, dict.fromkeys(found, pl.String))
    if frame["_id"].null_count() or frame["_id"].n_unique() < len(frame):
        raise DataError(f"{field}: an _id is missing or stands twice")
    text = pl.concat_str([name for name in ("title", "text") if name in found], separator="\n", ignore_nulls=True)
    return frame.select("_id", text=text).filter(pl.col("text") != "")


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _shares(keys: pl.Series, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each key, which depends on it and the seed alone."""
    digests = b"".join(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, ">u8") / 2.0**64


def _digest(*frames: pl.DataFrame) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        for column in frame.iter_columns():
            digest.update(f"{column.name} {len(column)}\n".encode())
            for text in column:
                data = text.encode("utf-8", "replace")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
    return digest.hexdigest()
