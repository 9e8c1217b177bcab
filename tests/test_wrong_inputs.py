"""Wrong inputs: each one is answered by its exit code and one sentence, and leaves nothing half-written."""

import errno
import gzip
import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import polars as pl
import pytest

from pipeline import Index, JobSpec, PipelineError, ledger, open_index, run, store
from pipeline.cli import main
from pipeline.encoders import models
from pipeline.errors import QueryError, SpecError
from pipeline.tables import DOCUMENTS
from tests.conftest import DIM, corpus_frame

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")
VECTOR = np.ones(DIM, np.float32)


# What a command answers


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refuses(self, code: int, *words: str) -> str:
        """The sentence of the refusal; `words` must stand in it."""
        *before, sentence = self.err.splitlines() or [""]
        assert self.code == code, self.err
        assert sentence.startswith("error: ")
        assert [line for line in before if not LOG_LINE.match(line)] == []
        assert self.out == ""
        for word in words:
            assert word in sentence
        # The marks of a message that was passed on as it came: an escaped line break, a class, pydantic's words.
        for mark in ("\\n", "<class", "Error(", "pydantic", "Value error", "Input should"):
            assert mark not in sentence
        return sentence


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process; what it does to logging and signals is undone."""
    handlers = logging.root.handlers[:]
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def make(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["matryoshka", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return Outcome(ended.value.code, captured.out, captured.err)

    yield make
    logging.root.handlers[:] = handlers
    for number, handler in signals.items():
        signal.signal(number, handler)


# Wrong specs, models and data on a fresh root


@dataclass(frozen=True)
class Case:
    """Files in the current directory, overrides of the spec (as `values`), and the answer."""

    code: int
    words: tuple[str, ...]
    files: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def case(name: str, code: int, /, *words: str, files: Mapping[str, Any] | None = None, **overrides: Any) -> Any:
    """One line of a table."""
    return pytest.param(Case(code, words, files or {}, overrides), id=name)


def corpus_case(name: str, code: int, /, *words: str, files: Mapping[str, Any], **overrides: Any) -> Any:
    """One line of a table whose files are the corpus."""
    return case(name, code, *words, files=files, **{"corpus__source": list(files), **overrides})


def model_case(name: str, code: int, *words: str, files: Mapping[str, Any]) -> Any:
    """One line of a table whose files are the folder of a model."""
    inside = {f"bad-model/{path}": content for path, content in files.items()}
    return case(name, code, "model.name", "bad-model", *words, files=inside, model__name="bad-model")


def write(files: Mapping[str, Any]) -> None:
    """Frames by suffix, bytes as they are, other values as JSON."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, pl.DataFrame):
            writers = {".parquet": content.write_parquet, ".csv": content.write_csv, ".jsonl": content.write_ndjson}
            writers[path.suffix](path)
        else:
            path.write_text(json.dumps(content))


def bytes_of(frame: pl.DataFrame, method: str) -> bytes:
    """A frame as the bytes of a file."""
    buffer = io.BytesIO()
    getattr(frame, method)(buffer)
    return buffer.getvalue()


FRAME = corpus_frame(20)
BLANKS = [" "] * 20
QUERIES = pl.DataFrame({"_id": ["q1", "q2"], "text": ["w001 w002", "w003"]})
QRELS = pl.DataFrame({"query_id": ["q1"], "corpus_id": ["doc-7"], "score": [1]})
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
EIGHT = {"dim": 8, "precision": "binary"}


def prefix(**fields: Any) -> list[dict[str, Any]]:
    """Prefixes of one table, 8 binary dimensions unless told otherwise."""
    return [{**EIGHT, **fields}]


def level(table: str, shortlist: int) -> dict[str, Any]:
    """A level of a cascade."""
    return {"table": table, "shortlist": shortlist}


