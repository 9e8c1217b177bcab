"""Held-out quality of a model at each prefix: nDCG@k with bootstrap intervals, and the probe's verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline import metrics, probe
from pipeline.encoders.sentence import prompts
from pipeline.training.data import Judged
from pipeline.transform import Moments, pca
from pipeline.vectors import Matrix, top, truncate, unit

POOL, ANCHORS = 8_192, 1_024
"""Documents that the probe looks among, and those whose neighbours it looks up."""
WATCHED_SHARE = 0.25
"""Share of the held-out queries that is watched while training, and not measured on afterwards …"""
WATCHED = {"static": (500, 5_000), "transformer": (200, 1_000)}
"""… at most so many queries, over so many documents (assumed: seconds each time on two cores)."""
QUERIES_AT_ONCE = 256
ROWS_AT_ONCE = {"static": 1_024, "transformer": 32}
"""Texts that the model takes at once."""
PerDim = Mapping[int, Mapping[str, NDArray[np.float64]]]
"""Metrics of each query, by dim."""


def split(held_out: Judged, kind: str, seed: int) -> tuple[Judged, Judged]:
    """(watched, measured): two parts of the held-out queries; what steers training is never what is reported."""
    ids = held_out.queries["_id"].to_list()
    count = min(int(len(ids) * WATCHED_SHARE), WATCHED[kind][0])
    order = np.random.default_rng(seed).permutation(len(ids))
    names = sorted(ids)
    watched = held_out.asked([names[place] for place in order[:count]] or ids)
    measured = held_out.asked([names[place] for place in order[count:]])
    return watched.among(WATCHED[kind][1], seed), measured


@dataclass(frozen=True)
class Watch:
    """Gives held-out nDCG of a model at each dim, by `ndcg_DIM`."""

    judged: Judged
    kind: str
    dims: Sequence[int]
    k: int

    def __call__(self, model: Any) -> dict[str, float]:
        """Measure the model as it is now."""
        found = per_query(*encode(model, self.judged, self.kind), self.judged, self.dims, self.k)
        return {f"ndcg_{dim}": float(values["ndcg"].mean()) for dim, values in found.items()}


def encode(model: Any, judged: Judged, kind: str) -> tuple[Matrix, Matrix]:
    """Unit vectors of queries and documents, float32, each with the model's own prompt."""
    rows = ROWS_AT_ONCE[kind]
    options = {"batch_size": rows, "convert_to_numpy": True, "show_progress_bar": False}
    said = prompts(model)
    found = (
        model.encode_query(judged.queries["text"].to_list(), prompt=said["query"], **options),
        model.encode_document(judged.documents["text"].to_list(), prompt=said["document"], **options),
    )
    vectors, documents = (unit(np.nan_to_num(np.asarray(one, np.float32))) for one in found)
    return vectors, documents


def per_query(vectors: Matrix, documents: Matrix, judged: Judged, dims: Sequence[int], k: int) -> PerDim:
    """Metrics of each query at each dim, by exact search of the prefixes."""
    names, ids = judged.queries["_id"].to_list(), judged.documents["_id"].to_numpy()
    found: dict[int, Mapping[str, NDArray[np.float64]]] = {}
    for dim in dims:
        asked, searched = truncate(vectors, dim), truncate(documents, dim)
        rankings: list[list[str]] = []
        for start in range(0, len(asked), QUERIES_AT_ONCE):
            scores = np.asarray(asked[start : start + QUERIES_AT_ONCE] @ searched.T, np.float32)
            rankings += ids[top(scores, min(k, len(ids)))].tolist()
        found[dim] = metrics.judged(names, rankings, judged.qrels, k)
    return found


def turned(vectors: Matrix, documents: Matrix) -> tuple[Matrix, Matrix]:
    """Both turned by PCA of the documents: what prefixes of this model are worth without training."""
    moments = Moments(documents.shape[1])
    for start in range(0, len(documents), POOL):
        moments.add(documents[start : start + POOL])
    transform = pca(moments)[0]
    return transform.apply(vectors), transform.apply(documents)


def table(when: str, found: PerDim, k: int, seed: int) -> pl.DataFrame:
    """A row per dim: means with 95 % intervals, and the share of the full dimension's nDCG that is kept."""
    full = found[max(found)]["ndcg"]
    rows = []
    for dim, values in found.items():
        row: dict[str, Any] = {"when": when, "dim": dim, "k": k, "queries": len(full)}
        for name in ("ndcg", "recall", "mrr"):
            low, high = metrics.interval(values[name], seed)
            row |= {name: float(values[name].mean()), f"{name}_low": low, f"{name}_high": high}
        low, high = _kept(values["ndcg"], full, seed)
        row |= {"kept": _ratio(values["ndcg"], full), "kept_low": low, "kept_high": high}
        rows.append(row)
    return pl.DataFrame(rows)


def _ratio(part: NDArray[np.float64], full: NDArray[np.float64]) -> float:
    return float(part.mean() / full.mean()) if full.mean() else 0.0


def _kept(part: NDArray[np.float64], full: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of the ratio of means, the same queries drawn for both."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(full), len(full)) for _ in range(metrics.RESAMPLES))
    low, high = np.percentile([_ratio(part[draw], full[draw]) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def verdict(vectors: Matrix, documents: Matrix, dims: Sequence[int], seed: int) -> probe.Verdict:
    """Whether plain prefixes of these documents hold, as the fit stage of a job asks it."""
    if dims and min(dims) > documents.shape[1] // 2:
        because = f"no trained prefix is at most half of {documents.shape[1]} dimensions; longer ones keep most anyway"
        return probe.Verdict("unsure", because, tuple(dims), (), len(documents), len(vectors))
    order = np.random.default_rng(seed).permutation(len(documents))[:POOL]
    pool = documents[order]
    anchors = min(ANCHORS, max(len(pool) // 2, 1))
    full_dim = pool.shape[1]
    rungs = probe.ladder(full_dim, dims)
    rest = Moments(full_dim)
    rest.add(pool[anchors:])
    kept = probe.compare(pool, anchors, vectors, pca(rest)[0], rungs, seed)
    return probe.judge(kept, rungs, dims, dims, len(documents), full_dim)
