"""Losses, weights of the dims, and what is told of each dim while training. Losses are sentence-transformers'."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.training import teacher
from pipeline.training.spec import Objective, TrainSpec, Weights


class DimLosses:
    """The loss at each dim since it was last asked, without its weight."""

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = tuple(sorted(dims, reverse=True))
        self._sums = dict.fromkeys(self.dims, 0.0)
        self._calls = 0

    def add(self, value: Any) -> None:
        """The loss of the next dim; they come in turn, the largest first."""
        self._sums[self.dims[self._calls % len(self.dims)]] += float(value)
        self._calls += 1

    def taken(self) -> dict[str, float]:
        """Mean by `loss_DIM` since the last call, which begins anew; nothing where no step was taken."""
        steps = self._calls // len(self.dims)
        means = {f"loss_{dim}": round(value / steps, 6) for dim, value in self._sums.items()} if steps else {}
        self.__init__(self.dims)  # type: ignore[misc]
        return means


def infonce(model: Any, settings: Objective, work: Path) -> Any:
    """Each anchor's positive against every other text of the batch."""
    from sentence_transformers.sentence_transformer import losses

    scale = 1 / settings.temperature
    if settings.cached:
        return losses.CachedMultipleNegativesRankingLoss(model, scale, mini_batch_size=settings.cached_rows)
    return losses.MultipleNegativesRankingLoss(model, scale)


def distill(model: Any, settings: Objective, work: Path) -> Any:
    """Each text's cosines with all others of the batch as the teacher has them, whatever the width of either.

    Cross entropy of the two softmaxes less the teacher's own entropy, so that 0 is agreement; texts that share a
    target (columns of one row) stand outside it, and their cosine is brought to 1.
    """
    import torch

    targets = torch.from_numpy(teacher.vectors(work))

    class SimilarityDistillLoss(torch.nn.Module):  # type: ignore[misc]
        def forward(self, features: Iterable[dict[str, Any]], labels: Any) -> Any:
            vectors = torch.cat([model(one)["sentence_embedding"] for one in features])
            vectors = torch.nn.functional.normalize(vectors, dim=1)
            places = labels.T.reshape(-1)
            wanted = targets[places.cpu()].to(vectors)
            same = places[:, None] == places[None, :]
            cosines = vectors @ vectors.T
            given, wanted = (
                torch.log_softmax((one / settings.temperature).masked_fill(same, -1e4), dim=1)
                for one in (cosines, wanted @ wanted.T)
            )
            apart = (wanted.exp() * (wanted - given)).sum(dim=1).mean()
            return apart + (1 - cosines)[same].mean()

    return SimilarityDistillLoss()


LOSSES: dict[str, Callable[[Any, Objective, Path], Any]] = {"infonce": infonce, "distill": distill}
"""Of a model, the objective, and the work folder."""


def uniform(place: int, share: float, alpha: float) -> float:
    """All dims alike."""
    return 1.0


def geometric(place: int, share: float, alpha: float) -> float:
    """Alpha times that of the next larger dim."""
    return alpha**place


def short(place: int, share: float, alpha: float) -> float:
    """The shorter, the more: 1 / share of the full dimension, to the power of alpha."""
    return float(share**-alpha)


WEIGHTS: dict[Weights, Callable[[int, float, float], float]] = {
    "uniform": uniform,
    "geometric": geometric,
    "short": short,
}
"""Of a dim's place (0: the largest), its share of the largest, and alpha."""


def weights(settings: Objective, dims: Sequence[int]) -> list[float]:
    """A weight per dim, in the order given; their mean is 1."""
    falling = sorted(dims, reverse=True)
    raw = [WEIGHTS[settings.weights](falling.index(dim), dim / falling[0], settings.alpha) for dim in dims]
    return [len(raw) * weight / sum(raw) for weight in raw]


def build(model: Any, spec: TrainSpec, work: Path) -> tuple[Any, DimLosses | None]:
    """The loss as the trainer takes it, and where it leaves the loss of each dim (None without Matryoshka loss)."""
    from sentence_transformers.sentence_transformer import losses

    inner = LOSSES[spec.objective.kind](model, spec.objective, work)
    if not spec.dims:
        return inner, None
    told = DimLosses(spec.dims)
    if spec.objective.cached:
        plain = inner.calculate_loss

        def counted(*given: Any, **named: Any) -> Any:
            value = plain(*given, **named)
            told.add(value.detach())
            return value

        inner.calculate_loss = counted
    else:
        inner.register_forward_hook(lambda module, given, value: told.add(value.detach()))
    return losses.MatryoshkaLoss(model, inner, list(spec.dims), weights(spec.objective, spec.dims)), told