SPECS = [
    case("unknown-section", 2, "unknown field modle", "did you mean 'model'", modle={}),
    case("unknown-field", 2, "unknown field corpus.txt", "did you mean 'text'", "keep_text", corpus__txt="text"),
    case("unknown-field-in-a-list", 2, "prefixes[0].indx", "did you mean 'index'", prefixes=prefix(indx={})),
    case("unknown-field-deep", 2, "prefixes[0].index.bitts", "'bits'", prefixes=prefix(index={"bitts": 4})),
    case("unknown-prompt", 2, "model.prompts.documents", "'document'", model__prompts={"documents": ""}),
    case("unknown-field-nothing-like-it", 2, "unknown field evaluate.xyz", "allowed here: queries", evaluate__xyz=1),
    case("unknown-metric", 2, "evaluate.floor", "'recall_exact'", "'recal'", evaluate__floor={"recal": 0.9}),
    case("text-for-number", 2, "seed", "integer", "'many'", seed="many"),
    case("fraction-for-integer", 2, "evaluate.k", "integer", "1.5", evaluate__k=1.5),
    case("number-for-text", 2, "name", "string", "7", name=7),
    case("text-for-section", 2, "embed", "'float16'", embed="float16"),
    case("null-for-section", 2, "corpus", "None", corpus=None),
    case("mapping-for-list", 2, "prefixes", "list", prefixes=EIGHT),
    case("text-for-boolean", 2, "corpus.keep_text", "'perhaps'", corpus__keep_text="perhaps"),
    case("number-for-columns", 2, "corpus.text", "7", corpus__text=7),
    case("neither-of-a-union", 2, "corpus.shard_rows", "'auto'", "integer", "'big'", corpus__shard_rows="big"),
    case("below-the-least", 2, "workers.count", "greater than or equal to 0", "-1", workers__count=-1),
    case("above-the-most", 2, "corpus.max_quarantined", "less than or equal to 1", "2", corpus__max_quarantined=2),
    case("missing-field", 2, "the field corpus.text is missing", corpus={"source": "x.csv"}),
    case("missing-field-in-a-list", 2, "the field prefixes[0].dim is missing", prefixes=[{"precision": "int8"}]),
    case("no-prefixes", 2, "prefixes", "at least 1", prefixes=[]),
    case("no-text-column", 2, "corpus.text", "at least 1", corpus__text=[]),
    case("empty-column-name", 2, "corpus.id", "at least 1", corpus__id=""),
    case("empty-root", 2, "root", "at least 1", root=""),
    case("name-with-a-slash", 2, "name", "'a/b'", name="a/b"),
    case(
        "unknown-precision",
        2,
        "prefixes[0].precision",
        "'int4'",
        "did you mean 'int8'",
        prefixes=prefix(precision="int4"),
    ),
    case("unknown-backend", 2, "model.backend", "'auto' or 'torch'", "'onnx'", model__backend="onnx"),
    case("unknown-transform", 2, "transform.kind", "'pca'", "'pcaa'", transform__kind="pcaa"),
    case("unknown-vectors", 2, "embed.vectors", "'float32'", "'int8'", embed__vectors="int8"),
    case(
        "unknown-index",
        2,
        "prefixes[0].index.kind",
        "'ivf_pq'",
        "did you mean",
        prefixes=prefix(index={"kind": "ivf_pq"}),
    ),
    case("binary-of-12", 2, "prefixes[0]", "multiple of 8", "12", prefixes=prefix(dim=12)),
    case("dim-zero", 2, "prefixes[0].dim", "0", prefixes=prefix(dim=0)),
    case("dim-above-the-model's", 2, "prefixes[0].dim", "40", f"{DIM} dimensions", prefixes=prefix(dim=40)),
    case("same-prefix-twice", 2, "prefix_8_binary stands twice", prefixes=[EIGHT, EIGHT]),
    case(
        "int8-with-an-index",
        2,
        "prefixes[0]",
        "cannot index int8",
        prefixes=prefix(precision="int8", index={"kind": "ivf_sq"}),
    ),
    case("binary-with-hnsw", 2, "prefixes[0]", "ivf_flat only", "hnsw_sq", prefixes=prefix(index={"kind": "hnsw_sq"})),
    case("bits-without-rq", 2, "prefixes[0].index", "bits is for kind: ivf_rq", prefixes=prefix(index={"bits": 4})),
    case("rq-of-12", 2, "multiple of 8", "12", prefixes=prefix(dim=12, precision="float16", index={"kind": "ivf_rq"})),
    case(
        "cascade-of-an-unknown-table",
        2,
        "'prefix_8_int8'",
        "did you mean",
        "prefix_8_binary",
        search__cascade=[level("prefix_8_int8", 9)],
    ),
    case(
        "rising-shortlists",
        2,
        "rises from 10 to 20",
        "prefix_16_int8",
        search__cascade=[level("prefix_8_binary", 10), level("prefix_16_int8", 20)],
    ),
    case("shortlist-zero", 2, "search.cascade[0].shortlist", "0", search__cascade=[level("prefix_8_binary", 0)]),
    case("reserved-name-kept", 2, "corpus", "'vector'", "reserved", corpus__keep=["vector"]),
    case("reserved-name-filtered", 2, "corpus", "'score'", "reserved", corpus__filter=["score"]),
    case("underscore-filtered", 2, "corpus", "'_id'", "begin with '_'", corpus__filter=["_id"]),
    case("column-carried-twice", 2, "corpus", "twice", corpus__keep=["lang"], corpus__filter=["lang"]),
    case("quotes-in-a-carried-name", 2, "corpus", "quotes", corpus__filter=["a`b"]),
    case("qrels-without-queries", 2, "evaluate", "qrels need queries", evaluate__qrels="qrels.parquet"),
    case("floor-without-qrels", 2, "evaluate", "ndcg needs qrels", evaluate__floor={"ndcg": 0.5}),
    case("floor-above-1", 2, "evaluate.floor.recall_exact", "98", evaluate__floor={"recall_exact": 98}),
]

SOURCES = [
    case("source-matches-nothing", 2, "corpus.source", "'nowhere/*.parquet'", corpus__source="nowhere/*.parquet"),
    case("source-is-no-file", 2, "corpus.source", "nowhere.csv", corpus__source="nowhere.csv"),
    case(
        "second-source-matches-nothing",
        2,
        "corpus.source",
        "b.csv",
        files={"a.csv": FRAME},
        corpus__source=["a.csv", "b.csv"],
    ),
    case(
        "folder-without-known-files",
        2,
        "corpus.source",
        "'docs'",
        ".parquet",
        files={"docs/a.md": b""},
        corpus__source="docs",
    ),
    case(
        "unknown-format",
        2,
        "corpus.source",
        "rows.xlsx",
        ".parquet",
        files={"rows.xlsx": b""},
        corpus__source="rows.xlsx",
    ),
    case("unknown-docstrings", 2, "'docstrings:numpy'", "docstrings:stdlib", corpus__source="docstrings:numpy"),
    case("unknown-scheme", 2, "corpus.source", "'ftpp://host/a.csv'", corpus__source="ftpp://host/a.csv"),
    *[
        corpus_case(
            f"{place}-column-absent-in-{suffix}",
            2,
            f"corpus.{place}",
            f"rows.{suffix}",
            "'colour'",
            "_id, title, text",
            files={f"rows.{suffix}": FRAME},
            **{f"corpus__{place}": "colour"},
        )
        for place in ("id", "text", "keep", "filter")
        for suffix in ("parquet", "csv", "jsonl")
    ],
    corpus_case(
        "id-column-absent-in-txt",
        2,
        "corpus.id",
        "rows.txt",
        "'_id'",
        files={"rows.txt": b"w001\n"},
        corpus__text="text",
    ),
    case(
        "column-absent-in-docstrings",
        2,
        "corpus.keep",
        "'lang'",
        "module",
        corpus__source="docstrings:stdlib",
        corpus__id="id",
        corpus__keep="lang",
    ),
]

