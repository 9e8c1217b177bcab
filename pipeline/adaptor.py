"""The learned adaptor: an affine map whose every prefix keeps the full vectors' similarities; no labels, no texts.

Started at a softly whitened PCA, trained on neighbourhoods of a sample for all prefix lengths at once. Torch on the
CPU, under a minute for 384 dimensions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.transform import Moments, Transform, pca
from pipeline.vectors import Matrix, top

ROWS = 20_000
"""Rows that training looks at; the rest of a larger sample would only cost memory."""
MIN_ROWS = 1_000
"""With fewer there is too little to learn from (assumed)."""
STEPS, RATE = 600, 2e-3
ANCHORS, NEAR, GROUPS = 4_096, 32, 16
"""A batch is the union of `GROUPS` neighbourhoods, each an anchor and its `NEAR` - 1 nearest rows."""
WIDE, POWER, WEIGHT = 0.1, 2, 0.5
"""Temperatures of the softmax over similarities: 0.1, at half the weight, for a wider circle, and 0.1 / 2 for the
nearest few (measured on three corpora: together they keep more at 64 of all-MiniLM-L6-v2's dimensions than either).
"""
WHITENING = 0.25
"""Each component starts divided by variance ** (WHITENING / 2): plain PCA's first ones drown the others."""
THREADS = 1
"""Equal bits on every machine; more saves seconds where cores are idle and costs minutes where they are not."""


def train(rows: Matrix, dims: Sequence[int], seed: int) -> Transform:
    """Learn from unit rows [n, D] for prefixes of `dims` numbers.

    Minimises, summed over dims and temperatures, the Kullback-Leibler divergence between the softmax of the full
    cosines within a batch and that of the prefix cosines (a listwise form of the similarity loss of
    Matryoshka-Adaptor, Yoon et al. 2024), by Adam with a cosine schedule. Equal bits for equal rows, seed, threads.
    """
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(seed)
    rows = rows[np.sort(rng.choice(len(rows), min(ROWS, len(rows)), replace=False))]
    start = _softly_whitened(rows)
    assert start.mean is not None and start.matrix is not None
    groups = _neighbourhoods(rows, rng)
    with _threads(torch):
        data, near = torch.from_numpy(rows), torch.from_numpy(groups)
        mean = torch.from_numpy(start.mean).requires_grad_()
        matrix = torch.from_numpy(start.matrix).requires_grad_()
        optimizer = torch.optim.Adam([mean, matrix], lr=RATE)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            picked = near[torch.from_numpy(rng.choice(len(near), min(GROUPS, len(near)), replace=False))]
            batch = data[torch.unique(picked)]
            wanted = _slopes(torch, batch @ batch.T)
            turned = (batch - mean) @ matrix
            loss = torch.zeros(())
            for dim in dims:
                prefix = functional.normalize(turned[:, :dim])
                cosines = prefix @ prefix.T
                slopes = _slopes(torch, cosines.detach()).sub_(wanted)
                loss = loss + (cosines * slopes).sum()  # has the divergence's gradient, for one exp per number
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Transform("adaptor", mean.detach().numpy(), matrix.detach().numpy())


def _slopes(torch: Any, cosines: Any) -> Any:
    """Sum over temperatures of softmax(cosines / T) / (T n), each row without itself: what the cosines [n, n] add to
    the gradient of the divergence. |cosine| <= 1, so no exponential overflows.
    """
    wide = torch.exp(cosines / WIDE).fill_diagonal_(0)
    close = wide**POWER
    wide *= WEIGHT / (WIDE * len(cosines)) / wide.sum(1, keepdim=True)
    close *= POWER / (WIDE * len(cosines)) / close.sum(1, keepdim=True)
    return wide.add_(close)


@contextmanager
def _threads(torch: Any) -> Iterator[None]:
    """A fixed number of threads, so that a repeated fit gives equal bits; what was set before is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _softly_whitened(rows: Matrix) -> Transform:
    """Centred PCA with each component divided by variance ** (WHITENING / 2), the first one as it is."""
    moments = Moments(rows.shape[1])
    moments.add(rows)
    found, variances = pca(moments)
    assert found.matrix is not None
    floor = variances[0] * 1e-6 or 1.0
    scale = (np.maximum(variances, floor) / max(variances[0], floor)) ** (-WHITENING / 2)
    return Transform("adaptor", found.mean, np.asarray(found.matrix * scale, np.float32))


def _neighbourhoods(rows: Matrix, rng: np.random.Generator) -> NDArray[np.int64]:
    """For some anchors their nearest rows, themselves included: int64[anchors, NEAR]."""
    anchors = rng.choice(len(rows), min(ANCHORS, len(rows)), replace=False)
    blocks = [top(rows[anchors[at : at + 256]] @ rows.T, NEAR) for at in range(0, len(anchors), 256)]
    return np.concatenate(blocks)
