"""Every field of a spec and every kind of change to a corpus, on a finished root: refused by name, or free."""

import re
import shutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import BaseModel

from pipeline import JobSpec, run, verify
from pipeline.embedder import Embedder
from pipeline.errors import StaleError
from pipeline.spec import Model
from tests.conftest import corpus_frame, save_model

REFUSED, ACCEPTED, IMPOSSIBLE = "refused", "accepted", "no change possible"
ROWS_PER_FILE, FILES = 8, "abc"
ROWS = ROWS_PER_FILE * len(FILES)


@dataclass(frozen=True)
class Entry:
    """What becomes of a finished root when a field has another value; `{}` in a value stands for the test's folder."""

    verdict: str
    values: Mapping[str, Any] = field(default_factory=dict)
    told: str = ""
    """The message's name for the field, and both values, as a pattern (null: any)."""


def refused(told: str, **values: Any) -> Entry:
    return Entry(REFUSED, _dotted(values), told)


def accepted(**values: Any) -> Entry:
    return Entry(ACCEPTED, _dotted(values))


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in values.items()}


ENTRIES = {
    "name": accepted(name="other"),
    "root": Entry(IMPOSSIBLE),  # another root is another job
    "seed": accepted(seed=7),
    "corpus.source": refused(
        rf"corpus\.rows: {ROWS} then, {2 * ROWS_PER_FILE} now \(also corpus\.digest\): 1 removed: \S*c\.parquet",
        corpus__source=["{}/corpus/a.parquet", "{}/corpus/b.parquet"],
    ),
    "corpus.id": refused(r"corpus\.id: '_id' then, None now", corpus__id=None),
    "corpus.text": refused(r"corpus\.text: \['title', 'text'\] then, \['text'\] now", corpus__text=["text"]),
    "corpus.keep": refused(r"corpus\.keep: \['year'\] then, \[\] now", corpus__keep=[]),
    "corpus.filter": refused(r"corpus\.filter: \['lang'\] then, \[\] now", corpus__filter=[]),
    "corpus.keep_text": refused(r"corpus\.keep_text: True then, False now", corpus__keep_text=False),
    "corpus.shard_rows": refused(r"corpus\.shard_rows: 4 then, 5 now", corpus__shard_rows=5),
    "corpus.max_quarantined": accepted(corpus__max_quarantined=0.5),
    "model.name": refused(r"model\.digest: 'sha256:\w+' then, 'sha256:\w+' now", model__name="{}/other"),
    "model.revision": accepted(model__revision="v1"),  # a folder is known by its digest
    "model.backend": accepted(model__backend="torch"),  # which is what auto means
    "model.precision": refused(r"model\.precision: 'float32' then, 'bfloat16' now", model__precision="bfloat16"),
    "model.min_cosine": accepted(model__min_cosine=0.5),
    "model.max_tokens": refused(r"model\.max_tokens: None then, 5 now", model__max_tokens=5),
    "model.batch_tokens": refused(r"model\.batch_tokens: 512 then, 77 now", model__batch_tokens=77),
    "model.prompts.document": refused(
        r"model\.prompts\.document: 'w001 ' then, 'w002 ' now", model__prompts__document="w002 "
    ),
    "model.prompts.query": refused(r"model\.prompts\.query: 'w003 ' then, 'w002 ' now", model__prompts__query="w002 "),
    "model.matryoshka_dims": accepted(model__matryoshka_dims=[8, 16]),
    "embed.vectors": refused(r"embed\.vectors: 'float16' then, 'float32' now", embed__vectors="float32"),
    "embed.parquet": accepted(embed__parquet=True),
    "transform.kind": accepted(transform__kind="order"),
    "transform.sample_rows": accepted(transform__sample_rows=20),
    "transform.accept_loss": accepted(transform__accept_loss=True),
    "prefixes.dim": accepted(prefixes__2__dim=24),
    "prefixes.precision": accepted(prefixes__2__precision="float32"),
    "prefixes.blocks": accepted(prefixes__2__blocks=[8, 16]),
    "prefixes.rotation": accepted(prefixes__0__rotation="random"),
    "prefixes.index.kind": accepted(prefixes__2__index={"kind": "ivf_flat"}),
    "prefixes.index.bits": accepted(prefixes__2__index={"kind": "ivf_rq", "bits": 8}),
    "index.min_rows": accepted(index__min_rows=1),
    "index.segments": accepted(index__segments=2),
    "index.text": accepted(index__text=True),
    "search.cascade.table": accepted(search__cascade__0__table="prefix_16_int8"),
    "search.cascade.shortlist": accepted(search__cascade__0__shortlist=9),
    "search.cascade.dim": accepted(
        prefixes__2__blocks=[8, 16],
        search__cascade__0={"table": "prefix_16_float16_nested", "shortlist": 10, "dim": 8},
    ),
    "search.cascade.scoring": accepted(search__cascade__0__scoring="hamming"),
    "search.engine": accepted(search__engine="lance"),
    "search.memory": accepted(search__memory=0),
    "search.stop": accepted(search__stop="margin"),
    "search.confidence": accepted(search__confidence=0.5),
    "search.cache": accepted(search__cache=True),
    "search.hybrid": accepted(index__text=True, search__hybrid=True),
    "search.examples": accepted(search__examples=["w001 w002"]),
    "evaluate.queries": accepted(evaluate__queries="{}/queries.parquet"),
    "evaluate.qrels": accepted(evaluate__queries="{}/queries.parquet", evaluate__qrels="{}/qrels.parquet"),
    "evaluate.k": accepted(evaluate__k=4),
    "evaluate.shortlists": accepted(evaluate__shortlists=[5]),
    "evaluate.floor": accepted(evaluate__floor={"recall_exact": 0.01}),
    "workers.count.min": accepted(workers__count={"min": 1, "max": 2}),
    "workers.count.max": accepted(workers__count={"min": 1, "max": 2}),
    "workers.gpus": accepted(workers__gpus=0),
    "workers.cpus": accepted(workers__cpus=1),
    "workers.memory": accepted(workers__memory=10**9),
    "workers.address": accepted(workers__address="ray://nowhere:1"),
}
"""Another valid value for every field."""
CHANGED = sorted(name for name, entry in ENTRIES.items() if entry.verdict != IMPOSSIBLE)


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in typing.get_args(annotation) for one in sections(part)]