DATA = [
    *[
        corpus_case(
            f"second-{suffix}-lacks-a-column",
            3,
            f"b.{suffix}",
            "'text'",
            "files must agree",
            files={f"a.{suffix}": FRAME, f"b.{suffix}": FRAME.drop("text")},
        )
        for suffix in ("parquet", "csv")
    ],
    *[
        corpus_case(
            f"filter-of-two-types-in-{suffix}",
            3,
            f"b.{suffix}",
            "'year'",
            "string",
            "int64",
            files={f"a.{suffix}": FRAME, f"b.{suffix}": FRAME.with_columns(pl.lit("MM").alias("year"))},
            corpus__filter="year",
        )
        for suffix in ("parquet", "jsonl")
    ],
    corpus_case(
        "keep-of-two-types-in-one-file",
        3,
        "a.jsonl",
        "'year'",
        "several types",
        files={"a.jsonl": b'{"_id": 1, "text": "w001", "year": 1999}\n{"_id": 2, "text": "w002", "year": "MM"}\n'},
        corpus__text="text",
        corpus__keep="year",
    ),
    corpus_case(
        "filter-of-lists",
        3,
        "corpus.filter",
        "'tags'",
        "list",
        files={"a.parquet": FRAME.with_columns(tags=[["a"]] * 20)},
        corpus__filter="tags",
    ),
    corpus_case(
        "duplicate-id-in-a-file",
        3,
        "duplicate id 'doc-1'",
        "a.parquet row 1",
        "a.parquet row 4",
        files={"a.parquet": FRAME.with_columns(_id=FRAME["_id"].replace("doc-4", "doc-1"))},
    ),
    corpus_case(
        "duplicate-id-across-files",
        3,
        "duplicate id 'doc-0'",
        "a.parquet row 0",
        "b.csv row 0",
        "20 repeated",
        files={"a.parquet": FRAME, "b.csv": FRAME},
    ),
    corpus_case(
        "number-and-text-of-one-id",
        3,
        "duplicate id '7'",
        "a.parquet",
        "b.parquet",
        files={"a.parquet": FRAME.with_columns(_id=range(20)), "b.parquet": FRAME[:1].with_columns(_id=pl.lit("7"))},
    ),
    corpus_case(
        "null-id",
        3,
        "a.parquet row 4",
        "'_id' is null",
        files={"a.parquet": FRAME.with_columns(_id=FRAME["_id"].replace("doc-4", None))},
    ),
    corpus_case(
        "empty-id",
        3,
        "a.csv row 4",
        "'_id' is empty",
        files={"a.csv": FRAME.with_columns(_id=FRAME["_id"].replace("doc-4", ""))},
    ),
    corpus_case(
        "id-left-out",
        3,
        "a.jsonl row 1",
        "'_id' is null",
        files={"a.jsonl": b'{"_id": 1, "text": "w001"}\n{"text": "w002"}\n'},
        corpus__text="text",
    ),
    corpus_case(
        "float-ids",
        3,
        "a.parquet row 0",
        "'_id' is a float",
        files={"a.parquet": FRAME.with_columns(_id=np.arange(20.0))},
    ),
    corpus_case("boolean-ids", 3, "a.jsonl row 0", "'_id' is a bool", files={"a.jsonl": FRAME.with_columns(_id=True)}),
    corpus_case(
        "text-of-integers",
        3,
        "a.parquet",
        "'year' holds int",
        files={"a.parquet": FRAME},
        corpus__text=["title", "year"],
    ),
    corpus_case(
        "text-of-lists",
        3,
        "a.parquet",
        "'title' holds",
        "list",
        files={"a.parquet": FRAME.with_columns(title=[["a"]] * 20)},
    ),
    corpus_case(
        "truncated-parquet",
        3,
        "cannot read",
        "a.parquet",
        "mend",
        files={"a.parquet": bytes_of(FRAME, "write_parquet")[:-40]},
    ),
    corpus_case("garbage-parquet", 3, "cannot read", "a.parquet", files={"a.parquet": b"garbage " * 100}),
    corpus_case("empty-parquet-file", 3, "cannot read", "a.parquet", files={"a.parquet": b""}),
    corpus_case(
        "damaged-parquet-page",
        3,
        "cannot read",
        "a.parquet",
        files={"a.parquet": b"PAR1" + bytes(400) + bytes_of(FRAME, "write_parquet")[404:]},
    ),
    corpus_case(
        "truncated-gz",
        3,
        "cannot read",
        "a.jsonl.gz",
        files={"a.jsonl.gz": gzip.compress(bytes_of(FRAME, "write_ndjson"))[:-40]},
    ),
    corpus_case("garbage-gz", 3, "cannot read", "a.jsonl.gz", files={"a.jsonl.gz": b"garbage " * 100}),
    corpus_case("garbage-zst", 3, "cannot read", "a.jsonl.zst", files={"a.jsonl.zst": b"garbage " * 100}),
    corpus_case("no-lance-table", 3, "cannot read", "a.lance", files={"a.lance/data": b""}),
    corpus_case("lines-that-are-no-json", 3, "a.jsonl", "no column", files={"a.jsonl": b"garbage\n" * 5}),
    corpus_case("csv-without-a-header", 3, "a.csv", "no column", files={"a.csv": b""}),
    corpus_case(
        "csv-column-twice",
        3,
        "a.csv",
        "'text'",
        "twice",
        files={"a.csv": b"_id,text,text\n1,w001,w002\n"},
        corpus__text="text",
    ),
    corpus_case("parquet-without-rows", 3, "no usable row", "0 rows", files={"a.parquet": FRAME[:0]}),
    corpus_case(
        "all-rows-blank",
        3,
        "no usable row",
        "5 rows",
        "blank_text 5",
        files={"a.parquet": FRAME[:5].with_columns(title=pl.lit(""), text=pl.lit(" "))},
    ),
    corpus_case(
        "budget-spent-by-blank-rows",
        3,
        "11 of 20 rows",
        "blank_text 11",
        "10 are allowed",
        "max_quarantined",
        files={"a.parquet": FRAME.with_columns(text=pl.Series([*BLANKS[:11], *FRAME["text"][11:]]))},
        corpus__text="text",
    ),
    corpus_case(
        "budget-spent-by-broken-lines",
        3,
        "11 of 31 rows",
        "undecodable 11",
        files={"a.jsonl": bytes_of(FRAME, "write_ndjson") + b'{"_id": \n' * 11},
    ),
    corpus_case(
        "budget-spent-by-the-model",
        3,
        "11 of 20 rows",
        "zero_norm 11",
        "10 are allowed",
        files={"a.parquet": FRAME.with_columns(text=pl.Series([*["unheard of"] * 11, *FRAME["text"][11:]]))},
        corpus__text="text",
    ),
    corpus_case(
        "budget-spent-by-nan",
        3,
        "12 of 20 rows",
        "non_finite 12",
        files={"a.parquet": FRAME.with_columns(text=pl.Series([*["broken"] * 12, *FRAME["text"][12:]]))},
        corpus__text="text",
        corpus__max_quarantined=0,
    ),
]

