"""Metrics as pure functions of rankings: recall against exact search, graded metrics, bootstrap intervals."""

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from numpy.typing import NDArray

RESAMPLES = 1_000
METRICS = ("recall_exact", "recall", "ndcg", "mrr")


def recall_exact(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per query, the share of exact search's hits [q, k] among those found; -1 stands for no hit."""
    wanted = truth >= 0
    hit = (truth[:, :, None] == found[:, None, :]).any(axis=2) & wanted
    sizes = wanted.sum(axis=1)
    # where there is nothing to find, nothing is missed
    return np.where(sizes > 0, hit.sum(axis=1) / np.maximum(sizes, 1), 1.0)


def judged(
    queries: Sequence[str], found: Sequence[Sequence[str]], qrels: Mapping[str, Mapping[str, int]], k: int
) -> dict[str, NDArray[np.float64]]:
    """Recall, nDCG and MRR at k of each judged query, by trec_eval's definitions; `found` are ids, best first."""
    run = {
        query: {name: float(-rank) for rank, name in enumerate(names)}
        for query, names in zip(queries, found, strict=True)
        if query in qrels
    }
    measures = {R @ k: "recall", nDCG @ k: "ndcg", RR @ k: "mrr"}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(run, 0.0) for name in measures.values()}
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[metric.measure]][metric.query_id] = metric.value
    return {name: np.array([one[query] for query in run]) for name, one in values.items()}


def interval(per_query: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean over queries (percentile method, Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [per_query[rng.integers(0, len(per_query), len(per_query))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def without_own(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], own: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first k hits of each query that are not the row it was taken from."""
    last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    rows, offsets = np.take_along_axis(rows, last, 1), np.take_along_axis(offsets, last, 1)
    mine = rows == own[:, None]
    return np.where(mine, -1, rows), np.where(mine, -1, offsets)
