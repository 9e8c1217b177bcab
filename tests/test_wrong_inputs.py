"""Wrong inputs: each one is answered by its exit code and one sentence, and leaves nothing half-written."""

import errno
import gzip
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import polars as pl
import pytest

from pipeline import Index, JobSpec, PipelineError, ledger, lock, open_index, run, store
from pipeline.cli import main
from pipeline.encoders import models
from pipeline.errors import QueryError, SpecError
from pipeline.storage import Root, sha256
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
    files: Mapping[str, Any]
    overrides: Mapping[str, Any]


def case(name: str, code: int, /, *words: str, files: Mapping[str, Any] | None = None, **overrides: Any) -> Any:
    """One line of a table."""
    return pytest.param(Case(code, words, files or {}, overrides), id=name)


def data(name: str, files: Mapping[str, Any], /, *words: str, **overrides: Any) -> Any:
    """One line of a table about the corpus: these files."""
    return case(name, 3, *words, files=files, **{"corpus__source": list(files), "corpus__text": "text", **overrides})


def bad_model(name: str, code: int, files: Mapping[str, Any], /, *words: str) -> Any:
    """One line of a table about a folder of these files, given as a model."""
    inside = {f"bad-model/{path}": content for path, content in files.items()}
    return case(name, code, "model.name", "bad-model", *words, files=inside, model__name="bad-model")


def judged(name: str, code: int, /, *words: str, queries: Any = None, qrels: Any = None) -> Any:
    """One line of a table about queries and qrels."""
    files = {"q.parquet": QUERIES if queries is None else queries, "j.parquet": QRELS if qrels is None else qrels}
    return case(name, code, *words, files=files, evaluate={"queries": "q.parquet", "qrels": "j.parquet"})


