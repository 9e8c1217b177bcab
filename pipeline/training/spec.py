"""The spec of a training: YAML in, frozen models out. `schemas/train.schema.json` is generated from them."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.section import Auto, Loaded, Names, Section, Word
from pipeline.sources import STDLIB
from pipeline.spec import Workers as JobWorkers

Dim = Annotated[int, Field(ge=1)]
Weights = Literal["uniform", "geometric", "short"]


class Base(Section):
    """The model that training begins with."""

    model: Word = Field(description="a local folder, the packaged offline model, or a hub id")
    revision: Word | None = Field(None, description="required for a hub id: a commit, so that it cannot move")
    kind: Literal["auto", "transformer", "static"] = Field(
        "auto", description="auto: what the model is; static: one vector per token, taken from a transformer"
    )
    init: Literal["tokens", "distill"] = Field(
        "tokens",
        description="of static: tokens: the transformer's table as it is; distill: what the transformer makes of each "
        "token alone, centred, along its principal axes, frequent tokens weighed less",
    )
    max_tokens: int | None = Field(None, ge=1, description="of a transformer's texts; null: the model's own limit")

    @model_validator(mode="after")
    def _init_is_of_static(self) -> Self:
        if self.init != "tokens" and self.kind != "static":
            raise ValueError("init: distill makes a static model; set kind: static too")
        return self


class Data(Section):
    """Pairs or triplets by column, docstrings, or a corpus with queries and their judgements."""

    source: Names = Field((), description="files of pairs, as in corpus.source of a job; or docstrings:stdlib")
    anchor: Word | None = Field(None, description="column of the query's side")
    positive: Word | None = Field(None, description="column of the text that it should find")
    negative: Word | None = Field(None, description="column of a text that it should not find")
    corpus: Names = Field((), description="files with _id, text and maybe title")
    queries: Word | None = Field(None, description="_id, text")
    qrels: Word | None = Field(None, description="query_id, corpus_id, score; a score above 0 makes a pair")

    @model_validator(mode="after")
    def _is_one_form(self) -> Self:
        pairs = bool(self.anchor and self.positive)
        judged = (bool(self.corpus), bool(self.queries), bool(self.qrels))
        if self.source and any(judged):
            raise ValueError("give source (pairs), or corpus, queries and qrels, not both")
        if self.source == (STDLIB,):
            if self.anchor or self.positive or self.negative:
                raise ValueError(f"{STDLIB} makes its own pairs; leave anchor, positive and negative out")
        elif self.source and not pairs:
            raise ValueError("source needs anchor and positive, the names of its columns")
        elif not self.source and not all(judged):
            raise ValueError(f"give source with anchor and positive, or {STDLIB}, or all of corpus, queries and qrels")
        elif not self.source and (self.anchor or self.positive or self.negative):
            raise ValueError("anchor, positive and negative are columns of source; judgements make pairs of their own")
        return self


class HeldOutFiles(Section):
    """Queries and judgements that training never sees."""

    queries: Word = Field(description="_id, text")
    qrels: Word = Field(description="query_id, corpus_id, score")
    corpus: Names = Field((), description="files with _id, text and maybe title; left out: data.corpus")


HeldOut = Annotated[
    Annotated[Annotated[float, Field(gt=0, lt=1)], Tag("a-share")] | Annotated[HeldOutFiles, Tag("some-files")],
    Discriminator(lambda value: "some-files" if isinstance(value, Mapping | HeldOutFiles) else "a-share"),
]
"""Tags with a hyphen are left out where a sentence names the field."""


class Teacher(Section):
    """A model whose full vectors every prefix of the student is to agree with."""

    model: Word = Field(description="as base.model")
    revision: Word | None = Field(None, description="required for a hub id")
    reads: Literal["each", "anchor", "positive"] = Field(
        "each", description="each: every text; else that column alone, for all texts of its row (as in translations)"
    )


Stages = Annotated[dict[Annotated[float, Field(ge=0)], Annotated[tuple[Dim, ...], Field(min_length=1)]], Tag("stages-")]
Schedule = Annotated[
    Annotated[Literal["all", "progressive"], Tag("a-word")] | Stages,
    Discriminator(lambda value: "stages-" if isinstance(value, Mapping) else "a-word"),
]


class Objective(Section):
    """What training makes better."""

    kind: Literal["infonce", "distill"] = Field(
        "infonce",
        description="infonce: every other text of the batch is a negative; distill: cosines become the teacher's",
    )
    temperature: float = Field(0.05, gt=0, description="cosines are divided by it")
    teacher: Teacher | None = Field(None, description="of distill")
    cached: bool = Field(False, description="gradients in small parts, so that a large batch fits into memory")
    cached_rows: int = Field(32, ge=1, description="rows in memory at once where cached")
    weights: Weights = Field(
        "uniform",
        description="of the dims: all alike; alpha^i for the i-th from the largest; (largest / dim)^alpha",
    )
    alpha: float = Field(0.5, gt=0, le=10, description="for weights geometric and short")
    schedule: Schedule = Field(
        "all",
        description="all dims from the start; progressive: the smallest third of them, then the next in each third of "
        "the training; or dims by the epoch at which they are added, as {0: [64, 32], 1.5: [384, 128]}",
    )

    gate: bool = Field(
        False, description="learn which dimensions matter and put these first, so that prefixes are chosen, not given"
    )

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> Self:
        if (self.kind == "distill") != (self.teacher is not None):
            raise ValueError("kind distill needs a teacher, and no other kind has one")
        if self.cached and self.kind != "infonce":
            raise ValueError(f"cached: {self.kind} has no such form; leave it out")
        return self


class Stop(Section):
    """When to end before the last epoch."""

    dim: Dim = Field(description="whose held-out nDCG decides")
    patience: int = Field(3, ge=1, description="checkpoints in a row that may bring nothing better")


class Measure(Section):
    """How held-out quality is measured."""

    k: int = Field(10, ge=1)
    dims: tuple[Dim, ...] = Field((), description="prefixes that are measured beside those that are trained")
    documents: int | None = Field(
        None, ge=1, description="documents searched, those that are relevant always among them; null: all"
    )


class Workers(JobWorkers):
    """Who trains: this process, or several workers that share each batch."""

    count: Annotated[int, Field(ge=1)] = Field(1, description="above 1, or with an address: Ray Train")
    memory: None = Field(None, description="not counted")

    @property
    def spread(self) -> bool:
        """Whether workers of Ray train."""
        return self.count > 1 or self.address is not None


def _counted(value: object) -> object:
    return {"count": value} if isinstance(value, int) else value


def _falling(value: object) -> object:
    numbers = isinstance(value, list | tuple) and all(isinstance(one, int) for one in value)
    return sorted(value, reverse=True) if numbers else value  # type: ignore[call-overload]


class TrainSpec(Loaded):
    """A whole training."""

    noun: ClassVar[str] = "training spec"

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, . _ -")
    output: Word = Field(description="folder of the finished model; while it is made, what is done lies in OUTPUT.work")
    seed: int = Field(0, ge=0, lt=2**32)
    base: Base
    data: Data
    held_out: HeldOut = Field(0.1, description="a share of what is in data, or files")
    dims: Annotated[tuple[Dim, ...], BeforeValidator(_falling)] = Field(
        description="prefixes that are trained, the model's own dimension among them; []: no Matryoshka loss"
    )
    project: Dim | None = Field(
        None, description="width of the model, where it is not to be the base's: its strongest axes, or a wider space"
    )
    objective: Objective = Objective()
    epochs: float = Field(1, gt=0)
    batch_size: int = Field(256, ge=2)
    learning_rate: Auto | Annotated[float, Field(gt=0)] = Field("auto", description="auto: by the kind of base")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="float16 needs a GPU")
    stop: Stop | None = Field(None, description="null: all epochs")
    checkpoint_steps: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="auto: a tenth of all steps")
    measure: Measure = Measure()
    workers: Annotated[Workers, BeforeValidator(_counted, json_schema_input_type=int | Workers)] = Field(
        Workers(), description="a number, or more about them; the result is the same as with one"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if "://" in self.output:
            raise ValueError(f"output: {self.output} is no folder of this machine; train into one and copy it")
        if len(set(self.dims)) < len(self.dims):
            raise ValueError("dims: a dimension stands twice; list it once")
        if self.stop is not None and self.dims and self.stop.dim not in self.dims:
            raise ValueError(f"stop.dim: {self.stop.dim} is not among dims {list(self.dims)}")
        if self.batch_size % self.workers.count:
            raise ValueError(f"batch_size: {self.batch_size} is no multiple of {self.workers.count} workers")
        if isinstance(self.held_out, HeldOutFiles) and not (self.held_out.corpus or self.data.corpus):
            raise ValueError("held_out.corpus: name its files, data has no corpus of its own")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective.schedule != "all" and not self.dims:
            raise ValueError("objective.schedule: it adds dims; give some")
        if self.objective.schedule != "all" and self.stop is not None:
            raise ValueError("stop: it could end before objective.schedule has added all dims; leave one of them out")
        if self.objective.teacher is not None and self.objective.teacher.reads != "each" and self.data.negative:
            raise ValueError(
                "objective.teacher.reads: a negative is no other way to say the same; leave it out of data"
            )
        if self.objective.gate and not self.dims:
            raise ValueError("objective.gate: it orders dimensions for prefixes; give dims")
        if isinstance(self.objective.schedule, Mapping):
            added = [dim for dims in self.objective.schedule.values() for dim in dims]
            if sorted(added, reverse=True) != list(self.dims):
                raise ValueError(f"objective.schedule: it adds {added}, each of dims {list(self.dims)} must come once")
            if min(self.objective.schedule) > 0 or max(self.objective.schedule) >= self.epochs:
                raise ValueError(f"objective.schedule: it begins at epoch 0 and ends before epoch {self.epochs:g}")
        return self
