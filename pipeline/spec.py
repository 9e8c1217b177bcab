"""The job spec: YAML in, frozen models out, checked once at the door.

A field's default stands here and nowhere else. `schemas/job.schema.json` is generated from these models.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import SpecError
from pipeline.limits import MAX_DEPTH
from pipeline.sentences import explain, masked, nearest, secret
from pipeline.vectors import Precision, bytes_per_row

Auto = Literal["auto"]
Stop = Literal["fixed", "margin", "predictor"]
Engine = Literal["auto", "lance", "resident"]
IndexKind = Literal["auto", "none", "ivf_flat", "ivf_sq", "ivf_rq", "hnsw_sq"]
MAX_SPEC_BYTES = 2**20
"""Bytes of a spec."""
MAX_NODES = 10_000
"""Values in a spec, keys and lists counted too."""
MAX_DIGITS = 100
"""Characters of a number."""
RESERVED_COLUMNS = ("row", "id", "text", "text_digest", "vector", "score", "rank", "query")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Word = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Word, ...],
    BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]),
]


class Section(BaseModel):
    """A part of a spec: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Corpus(Section):
    """Where the rows come from and which columns are used."""

    source: Names = Field(min_length=1, description="file, folder, glob or URI, or a list; docstrings:stdlib")
    id: Word | None = Field(None, description="id column; null: a hash of the text")
    text: Names = Field(min_length=1, description="text column, or several joined by a newline")
    keep: Names = Field((), description="columns carried to `documents` only")
    filter: Names = Field((), description="columns carried to every table, usable in `where`")
    keep_text: bool = Field(True, description="false: `documents` has no text column")
    shard_rows: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="rows per unit of work")
    max_quarantined: float = Field(0.01, ge=0, le=1, description="share of rows; 10 rows are always allowed")

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        carried = [*self.keep, *self.filter]
        for name in carried:
            if name in RESERVED_COLUMNS or name.startswith("_"):
                raise ValueError(
                    f"column {name!r} cannot be carried: {', '.join(RESERVED_COLUMNS)} and names that begin "
                    "with '_' are reserved; rename it in the corpus"
                )
            if not re.fullmatch(r"[^\x00-\x1f`\".]+", name):
                raise ValueError(f"column {name!r} cannot be carried: quotes, dots and control characters")
        if len(set(carried)) < len(carried):
            raise ValueError("a column stands twice in keep and filter; list it once")
        return self


Prompt = Annotated[str, Field(max_length=4_000)]  # prompts stand in each table's metadata, which stays short


class Prompts(Section):
    """Put before each text; null takes the model's own prompt where it has one."""

    document: Prompt | None = None
    query: Prompt | None = None


class Model(Section):
    """The embedding model and how it is run."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(min_length=1, description="a local folder, the packaged offline model, or a hub id")
    revision: Word | None = Field(None, description="required for a hub id: a commit, so that it cannot move")
    backend: Literal["auto", "torch"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto probes this machine")
    min_cosine: float = Field(0.9999, ge=0, le=1, description="what `auto` may lose against float32")
    max_tokens: int | None = Field(None, ge=1, description="null: the model's own limit")
    batch_tokens: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="tokens per batch, padding included")
    prompts: Prompts = Prompts()
    matryoshka_dims: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="what the model was trained for; null: its config"
    )


class Embed(Section):
    """How full vectors are stored."""

    vectors: Literal["float16", "float32"] = "float16"
    parquet: bool = Field(False, description="also write parquet/documents/*.parquet")


class Transform(Section):
    """What is applied before truncating."""

    kind: Literal["auto", "none", "pca", "adaptor", "order"] = Field(
        "auto", description="auto: none where plain prefixes hold by measurement, else the better of adaptor and pca"
    )
    sample_rows: int = Field(100_000, ge=1, description="rows that fitting looks at, chosen by seed")
    accept_loss: bool = Field(False, description="kind none only: run although the model was not trained for it")


class PrefixIndex(Section):
    """The ANN index of one prefix table."""

    kind: IndexKind = Field("auto", description="auto: IVF_RQ for float16, IVF_FLAT for binary, from index.min_rows")
    bits: Literal[1, 2, 4, 8] | None = Field(None, description="ivf_rq only; null: 4")

    @model_validator(mode="after")
    def _bits_belong_to_rq(self) -> Self:
        if self.bits is not None and self.kind != "ivf_rq":
            raise ValueError(f"bits is for kind: ivf_rq, not {self.kind}")
        return self


class Prefix(Section):
    """One derived table: how many dimensions, stored how."""

    dim: int = Field(ge=1)
    precision: Precision
    rotation: Literal["auto", "whitened_itq", "itq", "random", "none"] = Field(
        "auto", description="binary only, before the signs are taken; auto: whitened_itq"
    )
    index: PrefixIndex = PrefixIndex()

    @property
    def table(self) -> str:
        """Name of the table."""
        return f"prefix_{self.dim}_{self.precision}"

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one stored vector."""
        return bytes_per_row(self.dim, self.precision)

    @model_validator(mode="after")
    def _storage_can_hold_it(self) -> Self:
        if self.precision == "binary" and self.dim % 8:
            raise ValueError(f"binary packs 8 dimensions into a byte; dim must be a multiple of 8, not {self.dim}")
        if self.precision != "binary" and self.rotation != "auto":
            raise ValueError(f"rotation is for precision: binary, not {self.precision}")
        if self.precision == "int8" and self.index.kind not in ("auto", "none"):
            raise ValueError("LanceDB cannot index int8; use kind: none, or precision: float16")
        if self.precision == "binary" and self.index.kind not in ("auto", "none", "ivf_flat"):
            raise ValueError(f"LanceDB indexes binary with ivf_flat only, not {self.index.kind}")
        if self.index.kind == "ivf_rq" and self.dim % 8:
            raise ValueError(f"ivf_rq needs a multiple of 8 dimensions, not {self.dim}")
        return self


