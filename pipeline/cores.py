"""The machine's cores: one thread for each, shared by all searches here; matrix products can be kept off them."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

THREADS = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
Result = TypeVar("Result")


@cache
def has(package: str) -> bool:
    """Whether an optional package is installed."""
    return find_spec(package) is not None


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def threads() -> ThreadPoolExecutor:
    """One thread per core, shared by every open index of this process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(THREADS, "scan")
        return _pool


def spread(work: Callable[[slice], Result], count: int) -> list[Result]:
    """What `work` gives for consecutive slices of `count` things, one per core, in order.

    The caller's thread takes the first: handing it over would cost 0.1 ms (measured).
    """
    cuts = np.linspace(0, count, max(1, min(THREADS, count)) + 1).astype(int)
    first, *others = [slice(int(a), int(b)) for a, b in pairwise(cuts)]
    waiting = [threads().submit(work, part) for part in others]
    return [work(first), *(one.result() for one in waiting)]


@cache
def _blas() -> list[Any]:
    """What sets the threads of NumPy's matrix products."""
    return [one for one in ThreadpoolController().lib_controllers if one.user_api == "blas"]


_inside, _before = 0, list[int]()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products on the caller's thread alone, for the process, until the last caller leaves.

    OpenBLAS' threads go on spinning for some 25 ms after a small product, on the cores that the scans need (measured:
    64 queries take twice as long).
    """
    global _inside, _before
    with _pool_lock:
        if _inside == 0:
            _before = [one.get_num_threads() for one in _blas()]
            for one in _blas():
                one.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _pool_lock:
            _inside -= 1
            if _inside == 0:
                for one, count in zip(_blas(), _before, strict=True):
                    one.set_num_threads(count)
