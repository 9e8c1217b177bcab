"""An ANN index in segments: each is built on some fragments of a table by a worker, all are published as one index.

A segment has partitions of its own and a search looks at some in every one, so that few large segments answer faster
than many small ones. What was built is measured before it is kept.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import store
from pipeline.tables import vector_matrix
from pipeline.workers import Pool

log = logging.getLogger(__name__)

NAME = "vector_idx"
"""Lance's own name for the index of this column."""
MIN_RECALL = 0.95
QUERIES, K, SHORTLIST = 32, 10, 100
"""Rows of the table that are looked for; how many of each one's nearest have to be on a list of what length."""


@dataclass(frozen=True)
class Segment:
    """Part of an index: the table, the ids of its fragments, and what Lance is asked for."""

    number: int
    uri: str
    version: int
    fragments: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As logs have it."""
        return f"segment {self.number}"


class _Builder:
    """Builds segments; nobody sees one before it is published."""

    def __init__(self, threads: int) -> None:
        """The number of threads is set in the environment."""

    def __call__(self, segment: Segment) -> Any:
        """What Lance knows of the segment, small."""
        start, table = time.perf_counter(), store.open_table(segment.uri, segment.version)
        built = table.create_index_uncommitted(name=NAME, fragment_ids=list(segment.fragments), **segment.options)
        log.info("index %s seconds=%.1f", segment.name, time.perf_counter() - start)
        return built


def groups(rows: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Consecutive positions in at most `count` groups of about as many rows each."""
    total, before, found = sum(rows), 0, dict[int, list[int]]()
    for position, size in enumerate(rows):
        found.setdefault((2 * before + size) * count // (2 * total or 1), []).append(position)
        before += size
    return [tuple(group) for group in found.values()]


def split(table: Any, count: int) -> list[tuple[int, ...]]:
    """Ids of the table's fragments in at most `count` groups."""
    fragments = table.get_fragments()
    parts = groups([fragment.count_rows() for fragment in fragments], count)
    return [tuple(fragments[at].fragment_id for at in part) for part in parts]


def build(uri: str, parts: Sequence[tuple[int, ...]], options: Mapping[str, Any], pool: Pool) -> None:
    """Build an index of the column `vector` in one segment per group of fragments, and publish it."""
    table = store.open_table(uri)
    for index in table.describe_indices():
        if list(index.field_names) == ["vector"]:
            table.drop_index(index.name)
    todo = [Segment(number, uri, table.version, part, options) for number, part in enumerate(parts)]
    with pool.team(_Builder) as team:
        built = list(team.map(todo))
    table.commit_existing_index_segments(NAME, "vector", built)


def mark(table: Any) -> str:
    """A name of the index of `vector` as it stands: another one once any of its segments is built anew."""
    indexes = [index for index in table.describe_indices() if list(index.field_names) == ["vector"]]
    names = sorted(str(part.uuid) for index in indexes for part in index.segments)
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]


def recall(table: Any, probes: int) -> float:
    """Share of the nearest rows of some of the table's rows that its index puts on a shortlist; 1 is best."""
    at = np.unique(np.linspace(0, table.count_rows() - 1, QUERIES).astype(np.int64))
    found = [_found(table, query, probes) for query in vector_matrix(table.take(at, columns=["vector"])["vector"])]
    return float(np.mean(found))


def _found(table: Any, query: Any, probes: int) -> float:
    near = store.nearest(table, query, K, None, None).to_table()
    listed = store.nearest(table, query, SHORTLIST, probes, None).to_table()
    if str(query.dtype) == "uint8":  # many rows are equally near
        within = listed["_distance"].to_numpy() <= near["_distance"].to_numpy().max()
        return float(min(1.0, within.sum() / near.num_rows))
    return float(np.isin(near["row"].to_numpy(), listed["row"].to_numpy()).mean())
