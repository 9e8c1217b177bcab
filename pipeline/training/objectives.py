"""Losses, weights of the dims, and what is told of each dim while training. Losses are sentence-transformers'."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training import heads, teacher
from pipeline.training.spec import Objective, TrainSpec, Weights

log = logging.getLogger(__name__)


class DimLosses:
    """The loss at each dim since it was last asked, without its weight; of the dims that are on."""

    def __init__(self, dims: Sequence[int]) -> None:
        self.turn_on(dims)
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def turn_on(self, dims: Sequence[int]) -> None:
        """From now on these dims come in turn."""
        self.dims = tuple(sorted(dims, reverse=True))
        self._turn = 0

    def add(self, value: Any) -> None:
        """The loss of the next dim; they come in turn, the largest first."""
        dim = self.dims[self._turn % len(self.dims)]
        self._turn += 1
        self._sums[dim] = self._sums.get(dim, 0.0) + float(value)
        self._counts[dim] = self._counts.get(dim, 0) + 1

    def taken(self) -> dict[str, float]:
        """Mean by `loss_DIM` since the last call, which begins anew; nothing where no step was taken."""
        means = {f"loss_{dim}": round(value / self._counts[dim], 6) for dim, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


@dataclass(frozen=True)
class Built:
    """The loss as the trainer takes it, and where it leaves the loss of each dim (None without Matryoshka loss)."""

    loss: Any
    told: DimLosses | None
    begin: Callable[[float], None]
    """To be called before each step with the epoch, such as 1.5, on which alone it depends: a resumed run is right."""


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


def stages(spec: TrainSpec) -> list[tuple[float, tuple[int, ...]]]:
    """From which epoch on which dims are trained, by epoch; dims fall."""
    schedule, rising = spec.objective.schedule, sorted(spec.dims)
    if schedule == "all":
        return [(0.0, tuple(spec.dims))]
    if schedule == "progressive":
        ends = [math.ceil(len(rising) * third / 3) for third in (1, 2, 3)]
        return [(spec.epochs * third / 3, tuple(rising[:end][::-1])) for third, end in enumerate(ends)]
    on: list[int] = []
    found = []
    for epoch, dims in sorted(schedule.items()):
        on = sorted([*on, *dims], reverse=True)
        found.append((epoch, tuple(on)))
    return found


def build(model: Any, spec: TrainSpec, work: Path) -> Built:
    """The loss of a spec; `work` is where a teacher's vectors lie."""
    from sentence_transformers.sentence_transformer import losses

    inner = LOSSES[spec.objective.kind](model, spec.objective, work)
    if not spec.dims:
        return Built(inner, None, lambda epoch: None)
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
    outer = losses.MatryoshkaLoss(model, inner, list(spec.dims), weights(spec.objective, spec.dims))
    planned = stages(spec)
    _hold_what_is_off(model, told)

    gate = heads.gate_of(model)

    def begin(epoch: float) -> None:
        if gate is not None:
            gate.settle()
        dims = [dims for start, dims in planned if start <= epoch][-1]
        if dims == told.dims:
            return
        told.turn_on(dims)
        for part in (outer, *([inner.calculate_loss] if spec.objective.cached else [])):
            part.matryoshka_dims, part.matryoshka_weights = dims, weights(spec.objective, dims)
        log.info("train epoch=%.2f dims=%s", epoch, ",".join(map(str, dims)))

    return Built(outer, told, begin)


def _hold_what_is_off(model: Any, told: DimLosses) -> None:
    """No gradient, be it a rounding error that Adam makes a step of, reaches dims that are not on yet."""
    import torch

    def hold(module: Any, given: tuple[dict[str, Any], ...]) -> None:
        vectors, width = given[0]["sentence_embedding"], told.dims[0]
        if module.training and width < vectors.shape[1]:
            given[0]["sentence_embedding"] = torch.cat([vectors[:, :width], vectors[:, width:].detach()], dim=1)

    if type(model[-1]).__name__ == "Normalize":
        model[-1].register_forward_pre_hook(hold)