def write(files: Mapping[str, Any]) -> None:
    """Frames by suffix, bytes as they are, other values as JSON."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pl.DataFrame):
            content = packed(content, path.suffix)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def packed(frame: pl.DataFrame, suffix: str) -> bytes:
    """A frame as the bytes of a file."""
    buffer = io.BytesIO()
    {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}[suffix](buffer)
    return buffer.getvalue()


def but(frame: pl.DataFrame, **columns: Any) -> pl.DataFrame:
    """A frame with other columns: values, or one for all rows."""
    lists = {name: pl.Series(values) for name, values in columns.items() if isinstance(values, list)}
    return frame.with_columns(**{name: pl.lit(value) for name, value in columns.items() if name not in lists}, **lists)


def some(column: str, value: str | None, count: int) -> pl.DataFrame:
    """FRAME with this value in the last rows of a column."""
    return but(FRAME, **{column: [*FRAME[column][:-count], *[value] * count]})


def prefix(**fields: Any) -> list[dict[str, Any]]:
    """Prefixes of one table, 8 binary dimensions unless told otherwise."""
    return [{**EIGHT, **fields}]


def cascade(*levels: tuple[str, int]) -> list[dict[str, Any]]:
    """A cascade as it stands in a spec."""
    return [{"table": table, "shortlist": shortlist} for table, shortlist in levels]


FRAME = corpus_frame(20)
PARQUET, LINES = packed(FRAME, ".parquet"), packed(FRAME, ".jsonl")
ODD = b'{"_id": "odd", "text": "w001", "year": "MM"}\n'
HUGE = b'{"_id": "huge", "text": "w001", "year": %d}\n' % 10**30
GARBAGE = b"garbage " * 100
QUERIES = pl.DataFrame({"_id": ["q1", "q2"], "text": ["w001 w002", "w003"]})
QRELS = pl.DataFrame({"query_id": ["q1"], "corpus_id": ["doc-7"], "score": [1]})
TAGGED = but(FRAME, tags=[["a"]] * len(FRAME))
NUMBERED = but(FRAME, _id=list(range(len(FRAME))))
WEIGHTS = {"model.safetensors": GARBAGE}
MODULE = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
STATIC = {**MODULE, "type": "sentence_transformers.models.StaticEmbedding"}
FOREIGN = {**MODULE, "type": "custom_st.Transformer"}
RISING = cascade(("prefix_8_binary", 7), ("prefix_16_int8", 9))
UNREACHED = {"evaluate__floor": {"recall_exact": 1}, "search__cascade": cascade(("prefix_8_binary", 10))}
BUDGET = ("10 are allowed", "corpus.max_quarantined")
EIGHT = {"dim": 8, "precision": "binary"}

SPECS = [
    case("unknown-section", 2, "unknown field modle", "did you mean 'model'", modle={}),
    case("unknown-field", 2, "unknown field corpus.txt", "did you mean 'text'", "keep_text", corpus__txt="text"),
    case("unknown-field-in-a-list", 2, "prefixes[0].indx", "did you mean 'index'", prefixes=prefix(indx={})),
    case("unknown-field-deep", 2, "prefixes[0].index.bitts", "'bits'", prefixes=prefix(index={"bitts": 4})),
    case("unknown-prompt", 2, "model.prompts.documents", "'document'", model__prompts={"documents": ""}),
    case("unknown-field-like-no-other", 2, "unknown field evaluate.xyz", "allowed here: queries", evaluate__xyz=1),
    case("unknown-metric", 2, "evaluate.floor", "'recall_exact'", "'recal'", evaluate__floor={"recal": 0.9}),
    case(
        "misspelt-field-is-not-missing", 2, "corpus.tekst", "did you mean 'text'", corpus={"source": "a", "tekst": "b"}
    ),
    case("text-for-number", 2, "seed", "integer", "'many'", seed="many"),
    case("fraction-for-integer", 2, "evaluate.k", "integer", "1.5", evaluate__k=1.5),
    case("number-for-text", 2, "name", "string", "7", name=7),
    case("text-for-section", 2, "embed", "mapping", "'float16'", embed="float16"),
    case("null-for-section", 2, "corpus", "mapping", "None", corpus=None),
    case("mapping-for-list", 2, "prefixes", "list", "{'dim': 8", prefixes=EIGHT),
    case("text-for-boolean", 2, "corpus.keep_text", "boolean", "'perhaps'", corpus__keep_text="perhaps"),
    case("number-for-columns", 2, "corpus.text", "list", "7", corpus__text=7),
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
    case("unknown-precision", 2, "prefixes[0].precision", "did you mean 'int8'", prefixes=prefix(precision="int4")),
    case("unknown-backend", 2, "model.backend", "'auto', 'torch' or 'openvino'", "'onnx'", model__backend="onnx"),
    case("unknown-transform", 2, "transform.kind", "'pca'", "'pcaa'", transform__kind="pcaa"),
    case("unknown-vectors", 2, "embed.vectors", "'float32'", "'int8'", embed__vectors="int8"),
    case("unknown-index", 2, "prefixes[0].index.kind", "'ivf_rq'", prefixes=prefix(index={"kind": "ivf_pq"})),
    case("binary-of-12", 2, "prefixes[0]", "multiple of 8", "12", prefixes=prefix(dim=12)),
    case("dim-zero", 2, "prefixes[0].dim", "0", prefixes=prefix(dim=0)),
    case("dim-above-the-models", 2, "prefixes[0].dim", "40", f"{DIM} dimensions", prefixes=prefix(dim=40)),
    case("same-prefix-twice", 2, "prefix_8_binary stands twice", prefixes=[EIGHT, EIGHT]),
    case("index-on-int8", 2, "cannot index int8", prefixes=prefix(precision="int8", index={"kind": "ivf_sq"})),
    case("hnsw-on-binary", 2, "prefixes[0]", "ivf_flat only", "hnsw_sq", prefixes=prefix(index={"kind": "hnsw_sq"})),
    case("bits-without-rq", 2, "prefixes[0].index", "bits is for kind: ivf_rq", prefixes=prefix(index={"bits": 4})),
    case("rq-of-12", 2, "of 8", "12", prefixes=prefix(dim=12, precision="float16", index={"kind": "ivf_rq"})),
    case("unknown-table", 2, "'prefix_8_int8'", "did you mean", search__cascade=cascade(("prefix_8_int8", 9))),
    case("rising-shortlists", 2, "rises from 7 to 9 at prefix_16_int8", search__cascade=RISING),
    case("shortlist-zero", 2, "search.cascade[0].shortlist", "0", search__cascade=cascade(("prefix_8_binary", 0))),
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
    case("matches-nothing", 2, "corpus.source", "'nowhere/*.parquet'", corpus__source="nowhere/*.parquet"),
    case("no-such-file", 2, "corpus.source", "'nowhere.csv'", corpus__source="nowhere.csv"),
    case("no-such-second-file", 2, "'b.csv'", files={"a.csv": FRAME}, corpus__source=["a.csv", "b.csv"]),
    case("folder-of-other-files", 2, "corpus.source", "'docs'", files={"docs/a.md": b""}, corpus__source="docs"),
    case("unknown-format", 2, "corpus.source", "a.xlsx", ".parquet", files={"a.xlsx": b""}, corpus__source="a.xlsx"),
    case("unknown-docstrings", 2, "'docstrings:numpy'", "docstrings:stdlib", corpus__source="docstrings:numpy"),
    case("unknown-scheme", 2, "corpus.source", "'ftpp://host/a.csv'", corpus__source="ftpp://host/a.csv"),
    *(
        case(
            f"{place}-column-absent-in-{suffix}",
            2,
            f"corpus.{place}",
            f"rows.{suffix}",
            "'colour'",
            "_id, title, text",
            files={f"rows.{suffix}": FRAME},
            corpus__source=f"rows.{suffix}",
            **{f"corpus__{place}": "colour"},
        )
        for place in ("id", "text", "keep", "filter")
        for suffix in ("parquet", "csv", "jsonl")
    ),
    case("column-absent-in-txt", 2, "corpus.id", "a.txt", "'_id'", files={"a.txt": b"w001"}, corpus__source="a.txt"),
    case("column-absent-in-docstrings", 2, "corpus.id", "'_id'", "module", corpus__source="docstrings:stdlib"),
]

DATA = [
    *(
        data(
            f"second-{suffix}-lacks-a-column",
            {f"a.{suffix}": FRAME, f"b.{suffix}": FRAME.drop("text")},
            f"b.{suffix}",
            "'text'",
            "files must agree",
        )
        for suffix in ("parquet", "csv")
    ),
    *(
        data(
            f"filter-of-two-types-in-{suffix}",
            {f"a.{suffix}": FRAME, f"b.{suffix}": but(FRAME, year="MM")},
            f"b.{suffix}",
            "'year'",
            "string",
            "int64",
            "files must agree",
            corpus__filter="year",
        )
        for suffix in ("parquet", "jsonl")
    ),
    data("keep-of-two-types", {"a.jsonl": LINES + ODD}, "a.jsonl", "'year'", "several types", corpus__keep="year"),
    data("filter-beyond-64-bits", {"a.jsonl": LINES + HUGE}, "a.jsonl", "'year'", "64 bits", corpus__filter="year"),
    data("filter-of-lists", {"a.parquet": TAGGED}, "corpus.filter: column 'tags'", "list", corpus__filter="tags"),
    data("column-twice", {"a.csv": b"_id,title,text,text\n1,w001,w002,w003\n"}, "a.csv", "'text' twice"),
    data("duplicate-id-in-a-file", {"a.parquet": some("_id", "doc-1", 1)}, "'doc-1'", "a.parquet row 1", "row 19"),
    data("duplicate-id-across-files", {"a.parquet": FRAME, "b.csv": FRAME}, "'doc-0'", "b.csv row 0", "20 repeated"),
    data("duplicate-id-7-and-'7'", {"a.parquet": NUMBERED, "b.parquet": some("_id", "7", 1)}, "'7'", "row 7", "row 19"),
    data("null-id", {"a.parquet": some("_id", None, 1)}, "a.parquet row 19", "'_id' is null"),
    data("empty-id", {"a.parquet": some("_id", "", 1)}, "a.parquet row 19", "'_id' is empty"),
    data("empty-id-in-csv", {"a.csv": some("_id", "", 1)}, "a.csv row 19", "'_id' is null"),
    data("id-left-out", {"a.jsonl": LINES + b'{"text": "w001"}'}, "a.jsonl row 20", "'_id' is null"),
    data("float-ids", {"a.parquet": but(FRAME, _id=0.5)}, "a.parquet row 0", "'_id' is a float"),
    data("boolean-ids", {"a.jsonl": but(FRAME, _id=True)}, "a.jsonl row 0", "'_id' is a bool"),
    data("text-of-integers", {"a.parquet": FRAME}, "a.parquet", "'year' holds int64", corpus__text=["title", "year"]),
    data("text-of-lists", {"a.parquet": TAGGED}, "a.parquet", "'tags' holds", "list", corpus__text="tags"),
    data("truncated-parquet", {"a.parquet": PARQUET[:-40]}, "cannot read", "a.parquet", "mend"),
    data("damaged-parquet", {"a.parquet": PARQUET[:4] + bytes(400) + PARQUET[404:]}, "cannot read", "a.parquet"),
    data("garbage-parquet", {"a.parquet": GARBAGE}, "cannot read", "a.parquet"),
    data("empty-parquet", {"a.parquet": b""}, "cannot read", "a.parquet"),
    data("truncated-gz", {"a.jsonl.gz": gzip.compress(LINES)[:-40]}, "cannot read", "a.jsonl.gz"),
    data("garbage-gz", {"a.jsonl.gz": GARBAGE}, "cannot read", "a.jsonl.gz"),
    data("garbage-zst", {"a.jsonl.zst": GARBAGE}, "cannot read", "a.jsonl.zst"),
    data("garbage-jsonl", {"a.jsonl": b"garbage\n" * 5}, "a.jsonl has no column", "empty"),
    data("empty-csv", {"a.csv": b""}, "a.csv has no column", "empty"),
    data("empty-lance", {"a.lance/data": b""}, "cannot read", "a.lance", corpus__source="a.lance"),
    data("no-rows", {"a.parquet": FRAME[:0]}, "no usable row", "0 rows"),
    data("all-rows-blank", {"a.parquet": but(FRAME, title="", text=" ")[:5]}, "no usable row: 5 rows, blank_text 5"),
    data("budget-spent-by-blanks", {"a.parquet": some("text", " ", 11)}, "11 of 20 rows", "blank_text 11", *BUDGET),
    data("budget-spent-by-nulls", {"a.parquet": some("text", None, 11)}, "null_text 11"),
    data("budget-spent-by-broken-lines", {"a.jsonl": LINES + b'{"_id": \n' * 11}, "11 of 31 rows", "undecodable 11"),
    data("budget-spent-by-zeros", {"a.parquet": some("text", "unheard", 11)}, "11 of 20 rows", "zero_norm 11", *BUDGET),
    data("budget-spent-by-nan", {"a.parquet": some("text", "broken", 11)}, "non_finite 11"),
]

MODELS = [
    case("unknown-model", 2, "'all-minilm-l6'", "did you mean 'all-MiniLM-L6-v2'", model__name="all-minilm-l6"),
    case("hub-id-without-revision", 2, "'org/model'", "model.revision", model__name="org/model"),
    case("empty-revision", 2, "model.revision", "at least 1", model__name="org/model", model__revision=""),
    case("hub-out-of-reach", 1, "the hub for org/model", "abc12", model__name="org/model", model__revision="abc12"),
    bad_model("no-model", 2, {"notes.txt": b""}, "neither modules.json nor config.json"),
    bad_model("pickle-weights", 2, {"modules.json": [MODULE], "pytorch_model.bin": b""}, "no .safetensors"),
    bad_model("pickle-in-a-module", 2, {"config.json": {}, **WEIGHTS, "2_Dense/a.bin": b""}, "a.bin", "run code"),
    bad_model("module-of-its-own", 2, {"modules.json": [FOREIGN], **WEIGHTS}, "custom_st.Transformer", "code"),
    bad_model("auto-map", 2, {"config.json": {"auto_map": {}}, **WEIGHTS}, "auto_map", "code"),
    bad_model("auto-map-below", 2, {"modules.json": [MODULE], "0/config.json": {"auto_map": {}}}, "auto_map", "code"),
    bad_model("garbage-modules", 2, {"modules.json": b"[{"}, "modules.json", "not readable JSON"),
    bad_model("names-for-modules", 2, {"modules.json": ["a"], **WEIGHTS}, "modules.json", "no list of modules"),
    bad_model("mapping-for-modules", 2, {"modules.json": {}, **WEIGHTS}, "modules.json", "not a list"),
    bad_model("list-for-config", 2, {"config.json": [], **WEIGHTS}, "config.json", "not a dict"),
    bad_model("garbage-weights", 3, {"modules.json": [STATIC], **WEIGHTS}, "cannot read", "model.safetensors"),
]

JUDGEMENTS = [
    case("no-queries", 2, "evaluate.queries", "there is no file", "none.csv", evaluate__queries="none.csv"),
    case("queries-named-nothing", 2, "evaluate.queries", "at least 1", evaluate__queries=""),
    case("queries-in-xml", 2, "evaluate.queries", "q.xml", ".jsonl", files={"q.xml": b""}, evaluate__queries="q.xml"),
    judged("queries-without-ids", 2, "evaluate.queries", "q.parquet", "'_id'", queries=QUERIES.drop("_id")),
    judged("queries-without-text", 2, "evaluate.queries", "q.parquet", "'text'", queries=QUERIES.drop("text")),
    judged("qrels-without-scores", 2, "evaluate.qrels", "j.parquet", "'score'", qrels=QRELS.drop("score")),
    judged("queries-empty", 3, "evaluate.queries", "q.parquet", "empty", queries=QUERIES[:0]),
    judged("queries-garbage", 3, "evaluate.queries", "cannot read", "q.parquet", queries=GARBAGE),
    judged("query-null", 3, "evaluate.queries", "q.parquet", "nulls", queries=but(QUERIES, text=["w001", None])),
    judged(
        "query-blank", 3, "evaluate.queries", "q.parquet", "'q2'", "blank", queries=but(QUERIES, text=["w001", " "])
    ),
    judged("query-of-numbers", 3, "evaluate.queries", "q.parquet", "text", "Int", queries=but(QUERIES, text=7)),
    judged("query-id-twice", 3, "evaluate.queries", "q.parquet", "twice", queries=but(QUERIES, _id="q1")),
    judged("query-ids-of-lists", 3, "'_id'", "q.parquet", "List", queries=but(QUERIES, _id=[["a"], ["b"]])),
    judged("qrels-empty", 3, "evaluate.qrels", "j.parquet", "empty", qrels=QRELS[:0]),
    judged("qrels-of-no-query", 3, "evaluate.qrels", "j.parquet", "'q9'", "q.parquet", qrels=but(QRELS, query_id="q9")),
    judged("qrels-of-no-row", 3, "evaluate.qrels", "'doc-999'", "the corpus", qrels=but(QRELS, corpus_id="doc-999")),
    judged("scores-of-lists", 3, "evaluate.qrels", "'score'", "j.parquet", "List", qrels=but(QRELS, score=[[1]])),
    *(
        judged(f"score-{score}", 3, "j.parquet", "no whole numbers", qrels=but(QRELS, score=score))
        for score in ("good", 0.5, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize("case", [*SPECS, *SOURCES, *DATA, *MODELS, *JUDGEMENTS])
def test_nothing_is_published(case, job_file, values, call):
    write(case.files)
    job, root = job_file(**case.overrides), Path(values(**case.overrides)["root"] or "nowhere")
    sentence = call("run", job).refuses(case.code, *case.words)
    assert ledger.newest_generation(Root(root)) is None
    assert not (root / "manifest.json").exists()
    assert not store.table_exists(store.table_uri(Root(root), DOCUMENTS))
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
        pytest.param("search JOB w001 -k many", ["-k", "integer"], id="k-that-is-no-number"),
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
        pytest.param("s3://bucket/job", ["s3:", "credentials", "AWS_ACCESS_KEY_ID"], id="object-store"),
        pytest.param("gs://bucket", ["gs:", "credentials", "GOOGLE_"], id="another-object-store"),
        pytest.param("ftp://host/job", ["ftp://host/job", "folder", "s3://bucket"], id="no-store"),
    ],
)
def test_roots_that_cannot_be_written(root, words, job_file, call, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
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
    assert ledger.begun(Root(root)) is None
    assert ledger.Ledger(Root(root), "embed").names() == set()
    assert call("run", job_file()).code == 0  # the root is as good as new


@pytest.mark.parametrize(
    ("file", "damage", "code", "words"),
    [
        pytest.param("model.safetensors", lambda whole: whole[:-100], 3, ["odd"], id="cut-weights"),
        pytest.param("tokenizer.json", lambda whole: whole[:-100], 2, ["odd cannot be loaded"], id="cut-tokenizer"),
        pytest.param("modules.json", lambda whole: whole.replace(b".Norm", b".X"), 2, ["odd cannot"], id="odd-module"),
    ],
)
def test_a_model_that_cannot_be_loaded(file, damage, code, words, model, job_file, values, call):
    shutil.copytree(model, "odd")
    damaged = next(Path("odd").rglob(file))
    damaged.write_bytes(damage(damaged.read_bytes()))
    call("run", job_file(model__name="odd")).refuses(code, *words)
    assert ledger.begun(Root(Path(values()["root"]))) is None


def test_a_query_the_model_cannot_embed(job_file, values, call):
    write({"q.csv": but(QUERIES, text=["w001", "unheard"])})
    call("run", job_file(evaluate__queries="q.csv")).refuses(3, "evaluate.queries", "q.csv", "query 1", "zero_norm")
    assert ledger.newest_generation(Root(Path(values()["root"]))) is None
    assert call("run", job_file()).code == 0


def test_packaged_weights_with_another_digest(model, monkeypatch, job_file, values, call):
    shutil.copytree(model, "packages/boxed_weights/model")
    Path("packages/boxed_weights/__init__.py").touch()
    monkeypatch.syspath_prepend(str(Path("packages").absolute()))
    monkeypatch.setitem(models.PACKAGED, "boxed", ("boxed_weights", "0" * 64))
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
    assert ledger.newest_generation(Root(Path(values()["root"]))) is None
    assert call("run", job).code == 0
    assert len(open_index(values()["root"]).search(VECTOR, k=200)) == 120


def test_a_cluster_out_of_reach(job_file, values, call, monkeypatch):
    import ray

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", lost)
    job = job_file(workers={"count": 1, "address": "10.0.0.1:6379"})
    call("run", job).refuses(1, "cannot reach a Ray cluster", "10.0.0.1:6379", "any running Ray")
    assert ledger.begun(Root(Path(values()["root"]))) is None


def test_a_defect_keeps_its_traceback(job_file, call, monkeypatch):
    def defect(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("pipeline.cli.run_job", defect)
    with pytest.raises(KeyError, match="a defect"):
        call("run", job_file())


def test_corrected_data_runs_in_the_same_root(job_file, call):
    write({"rows.csv": but(FRAME, _id="same")})
    job = job_file(corpus__source="rows.csv")
    call("run", job).refuses(3, "duplicate id 'same'")
    write({"rows.csv": FRAME})
    assert call("run", job).code == 0


def test_a_spent_budget_can_be_raised(job_file, values, call):
    write({"rows.csv": some("text", "unheard", 11)})
    job = job_file(corpus__source="rows.csv", corpus__text="text")
    call("run", job).refuses(3, "11 of 20 rows", "zero_norm 11")
    assert call("run", job, "--set", "corpus.max_quarantined=0.6").code == 0
    assert ledger.newest_generation(Root(Path(values()["root"])))["corpus"]["quarantined"] == 11


# A finished root refuses what would change or mix it


CARRIED = {"keep": ["title"], "filter": ["lang", "year"]}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with a corpus and a finished root, made once; tests change copies."""
    folder = tmp_path_factory.mktemp("once")
    corpus_frame().write_parquet(folder / "corpus.parquet")
    job = {
        "name": "test",
        "root": str(folder / "root"),
        "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": ["title", "text"], **CARRIED},
        "model": {"name": str(model)},
        "prefixes": [EIGHT, {"dim": 16, "precision": "int8"}, {"dim": 16, "precision": "float16"}],
        "workers": {"count": 0},
    }
    run(JobSpec.of(job))
    return folder