def fields(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Dotted names of all that can be set."""
    for name, info in model.model_fields.items():
        inner = sections(info.annotation)
        if not inner:
            yield before + name
        for section in inner:
            yield from fields(section, f"{before}{name}.")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted name; places in lists do not count."""
    if isinstance(value, dict) and name != "evaluate.floor":
        for key, one in value.items():
            yield from leaves(one, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for one in value:
            yield from leaves(one, name)
    else:
        yield name, value


def changed(values: dict[str, Any], changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain values with some of them replaced."""
    made: Any = JobSpec.of(values).model_dump(mode="json")
    for path, value in changes.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        target = made
        for key in way:
            target = target[key]
        target[last] = _filled(value, folder)
    return dict(made)


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_filled(one, folder) for one in value]
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


def begun_with(folder: Path, root: Path) -> dict[str, Any]:
    """The spec of the finished root: no field is `auto` where another value could mean the same."""
    return {
        "name": "test",
        "root": str(root),
        "corpus": {
            "source": [str(folder / f"corpus/{name}.parquet") for name in FILES],
            "id": "_id",
            "text": ["title", "text"],
            "keep": ["year"],
            "filter": ["lang"],
            "shard_rows": 4,
        },
        "model": {
            "name": str(folder / "model"),
            "precision": "float32",
            "batch_tokens": 512,
            "prompts": {"document": "w001 ", "query": "w003 "},
        },
        "prefixes": [
            {"dim": 8, "precision": "binary"},
            {"dim": 16, "precision": "int8"},
            {"dim": 16, "precision": "float16"},
        ],
        "transform": {"kind": "pca"},
        "search": {"cascade": [{"table": "prefix_8_binary", "shortlist": 10}]},
        "evaluate": {"shortlists": [], "k": 3},
        "workers": {"count": 0},
    }


def write_corpus(folder: Path, frame: pl.DataFrame) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(FILES):
        frame[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE].write_parquet(folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with corpus, models, queries, and a finished root that was set aside."""
    folder = tmp_path_factory.mktemp("refusals")
    save_model(folder / "model")
    save_model(folder / "other", seed=1)
    write_corpus(folder / "corpus", corpus_frame(ROWS))
    queries = corpus_frame(3, seed=5).select("_id", "text")
    queries.write_parquet(folder / "queries.parquet")
    qrels = {"query_id": queries["_id"], "corpus_id": queries["_id"], "score": [1, 1, 1]}
    pl.DataFrame(qrels).write_parquet(folder / "qrels.parquet")
    run(JobSpec.of(begun_with(folder, folder / "root")))
    (folder / "root").rename(folder / "finished")
    return folder


@pytest.fixture
def finished(prepared):
    """The finished root, as it was, with its spec as plain values."""
    shutil.rmtree(prepared / "root", ignore_errors=True)
    shutil.copytree(prepared / "finished", prepared / "root")
    return begun_with(prepared, prepared / "root")


@pytest.fixture
def embedders(monkeypatch):
    """Every model that is loaded to embed a corpus from now on."""
    loaded: list[Embedder] = []
    load = Embedder.__init__
    monkeypatch.setattr(Embedder, "__init__", lambda self, *given: (loaded.append(self), load(self, *given))[1])
    return loaded


def stamps(root: Path, below: str = "") -> dict[str, tuple[int, int]]:
    """Size and time of every file but those of the lock, by name; of a kept file the name tells the content."""
    found = {path.relative_to(root).as_posix(): path.stat() for path in (root / below).rglob("*") if path.is_file()}
    return {
        name: (stat.st_size, 0 if name.startswith("_state/kept/") else stat.st_mtime_ns)
        for name, stat in found.items()
        if not name.startswith(("_state/locks/", "_state/drafts/"))
    }


def embedded(root: Path) -> dict[str, tuple[int, int]]:
    """What embedding leaves: records and data files."""
    return stamps(root, "_state/embed") | stamps(root, "lancedb/documents.lance/data") | stamps(root, "_state/moves")


def assert_refused(values: dict[str, Any], told: str) -> None:
    """StaleError by name, with both values and what to do; beside a scan of the corpus nothing is written."""
    root = Path(values["root"])
    before = stamps(root)
    with pytest.raises(StaleError) as error:
        run(JobSpec.of(values))
    message = str(error.value)
    assert re.match(rf"{re.escape(str(root))} was begun with another {told}", message), message
    assert message.endswith("; set it back, or choose another root")
    after = stamps(root)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(("_state/corpus/", "_state/kept/")) for name in after.keys() - before.keys())


def assert_nothing_left_to_do(values: dict[str, Any]) -> None:
    """Set back, the same job finds everything finished."""
    root = Path(values["root"])
    before = stamps(root, "lancedb") | stamps(root, "generations")
    assert run(JobSpec.of(values))["generation"] == 1
    assert stamps(root, "lancedb") | stamps(root, "generations") == before


def test_every_field_has_an_entry():
    assert sorted(fields(JobSpec)) == sorted(ENTRIES)


def test_a_static_model_is_run_by_torch_alone():
    assert typing.get_args(Model.model_fields["backend"].annotation) == ("auto", "torch", "openvino")


@pytest.mark.parametrize("name", CHANGED)
def test_an_entry_changes_its_field(name, prepared):
    values = begun_with(prepared, prepared / "root")
    then, now = (
        [one for one in leaves(JobSpec.of(made).model_dump(mode="json")) if one[0] == name]
        for made in (values, changed(values, ENTRIES[name].values, prepared))
    )
    assert now
    assert then != now


@pytest.mark.parametrize("name", [name for name in CHANGED if ENTRIES[name].verdict == REFUSED])
def test_what_changes_the_meaning_of_vectors_is_refused(name, finished, prepared, embedders):
    entry = ENTRIES[name]
    assert_refused(changed(finished, entry.values, prepared), entry.told)
    assert_nothing_left_to_do(finished)
    assert not embedders


@pytest.mark.parametrize("name", [name for name in CHANGED if ENTRIES[name].verdict == ACCEPTED])
def test_everything_else_embeds_nothing(name, finished, prepared, embedders):
    root = Path(finished["root"])
    before = embedded(root)
    values = changed(finished, ENTRIES[name].values, prepared)
    generation = run(JobSpec.of(values))
    assert not embedders
    assert embedded(root) == before
    assert generation["spec"] == JobSpec.of(values).model_dump(mode="json") or name.startswith("workers.")
    assert not verify.run(root).problems


@pytest.mark.parametrize("value", [{"model__precision": "auto"}, {"model__batch_tokens": "auto"}])
def test_auto_takes_what_there_is(value, finished, prepared, embedders):
    run(JobSpec.of(changed(finished, _dotted(value), prepared)))
    assert not embedders


@pytest.mark.parametrize("name", ["document", "query"])
def test_the_models_own_prompt_is_another_one(name, finished, prepared):
    told = rf"model\.prompts\.{name}: 'w00\d ' then, None now"
    assert_refused(changed(finished, {f"model.prompts.{name}": None}, prepared), told)


def test_more_than_one_changed_field_is_told(finished, prepared):
    values = changed(finished, {"corpus.keep_text": False, "embed.vectors": "float32"}, prepared)
    assert_refused(values, r"corpus\.keep_text: True then, False now \(also embed\.vectors\);")


def test_the_same_model_elsewhere_is_the_same(finished, prepared, tmp_path, embedders):
    shutil.copytree(prepared / "model", tmp_path / "moved")
    run(JobSpec.of(changed(finished, {"model.name": str(tmp_path / "moved")}, prepared)))
    assert not embedders


def test_parquet_is_written_later_from_what_is_stored(finished, prepared, embedders):
    root = Path(finished["root"])
    assert not list(root.glob("parquet/documents/*"))
    run(JobSpec.of(changed(finished, {"embed.parquet": True}, prepared)))
    assert not embedders
    parts = sorted(root.glob("parquet/documents/*.parquet"))
    assert len(parts) == 1  # the shards of four rows were joined
    assert pl.concat([pl.read_parquet(part) for part in parts])["row"].to_list() == list(range(ROWS))


# The corpus


def rewrite(path: Path, frame: pl.DataFrame) -> None:
    frame.write_parquet(path)


def _edited(corpus: Path) -> None:
    frame = pl.read_parquet(corpus / "b.parquet")
    frame[3, "text"] = "w250 w251 w252"
    rewrite(corpus / "b.parquet", frame)


def _with_a_row_more(corpus: Path) -> None:
    more = corpus_frame(ROWS + 1, seed=3)[ROWS:]
    rewrite(corpus / "b.parquet", pl.concat([pl.read_parquet(corpus / "b.parquet"), more]))


def _with_rows_in_another_order(corpus: Path) -> None:
    rewrite(corpus / "a.parquet", pl.read_parquet(corpus / "a.parquet").reverse())


def _with_two_files_swapped(corpus: Path) -> None:
    (corpus / "a.parquet").rename(corpus / "x")
    (corpus / "b.parquet").rename(corpus / "a.parquet")
    (corpus / "x").rename(corpus / "b.parquet")


def _with_a_file_more(corpus: Path) -> None:
    corpus_frame(ROWS + 2, seed=3)[ROWS:].write_parquet(corpus / "d.parquet")


def _cut_into_other_files(corpus: Path) -> None:
    whole = pl.concat([pl.read_parquet(path) for path in sorted(corpus.glob("*.parquet"))])
    for path in corpus.glob("*.parquet"):
        path.unlink()
    whole[:12].write_parquet(corpus / "a.parquet")
    whole[12:].write_parquet(corpus / "b.parquet")


SAME_ROWS = r"corpus\.digest: '\w+' then, '\w+' now: "
CORPUS = {
    "a row edited": (_edited, SAME_ROWS + r"1 changed: \S*b\.parquet \(8 -> 8 rows\);"),
    "a row added": (
        _with_a_row_more,
        r"corpus\.rows: 24 then, 25 now \(also corpus\.digest\): 1 changed: \S*b\.parquet \(8 -> 9 rows\);",
    ),
    "a row removed": (
        lambda corpus: rewrite(corpus / "c.parquet", pl.read_parquet(corpus / "c.parquet")[1:]),
        r"corpus\.rows: 24 then, 23 now \(also corpus\.digest\): 1 changed: \S*c\.parquet \(8 -> 7 rows\);",
    ),
    "rows in another order": (
        _with_rows_in_another_order,
        SAME_ROWS + r"1 changed: \S*a\.parquet \(8 -> 8 rows\);",
    ),
    "a file added": (
        _with_a_file_more,
        r"corpus\.rows: 24 then, 26 now \(also corpus\.digest\): 1 added: \S*d\.parquet;",
    ),
    "a file removed": (
        lambda corpus: (corpus / "b.parquet").unlink(),
        r"corpus\.rows: 24 then, 16 now \(also corpus\.digest\): 1 removed: \S*b\.parquet;",
    ),
    "two files swapped": (
        _with_two_files_swapped,
        SAME_ROWS + r"2 changed: \S*a\.parquet \(8 -> 8 rows\), \S*b\.parquet \(8 -> 8 rows\);",
    ),
    "a file renamed to another place": (
        lambda corpus: (corpus / "a.parquet").rename(corpus / "z.parquet"),
        SAME_ROWS + r"1 renamed: \S*a\.parquet -> \S*z\.parquet;",
    ),
    "the same rows in other files": (
        _cut_into_other_files,
        SAME_ROWS + r"2 changed: \S*a\.parquet \(8 -> 12 rows\), \S*b\.parquet \(8 -> 12 rows\); 1 removed: \S*c\.par",
    ),
}


@pytest.fixture
def own_corpus(prepared, tmp_path):
    """A finished root with a corpus of its own, given as a folder."""
    write_corpus(tmp_path / "corpus", corpus_frame(ROWS))
    values = begun_with(prepared, tmp_path / "root")
    values["corpus"]["source"] = [str(tmp_path / "corpus")]
    run(JobSpec.of(values))
    return values, tmp_path / "corpus"


@pytest.mark.parametrize("what", CORPUS)
def test_a_changed_corpus_is_refused_with_what_changed(what, own_corpus, embedders):
    values, corpus = own_corpus
    change, told = CORPUS[what]
    kept = shutil.copytree(corpus, corpus.parent / "kept")
    change(corpus)
    assert_refused(values, told)
    shutil.rmtree(corpus)
    shutil.copytree(kept, corpus)
    assert_nothing_left_to_do(values)
    assert not embedders


def test_files_listed_in_another_order_are_refused(finished):
    values = {**finished, "corpus": {**finished["corpus"], "source": finished["corpus"]["source"][::-1]}}
    assert_refused(values, SAME_ROWS + "the same files in another order;")


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus: (corpus / "b.parquet").rename(corpus / "bb.parquet"),
        lambda corpus: (corpus / "b.parquet").touch(),
        lambda corpus: (corpus / "b.txt~").write_text("no file of a corpus"),
    ],
    ids=["renamed, in the same place", "touched", "a file that is none of the corpus"],
)
def test_the_same_bytes_in_the_same_order_are_the_same_corpus(change, own_corpus, embedders):
    values, corpus = own_corpus
    change(corpus)
    assert_nothing_left_to_do(values)
    assert not embedders
