"""Is it Matryoshka? What a cut keeps of the full vectors' neighbours, plain and otherwise, and the verdict.

In a model that was not trained for prefixes the order of the dimensions means nothing: its first d numbers keep no more
than any d of them. Trained prefixes keep far more. A random rotation and PCA show what else could be had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.transform import Transform, random_rotation, shuffled
from pipeline.vectors import Matrix, top, truncate, unit

NEIGHBOURS = 10
ANCHORS = 1_000
"""Rows (and queries) whose neighbours are looked up."""
MIN_ROWS = 256
"""Below so many rows the verdict is `unsure` (assumed)."""
SHUFFLES = 3
TRAINED, NOT_TRAINED = 0.25, 0.15
"""Share of PCA's advantage over shuffled dimensions that the plain cut must have for either verdict.

Measured at 16 to 128 of 384 dimensions: 0.29 and more for static models after 100 steps with MatryoshkaLoss, -0.08
to 0.05 for the same without it and for all-MiniLM-L6-v2.
"""
SURE = 3.0
"""Standard errors by which plain and shuffled must differ to count as different."""
LITTLE = 0.02
"""A difference in neighbours kept that nobody would notice: vectors without strong directions leave no more."""
NEAR_DIM = 2**0.5
"""A dim within this factor of one that was trained counts as trained."""

Says = Literal["trained", "not trained", "unsure"]


@dataclass(frozen=True)
class Kept:
    """What a way of cutting keeps, per anchor: share of the 10 nearest, and the mean error of their cosines."""

    way: str
    dim: int
    of: str
    neighbours: NDArray[np.float64]
    errors: NDArray[np.float64]

    def figures(self) -> dict[str, float | int | str]:
        """The means over anchors, as they stand in the manifest."""
        return {
            "way": self.way,
            "dim": self.dim,
            "of": self.of,
            "neighbours": round(float(self.neighbours.mean()), 4),
            "error": round(float(self.errors.mean()), 4),
        }


@dataclass(frozen=True)
class Verdict:
    """Whether plain prefixes hold; `far` are wanted dims far from every dim the model was trained for."""

    says: Says
    because: str
    declared: tuple[int, ...]
    far: tuple[int, ...]
    rows: int
    queries: int

    @property
    def holds(self) -> bool:
        """Whether `auto` cuts as it is: measured so, or declared where too little was seen to tell."""
        return self.says == "trained" or (self.says == "unsure" and bool(self.declared))

    def figures(self) -> dict[str, object]:
        """JSON values for the manifest."""
        return {
            "says": self.says,
            "because": self.because,
            "declared": list(self.declared),
            "far": list(self.far),
            "rows": self.rows,
            "queries": self.queries,
        }


def ladder(full_dim: int, declared: Sequence[int]) -> list[int]:
    """Dims that decide: those declared, else powers of two from full / 32, up to half the full dimension.

    Nearer to the full dimension every cut keeps almost everything.
    """
    most = max(1, full_dim // 2)
    known = sorted(dim for dim in set(declared) if dim <= most)
    return known or [2**power for power in range(3, 13) if full_dim / 32 <= 2**power <= most] or [most]


def compare(
    pool: Matrix, anchors: int, queries: Matrix | None, pca: Transform, dims: Sequence[int], seed: int
) -> list[Kept]:
    """What `measure` finds for the plain cut, shuffled dimensions (mean of a few), a random rotation and a PCA."""
    full_dim = pool.shape[1]
    ways = {"plain": Transform(), "random": random_rotation(full_dim, seed), "pca": pca}
    kept = measure(pool, anchors, queries, ways, dims)
    orders = {str(number): shuffled(full_dim, seed + number) for number in range(SHUFFLES)}
    parts = measure(pool, anchors, None, orders, dims)
    for dim in dims:
        same = [one for one in parts if one.dim == dim]
        shares, errors = (np.mean([getattr(one, name) for one in same], axis=0) for name in ("neighbours", "errors"))
        kept.append(Kept("shuffled", dim, "rows", shares, errors))
    return kept


def measure(
    pool: Matrix, anchors: int, queries: Matrix | None, transforms: Mapping[str, Transform], dims: Sequence[int]
) -> list[Kept]:
    """What each transform's cut to each dim keeps of the neighbours among `pool`.

    `pool` are unit vectors [n, D]; its first `anchors` rows are looked up, never counted against themselves, and so
    are `queries` [q, D] where given.
    """
    asked: dict[str, Matrix] = {"rows": pool[:anchors]}
    if queries is not None and len(queries):
        asked["queries"] = unit(queries[:ANCHORS])
    kept = []
    for of, vectors in asked.items():
        full = _similarities(vectors, pool, of)
        nearest = top(full, NEIGHBOURS)
        truth = np.take_along_axis(full, nearest, 1)
        for way, transform in transforms.items():
            all_rows, all_vectors = transform.apply(pool), transform.apply(vectors)
            for dim in dims:
                cut = _similarities(truncate(all_vectors, dim), truncate(all_rows, dim), of)
                found = top(cut, NEIGHBOURS)
                shares = (found[:, :, None] == nearest[:, None, :]).any(axis=1).mean(axis=1)
                errors = np.abs(np.take_along_axis(cut, nearest, 1) - truth).mean(axis=1)
                kept.append(Kept(way, dim, of, shares, errors.astype(np.float64)))
    return kept


def _similarities(vectors: Matrix, pool: Matrix, of: str) -> Matrix:
    found = np.asarray(vectors @ pool.T, np.float32)
    if of == "rows":
        np.fill_diagonal(found, -2.0)
    return found


def judge(
    kept: Sequence[Kept],
    ladder: Sequence[int],
    declared: Sequence[int],
    wanted: Sequence[int],
    rows: int,
    full_dim: int,
) -> Verdict:
    """The verdict on plain prefixes, from what `plain`, `shuffled` and `pca` keep of the rows' neighbours.

    `rows` are those of the whole sample.
    """
    queries = max((len(one.neighbours) for one in kept if one.of == "queries"), default=0)
    says, because, held = _compared(kept, ladder, rows, full_dim)
    known = list(declared) or held
    far = [dim for dim in wanted if known and dim < full_dim and not _is_near(dim, known)]
    if declared:
        agrees = "as" if says == "trained" else "yet"
        because += f", {agrees} the model declares {', '.join(map(str, declared))}"
    return Verdict(says, because, tuple(declared), tuple(far), rows, queries)


def _compared(kept: Sequence[Kept], ladder: Sequence[int], rows: int, full_dim: int) -> tuple[Says, str, list[int]]:
    """The verdict, its reason, and the dims whose plain cut holds."""
    if rows < MIN_ROWS:
        return "unsure", f"{rows} rows are too few to tell (at least {MIN_ROWS})", []
    found = {(one.way, one.dim): one.neighbours for one in kept if one.of == "rows"}
    held, lost = [], []
    for dim in ladder:
        gain = found["plain", dim] - found["shuffled", dim]
        means = {way: float(found[way, dim].mean()) for way in ("plain", "shuffled", "pca")}
        room = max(means["pca"], means["plain"]) - means["shuffled"]
        error = SURE * float(gain.std()) / np.sqrt(len(gain))
        if gain.mean() > max(error, LITTLE) and gain.mean() >= TRAINED * room:
            held.append(dim)
        elif gain.mean() + error < max(0.5 * room, 2 * LITTLE) and gain.mean() <= max(NOT_TRAINED * room, LITTLE):
            lost.append(dim)
    middle = ladder[len(ladder) // 2]
    means = {way: float(found[way, middle].mean()) for way in ("plain", "shuffled", "random", "pca")}
    figures = (
        f"at {middle} of {full_dim} dimensions the plain cut keeps {means['plain']:.1%} of the {NEIGHBOURS} nearest, "
        f"{middle} dimensions in any other order {means['shuffled']:.1%}, a random rotation {means['random']:.1%}, "
        f"PCA {means['pca']:.1%}"
    )
    if 2 * len(held) > len(ladder):
        return "trained", figures, held
    return ("not trained" if 2 * len(lost) > len(ladder) else "unsure"), figures, held


def _is_near(dim: int, trained: Sequence[int]) -> bool:
    return any(max(dim / one, one / dim) <= NEAR_DIM for one in trained)


def lost(kept: Sequence[Kept], wanted: Sequence[int]) -> dict[str, float]:
    """Per wanted dim, how much less of the rows' neighbours the plain cut keeps than PCA: shares of 1."""
    found = {(one.way, one.dim): float(one.neighbours.mean()) for one in kept if one.of == "rows"}
    return {str(dim): round(found["pca", dim] - found["plain", dim], 4) for dim in wanted if ("pca", dim) in found}