MODELS = [
    case(
        "unknown-model",
        2,
        "model.name",
        "'all-minilm-l6-v3'",
        "did you mean 'all-MiniLM-L6-v2'",
        model__name="all-minilm-l6-v3",
    ),
    case("hub-id-without-revision", 2, "'org/model'", "model.revision", model__name="org/model"),
    case(
        "hub-id-with-an-empty-revision", 2, "'org/model'", "model.revision", model__name="org/model", model__revision=""
    ),
    case(
        "hub-out-of-reach",
        1,
        "cannot reach the hub for org/model",
        "abc123",
        model__name="org/model",
        model__revision="abc123",
    ),
    model_case("folder-without-a-model", 2, "modules.json", files={"notes.txt": b""}),
    model_case(
        "only-pickle-weights",
        2,
        ".safetensors",
        files={"modules.json": [TRANSFORMER], "config.json": {}, "pytorch_model.bin": b""},
    ),
    model_case(
        "one-module-with-pickle-weights",
        2,
        "pytorch_model.bin",
        "can run code",
        files={"modules.json": [TRANSFORMER], "model.safetensors": b"", "2_Dense/pytorch_model.bin": b""},
    ),
    model_case(
        "module-of-its-own-code",
        2,
        "custom_st.Transformer",
        "code of its own",
        files={"modules.json": [{**TRANSFORMER, "type": "custom_st.Transformer"}], "model.safetensors": b""},
    ),
    model_case(
        "auto-map",
        2,
        "auto_map in config.json",
        "code of its own",
        files={"config.json": {"auto_map": {}}, "model.safetensors": b""},
    ),
    model_case("modules-that-are-no-json", 2, "modules.json", "not readable JSON", files={"modules.json": b"[{"}),
    model_case(
        "modules-that-are-no-objects",
        2,
        "modules.json",
        files={"modules.json": ["Transformer"], "model.safetensors": b""},
    ),
    model_case("config-that-is-no-object", 2, "config.json", files={"config.json": [], "model.safetensors": b""}),
    model_case(
        "weights-that-are-none",
        2,
        "model.safetensors",
        files={
            "modules.json": [{**TRANSFORMER, "type": "sentence_transformers.models.StaticEmbedding"}],
            "model.safetensors": b"x",
        },
    ),
]


def judged(name: str, code: int, *words: str, queries: Any = QUERIES, qrels: Any = QRELS) -> Any:
    """One line of a table about queries and qrels."""
    settings = {"queries": "queries.parquet", "qrels": "qrels.parquet"}
    files = {settings["queries"]: queries, settings["qrels"]: qrels}
    return case(name, code, *words, files=files, evaluate=settings)


JUDGEMENTS = [
    case("queries-missing", 2, "evaluate.queries", "there is no file", "none.csv", evaluate__queries="none.csv"),
    case("queries-named-nothing", 2, "evaluate.queries", evaluate__queries=""),
    case(
        "queries-of-an-unknown-format",
        2,
        "evaluate.queries",
        "q.xml",
        ".jsonl",
        files={"q.xml": b""},
        evaluate__queries="q.xml",
    ),
    judged("queries-without-ids", 2, "evaluate.queries", "queries.parquet", "'_id'", queries=QUERIES.drop("_id")),
    judged("queries-without-text", 2, "evaluate.queries", "queries.parquet", "'text'", queries=QUERIES.drop("text")),
    judged("qrels-without-scores", 2, "evaluate.qrels", "qrels.parquet", "'score'", qrels=QRELS.drop("score")),
    judged("queries-empty", 3, "evaluate.queries", "queries.parquet", "empty", queries=QUERIES[:0]),
    judged("queries-unreadable", 3, "evaluate.queries", "cannot read", "queries.parquet", queries=b"garbage"),
    judged(
        "queries-with-a-null", 3, "evaluate.queries", "null", queries=QUERIES.with_columns(text=pl.Series(["a", None]))
    ),
    judged(
        "queries-with-a-blank",
        3,
        "evaluate.queries",
        "queries.parquet",
        "'q2'",
        "blank",
        queries=QUERIES.with_columns(text=pl.Series(["a", " "])),
    ),
    judged(
        "queries-of-numbers",
        3,
        "evaluate.queries",
        "queries.parquet",
        "text",
        queries=QUERIES.with_columns(text=pl.lit(7)),
    ),
    judged(
        "query-id-twice",
        3,
        "evaluate.queries",
        "queries.parquet",
        "twice",
        queries=QUERIES.with_columns(_id=pl.lit("q1")),
    ),
    judged(
        "qrels-of-an-unknown-query",
        3,
        "evaluate.qrels",
        "'q9'",
        "queries.parquet",
        qrels=QRELS.with_columns(query_id=pl.lit("q9")),
    ),
    judged(
        "qrels-of-an-unknown-document",
        3,
        "evaluate.qrels",
        "'doc-999'",
        "not in the corpus",
        qrels=QRELS.with_columns(corpus_id=pl.lit("doc-999")),
    ),
    judged(
        "qrels-with-words-for-scores",
        3,
        "evaluate.qrels",
        "scores",
        "no numbers",
        qrels=QRELS.with_columns(score=pl.lit("good")),
    ),
    judged("qrels-with-nan", 3, "evaluate.qrels", "scores", qrels=QRELS.with_columns(score=pl.lit(float("nan")))),
    judged(
        "a-query-the-model-cannot-embed",
        3,
        "evaluate.queries",
        "queries.parquet",
        "zero_norm",
        queries=QUERIES.with_columns(text=pl.Series(["unheard", "w001"])),
    ),
]