class Index(Section):
    """When ANN indexes are built."""

    min_rows: int = Field(100_000, ge=1, description="below it `auto` builds none")


class Level(Section):
    """One pass of the cascade."""

    table: str
    shortlist: int = Field(ge=1)
    scoring: Literal["auto", "asymmetric", "hamming"] = Field(
        "auto",
        description="binary only; auto: asymmetric (float query against bits) where this project scans, "
        "hamming where an index answers",
    )


class Search(Section):
    """How queries are answered."""

    engine: Engine = Field(
        "auto", description="lance: tables are read where they lie; resident: codes in memory; auto: chosen by size"
    )
    memory: int = Field(2_000_000_000, ge=0, description="bytes that codes held in memory may take")
    stop: Stop = Field(
        "fixed",
        description="how many candidates meet the full vectors: the shortlist; up to five times it, until the margin "
        "over those left is wide; or as many as a small network predicts from the query and its coarse scores",
    )
    confidence: float = Field(
        0.95,
        ge=0.5,
        le=0.99,
        description="share of queries that get what the whole list would give, where stop is not fixed",
    )
    cache: bool = Field(False, description="also write codes and full vectors as files that searches map into memory")
    cascade: tuple[Level, ...] | None = Field(
        None, description="coarse to fine; null: the smallest table, shortlist max(200, 20 k); [] is exact"
    )
    examples: Names = Field((), description="queries whose top hits are shown when a run ends")


class Evaluate(Section):
    """How recall and nDCG are measured."""

    queries: Word | None = Field(None, description="_id, text; null: 500 seeded corpus rows")
    qrels: Word | None = Field(None, description="query_id, corpus_id, score")
    k: int = Field(10, ge=1)
    shortlists: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (50, 200, 1_000), description="lengths that the sweep tries with every table, beside max(200, 20 k)"
    )
    floor: dict[Literal["recall_exact", "recall", "ndcg", "mrr"], Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="the least the cascade must reach; a miss is exit 6"
    )

    @model_validator(mode="after")
    def _judgements_fit(self) -> Self:
        if self.qrels and not self.queries:
            raise ValueError("qrels need queries; name their file too")
        needs = sorted(set(self.floor) - {"recall_exact"})
        if needs and not self.qrels:
            raise ValueError(f"a floor on {', '.join(needs)} needs qrels")
        return self


class Workers(Section):
    """Who does the work."""

    count: Auto | Annotated[int, Field(ge=0)] = Field(
        "auto", description="auto: one per GPU, else one per four cores; 0: in this process, without Ray"
    )
    gpus: Auto | Annotated[float, Field(ge=0)] = Field("auto", description="GPUs per worker")
    address: Word | None = Field(None, description="a Ray cluster; null: started here")


