"""The job spec: YAML in, frozen models out, checked once at the door.

A field's default stands here and nowhere else. `schemas/job.schema.json` is generated from these models.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from pipeline.nested import check_blocks, check_cascade
from pipeline.section import Auto, Loaded, Names, Section, Word
from pipeline.values import size
from pipeline.vectors import Precision, bytes_per_row, vector_columns

Stop = Literal["fixed", "margin", "predictor"]
Engine = Literal["auto", "lance", "resident"]
IndexKind = Literal["auto", "none", "ivf_flat", "ivf_sq", "ivf_rq", "hnsw_sq"]
RESERVED_COLUMNS = ("row", "id", "text", "text_digest", "vector", "score", "rank", "query", "fused")


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
    backend: Literal["auto", "torch", "openvino"] = Field("auto", description="auto probes this machine")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="auto probes this machine; int8 needs openvino"
    )
    min_cosine: float = Field(0.9999, ge=0, le=1, description="what `auto` may lose against float32, as a mean")
    max_tokens: int | None = Field(None, ge=1, description="null: the model's own limit")
    batch_tokens: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="tokens per batch, padding included")
    prompts: Prompts = Prompts()
    matryoshka_dims: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="what the model was trained for; null: its config"
    )

    @model_validator(mode="after")
    def _engines_have_their_precisions(self) -> Self:
        if self.backend == "torch" and self.precision == "int8":
            raise ValueError("precision int8 is for backend: openvino, or auto")
        if self.backend == "openvino" and self.precision == "float16":
            raise ValueError("precision float16 is for backend: torch, on a GPU")
        return self


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
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="ends of nested blocks, the last one dim: a reader of a shorter prefix reads only its blocks"
    )
    index: PrefixIndex = PrefixIndex()

    @property
    def table(self) -> str:
        """Name of the table."""
        return f"prefix_{self.dim}_{self.precision}" + ("_nested" if self.blocks else "")

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one stored vector."""
        return bytes_per_row(self.dim, self.precision)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims at which it can be read."""
        return self.blocks or (self.dim,)

    @property
    def scanned_bytes(self) -> int:
        """Bytes per row that a scan reads at the least: those of the first block."""
        return bytes_per_row(self.dims[0], self.precision)

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

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if not self.blocks:
            return self
        given = ", ".join(map(str, self.blocks))
        if list(self.blocks) != sorted(set(self.blocks)) or self.blocks[-1] != self.dim:
            raise ValueError(f"blocks are ends that rise up to dim {self.dim}, like [64, 128, 256], not [{given}]")
        if self.precision == "binary":
            raise ValueError("binary has no blocks: each binary prefix is turned on its own; list one table per dim")
        if self.index.kind not in ("auto", "none"):
            raise ValueError(f"blocks are scanned, without an index; leave {self.index.kind} to a table without blocks")
        return self


class Index(Section):
    """Which indexes are built beside those of `row` and `id`."""

    min_rows: int = Field(100_000, ge=1, description="ANN: below it `auto` builds none")
    text: bool = Field(False, description="a full-text index over the texts, for hybrid search")
    segments: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="of an ANN index; auto: as few as fit")


class Level(Section):
    """One pass of the cascade."""

    table: str
    shortlist: int = Field(ge=1)
    scoring: Literal["auto", "asymmetric", "hamming"] = Field(
        "auto",
        description="binary only; auto: asymmetric (float query against bits) where this project scans, "
        "hamming where an index answers",
    )
    dim: int | None = Field(None, ge=1, description="of a table with blocks: the end of one; null: all of it")

    @property
    def how(self) -> str | int:
        """The dim of a table with blocks, else how codes are scored."""
        return self.dim or self.scoring


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
    hybrid: bool = Field(
        False,
        description="a text is also looked up in the full-text index and both answers are fused; needs index.text",
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


class Range(Section):
    """Workers that come and go."""

    min: int = Field(1, ge=1, description="as many are asked for, also where a node has yet to come")
    max: int = Field(ge=1, description="up to so many are asked for while shards wait")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; swap them")
        return self


Bytes = Annotated[int, Field(ge=1), BeforeValidator(size, json_schema_input_type=int | str)]
Count = Annotated[
    Annotated[Auto | Annotated[int, Field(ge=0)], Tag("one-count")] | Annotated[Range, Tag("a-range")],
    Discriminator(lambda value: "a-range" if isinstance(value, Mapping | Range) else "one-count"),
]
"""Tags with a hyphen are left out where a sentence names the field."""


class Workers(Section):
    """Who does the work."""

    count: Count = Field(
        "auto",
        description="auto: one per GPU, else one per four cores; 0: in this process, without Ray; "
        "{min, max}: as nodes come and go",
    )
    gpus: Auto | Annotated[float, Field(ge=0)] = Field("auto", description="GPUs per worker")
    cpus: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="cores, and threads, per worker; auto: workers x cores are those of the nodes"
    )
    memory: Bytes | None = Field(None, description='reserved per worker, in bytes or like "4GB"; null: not counted')
    address: Word | None = Field(None, description="a Ray cluster; null: started here")


class JobSpec(Loaded):
    """A whole job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, . _ -")
    root: str = Field(
        min_length=1, description="a folder or s3://bucket/name (gs://, az://); all that the job writes lies below it"
    )
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
        for prefix in self.prefixes:
            for name in vector_columns(prefix.blocks):
                if name in self.corpus.filter:
                    raise ValueError(f"corpus.filter: {prefix.table} has a column {name} of its own; rename the filter")
        if self.index.text and not self.corpus.keep_text:
            raise ValueError("index.text: the index is built over stored texts; set corpus.keep_text: true")
        if self.search.hybrid and not self.index.text:
            raise ValueError("search.hybrid needs the full-text index; set index.text: true")
        levels = self.search.cascade or ()
        check_cascade([(level.table, level.shortlist) for level in levels], tables)
        check_blocks([(level.table, level.dim) for level in levels], {one.table: one.blocks for one in self.prefixes})
        return self

    @property
    def smallest(self) -> Prefix:
        """The table whose scan reads the fewest bytes per row: the default cascade."""
        return min(self.prefixes, key=lambda prefix: (prefix.scanned_bytes, prefix.table))