@pytest.mark.parametrize("case", [*SPECS, *SOURCES, *DATA, *MODELS, *JUDGEMENTS])
def test_nothing_is_published(case, job_file, values, call):
    write(case.files)
    job, root = job_file(**case.overrides), Path(values(**case.overrides)["root"] or "nowhere")
    sentence = call("run", job).refuses(case.code, *case.words)
    assert ledger.newest_generation(root) is None
    assert not (root / "manifest.json").exists()
    assert not store.table_exists(store.table_uri(root, DOCUMENTS))
    if case.code == 2:
        assert not root.exists()
        assert call("validate", job).refuses(2) == sentence


# A spec that is not even a mapping of values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(b"name: a\nroot: r\nname: b\n", ["'name' stands twice", "line 3"], id="key-twice"),
        pytest.param(b"corpus:\n  id: a\n  id: b\n", ["'id' stands twice", "line 3"], id="nested-key-twice"),
        pytest.param(b"name: [a\nroot: r\n", ["not valid YAML", "line 2"], id="invalid-yaml"),
        pytest.param(b"name: a\n\troot: r\n", ["not valid YAML", "line 2"], id="tab"),
        pytest.param(b"name: \x00\n", ["not valid YAML"], id="null-byte"),
        pytest.param(b"name: !!python/name:os.system\n", ["not valid YAML", "line 1", "python/name"], id="code"),
        pytest.param(b"name: caf\xe9\n", ["not UTF-8"], id="latin-1"),
        pytest.param(b"- name: a\n", ["mapping", "list"], id="a-list"),
        pytest.param(b"", ["mapping"], id="empty"),
        pytest.param(b"name: a\n", ["the field root is missing", "3 more"], id="fields-missing"),
        pytest.param(b"1: 2\n", ["1"], id="a-number-as-field"),
        pytest.param(b"name: &a [*a]\n", ["name"], id="endless"),
    ],
)
def test_a_broken_spec(text, words, call):
    Path("broken.yaml").write_bytes(text)
    call("run", "broken.yaml").refuses(2, "broken.yaml", *words)
    assert [path.name for path in Path().iterdir()] == ["broken.yaml"]


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("", ["command"], id="no-command"),
        pytest.param("serach JOB", ["'serach'", "'search'"], id="unknown-command"),
        pytest.param("run", ["job"], id="no-job"),
        pytest.param("run JOB --colour", ["--colour"], id="unknown-option"),
        pytest.param("run JOB --from embd", ["--from", "'embd'", "'embed'"], id="unknown-stage"),
        pytest.param("run JOB --from index --until fit", ["--from index", "--until fit"], id="from-after-until"),
        pytest.param("run none.yaml", ["none.yaml", "No such file"], id="spec-missing"),
        pytest.param("run .", ["the job spec .", "directory"], id="spec-is-a-folder"),
        pytest.param("status none", ["none", "No such file"], id="status-of-nothing"),
        pytest.param("search none w001", ["none", "No such file"], id="search-of-nothing"),
        pytest.param("search JOB w001 -k many", ["-k", "'many'"], id="k-that-is-no-number"),
        pytest.param("run JOB --set seed", ["'seed'", "path.to.field=value"], id="set-without-value"),
        pytest.param("run JOB --set =3", ["'=3'", "path.to.field=value"], id="set-without-field"),
        pytest.param("run JOB --set corpus..id=3", ["'corpus..id=3'", "path.to.field=value"], id="set-with-a-gap"),
        pytest.param("run JOB --set seed=[1", ["'seed=[1'", "not valid YAML"], id="set-to-broken-yaml"),
        pytest.param("run JOB --set seed=many", ["seed", "'many'"], id="set-to-a-wrong-value"),
        pytest.param("run JOB --set sead=1", ["sead", "did you mean 'seed'"], id="set-unknown-field"),
        pytest.param("run JOB --set name.first=a", ["'name.first=a'", "name"], id="set-below-a-value"),
        pytest.param("run JOB --set prefixes.7.dim=8", ["'prefixes.7.dim=8'", "prefixes"], id="set-beyond-a-list"),
        pytest.param("run JOB --set prefixes.first=8", ["'prefixes.first=8'", "'first'"], id="set-name-in-a-list"),
        pytest.param("run JOB --set model.name.x.y=8", ["'model.name.x.y=8'"], id="set-far-below-a-value"),
        pytest.param("status . --set seed=1", ["--set", "is a root"], id="set-on-a-root"),
    ],
)
def test_wrong_calls(arguments, words, job_file, values, call):
    job = job_file()
    call(*(str(job) if part == "JOB" else part for part in arguments.split())).refuses(2, *words)
    assert not Path(values()["root"]).exists()
    assert list(Path().iterdir()) == []


# Roots that cannot be written


@pytest.mark.parametrize(
    ("root", "words"),
    [
        pytest.param("file", ["root file", "folder"], id="root-is-a-file"),
        pytest.param("file/below", ["root file/below", "folder"], id="root-below-a-file"),
        pytest.param("half", ["root half", "folder"], id="file-where-a-folder-belongs"),
        pytest.param("s3://bucket/job", ["s3:", "bucket/job", "object stores", "folder"], id="object-store"),
        pytest.param("gs://bucket", ["gs:", "bucket", "object stores", "folder"], id="another-object-store"),
    ],
)
def test_roots_that_cannot_be_written(root, words, job_file, call):
    write({"file": b"precious", "half/lancedb": b"precious"})
    call("run", job_file(root=root)).refuses(2, *words)
    assert Path("file").read_bytes() == Path("half/lancedb").read_bytes() == b"precious"
    assert {path.name for path in Path().iterdir()} == {"file", "half"}


# What only the loaded model tells


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param({"model__max_tokens": 64}, ["model.max_tokens", "leave max_tokens null"], id="max-tokens"),
        pytest.param({"model__precision": "bfloat16"}, ["model.precision", "bfloat16"], id="precision"),
        pytest.param({"prefixes": prefix(dim=40)}, ["prefixes[0].dim", "40", f"{DIM} dim"], id="dim"),
    ],
)
def test_said_before_the_first_shard(overrides, words, job_file, values, call, monkeypatch):
    monkeypatch.setattr(models, "_dimension", lambda path: None)
    call("run", job_file(**overrides)).refuses(2, *words)
    root = Path(values()["root"])
    assert ledger.begun(root) is None
    assert ledger.Ledger(root, "embed").names() == set()
    assert call("run", job_file()).code == 0  # the root is as good as new


