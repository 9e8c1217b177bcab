"""What stands between a base and its prefixes: a projection to the wanted width, and a gate that learns which
dimensions matter. Both end as the columns of a static table or of one linear layer, in an order that plain cuts use.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import rotation
from pipeline.training.measure import ROWS_AT_ONCE
from pipeline.training.spec import TrainSpec
from pipeline.transform import Moments
from pipeline.vectors import Matrix

log = logging.getLogger(__name__)

SAMPLE = {"static": 10_000, "transformer": 2_000}
"""Texts whose vectors decide what a projection keeps (assumed: seconds each on two cores)."""
GATE_STEP = 0.03
"""Change of a gate's logarithm in a step at the full learning rate, whatever that rate is (assumed: a dimension can
be silenced to a twentieth in 100 steps)."""
DENSE, GATE = "projection", "gate"
"""Their names among the model's modules."""


def add(model: Any, spec: TrainSpec, texts: Sequence[str], kind: str, rate: float) -> None:
    """The projection and gate that the spec asks for, in place; the same for the same texts and seed."""
    if spec.project is not None:
        _project(model, spec.project, _sampled(model, spec, texts, kind), spec.seed)
    if spec.objective.gate:
        if not (_is_table(model) or spec.project):  # what the gate is baked into
            width = int(model.get_embedding_dimension())
            _put_before_end(model, DENSE, _linear(np.eye(width, dtype=np.float32)))
        _put_before_end(model, GATE, _gate_class()(int(model.get_embedding_dimension()), GATE_STEP / rate))


def projection(vectors: Matrix, width: int, seed: int) -> Matrix:
    """float32[D, width] with orthonormal rows or columns.

    Not wider: the axes of most energy, uncentred, so that cosines are kept as well as `width` axes can, and wholly
    where it is D. Wider: a random turn into the larger space, which keeps every cosine.
    """
    dim = vectors.shape[1]
    if width > dim:
        return rotation.random(width, seed)[:dim]
    moments = Moments(dim)
    moments.add(vectors)
    _, axes = np.linalg.eigh(moments.products)
    axes = axes[:, ::-1][:, :width]
    peaks = axes[np.abs(axes).argmax(axis=0), np.arange(width)]
    return np.asarray(axes * np.where(peaks < 0, -1.0, 1.0), np.float32)


def _sampled(model: Any, spec: TrainSpec, texts: Sequence[str], kind: str) -> Matrix:
    """Vectors of some of the texts."""
    distinct = sorted(set(texts))
    chosen = np.random.default_rng(spec.seed).permutation(len(distinct))[: SAMPLE[kind]]
    options = {"batch_size": ROWS_AT_ONCE[kind], "convert_to_numpy": True, "show_progress_bar": False}
    return np.nan_to_num(np.asarray(model.encode([distinct[place] for place in chosen], **options), np.float32))


def _project(model: Any, width: int, vectors: Matrix, seed: int) -> None:
    matrix = projection(vectors, width, seed)
    kept = float(np.square(vectors @ matrix).sum() / max(float(np.square(vectors).sum()), 1e-12))
    log.info("base projected dim=%d to=%d energy_kept=%.4f", vectors.shape[1], width, kept)
    if _is_table(model):
        _turn_table(model, matrix)
    else:
        _put_before_end(model, DENSE, _linear(matrix))


def _is_table(model: Any) -> bool:
    """Whether nothing but a normalisation follows a static table."""
    kinds = [type(module).__name__ for module in model]
    return kinds in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"])


def _turn_table(model: Any, matrix: Matrix) -> None:
    """The table times the matrix: a mean of its rows times the matrix is the same."""
    import torch

    table = model[0].embedding
    turned = table.weight.detach() @ torch.from_numpy(matrix).to(table.weight)
    table.weight = torch.nn.Parameter(turned.contiguous())
    table.embedding_dim = model[0].embedding_dim = matrix.shape[1]


