"""Query and qrels files: read, checked, and the queries' vectors, embedded once and kept.

Queries are `_id, text`; qrels `query_id, corpus_id, score` (the BEIR columns).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import store
from pipeline.errors import DataError, QueryError, SpecError
from pipeline.ledger import Ledger, Record
from pipeline.spec import Evaluate
from pipeline.storage import Root, to_json
from pipeline.tables import TableInfo
from pipeline.vectors import Matrix


def check_files(settings: Evaluate) -> None:
    """SpecError where a file or column is missing, DataError where it cannot be read or its ids do not match."""
    if settings.queries:
        queries = set(_read(settings.queries, "evaluate.queries", ("_id", "text"))["_id"])
        if settings.qrels:
            qrels = _read(settings.qrels, "evaluate.qrels", ("query_id", "corpus_id", "score"))
            unknown = qrels.filter(~pl.col("query_id").is_in(list(queries)))
            if len(unknown):
                raise DataError(
                    f"evaluate.qrels: {settings.qrels} judges query {unknown['query_id'][0]!r}, "
                    f"which is not in {settings.queries} ({len(unknown)} such rows)"
                )


def judged_ids(settings: Evaluate) -> list[str]:
    """The corpus ids that the qrels name."""
    if not settings.qrels:
        return []
    qrels = _read(settings.qrels, "evaluate.qrels", ("query_id", "corpus_id", "score"))
    return qrels["corpus_id"].unique(maintain_order=True).to_list()


def check_judged(settings: Evaluate, names: Sequence[str], known: Sequence[bool]) -> None:
    """DataError where qrels name a corpus id that the corpus has not."""
    unknown = [name for name, there in zip(names, known, strict=True) if not there]
    if unknown:
        raise DataError(
            f"evaluate.qrels: {settings.qrels} judges document {unknown[0]!r}, which is not in the corpus "
            f"({len(unknown)} unknown ids); qrels must be of this corpus"
        )


def _read(path: str, field: str, columns: Sequence[str]) -> pl.DataFrame:
    file = Path(path)
    if not file.is_file():
        raise SpecError(f"{field}: there is no file {path}")
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": partial(pl.read_parquet, glob=False),
        ".jsonl": pl.read_ndjson,
        ".csv": partial(pl.read_csv, infer_schema=False),
        ".tsv": partial(pl.read_csv, infer_schema=False, separator="\t"),
    }
    if file.suffix not in readers:
        raise SpecError(f"{field}: {path} has no known format; use {', '.join(readers)}")
    try:
        frame = readers[file.suffix](file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{field}: cannot read {path}: {str(error).splitlines()[0]}") from None
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise SpecError(f"{field}: {path} has no column {missing[0]!r}; it needs {', '.join(columns)}")
    nested = [column for column in columns if frame[column].dtype.is_nested()]
    if nested:
        raise DataError(f"{field}: column {nested[0]!r} of {path} holds {frame[nested[0]].dtype}, not single values")
    ids = [column for column in columns if column.endswith("id")]
    frame = frame.select(columns).with_columns(pl.col(ids).cast(pl.String))
    if not len(frame) or sum(frame.null_count().row(0)):
        raise DataError(f"{field}: {path} is empty or has nulls in {', '.join(columns)}")
    return _checked_qrels(frame, field, path) if "score" in columns else _checked_queries(frame, field, path)


def _checked_queries(frame: pl.DataFrame, field: str, path: str) -> pl.DataFrame:
    if frame["_id"].n_unique() < len(frame):
        raise DataError(f"{field}: {path} has a query id twice")
    if frame["text"].dtype != pl.String:
        raise DataError(f"{field}: the text in {path} is {frame['text'].dtype}, not String")
    blank = frame.filter(pl.col("text").str.strip_chars() == "")
    if len(blank):
        raise DataError(f"{field}: {path} has a blank text for query {blank['_id'][0]!r}")
    return frame


def _checked_qrels(frame: pl.DataFrame, field: str, path: str) -> pl.DataFrame:
    frame = frame.with_columns(pl.col("score").cast(pl.Float64, strict=False))
    if not (frame["score"] % 1 == 0).fill_null(False).all():
        raise DataError(f"{field}: {path} has scores that are no whole numbers")
    return frame


def read_queries(path: str, field: str = "evaluate.queries") -> pl.DataFrame:
    """`_id, text`, checked; `field` names it in errors."""
    return _read(path, field, ("_id", "text"))


def read_qrels(path: str) -> dict[str, dict[str, int]]:
    """Grades by query and document."""
    judged: dict[str, dict[str, int]] = {}
    for query, document, score in _read(path, "evaluate.qrels", ("query_id", "corpus_id", "score")).iter_rows():
        judged.setdefault(query, {})[document] = int(score)
    return judged


def embedded(
    where: str, texts: Sequence[str], info: TableInfo, root: Root, encode: Callable[[Sequence[str]], Matrix]
) -> Matrix:
    """Vectors of a file's queries, float32[n, full_dim], embedded once per text, model and prompt.

    `where` names the file in a DataError.
    """
    basis = [info.model_digest, info.max_tokens, info.prompts["query"], *texts]
    key = hashlib.sha256(to_json(basis)).hexdigest()[:32]

    def made() -> Record:
        try:
            return {"kept": root.keep(store.npy(encode(texts)))}
        except QueryError as error:
            raise DataError(f"{where}: {error}") from None

    record = Ledger(root, "queries").once(key, made, lambda record: root.has(record["kept"]))
    return np.asarray(store.from_npy(root.kept(record["kept"])))