@pytest.fixture
def packaged(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the stand-in a packaged model `boxed` with this sha256."""
    (Path("packages") / "boxed_weights").mkdir(parents=True)
    Path("packages/boxed_weights/__init__.py").touch()
    Path("packages/boxed_weights/model").mkdir()
    for file in model.rglob("*"):
        if file.is_file():
            shutil.copy(file, Path("packages/boxed_weights/model") / file.name)
    monkeypatch.syspath_prepend(str(Path("packages").absolute()))
    return lambda digest: monkeypatch.setitem(models.PACKAGED, "boxed", ("boxed_weights", digest))


def test_packaged_weights_with_another_digest(packaged, job_file, values, call):
    packaged("0" * 64)
    call("run", job_file(model__name="boxed")).refuses(3, "weights of boxed", "000000000000", "reinstall")
    assert not Path(values()["root"]).exists()


def test_packaged_model_that_is_not_installed(monkeypatch, job_file, values, call):
    monkeypatch.setitem(models.PACKAGED, "boxed", ("no_such_module", ""))
    call("run", job_file(model__name="boxed")).refuses(2, "boxed", "pip install")
    assert not Path(values()["root"]).exists()


# The surroundings fail


def test_a_full_disk_can_be_resumed(job_file, values, call, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = job_file()
    with monkeypatch.context() as broken:
        broken.setattr(store, "lance_write_fragments", full)
        call("run", job).refuses(1, "No space left on device", "run again")
    assert ledger.newest_generation(Path(values()["root"])) is None
    assert call("run", job).code == 0
    assert len(open_index(values()["root"]).search(VECTOR, k=200)) == 120


def test_a_cluster_out_of_reach(job_file, values, call, monkeypatch):
    import ray

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", lost)
    job = job_file(workers={"count": 1, "address": "10.0.0.1:6379"})
    call("run", job).refuses(1, "cannot reach a Ray cluster", "10.0.0.1:6379", "any running Ray")
    assert ledger.begun(Path(values()["root"])) is None


def test_a_defect_keeps_its_traceback(job_file, call, monkeypatch):
    def defect(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("pipeline.cli.run_job", defect)
    with pytest.raises(KeyError, match="a defect"):
        call("run", job_file())


def test_corrected_data_runs_in_the_same_root(job_file, call):
    write({"rows.csv": FRAME.with_columns(_id=pl.lit("same"))})
    job = job_file(corpus__source="rows.csv")
    call("run", job).refuses(3, "duplicate id 'same'")
    write({"rows.csv": FRAME})
    assert call("run", job).code == 0


def test_a_spent_budget_can_be_raised(job_file, values, call):
    write({"rows.csv": FRAME.with_columns(text=pl.Series([*["unheard"] * 11, *FRAME["text"][11:]]))})
    job = job_file(corpus__source="rows.csv", corpus__text="text")
    call("run", job).refuses(3, "11 of 20 rows", "zero_norm 11")
    assert call("run", job, "--set", "corpus.max_quarantined=0.6").code == 0
    assert ledger.newest_generation(Path(values()["root"]))["corpus"]["quarantined"] == 11


# A finished root refuses what would change or mix it


CARRIED = {"corpus__keep": ["title"], "corpus__filter": ["lang", "year"]}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with a corpus and a finished root, made once; tests change copies."""
    folder = tmp_path_factory.mktemp("once")
    corpus_frame().write_parquet(folder / "corpus.parquet")
    corpus = {"source": str(folder / "corpus.parquet"), "id": "_id", "text": ["title", "text"]}
    corpus |= {"keep": ["title"], "filter": ["lang", "year"]}
    tables = [EIGHT, {"dim": 16, "precision": "int8"}, {"dim": 16, "precision": "float16"}]
    run(
        JobSpec.of(
            {
                "name": "test",
                "root": str(folder / "root"),
                "corpus": corpus,
                "model": {"name": str(model)},
                "prefixes": tables,
                "workers": {"count": 0},
            }
        )
    )
    return folder


class Finished:
    """A finished root of this test's own."""

    def __init__(self, folder: Path, root: Path, job_file: Callable[..., Path]) -> None:
        shutil.copytree(folder / "root", root)
        self.root, self._source, self._job_file = root, folder / "corpus.parquet", job_file
        self._files, self._hits = self._published(), self.hits()

    def job(self, **overrides: Any) -> Path:
        """The spec that made it, with overrides."""
        return self._job_file(**{"corpus__source": str(self._source), **CARRIED, **overrides})

    def hits(self) -> pl.DataFrame:
        """What a search finds."""
        return open_index(self.root).search(VECTOR, k=5, where="lang = 'en'")

    def assert_unchanged(self) -> None:
        """Every published file is as it was, and can be searched."""
        assert self._published() == self._files
        assert self.hits().equals(self._hits)

    def _published(self) -> dict[str, str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        names = {path.relative_to(self.root).as_posix(): path for path in files}
        return {name: store.sha256(path) for name, path in names.items() if not name.startswith("_state/")}


@pytest.fixture
def finished(once: Path, tmp_path: Path, job_file: Callable[..., Path], other_model: Path) -> Finished:
    """A copy of the finished root; `other-model` is in the current directory."""
    Path("other-model").symlink_to(other_model)
    return Finished(once, tmp_path / "root", job_file)


CHANGED = corpus_frame().with_columns(text=corpus_frame(seed=1)["text"])

REFUSED = [
    case("another-model", 4, "model.digest", "sha256:", "choose another root", model__name="other-model"),
    case("another-text-rule", 4, "corpus.text", "['title', 'text'] then", "['text'] now", corpus__text="text"),
    case("another-id", 4, "corpus.id", "_id then", "None now", corpus__id=None),
    case("other-rows", 4, "corpus.rows", "120 then", "20 now", files={"c.parquet": FRAME}, corpus__source="c.parquet"),
    case("other-texts", 4, "corpus.digest", files={"c.parquet": CHANGED}, corpus__source="c.parquet"),
    case(
        "more-columns-kept",
        4,
        "corpus.keep",
        "['title'] then",
        corpus__keep=["title", "text2"],
        corpus__source="c.parquet",
        files={"c.parquet": corpus_frame().with_columns(text2="text")},
    ),
    case("another-filter", 4, "corpus.filter", "['lang', 'year'] then", "['lang'] now", corpus__filter="lang"),
    case("no-texts-kept", 4, "corpus.keep_text", "True then", "False now", corpus__keep_text=False),
    case("other-shards", 4, "corpus.shard_rows", "8192 then", "50 now", corpus__shard_rows=50),
    case("other-vectors", 4, "embed.vectors", "float16 then", "float32 now", embed__vectors="float32"),
    case("parquet-too", 4, "embed.parquet", "False then", "True now", embed__parquet=True),
    case("another-precision", 4, "model.precision", "float32 then", "bfloat16 now", model__precision="bfloat16"),
    case("another-document-prompt", 4, "model.prompts.document", "w001: now", model__prompts={"document": "w001: "}),
    case("another-query-prompt", 4, "model.prompts.query", "w001: now", model__prompts={"query": "w001: "}),
    case("another-token-limit", 4, "model.max_tokens", "None then", "9 now", model__max_tokens=9),
    case("other-batches", 4, "model.batch_tokens", "512 now", model__batch_tokens=512),
    case("unknown-field", 2, "unknown field corpus.txt", corpus__txt="text"),
    case("dim-above-the-model's", 2, "prefixes[0].dim", "40", prefixes=prefix(dim=40)),
    case("corpus-gone", 2, "corpus.source", "gone.csv", corpus__source="gone.csv"),
    case("column-gone", 2, "corpus.filter", "'lang'", files={"c.csv": FRAME.drop("lang")}, corpus__source="c.csv"),
    case(
        "corpus-with-duplicate-ids",
        3,
        "duplicate id",
        files={"a.csv": FRAME, "b.csv": FRAME},
        corpus__source=["a.csv", "b.csv"],
    ),
    case("corpus-damaged", 3, "cannot read", "c.parquet", files={"c.parquet": b"garbage"}, corpus__source="c.parquet"),
    case(
        "floor-missed",
        6,
        "recall_exact",
        "< 1",
        "nothing was published",
        evaluate__floor={"recall_exact": 1},
        search__cascade=[level("prefix_8_binary", 10)],
    ),
]


@pytest.mark.parametrize("case", REFUSED)
def test_a_finished_root_stays_as_it_is(case, finished, call):
    write(case.files)
    call("run", finished.job(**case.overrides)).refuses(case.code, *case.words)
    finished.assert_unchanged()


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_held_root(command, finished, call):
    with ThreadPoolExecutor(1) as elsewhere:  # in this thread, filelock would call it a deadlock
        held = store.lock(finished.root)
        elsewhere.submit(held.__enter__).result()
        try:
            call(command, finished.job()).refuses(5, str(finished.root), "held by another job", "process")
            finished.assert_unchanged()
            assert call("status", finished.root).code == 0
        finally:
            elsewhere.submit(held.__exit__, None, None, None).result()
    assert call(command, finished.job()).code == 0


def test_a_missed_floor_publishes_nothing(job_file, values, call):
    job = job_file(evaluate__floor={"recall_exact": 1}, search__cascade=[level("prefix_8_binary", 10)])
    for _ in range(2):  # the second time, everything but the evaluation is done
        call("run", job).refuses(6, "cascade", "recall_exact", "< 1")
        assert ledger.newest_generation(Path(values()["root"])) is None
    call("search", job, "w001").refuses(4, "no finished generation")
    assert call("run", job, "--set", "evaluate.floor={}").code == 0


@pytest.mark.parametrize("version", ["cleaned-up", "deleted"])
def test_a_pinned_version_that_is_gone(version, finished, call):
    uri = store.table_uri(finished.root, "prefix_8_binary")
    if version == "cleaned-up":
        table = lance.dataset(uri)
        table.delete("row = 0")
        table.cleanup_old_versions(older_than=None, retain_versions=1, delete_unverified=True)
    else:
        shutil.rmtree(Path(uri) / "_versions")
    call("search", finished.root, "w001").refuses(4, "prefix_8_binary", "version", "run the job again")
    assert ledger.newest_generation(finished.root)["generation"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("search JOB w001", ["no finished generation", "run the job"], id="search"),
        pytest.param("search ROOT w001", ["no finished generation", "run the job"], id="search-root"),
        pytest.param("status ROOT", ["holds no job", "run one first"], id="status"),
        pytest.param("run JOB --from derive", ["stage embed is not finished", "--from derive"], id="from-derive"),
        pytest.param("evaluate JOB", ["stage embed is not finished"], id="evaluate"),
    ],
)
def test_a_root_without_a_generation(arguments, words, job_file, values, call):
    root = Path(values()["root"])
    root.mkdir()
    places = {"JOB": str(job_file()), "ROOT": str(root)}
    call(*(places.get(part, part) for part in arguments.split())).refuses(4, str(root), *words)
    assert ledger.newest_generation(root) is None
    assert ledger.begun(root) is None


def test_an_unfinished_root_is_not_searched(job_file, values, call):
    job = job_file()
    assert call("run", job, "--until", "embed").code == 0
    call("search", job, "w001").refuses(4, "no finished generation")


def test_search_with_another_model_than_recorded(finished, other_model, call):
    generation = ledger.newest_generation(finished.root)
    index = Index(finished.root, generation, model=str(other_model))
    with pytest.raises(PipelineError, match="the tables need") as refusal:
        index.search("w001")
    assert refusal.value.exit_code == 3


# Wrong queries


NAN = np.where(np.arange(DIM) == 3, np.nan, 1).astype(np.float32)

WHERES = [
    pytest.param("text = 'a'", ["'text'", "lang, year"], id="no-filter-column"),
    pytest.param("lang = 3", ["lang holds strings", "3 is a number"], id="number-for-text"),
    pytest.param("year = '1990'", ["year holds numbers", "'1990' is a string"], id="text-for-number"),
    pytest.param("year LIKE '19%'", ["LIKE", "year"], id="like-of-numbers"),
    pytest.param("year ~ 3", ["cannot read '~ 3'"], id="unknown-sign"),
    pytest.param("lang = 'en", ["cannot read"], id="open-string"),
    pytest.param("(lang = 'en'", ["expected )", "the end"], id="open-bracket"),
    pytest.param("lang = 'en' year = 1990", ["AND, OR", "'year'"], id="no-and"),
    pytest.param("lang", ["expected", "the end"], id="only-a-column"),
    pytest.param("year IN ()", ["expected", "')'"], id="in-nothing"),
    pytest.param("year = 99999999999999999999", ["64 bits"], id="beyond-64-bits"),
    pytest.param("lang = 'en'; DROP TABLE x", ["cannot read '; DROP TABLE x'"], id="second-statement"),
    pytest.param("lower(lang) = 'en'", ["'lower'"], id="a-function"),
    pytest.param("", ["expected a filter column", "the end"], id="empty"),
    pytest.param("NOT " * 200 + "lang = 'en'", ["nested deeper"], id="deeply-nested"),
]

ASKED = [
    pytest.param({"k": 0}, ["k must be at least 1", "0"], id="k-zero"),
    pytest.param({"k": -3}, ["k must be at least 1", "-3"], id="k-negative"),
    pytest.param({"queries": NAN}, ["query 0", "NaN"], id="nan"),
    pytest.param({"queries": VECTOR * np.inf}, ["query 0", "infinity"], id="infinity"),
    pytest.param({"queries": np.stack([VECTOR, NAN])}, ["query 1", "NaN"], id="nan-in-the-second"),
    pytest.param({"queries": VECTOR[:-1]}, [f"(n, {DIM})", f"({DIM - 1},)"], id="wrong-length"),
    pytest.param({"queries": VECTOR[None, None]}, [f"(n, {DIM})", f"(1, 1, {DIM})"], id="three-axes"),
    pytest.param({"queries": VECTOR.astype(str)}, ["numbers", "<U"], id="vector-of-strings"),
    pytest.param({"queries": VECTOR.astype(complex)}, ["numbers", "complex"], id="vector-of-complex"),
    pytest.param({"queries": VECTOR * 0}, ["length 0"], id="zero-vector"),
    pytest.param({"queries": VECTOR.tolist()}, ["float array"], id="list-of-floats"),
    pytest.param({"queries": None}, ["a text"], id="nothing"),
    pytest.param({"queries": ""}, ["query 0 is blank"], id="empty-text"),
    pytest.param({"queries": ["w001", " \n"]}, ["query 1 is blank"], id="blank-text"),
    pytest.param({"queries": "unheard of"}, ["query 0", "zero_norm"], id="text-without-a-direction"),
    pytest.param({"cascade": [("prefix_9_binary", 9)]}, ["'prefix_9_binary'", "prefix_8_binary"], id="unknown-table"),
    pytest.param({"cascade": [("documents", 9)]}, ["'documents'"], id="documents-as-a-level"),
    pytest.param(
        {"cascade": [("prefix_8_binary", 9), ("prefix_16_int8", 99)]}, ["rises from 9 to 99"], id="rising-shortlists"
    ),
    pytest.param({"cascade": [("prefix_8_binary", "many")]}, ["many"], id="shortlist-of-words"),
    pytest.param({"cascade": ["prefix_8_binary"]}, ["cascade"], id="level-without-shortlist"),
    pytest.param({"cascade": [("prefix_8_binary", 0)]}, ["shortlist", "0"], id="shortlist-zero"),
]


@pytest.fixture(scope="module")
def index(once: Path) -> Index:
    """The finished root, open."""
    return open_index(once / "root")


@pytest.mark.parametrize(("asked", "words"), ASKED)
def test_wrong_queries(asked, words, index):
    with pytest.raises(QueryError) as refusal:
        index.search(**{"queries": VECTOR, **asked})
    assert isinstance(refusal.value, ValueError) and isinstance(refusal.value, SpecError)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("where", "words"), WHERES)
