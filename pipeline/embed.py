"""The embed stage: every usable row through the model once, at full dimension, into `documents`.

Comes in: a scan and its shards. Workers write their shard's fragment and leave a record, and join those of neighbours
to few large ones; the driver seals all of them in one record and publishes them in order with one commit. Vectors
never pass through the driver.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import ledger, merge, rows, store
from pipeline.embedder import (
    COUNTERS,
    LOOKAHEAD,
    METERS,
    Embedder,
    Facts,
    Resolve,
    Trial,
    Work,
    documents_columns,
    documents_info,
    parquet_bytes,
)
from pipeline.encoders import choose
from pipeline.encoders.models import ModelFolder
from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.ledger import Ledger, Record, Slot
from pipeline.merge import Merger
from pipeline.sources import Shard
from pipeline.spec import JobSpec
from pipeline.storage import Root, to_json
from pipeline.tables import DOCUMENTS, FORMAT, TableInfo, combined_digest
from pipeline.workers import Died, OnProgress, Pool, Team

log = logging.getLogger(__name__)

STATE_FORMAT = 4
"""Version of what lies in `_state`; a root begun with another one is refused."""
MAX_TRIALS = 256
"""Workers that one shard may cost while the rows that end them are looked for; each row costs about 14."""


@dataclass(frozen=True)
class Full:
    """The finished `documents` table; `parts` are (rows, digest) of each shard, `files` sha256 of each data file."""

    version: int
    digest: str
    rows: int
    facts: Facts
    info: TableInfo
    parts: Sequence[tuple[int, str]]
    files: Mapping[str, str]
    fragments: Sequence[Mapping[str, Any]]
    quarantine: str
    counters: Mapping[str, Any]


def run(
    spec: JobSpec,
    folder: ModelFolder,
    shards: Sequence[Shard],
    corpus_fields: Mapping[str, Any],
    types: Mapping[str, pa.DataType],
    root: Root,
    pool: Pool,
    on_progress: OnProgress | None = None,
    afresh: bool = False,
    check_corpus: Callable[[], None] = lambda: None,
) -> Full:
    """Embed what is missing and publish `documents`; `afresh` publishes it again, without its indexes.

    `check_corpus` is called when all is embedded, before it is merged: the texts must be those that were scanned.
    `corpus_fields` are the corpus' part of the fingerprint. Raises StaleError where the root was begun
    otherwise, SpecError where a prefix is longer than the model's vectors, DataError where the budget is spent.
    """
    fixed = {**corpus_fields, **_fixed_fields(spec, folder)}
    standing, book = ledger.restore(root), Ledger(root, "embed")
    if standing is not None:
        wanted = {**fixed, **_insisted(spec, standing)}
        ledger.refuse_changes(root, standing, {field: wanted[field] for field in wanted if field != "scan"})
        check_dims(spec, standing["facts"]["full_dim"])
    groups = merge.groups(shards)
    seal = book.slot(_seal(merge.newest(root, groups)), _wholeness(root))
    if seal.record is None:
        merged = merge.standing(root, groups, _tally)
        open_ = [shard for group in groups if group.name not in merged for shard in group.shards]
        names = [shard.name for shard in open_]
        slots = book.slots(names, _wholeness(root), _tally)
        todo = [(shard, slot.name) for shard, slot in zip(open_, slots, strict=True) if slot.record is None]
        with ExitStack() as stack:
            team: Team | None = None
            if todo:
                setup = partial(Embedder, spec, folder, root, types)
                team = stack.enter_context(pool.team(setup, on_progress, gpus=True, lookahead=LOOKAHEAD))
                total = sum(shard.rows for shard in shards)
                standing = standing or _begin(spec, team.call(Resolve(shards[0], total)), fixed, root)
                made = _embed(todo, Facts(**standing["facts"]), team)
                slots = [slot if slot.name not in made else Slot(slot.name, made[slot.name]) for slot in slots]
            assert standing is not None
            done = dict(zip(names, slots, strict=True))
            _check_budget(spec, shards, [*merged.values(), *(slot.done for slot in slots)])
            check_corpus()
            _, schema = _looks(spec, types, standing)

            def workers() -> AbstractContextManager[Team]:
                return pool.team(partial(Merger, root)) if team is None else nullcontext(team)

            merged = merge.run(groups, merged, done, schema, root, workers, _tally)
        seal = book.slot(_seal(merge.newest(root, groups)), _wholeness(root))
        if seal.record is None:
            pieces = [merged[group.name] if group.name in merged else done[group.name].done for group in groups]
            seal = Slot(seal.name, book.add(seal.name, _sealed(pieces, root)))
    assert standing is not None
    sealed = seal.done
    info, schema = _looks(spec, types, standing)
    return Full(
        version=store.commit(root, DOCUMENTS, schema, sealed["fragments"], afresh),
        digest=sealed["digest"],
        rows=sealed["rows"],
        facts=Facts(**standing["facts"]),
        info=info,
        parts=sealed["parts"],
        files=sealed["files"],
        fragments=sealed["fragments"],
        quarantine=sealed["quarantine"],
        counters=sealed,
    )


def finished(root: Root) -> set[str]:
    """Names of the shards that have a record."""
    return {name for name in Ledger(root, "embed").names() if not name.startswith("sealed-")}


@dataclass(frozen=True)
class Standing:
    """How far the stage is: shards that are done, of how many; rows of theirs in `documents`, and those set aside."""

    done: int
    shards: int
    rows: int
    quarantined: Mapping[str, int]
    is_sealed: bool


def standing(root: Root, begun: Record) -> Standing:
    """How far the stage is, from records alone: from the seal where there is one, else from those of the shards."""
    total, size = begun["corpus.rows"], begun["corpus.shard_rows"]
    shards = [Shard(at, start, min(size, total - start), ()) for at, start in enumerate(range(0, total, size))]
    book = Ledger(root, "embed")
    seal = book.get(_seal(merge.newest(root, merge.groups(shards))))
    if seal is not None:
        return Standing(len(shards), len(shards), seal["rows"], seal["quarantined"], True)
    done = book.slots(sorted(finished(root)), keep=lambda record: (record["rows"], record["quarantined"]))
    found = [slot.done for slot in done if slot.record is not None]
    return Standing(len(found), len(shards), sum(count for count, _ in found), _counted(one for _, one in found), False)


def _looks(spec: JobSpec, types: Mapping[str, pa.DataType], standing: Record) -> tuple[TableInfo, pa.Schema]:
    """Metadata and schema of `documents`."""
    facts = Facts(**standing["facts"])
    info = documents_info(facts, spec)
    return info, info.to_schema(documents_columns(spec, types, facts))


def _seal(slots: Sequence[str]) -> str:
    """Name of the record that joins these."""
    return "sealed-" + hashlib.sha256("\n".join(slots).encode()).hexdigest()[:16]


def _wholeness(root: Root) -> Callable[[Record], bool]:
    """Tells of records, of shards or the whole stage, whether their files are there."""
    is_there = store.wholeness(root, DOCUMENTS)
    return lambda record: ("quarantine" not in record or root.has(record["quarantine"])) and is_there(record)


def _begin(spec: JobSpec, facts: Facts, fixed: Mapping[str, Any], root: Root) -> Record:
    """Check what the first worker resolved and write down what the root is begun with."""
    check_dims(spec, facts.full_dim)
    log.info(
        "embed model=%s dim=%d backend=%s precision=%s attention=%s compiled=%s tokenizer=%s batch_tokens=%d "
        "probed: %s",
        facts.name, facts.full_dim, facts.backend, facts.precision, facts.attention, facts.compiled,
        facts.tokenizer, facts.batch_tokens, choose.told(facts.probe),
    )  # fmt: skip
    begun = {**fixed, **_resolved_fields(facts), "asked": _asked(spec), "facts": asdict(facts)}
    return ledger.begin(root, begun)


def _embed(todo: Sequence[tuple[Shard, str]], facts: Facts, team: Team) -> dict[str, "Tally"]:
    """Every shard once, by slot; one that ends its workers is searched for the rows that do, and done without them."""
    works = [Work(shard, facts, slot) for shard, slot in todo]
    places = {shard.number: slot for shard, slot in todo}
    made, died = {}, []
    for result in team.outcomes(works):
        if isinstance(result, Died):
            died.append(result)
        else:
            made[places[result["shard"]]] = _tally(result)
            _log(result)
    for one in died:
        poison = _Hunt(team, one).rows()
        log.warning("embed shard=%s rows=%s end a worker and are set aside", one.item.shard.name, sorted(poison))
        (result,) = team.outcomes([Work(one.item.shard, facts, one.item.name, poison)])
        if isinstance(result, Died):
            raise PipelineError(f"{result.sentence}, also without the rows that end a worker by themselves; run again")
        made[one.item.name] = _tally(result)
        _log(result)
    return made


class _Hunt:
    """Looks for the rows that end a worker, by halving."""

    def __init__(self, team: Team, died: Died) -> None:
        self._team, self._died, self._left = team, died, MAX_TRIALS

    def rows(self) -> dict[int, str]:
        """Positions among the shard's usable texts, with the reason; PipelineError where no row is to blame."""
        count = self._try(0, 0)
        if isinstance(count, Died):
            raise PipelineError(f"{count.sentence}, before any row of it was read; run again")
        found = self._search(0, int(count))
        if not found:
            raise PipelineError(
                f"{self._died.sentence}, and no single row does it: too little memory? Lower model.batch_tokens in "
                "another root, or give a worker more memory, and run again"
            )
        return found

    def _search(self, start: int, stop: int) -> dict[int, str]:
        outcome = self._try(start, stop)
        if not isinstance(outcome, Died):
            return {}
        if stop - start == 1:
            return {start: f"ends the worker: {outcome.reason}"}
        middle = (start + stop) // 2
        return self._search(start, middle) | self._search(middle, stop)

    def _try(self, start: int, stop: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise PipelineError(f"{self._died.sentence}, and too many rows do it to look for all; run again")
        work = self._died.item
        (outcome,) = self._team.outcomes([Trial(work.shard, work.facts, start, stop)], tries=1)
        return outcome


def _fixed_fields(spec: JobSpec, folder: ModelFolder) -> dict[str, Any]:
    """Fingerprint fields known before a model is loaded."""
    return {
        "format": FORMAT,
        "state_format": STATE_FORMAT,
        "model.digest": folder.digest,
        "embed.vectors": spec.embed.vectors,
    }


def _asked(spec: JobSpec) -> dict[str, Any]:
    """Fields where null stands for the model's own value."""
    model = spec.model
    return {
        "model.max_tokens": model.max_tokens,
        "model.prompts.document": model.prompts.document,
        "model.prompts.query": model.prompts.query,
    }


def _insisted(spec: JobSpec, standing: Record) -> dict[str, Any]:
    """What this spec says of fields that were resolved when the root was begun; `auto` takes what there is."""
    model, asked = spec.model, _asked(spec)
    automatic = {
        "model.backend": model.backend,
        "model.precision": model.precision,
        "model.batch_tokens": model.batch_tokens,
    }
    insisted = {field: value for field, value in automatic.items() if value != "auto"}
    same = [field for field, value in asked.items() if value is None and standing["asked"][field] is None]
    return insisted | {field: value for field, value in asked.items() if field not in same}


def _resolved_fields(facts: Facts) -> dict[str, Any]:
    return {
        "model.backend": facts.backend,
        "model.precision": facts.precision,
        "model.attention": facts.attention,
        "model.compiled": facts.compiled,
        "model.max_tokens": facts.max_tokens,
        "model.batch_tokens": facts.batch_tokens,
        "model.prompts.document": facts.prompts["document"],
        "model.prompts.query": facts.prompts["query"],
    }


def check_dims(spec: JobSpec, full_dim: int) -> None:
    """SpecError where a prefix is longer than the model's own dimension."""
    for number, prefix in enumerate(spec.prefixes):
        if prefix.dim > full_dim:
            raise SpecError(
                f"prefixes[{number}].dim: {prefix.dim} is more than the {full_dim} dimensions of {spec.model.name}; "
                f"use {full_dim} or less"
            )


@dataclass(frozen=True, slots=True)
class Tally:
    """What the seal takes of the record of a shard or a merge: those of all shards are in memory at once.

    `fragments` are JSON, a quarter of its values' size; `aside` are rows for the quarantine; `numbers` are of SUMMED.
    """

    fragments: bytes
    files: Mapping[str, str]
    parts: Sequence[tuple[int, str]]
    aside: pa.Table | None
    quarantined: Mapping[str, int]
    numbers: Sequence[float]
    peak_memory_bytes: int


SUMMED = ("rows", "repaired", *METERS, *COUNTERS, *merge.COUNTERS)


def _tally(record: Record) -> Tally:
    shards = record.get("shards", [record])
    aside = [row for shard in shards for row in shard["set_aside"]]
    return Tally(
        fragments=to_json(record["fragments"]),
        files=record["files"],
        parts=[(shard["rows"], shard["digest"]) for shard in shards],
        aside=pa.Table.from_pylist(aside, rows.QUARANTINE_SCHEMA) if aside else None,
        quarantined=_counted(shard["quarantined"] for shard in shards),
        numbers=[
            record.get(name, 0) if name in merge.COUNTERS else sum(shard[name] for shard in shards) for name in SUMMED
        ],
        peak_memory_bytes=max(shard["peak_memory_bytes"] for shard in shards),
    )


def _counted(reasons: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each reason's rows."""
    found = Counter[str]()
    for one in reasons:
        found.update(one)
    return dict(found)


def _check_budget(spec: JobSpec, shards: Sequence[Shard], tallies: Sequence[Tally]) -> None:
    """DataError where the budget is spent, or nothing is left."""
    reasons = _counted(tally.quarantined for tally in tallies)
    rows.check_budget(spec.corpus, sum(shard.rows for shard in shards), reasons)
    if not any(count for tally in tallies for count, _ in tally.parts):
        raise DataError(f"no row could be embedded: {reasons}")


def _sealed(tallies: Sequence[Tally], root: Root) -> Record:
    """The record that ends the stage, from those of its shards and merges, in order."""
    aside = [rows.QUARANTINE_SCHEMA.empty_table(), *(tally.aside for tally in tallies if tally.aside is not None)]
    parts = [part for tally in tallies for part in tally.parts]
    sums = [round(sum(numbers), 3) for numbers in zip(*(tally.numbers for tally in tallies), strict=True)]
    return {
        "quarantine": root.keep(parquet_bytes(pa.concat_tables(aside).combine_chunks())),
        "fragments": [fragment for tally in tallies for fragment in json.loads(tally.fragments)],
        "files": {path: digest for tally in tallies for path, digest in tally.files.items()},
        "parts": parts,
        "digest": combined_digest([digest for _, digest in parts]),
        "quarantined": _counted(tally.quarantined for tally in tallies),
        "peak_memory_bytes": max(tally.peak_memory_bytes for tally in tallies),
        **dict(zip(SUMMED, sums, strict=True)),
    }


def _log(record: Record) -> None:
    rate = record["rows"] / record["seconds"] if record["seconds"] else 0.0
    log.info(
        "embed shard=%07d rows=%d tokens=%d quarantined=%d seconds=%.1f rows_per_second=%.0f",
        record["shard"], record["rows"], record["tokens"], sum(record["quarantined"].values()), record["seconds"], rate,
    )  # fmt: skip