class JobSpec(Section):
    """A whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, . _ -")
    root: str = Field(min_length=1, description="a folder; all that the job writes lies below it")
    seed: int = Field(0, ge=0)
    corpus: Corpus
    model: Model
    embed: Embed = Embed()
    transform: Transform = Transform()
    prefixes: tuple[Prefix, ...] = Field(min_length=1)
    index: Index = Index()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        tables = [prefix.table for prefix in self.prefixes]
        for table in tables:
            if tables.count(table) > 1:
                raise ValueError(f"prefixes: {table} stands twice; (dim, precision) must be unique")
        check_cascade([(level.table, level.shortlist) for level in self.search.cascade or ()], tables)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `path.to.field=value` overrides, check everything.

        Raises SpecError, which names the file, the field, what was given and what is allowed.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SPEC_BYTES + 1)
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
            raise SpecError(f"cannot read the job spec {path}: {reason}") from None
        if len(data) > MAX_SPEC_BYTES:
            raise SpecError(f"cannot read the job spec {path}: it is larger than {MAX_SPEC_BYTES:,} bytes")
        values = _parse(text, str(path))
        if not isinstance(values, dict):
            raise SpecError(f"{path}: a job spec is a mapping that begins with `name:`, not {type(values).__name__}")
        for override in overrides:
            _override(values, override)
        return cls.of(values, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], origin: str = "spec") -> Self:
        """Check plain values; SpecError begins with `origin`."""
        if (url := secret(values)) is not None:
            raise SpecError(f"{origin}: {url}: keep credentials out of the spec; set them in the environment")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(f"{origin}: {explain(cls, error)}") from None


def check_cascade(levels: Sequence[tuple[str, int]], tables: Sequence[str]) -> None:
    """Raise ValueError where a level names no table or a shortlist rises."""
    for number, (table, shortlist) in enumerate(levels):
        if table not in tables:
            raise ValueError(f"cascade: no table {table!r}{nearest(table, tables)}; tables: {', '.join(tables)}")
        if shortlist < 1:
            raise ValueError(f"cascade: shortlist must be at least 1, not {shortlist} at {table}")
        if number and shortlist > levels[number - 1][1]:
            raise ValueError(
                f"cascade: shortlist rises from {levels[number - 1][1]} to {shortlist} at {table}; "
                "each level must keep at most what the one before found"
            )


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases; what is too deep, too much, repeated or no finite number is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise _problem("an alias (*name) is not allowed; write the value out", mark)
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MAX_DEPTH:
            raise _problem(f"nested deeper than {MAX_DEPTH} levels", mark)
        if self._nodes > MAX_NODES:
            raise _problem(f"more than {MAX_NODES:,} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _problem(f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number of a sensible length, since YAML's 1:1:1:… grows without bound."""
        is_whole = node.tag.endswith(":int")
        if len(node.value) > MAX_DIGITS:
            raise _problem(f"a number of {len(node.value):,} characters", node.start_mark)
        try:
            number = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        except ValueError:
            raise _problem(f"{node.value!r} is no number", node.start_mark) from None
        if not math.isfinite(number):
            raise _problem(f"{node.value} is not a finite number", node.start_mark)
        return number


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _problem(what: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(f"{origin}: not valid YAML{where}: {problem}") from None


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    shown = f"--set {masked(override)[:200]!r}"
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise SpecError(f"{shown}: write path.to.field=value, for example --set workers.count=2")
    target: Any = values
    for key in keys[:-1]:
        if isinstance(target, list) and _place(key) < len(target):
            target = target[_place(key)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
            if target is None:
                raise SpecError(f"{shown}: {key} is null in the spec")
        else:
            raise SpecError(f"{shown}: there is nothing below {key!r}")
    value = _parse(text, shown)
    if isinstance(target, list) and _place(keys[-1]) < len(target):
        target[_place(keys[-1])] = value
    elif isinstance(target, list) and keys[-1] == str(len(target)):
        target.append(value)
    elif isinstance(target, dict):
        target[keys[-1]] = value
    else:
        raise SpecError(f"{shown}: there is no field {keys[-1]!r} in {'.'.join(keys[:-1])}")


def _place(key: str) -> int:
    """A key as a place in a list; beyond every list where it is none."""
    return int(key) if re.fullmatch("[0-9]{1,9}", key) else sys.maxsize