def test_wrong_filters(where, words, index, once, call):
    with pytest.raises(QueryError) as refusal:
        index.search(VECTOR, where=where)
    assert isinstance(refusal.value, ValueError)
    sentence = call("search", once / "root", "w001", "--where", where).refuses(2, *words)
    assert sentence == f"error: {refusal.value}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["w001", "-k", "0"], ["k must be at least 1"], id="k-zero"),
        pytest.param(["w001", "-k", "-1", "--exact"], ["k must be at least 1", "-1"], id="k-negative"),
        pytest.param(["w001", "-k", "0", "--explain"], ["k must be at least 1"], id="explain-k-zero"),
        pytest.param([" "], ["query 0 is blank"], id="blank"),
        pytest.param(["unheard"], ["query 0", "zero_norm"], id="without-a-direction"),
    ],
)
def test_wrong_searches(arguments, words, once, call):
    call("search", once / "root", *arguments).refuses(2, *words)


def test_a_cascade_of_an_unknown_table_on_the_command_line(finished, call):
    job = finished.job(search__cascade=[level("prefix_9_binary", 10)])
    call("search", job, "w001").refuses(2, "'prefix_9_binary'", "did you mean")
    finished.assert_unchanged()


# The same through a real process


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param("run JOB --set corpus.txt=a", 2, ["unknown field corpus.txt"], id="spec"),
        pytest.param("run JOB --set corpus.source=twice.csv", 3, ["duplicate id 'same'"], id="data"),
        pytest.param("search ROOT w001", 4, ["no finished generation"], id="nothing-finished"),
    ],
)
def test_a_real_process(arguments, code, words, job_file, values):
    write({"twice.csv": FRAME.with_columns(_id=pl.lit("same"))})
    root = Path(values()["root"])
    root.mkdir()
    places = {"JOB": str(job_file()), "ROOT": str(root)}
    command = [sys.executable, "-m", "pipeline", *(places.get(part, part) for part in arguments.split())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    Outcome(ended.returncode, ended.stdout, ended.stderr).refuses(code, *words)
    assert ledger.newest_generation(root) is None
