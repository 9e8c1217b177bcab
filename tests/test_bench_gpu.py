"""The GPU benchmark, at tiny size on a CPU, where neither Ray, Lance nor polars can be imported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench import gpu
from tests.bench.gpu_models import SETS, Shape, flops, texts, words
from tests.bench.gpu_variants import Way, limited

CHECKOUT = Path(__file__).parents[1]
ABSENT = ["ray", "lance", "lancedb", "polars", "pydantic", "typer", "rich", "altair", "faiss", "openvino"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """gpu.json and what was printed."""
    out = tmp_path_factory.mktemp("gpu")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT}));"
        f"sys.argv[1:] = ['--tiny', '--out', {str(out)!r}]; runpy.run_module('tests.bench.gpu', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads((out / "gpu.json").read_text()), ran.stdout


def test_every_way_has_figures_or_says_why_not(told):
    rows = told[0]["rows"]
    ways = {(row["set"], row["way"].partition(",")[0]) for row in rows}
    for name in ("mixed", "short"):
        for way in ("ours packed", "ours padded", "ours packed compiled", "sentence-transformers default",
                    "sentence-transformers sdpa"):  # fmt: skip
            assert (name, way) in ways
    for row in rows:
        assert row["tokens_per_second"] > row["texts_per_second"] > 0
        assert 0 < row["mfu"] < 2
        if row["cosine"] is not None:
            assert 0.999 <= row["cosine"] <= 1 + 1e-6
    assert any("1 process" in row["way"] and row["tokens_per_second"] for row in rows)


def test_only_packed_batches_have_no_padding(told):
    for row in told[0]["rows"]:
        if row["padding"] is not None and row["way"].startswith("ours"):
            assert (row["padding"] == 0) == ("packed" in row["way"])


def test_the_turns_tell_how_often_ours_goes_into_the_others(told):
    data, printed = told
    (turn,) = [row for row in data["rows"] if "turns" in row["way"] and row["set"] == "mixed"]
    ours, default, best = (np.median(turn["rates"][name]) for name in ("ours", "default", "best"))
    assert turn["note"] == f"{ours / default:.1f} x default, {ours / best:.2f} x best"
    assert turn["note"] in printed
    assert {"torch", "sentence-transformers"} <= set(data["machine"]["packages"])
    assert data["machine"]["peak_flops"] > 1e9
    assert data["machine"]["varlen_kernel"] == torch.cuda.is_available()


def test_operations_and_padding_by_hand():
    shape = Shape("x", layers=3, width=2, heads=1, tokens=0)
    assert flops(shape, np.array([3, 1])) == 24 * 3 * 4 * (3 + 1) + 4 * 3 * 2 * (9 + 1)
    assert gpu.padded_tokens(np.array([1, 5, 3]), 2) == 5 * 2 + 1


def test_texts_have_the_lengths_they_say():
    assert len(set(words())) == len(words()) == 30_522 - 5
    for name, (low, high) in SETS.items():
        made, lengths = texts(name, 5_000)
        assert [len(text.split()) + 2 for text in made] == lengths.tolist()
        assert low <= lengths.min() < lengths.max() <= high
        assert 3_000 < lengths.sum() < 7_000
    assert texts("short", 100, seed=1)[0] != texts("short", 100, seed=2)[0]


class Clock:
    """A bench with so many seconds left."""

    rows, cuda, torch, write = [], False, None, staticmethod(lambda: None)
    row = gpu.Bench.row

    def __init__(self, seconds):
        self.left = lambda: seconds


def test_what_has_no_time_left_says_so(capsys):
    what = {"shape": "x", "set": "y", "way": "z", "precision": "w", "batch": 1}
    assert Clock(5).row(what, lambda: {"cosine": 1.0}, needs=10)["note"] == "left out: no time left"
    assert Clock(15).row(what, lambda: {"cosine": 1.0}, needs=10)["cosine"] == 1.0
    assert Clock(0.05).row(what, lambda: time.sleep(9), needs=0)["note"].startswith("failed: TimeoutError")
    assert "no time left" in capsys.readouterr().out


def test_a_limit_ends_with_its_block():
    with limited(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError), limited(0.01):
        time.sleep(9)


def test_vectors_that_are_far_from_float32_do_not_count():
    case = object.__new__(gpu.Case)
    case.judged, case.truth = ["a", "b"], np.eye(2)
    assert case.checked(np.eye(2) * 3)["cosine"] == 1.0
    with pytest.raises(RuntimeError, match="0.5"):
        case.checked(np.array([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(RuntimeError, match="nan"):
        case.checked(np.full((2, 2), np.nan))


def test_names_of_ways():
    assert Way().name == "ours packed"
    assert Way(compiled=True).name == "ours packed compiled"