def _linear(matrix: Matrix) -> Any:
    import torch
    from sentence_transformers.base.modules import Dense

    weight = torch.from_numpy(np.ascontiguousarray(matrix.T))
    return Dense(*matrix.shape, bias=False, activation_function=None, init_weight=weight)


def _put_before_end(model: Any, name: str, module: Any) -> None:
    """Last, or before the last where that brings vectors to length 1; the rest keep their names and order."""
    named = list(model.named_children())
    place = len(named) - (type(named[-1][1]).__name__ == "Normalize")
    while name in dict(named):  # a base that was projected before
        name += "_"
    named.insert(place, (name, module.to(model.device)))
    for old, _ in list(model.named_children()):
        del model._modules[old]
    for new, one in named:
        model.add_module(new, one)


def gate_of(model: Any) -> Any | None:
    """The model's gate; None where it has none."""
    return dict(model.named_children()).get(GATE)


@functools.cache
def _gate_class() -> type[Any]:
    """A module that scales dimensions by what it has learnt and hands them on, the most important first.

    Importance of a dimension: its scale times the root of its mean square, that is, its share in the dot products. The
    order changes between steps only (`settle`), so that all texts of a step are cut alike.
    """
    import torch
    from sentence_transformers.base.modules.module import Module

    class Gate(Module):  # type: ignore[misc]
        config_keys = ["width", "gain"]  # noqa: RUF012 as in sentence-transformers

        def __init__(self, width: int, gain: float) -> None:
            super().__init__()
            self.width, self.gain = width, gain
            self.grown = torch.nn.Parameter(torch.zeros(width))
            self.register_buffer("squares", torch.ones(width))
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("order", torch.arange(width))

        def scale(self) -> Any:
            step = self.grown - self.grown.detach()  # gradients as large as without the gain: they are clipped together
            return torch.exp(self.gain * self.grown.detach() + step)

        def settle(self) -> None:
            if self.seen > 0:
                importance = (self.scale() * self.squares.sqrt()).detach()
                self.order.copy_(torch.argsort(-importance, stable=True))

        def forward(self, features: dict[str, Any], **named: Any) -> dict[str, Any]:
            vectors = features["sentence_embedding"]
            if self.training:
                with torch.no_grad():
                    squares = torch.nn.functional.normalize(vectors.float(), dim=1).square().mean(dim=0)
                    self.squares.lerp_(squares, 1.0 if self.seen == 0 else 0.02)
                    self.seen.fill_(1)
            features["sentence_embedding"] = (vectors * self.scale())[:, self.order]
            return features

        def get_embedding_dimension(self) -> int:
            return self.width

        def save(self, output_path: str, *given: Any, safe_serialization: bool = True, **named: Any) -> None:
            self.save_config(output_path)
            self.save_torch_weights(output_path, safe_serialization=safe_serialization)

        @classmethod
        def load(cls, model_name_or_path: str, **named: Any) -> Any:
            where = {key: named.get(key) for key in ("subfolder", "local_files_only") if key in named}
            config = cls.load_config(model_name_or_path, **where)
            return cls.load_torch_weights(model_name_or_path, model=cls(**config), **where)

    return Gate


def bake(model: Any) -> None:
    """Scale and order of the gate into the table or layer before it; the model is a plain one again."""
    gate = gate_of(model)
    if gate is None:
        return
    import torch

    before = model[list(dict(model.named_children())).index(GATE) - 1]
    with torch.no_grad():
        scale, order = gate.scale()[gate.order], gate.order
        if type(before).__name__ == "StaticEmbedding":
            before.embedding.weight = torch.nn.Parameter((before.embedding.weight[:, order] * scale).contiguous())
        else:
            before.linear.weight = torch.nn.Parameter((before.linear.weight[order] * scale[:, None]).contiguous())
    del model._modules[GATE]
    log.info("gate baked first=%s", ",".join(str(int(place)) for place in order[:8]))