class Finished:
    """A finished root of this test's own."""

    def __init__(self, folder: Path, root: Path, job_file: Callable[..., Path]) -> None:
        shutil.copytree(folder / "root", root)
        self.root, self._source, self._job_file = root, folder / "corpus.parquet", job_file
        self._files, self.found = self._published(), self.hits()

    def job(self, **overrides: Any) -> Path:
        """The spec that made it, with overrides."""
        carried = {f"corpus__{place}": names for place, names in CARRIED.items()}
        return self._job_file(**{"corpus__source": str(self._source), **carried, **overrides})

    def hits(self) -> pl.DataFrame:
        """What a search finds."""
        return open_index(self.root).search(VECTOR, k=5, where="lang = 'en'")

    def assert_unchanged(self) -> None:
        """Every published file is as it was, and can be searched."""
        assert self._published() == self._files
        assert self.hits().equals(self.found)

    def _published(self) -> dict[str, str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        names = {path.relative_to(self.root).as_posix(): path for path in files}
        return {name: sha256(path) for name, path in names.items() if not name.startswith("_state/")}


@pytest.fixture
def finished(once: Path, tmp_path: Path, job_file: Callable[..., Path], other_model: Path) -> Finished:
    """A copy of the finished root; `other-model` is in the current directory."""
    Path("other-model").symlink_to(other_model)
    return Finished(once, tmp_path / "root", job_file)


CHANGED = corpus_frame().with_columns(text=corpus_frame(seed=1)["text"])

REFUSED = [
    case("another-model", 4, "model.digest", "sha256:", "choose another root", model__name="other-model"),
    case("another-text-rule", 4, "corpus.text", "['title', 'text'] then", "['text'] now", corpus__text="text"),
    case("another-id", 4, "corpus.id", "'_id' then", "None now", corpus__id=None),
    case("other-rows", 4, "corpus.rows", "120 then", "20 now", files={"c.parquet": FRAME}, corpus__source="c.parquet"),
    case("other-texts", 4, "corpus.digest", files={"c.parquet": CHANGED}, corpus__source="c.parquet"),
    case("no-column-kept", 4, "corpus.keep", "['title'] then", "[] now", corpus__keep=[]),
    case("another-filter", 4, "corpus.filter", "['lang', 'year'] then", "['lang'] now", corpus__filter="lang"),
    case("no-texts-kept", 4, "corpus.keep_text", "True then", "False now", corpus__keep_text=False),
    case("other-shards", 4, "corpus.shard_rows", "8192 then", "50 now", corpus__shard_rows=50),
    case("other-vectors", 4, "embed.vectors", "'float16' then", "'float32' now", embed__vectors="float32"),
    case("another-precision", 4, "model.precision", "'float32' then", "'bfloat16' now", model__precision="bfloat16"),
    case("document-prompt", 4, "model.prompts.document", "'' then", "'a ' now", model__prompts={"document": "a "}),
    case("query-prompt", 4, "model.prompts.query", "'' then", "'a ' now", model__prompts={"query": "a "}),
    case("another-token-limit", 4, "model.max_tokens", "None then", "9 now", model__max_tokens=9),
    case("other-batches", 4, "model.batch_tokens", "512 now", model__batch_tokens=512),
    case("unknown-field", 2, "unknown field corpus.txt", corpus__txt="text"),
    case("dim-above-the-models", 2, "prefixes[0].dim", "40", prefixes=prefix(dim=40)),
    case("corpus-gone", 2, "corpus.source", "gone.csv", corpus__source="gone.csv"),
    case("column-gone", 2, "corpus.filter", "'lang'", files={"c.csv": FRAME.drop("lang")}, corpus__source="c.csv"),
    case("duplicate-ids", 3, "'doc-0'", files={"a.csv": FRAME, "b.csv": FRAME}, corpus__source=["a.csv", "b.csv"]),
    case("corpus-damaged", 3, "cannot read", "c.parquet", files={"c.parquet": GARBAGE}, corpus__source="c.parquet"),
    case("floor-missed", 6, "recall_exact", "< 1", "nothing was published", **UNREACHED),
]


@pytest.mark.parametrize("case", REFUSED)
def test_a_finished_root_stays_as_it_is(case, finished, call):
    write(case.files)
    call("run", finished.job(**case.overrides)).refuses(case.code, *case.words)
    finished.assert_unchanged()


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_held_root(command, finished, call):
    with ThreadPoolExecutor(1) as elsewhere:  # in this thread, filelock would call it a deadlock
        held = lock.lock(Root(finished.root))
        elsewhere.submit(held.__enter__).result()
        try:
            call(command, finished.job()).refuses(5, str(finished.root), "held by another job", "process")
            finished.assert_unchanged()
            assert call("status", finished.root).code == 0
        finally:
            elsewhere.submit(held.__exit__, None, None, None).result()
    assert call(command, finished.job()).code == 0


def test_a_missed_floor_publishes_nothing(job_file, values, call):
    job = job_file(**UNREACHED)
    for _ in range(2):  # the second time, everything but the evaluation is done
        call("run", job).refuses(6, "cascade", "recall_exact", "< 1")
        assert ledger.newest_generation(Root(Path(values()["root"]))) is None
    call("search", job, "w001").refuses(4, "no finished generation")
    assert call("run", job, "--set", "evaluate.floor={}").code == 0


@pytest.mark.parametrize("version", ["cleaned-up", "deleted"])
def test_a_pinned_version_that_is_gone(version, finished, call):
    uri = store.table_uri(Root(finished.root), "prefix_8_binary")
    if version == "cleaned-up":
        table = lance.dataset(uri)
        table.delete("row = 0")
        table.cleanup_old_versions(older_than=None, retain_versions=1, delete_unverified=True)
    else:
        shutil.rmtree(Path(uri) / "_versions")
    call("search", finished.root, "w001").refuses(4, "prefix_8_binary", "version", "run the job again")
    assert ledger.newest_generation(Root(finished.root))["generation"] == 1
    assert call("run", finished.job()).code == 0
    assert finished.hits().equals(finished.found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("search JOB w001", ["no finished generation", "run the job"], id="search"),
        pytest.param("search ROOT w001", ["no finished generation", "run the job"], id="search-root"),
        pytest.param("status ROOT", ["holds no job", "run one first"], id="status"),
        pytest.param("run JOB --from derive", ["stage corpus is not finished", "--from derive"], id="from-derive"),
        pytest.param("evaluate JOB", ["stage corpus is not finished"], id="evaluate"),
    ],
)
def test_a_root_without_a_generation(arguments, words, job_file, values, call):
    root = Path(values()["root"])
    root.mkdir()
    places = {"JOB": str(job_file()), "ROOT": str(root)}
    call(*(places.get(part, part) for part in arguments.split())).refuses(4, str(root), *words)
    assert ledger.newest_generation(Root(root)) is None
    assert ledger.begun(Root(root)) is None


def test_an_unfinished_root_is_not_searched(job_file, values, call):
    job = job_file()
    assert call("run", job, "--until", "embed").code == 0
    call("search", job, "w001").refuses(4, "no finished generation")
    call("run", job, "--set", "embed.vectors=float32").refuses(4, "embed.vectors")
    assert call("run", job).code == 0


def test_search_with_another_model_than_recorded(finished, other_model, call):
    generation = ledger.newest_generation(Root(finished.root))
    index = Index(Root(finished.root), generation, model=str(other_model))
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
    job = finished.job(search__cascade=cascade(("prefix_9_binary", 10)))
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
    write({"twice.csv": but(FRAME, _id="same")})
    root = Path(values()["root"])
    root.mkdir()
    places = {"JOB": str(job_file()), "ROOT": str(root)}
    command = [sys.executable, "-m", "pipeline", *(places.get(part, part) for part in arguments.split())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    Outcome(ended.returncode, ended.stdout, ended.stderr).refuses(code, *words)
    assert ledger.newest_generation(Root(root)) is None
