"""This project: cascades over one root, in each engine, one process each."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.resident import available
from pipeline.search import open_index
from pipeline.spec import Engine
from pipeline.vectors import Matrix
from tests.bench import root
from tests.bench.measure import Contender, Search, Setting
from tests.bench.sets import K, Set

ENGINES = ("resident", "lance")
TABLES = ("binary-64", "binary-128", "binary-256", "int8", "float16-rq", "funnel")


def contenders() -> list[Contender]:
    """Every engine with every first table; `funnel` has two levels before the full vectors."""
    return [
        Contender(
            f"ours-{engine}-{table}", f"ours, {engine}", "root", _make, partial(_start, engine),
            partial(_settings, table), needs=partial(_missing, engine),
        )
        for engine in ENGINES
        for table in TABLES
    ]  # fmt: skip


def _missing(engine: str) -> str:
    """What this engine lacks here; nothing: empty."""
    return available() if engine == "resident" else ""


def _make(of: Set, folder: Path) -> dict[str, float]:
    binary = [{"dim": bits, "precision": "binary", "index": {"kind": "none"}} for bits in of.bits]
    numbers = [
        {"dim": of.short, "precision": "int8"},
        {"dim": of.short, "precision": "float16", "index": {"kind": "ivf_rq"}},
    ]
    return root.build(Path(of.folder, "corpus.npy"), folder / "root", [*binary, *numbers])


def _settings(table: str, of: Set) -> list[Setting]:
    """Shortlists and scorings of one first table; the last binary one is also asked for a whole table of hits."""
    kind, _, bits = table.partition("-")
    settings: list[Setting] = []
    if kind == "binary" and int(bits) in of.bits:
        name = f"prefix_{bits}_binary"
        for how in ("auto", "hamming"):
            for size in (200,) if of.quick else (100, 200, 400, 1000):
                settings.append({"cascade": [[name, size, how]]})
            settings.append({"cascade": [[name, 200, how]], "coarse": True})
        if int(bits) == of.bits[-1]:
            settings.append({"cascade": [[name, 200, "auto"]], "whole": True})
    if kind in ("int8", "float16"):
        name = f"prefix_{of.short}_{kind}"
        settings += [{"cascade": [[name, size]]} for size in ((100,) if of.quick else (50, 100, 200))]
        settings.append({"cascade": [[name, 200]], "coarse": True})
    if kind == "funnel":
        first, second = f"prefix_{of.bits[0]}_binary", f"prefix_{of.short}_int8"
        sizes = ((1000, 200),) if of.quick else ((1000, 100), (1000, 200), (4000, 200))
        settings += [{"cascade": [[first, many], [second, few]]} for many, few in sizes]
    return settings


def _start(engine: Engine, of: Set, folder: Path) -> Search:
    path = folder / "root"
    index = open_index(path, engine=engine)

    def search(queries: Matrix, setting: Setting) -> Matrix:
        cascade: Sequence = [tuple(level) for level in setting["cascade"]]
        if setting.get("whole"):
            frame = index.search(queries, K, cascade=cascade)
            return frame["row"].to_numpy().reshape(len(queries), -1)
        if setting.get("coarse"):
            hits, _ = index.rank(queries, cascade[-1][1], None, cascade, rescore=False)
        else:
            hits, _ = index.rank(queries, K, None, cascade)
        return np.asarray(hits.rows)

    return search
