"""Readers while the job goes on: a generation that was opened stays what it is; `refresh` moves on to the newest."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline import open_index, run
from pipeline.vectors import unit
from tests.conftest import DIM

SEARCHES = int(os.environ.get("SEARCHES", "400"))
"""Of 8 threads together."""
PREFIXES = [
    [{"dim": 8, "precision": "binary"}],
    [{"dim": 8, "precision": "binary"}, {"dim": 16, "precision": "float16", "index": {"kind": "ivf_flat"}}],
    [{"dim": 8, "precision": "binary", "rotation": "random"}, {"dim": 24, "precision": "int8"}],
    [{"dim": 8, "precision": "binary"}, {"dim": 16, "precision": "float16", "index": {"kind": "ivf_sq"}}],
]


def test_refresh_moves_to_the_newest_generation(spec):
    first = run(spec(prefixes=PREFIXES[0]))
    index = open_index(first["spec"]["root"])
    assert not index.refresh()
    before = index.search("w001 w002")
    second = run(spec(prefixes=PREFIXES[1], search__cache=True))
    assert index.generation["generation"] == first["generation"]
    assert index.search("w001 w002").equals(before)
    assert index.refresh()
    assert index.generation["generation"] == second["generation"]
    assert set(index.opened.views) == {"documents", "prefix_8_binary", "prefix_16_float16"}


def test_searches_of_many_threads_during_rebuilds_never_mix_generations(spec):
    """Every table of every generation, asked for all rows, must lead to the exact answer by its own scores."""
    job = spec(prefixes=PREFIXES[0])
    run(job)
    index = open_index(job.root)
    queries = np.random.default_rng(0).standard_normal((20, DIM))
    exact = [index.exact(query) for query in queries]
    turns, built, seen = itertools.count(), [], set()

    def rebuild():
        while len(built) < 5 or next(turns) < SEARCHES:
            number = len(built) + 1
            built.append(run(spec(prefixes=PREFIXES[number % 4], search__cache=number % 2 == 0))["generation"])

    def read(number):
        mine = index if number % 2 else open_index(job.root, engine=("lance", "resident")[number // 2 % 2])
        for turn in turns:
            if turn >= SEARCHES and len(built) >= 5:
                break
            if turn % 7 == number % 7:
                mine.refresh()
            opened = mine.opened
            at = turn % len(queries)
            table = sorted(set(opened.views) - {"documents"})[turn % (len(opened.views) - 1)]
            hits, _ = opened.rank(unit(queries[at][None]), 10, None, [(table, 120, "auto")])
            assert hits.rows[0].tolist() == exact[at]["row"].to_list()
            assert mine.search(queries[at], cascade=[("prefix_8_binary", 120)]).equals(exact[at])
            seen.add(opened.generation["generation"])

    with ThreadPoolExecutor(9) as pool:
        for one in [pool.submit(rebuild), *(pool.submit(read, number) for number in range(8))]:
            one.result()
    assert len(seen) > 3
