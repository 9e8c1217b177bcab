"""The page of a training: what it shows, what it advises, what it compares."""

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.training import output, page
from tests.test_report import Elements, drawn_marks, specs


def record(name="one", objective=None, ndcg=(0.4, 0.39, 0.3), half=0.01, dims=(32, 16, 8), digest="d", **changes):
    """A finished training with these nDCGs at its dims; the base has a fifth of each."""
    rows = [
        {
            "when": when, "dim": dim, "k": 10, "queries": 50,
            "ndcg": one * part, "ndcg_low": (one - half) * part, "ndcg_high": (one + half) * part,
            "kept": one / ndcg[0], "kept_low": one / ndcg[0] - 0.01, "kept_high": one / ndcg[0] + 0.01,
        }
        for when, part in (("before", 0.2), ("after", 1.0))
        for dim, one in zip(dims, ndcg, strict=True)
    ]  # fmt: skip
    content = {
        "pairs": 900, "skipped": 1, "held_out_queries": 90, "documents": 1_000, "digest": digest,
        "measured_queries": 50, "measured_documents": 1_000,
    }  # fmt: skip
    spec = {
        "name": name, "output": name, "seed": 0, "dims": list(dims), "stop": None, "epochs": 1,
        "objective": {"kind": "infonce", "weights": "uniform", **(objective or {})}, "data": {"source": [name]},
        **changes,
    }  # fmt: skip
    return {
        "name": name, "kind": "static", "full_dim": dims[0], "dims": list(dims), "steps": 30, "spec": spec,
        "base": {"name": "/models/base", "digest": "b"}, "probe": {"says": "trained", "because": "they <hold>"},
        "fingerprint": {"content": content}, "evaluation": rows, "seconds": {"train": 3.0}, "versions": {"torch": "2"},
    }  # fmt: skip


def curve():
    steps = [(step, f"{name}_{dim}", 1 / step) for step in (1, 2) for name in ("loss", "ndcg") for dim in (32, 16, 8)]
    return pl.DataFrame(steps, ["step", "name", "value"], orient="row")


def save(folder, made):
    folder.mkdir(parents=True)
    (folder / output.RECORD).write_text(json.dumps({key: value for key, value in made.items() if key != "evaluation"}))
    (folder / "evaluation.json").write_text(json.dumps(made["evaluation"]))
    curve().write_parquet(folder / output.CURVE)


def test_the_page_has_the_curves_and_needs_nothing_else(tmp_path):
    save(tmp_path / "draft", record())
    page.write(tmp_path / "draft", tmp_path / "models" / "one")
    text = (tmp_path / "draft" / page.FILE).read_text()
    found = Elements(text)
    drawn = specs(text)
    assert set(drawn) == {"plot-dim-ndcg", "plot-dim-kept", "plot-steps-loss", "plot-steps-ndcg"}
    assert all(drawn_marks(spec) >= 4 for spec in drawn.values())
    links = [attributes.get(name) or "" for _, attributes in found.found for name in ("src", "href")]
    assert not [link for link in links if "//" in link]
    assert "they <hold>" in found.visible()  # as text, not as an element
    assert "Beside other trainings" not in found.visible()
    assert "0.4000" in found.visible()


@pytest.mark.parametrize(
    ("ndcg", "says"),
    [
        ((0.4, 0.395, 0.39), "Cut to 8 of 32 dimensions: they keep 97.5%"),
        ((0.4, 0.39, 0.3), "Cut to 16 of 32 dimensions: they keep 97.5%"),
        ((0.4, 0.396, 0.381), "That interval reaches below 95%; 16 keep 99.0%"),
        ((0.4, 0.382, 0.3), "That interval reaches below 95%; no prefix is wholly above it."),
        ((0.4, 0.36, 0.3), "Cut nothing: no trained prefix keeps 95% of the full nDCG@10, the best is 16 with 90.0%"),
    ],
)
def test_the_advice_follows_the_figures(ndcg, says):
    assert says in " ".join(page.verdict(record(ndcg=ndcg)))


def test_a_training_that_lost_against_its_base_says_so():
    made = record()
    assert "All 32 dimensions find more than the base did (0.400, 0.080)." in page.verdict(made)
    for row in made["evaluation"]:
        if row["when"] == "before":
            row.update(ndcg=0.5, ndcg_low=0.49, ndcg_high=0.51)
    assert "find less than the base did" in page.verdict(made)[-1]


def test_trainings_on_the_same_data_are_compared_and_others_left_out(tmp_path):
    mine = record()
    made = {
        "progressive": record(objective={"schedule": "progressive"}, ndcg=(0.4, 0.385, 0.305)),
        "short": record(objective={"weights": "short"}, ndcg=(0.37, 0.38, 0.35)),
        "other-data": record(digest="e"),
        "other-seed": record(seed=1),
        "both": record(objective={"weights": "short", "schedule": "progressive"}, ndcg=(0.38, 0.37, 0.33)),
    }
    for name, one in made.items():
        save(tmp_path / "models" / name, one)
    (tmp_path / "models" / "torn").mkdir()
    (tmp_path / "models" / "torn" / output.RECORD).write_text("{")
    save(tmp_path / "draft", mine)
    page.write(tmp_path / "draft", tmp_path / "models" / "mine")
    text = Elements((tmp_path / "draft" / page.FILE).read_text()).visible()
    (tmp_path / "draft").rename(tmp_path / "models" / "mine")
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path / "models" / "short"), "--json"])  # anew, with mine
    path = json.loads(done.stdout)["report"]
    assert path == str(tmp_path / "models" / "short" / page.FILE)
    assert "short (this one)" in Elements(Path(path).read_text()).visible()
    assert "mine (this one) uniform" in text
    assert "other-data" not in text
    assert "other-seed" not in text
    assert (
        "Take short: at 8 dimensions it finds most, 0.3500 (0.340 – 0.360), outside the interval of this one." in text
    )
    assert "At 32 it is below mine, progressive, outside the intervals: short prefixes cost it that." in text
    assert (
        "objective.weights: uniform instead of short (short) brought +0.0300 at 32 (clear), +0.0100 at 16, "
        "-0.0500 at 8 (clear)"
    ) in text
    assert "(progressive) brought +0.0000 at 32, +0.0050 at 16, -0.0050 at 8;" in text
    assert "(both) brought" not in text


def test_within_the_intervals_nothing_is_recommended():
    made = {"mine": record(), "other": record(objective={"weights": "short"}, ndcg=(0.4, 0.39, 0.31))}
    text = Elements(page.page(made["mine"], curve(), "mine", {"other": made["other"]})).visible()
    assert "At 8 dimensions other finds most, 0.3100 (0.300 – 0.320), within the interval of this one" in text
    assert "At 8 dimensions this one finds most, 0.3100 (0.300 – 0.320), within the interval of others" in advice(
        made["other"], made["mine"]
    )
    weak = record(ndcg=(0.4, 0.39, 0.25))
    assert "finds most, 0.3000 (0.290 – 0.310), outside the intervals of all others: take it." in advice(
        made["mine"], weak
    )


def advice(mine, other):
    return Elements(page.page(mine, curve(), "mine", {"other": other})).visible()
