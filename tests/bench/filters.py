"""Filtered search in both engines, against exact filtered search: recall and milliseconds by selectivity.

python -m tests.bench.root corpus.npy ROOT 256:binary 128:float16:ivf_rq --shares
python -m tests.bench.filters ROOT queries.npy
"""

import argparse
import time
from pathlib import Path

import numpy as np

from pipeline import open_index
from pipeline.vectors import unit

CASCADES = {"resident": ("binary", 400), "lance": ("float16", 200)}
"""The last of the tables of this precision, and its shortlist."""


def main() -> None:
    """Print one line for each engine and share of rows."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("root", type=Path)
    options.add_argument("queries", type=Path)
    options.add_argument("--count", type=int, default=100)
    asked = options.parse_args()
    queries = unit(np.load(asked.queries)[: asked.count])
    for share in (1, 10, 100, 500):
        where = f"thousandth < {share}"
        for engine, (precision, shortlist) in CASCADES.items():
            index = open_index(asked.root, engine=engine)
            fitting = [view for view in index.opened.views.values() if view.name.endswith(precision)]
            table = max(fitting, key=lambda view: view.info.dim).name
            cascade = [(table, shortlist)]
            truth, _ = index.rank(queries, 10, where, [])
            found, _ = index.rank(queries, 10, where, cascade)
            seconds = []
            for query in queries:
                start = time.perf_counter()
                index.rank(query[None], 10, where, cascade)
                seconds.append(time.perf_counter() - start)
            recall = np.mean([np.isin(mine, true).mean() for mine, true in zip(found.rows, truth.rows, strict=True)])
            print(f"{share / 10:5.1f} %  {engine:8}  {table} {shortlist}  recall@10 {recall:.4f}  "
                  f"median {np.median(seconds) * 1000:.2f} ms", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
