"""How many workers, with how many cores, GPUs and bytes each, on the nodes that there are."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import SpecError
from pipeline.spec import Range, Workers

CORES_PER_CPU_WORKER = 4
"""Threads of one CPU worker where the machine has them (assumed: transformers scale well to four)."""
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS",
    "POLARS_MAX_THREADS",
)  # fmt: skip
"""What libraries read when they load: a worker's threads, not those of its node."""


@dataclass(frozen=True)
class Node:
    """What one machine offers; memory in bytes."""

    cores: int
    gpus: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Plan:
    """How many workers are asked for, with how many threads, GPUs and bytes each; up to `most` while shards wait.

    `shared`: a worker has other work beside it, and its libraries must be told of its threads.
    """

    count: int
    threads: int
    gpus: float
    most: int = 0
    memory: int | None = None
    shared: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """What a worker's libraries are told before they load."""
        return dict.fromkeys(THREAD_VARIABLES, str(self.threads)) if self.shared else {}

    @property
    def limit(self) -> int:
        """The most workers at once."""
        return max(self.count, self.most)


def plan(settings: Workers, nodes: Sequence[Node]) -> Plan:
    """Size the workers to what there is: one per GPU, else one per four cores; workers × threads = cores.

    SpecError where no node has room for one, except with {min, max}, which waits for nodes that come later.
    """
    gpus, elastic = sum(node.gpus for node in nodes), isinstance(settings.count, Range)
    each = (1.0 if gpus else 0.0) if settings.gpus == "auto" else float(settings.gpus)
    wanted = settings.count if isinstance(settings.count, int) else None
    if not elastic and each > 0:
        if gpus == 0:
            raise SpecError(f"workers.gpus: {each:g} per worker were asked for, no GPU is visible; use auto or 0")
        if wanted and each * wanted > gpus:
            raise SpecError(f"workers: {wanted} workers with {each:g} GPUs each need more than the {gpus} visible")
    threads = _threads(nodes, each, wanted) if settings.cpus == "auto" else settings.cpus
    fit = sum(_fitting(node, threads, each, settings.memory) for node in nodes)
    if isinstance(settings.count, Range):
        start = min(max(settings.count.min, fit), settings.count.max)
        return Plan(start, threads, each, settings.count.max, settings.memory)
    if fit == 0 and wanted != 0:
        memory = f" and {settings.memory / 1e9:g} GB" if settings.memory else ""
        raise SpecError(
            f"workers: no node has room for one with {threads} cores{memory}; ask for less, or use "
            "count: {min: 1, max: N} where nodes come later"
        )
    return Plan(fit if wanted is None else wanted, threads, each, memory=settings.memory)


def _threads(nodes: Sequence[Node], each: float, wanted: int | None) -> int:
    """The most cores that each of so many workers can have; with None as many as are usual on the smallest node."""
    if wanted is not None:
        most = max((node.cores for node in nodes), default=1)
        enough = (
            threads
            for threads in range(most, 1, -1)
            if sum(_fitting(node, threads, each, None) for node in nodes) >= max(wanted, 1)
        )
        return next(enough, 1)
    shares = [
        node.cores // (int(node.gpus / each) if each else max(1, node.cores // CORES_PER_CPU_WORKER))
        for node in nodes
        if node.cores and node.gpus >= each
    ]
    return max(1, min(shares, default=CORES_PER_CPU_WORKER))


def _fitting(node: Node, threads: int, each: float, memory: int | None) -> int:
    """How many workers a node holds."""
    limits = [node.cores // threads]
    if each:
        limits.append(int(node.gpus / each))
    if memory:
        limits.append(node.memory // memory)
    return min(limits)
