"""The report: one page that needs nothing else, says what was measured, and lets no text do harm."""

import dataclasses
import datetime
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
import vl_convert

from pipeline import JobSpec, plots, querylog, report, run
from pipeline.errors import StaleError
from pipeline.html import in_script, shown
from pipeline.storage import Root
from tests.conftest import corpus_frame

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!-- {{ 7 * 7 }} & \"'"
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, and the text inside, by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((self.inside[-1] if self.inside else "", text))

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def visible(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())


def specs(page: str) -> dict[str, dict]:
    """Vega-Lite specs of a page by the id of their place."""
    found = re.findall(r'<script type="application/json" data-plot="([^"]*)">(.*?)</script>', page, re.S)
    return {name: json.loads(text) for name, text in found}


def drawn_marks(spec: dict) -> int:
    """Points, lines, bars that a spec draws, by Vega outside any browser."""
    svg = vl_convert.vegalite_to_svg(spec)
    groups = re.findall(r'<g class="mark-(?:symbol|line|rect|rule|area) role-mark.*?</g>', svg, re.S)
    return sum(group.count("<path") + group.count("<line") for group in groups)


def query_log(root: Path) -> None:
    days = [datetime.datetime(2025, month, 3, 12, tzinfo=datetime.UTC) for month in (1, 2, 3)]
    log = {
        "measured_at": days, "file": [f"{HOSTILE}.jsonl"] * 3, "queries": [100, 120, 140], "k": [10] * 3,
        "generation": [1, 1, 2], "recall_exact": [0.98, 0.97, 0.93], "recall_exact_low": [0.97, 0.96, 0.91],
        "recall_exact_high": [0.99, 0.98, 0.95], "median_ms": [1.0, 1.1, 1.2], "p95_ms": [2.0, 2.1, 2.2],
    }  # fmt: skip
    pl.DataFrame(log).write_parquet(root / querylog.NAME)


@pytest.fixture(scope="module")
def root(tmp_path_factory, model) -> Path:
    """A finished root: hostile names and texts, qrels, quarantined rows, a query log."""
    folder = tmp_path_factory.mktemp("report")
    blank = pl.arange(0, pl.len()) < 3
    frame = corpus_frame().with_columns(
        _id=pl.col("_id") + HOSTILE,
        title=pl.when(blank).then(pl.lit("")).otherwise("title"),
        text=pl.when(blank).then(pl.lit("")).otherwise(pl.col("text") + HOSTILE),
    )
    frame.write_parquet(folder / "corpus.parquet")
    asked = frame[20:60].select("_id", text=pl.col("title") + " " + pl.col("text"))
    asked.write_parquet(folder / "queries.parquet")
    asked.select(query_id="_id", corpus_id="_id", score=pl.lit(1)).write_parquet(folder / "qrels.parquet")
    job = JobSpec.of(
        {
            "name": "hostile",
            "root": str(folder / "root"),
            "corpus": {"source": str(folder / "corpus.parquet"), "id": "_id", "text": ["title", "text"]},
            "model": {"name": str(model), "prompts": {"query": HOSTILE}},
            "prefixes": [
                {"dim": 8, "precision": "binary"}, {"dim": 16, "precision": "binary"},
                {"dim": 16, "precision": "int8"}, {"dim": 16, "precision": "float16"},
            ],
            "search": {"cascade": [
                {"table": "prefix_8_binary", "shortlist": 12}, {"table": "prefix_16_int8", "shortlist": 11},
            ]},
            "evaluate": {
                "queries": str(folder / "queries.parquet"), "qrels": str(folder / "qrels.parquet"),
                "shortlists": [20, 50], "k": 10,
            },
            "workers": {"count": 0},
        }
    )  # fmt: skip
    run(job)
    query_log(Path(job.root))
    return Path(job.root)


@pytest.fixture(scope="module")
def page(root) -> str:
    path = report.run(Root(root))
    assert path == root / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page):
    assert len(page.encode()) < 3_000_000
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "image", "use")
        assert not {"src", "srcset", "data", "action", "background", "poster", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    style = "".join(text for tag, text in elements.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    policy = elements.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy


def test_hostile_texts_do_no_harm(page):
    elements = Elements(page)
    kinds = [attributes.get("type") for attributes in elements.named("script")]
    assert [kind for kind in kinds if kind is None] == [None, None]  # Vega, and what draws
    assert set(kinds) == {None, "application/json"}
    assert HOSTILE.replace("\u2028", " ") in elements.visible()  # shown as it is
    for tag, text in elements.texts:
        assert tag != "script" or "\u2028" not in text
    assert in_script({"a": HOSTILE}).isascii() and "<" not in in_script([HOSTILE])
    assert json.loads(in_script({"a": HOSTILE, "b": float("nan")})) == {"a": HOSTILE, "b": None}


def test_the_page_says_what_was_measured(page):
    said = Elements(page).visible()
    assert "The cascade prefix_8_binary (shortlist 12) → prefix_16_int8 (shortlist 11) → full vectors keeps" in said
    assert "of exact search's nDCG@10 (" in said and "(verdict: unsure): 117 rows are too few" in said
    for heading in (
        "Is it Matryoshka?", "Quality against dimension", "Quality against cost", "Explained variance", "Throughput",
        "Tables and sizes", "Quarantine", "Example queries", "Query log", "Everything that was measured",
        "Spec and manifest",
    ):  # fmt: skip
        assert heading in said
    assert "3 of 120 rows were set aside (2.50%)" in said and "blank_text" in said
    assert "Measured with 40 queries from queries.parquet; k = 10; intervals: bootstrap 95% over the queries." in said


def test_every_lost_hit_is_marked_by_a_word(root, page):
    lost = pl.read_parquet(root / "examples.parquet")["lost"].sum()
    assert lost > 0
    assert page.count('<td class="lost">') == page.count('<strong class="badge">lost</strong>') == lost


def test_every_plot_draws_and_has_words_and_numbers(page):
    found, elements = specs(page), Elements(page)
    assert {"plot-dim-ndcg", "plot-scanned-recall_exact", "plot-median-ms-ndcg", "plot-drift"} < set(found)
    assert {name: drawn_marks(spec) > 1 for name, spec in found.items()} == dict.fromkeys(found, True)
    places = {one["id"]: one for one in elements.named("div") if one.get("class") == "plot"}
    assert set(places) == set(found) and all(len(one["aria-label"]) > 20 for one in places.values())
    assert page.count("<figcaption>") == page.count("<summary>The numbers</summary>") == len(found)


def test_without_qrels_there_are_no_empty_plots(spec):
    job = spec()
    run(job)
    page = report.run(Root(Path(job.root))).read_text(encoding="utf-8")
    found, said = specs(page), Elements(page).visible()
    assert not [name for name in found if "ndcg" in name]
    assert all(drawn_marks(one) for one in found.values())
    assert "nDCG" not in said and "120 documents as queries, each never counted against itself" in said
    assert "None: all 120 rows are in the tables." in said and "Query log" not in said


@pytest.mark.parametrize("precision", ["binary", "int8", "float16"])
def test_one_prefix_is_enough(spec, precision):
    job = spec(prefixes=[{"dim": 16, "precision": precision}], evaluate__k=3)
    run(job)
    page = report.run(Root(Path(job.root))).read_text(encoding="utf-8")
    assert all(drawn_marks(one) for one in specs(page).values())
    assert f"The cascade prefix_16_{precision} (shortlist " in Elements(page).visible()


def test_a_forced_transform_says_what_it_costs(root):
    facts = report.read(Root(root))
    transform = facts.generation["transform"] | {"kind": "none", "lost": {"8": 0.31, "16": 0.125}, "compared": None}
    transform["verdict"] = transform["verdict"] | {"says": "not trained", "far": [8]}
    tables = facts.generation["tables"]
    tables = tables | {"prefix_16_int8": tables["prefix_16_int8"] | {"clipped_share": 0.02}}
    forced = facts.generation | {"transform": transform, "tables": tables}
    said = Elements(report.page(dataclasses.replace(facts, generation=forced))).visible()
    assert "was not trained for prefixes" in said
    assert "they lose of the neighbours: 31.0 points at 8, 12.5 points at 16." in said
    assert "Dimensions 8 are far from every one" in said
    assert "prefix_16_int8: 2.00% of its numbers were too large for int8" in said


def test_nothing_finished_is_refused(tmp_path, root):
    with pytest.raises(StaleError, match="no finished generation"):
        report.run(Root(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "evaluation.parquet").write_bytes(b"other")
    with pytest.raises(StaleError, match="is not what generation 1 was published with"):
        report.run(Root(copy))


def test_the_same_root_gives_the_same_page(root, page):
    assert report.run(Root(root)).read_text(encoding="utf-8") == page


def test_the_pareto_front_is_what_nothing_cheaper_reaches():
    rows = pl.DataFrame({"cost": [8, 8, 16, 32, 4, 16], "quality": [0.5, 0.7, 0.6, 0.9, 0.1, 0.7]})
    assert plots.pareto(rows, "cost", "quality") == {4, 1, 3}


def test_cells_are_readable():
    cells = [None, float("nan"), True, 12345, 0.98765, 123.456, 12345.6, "x"]
    assert [shown(cell) for cell in cells] == ["–", "–", "yes", "12,345", "0.9877", "123.46", "12,345.6", "x"]


PROBE = """<!doctype html><body><script>
const widths = [1280, 360], pages = widths.map((width) => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.srcdoc = PAGE;
  return document.body.appendChild(frame);
});
setTimeout(() => {
  const seen = pages.map((frame) => {
    const page = frame.contentDocument;
    const plots = [...page.querySelectorAll(".plot")];
    return {
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      images: page.images.length, plots: plots.length,
      empty: plots.filter((plot) => plot.dataset.drawn !== "yes"
        || !plot.querySelector(".role-mark :is(path, line)")).map((plot) => plot.id + plot.textContent),
      clipped: plots.flatMap((plot) => {
        const room = plot.getBoundingClientRect();
        return [...plot.querySelectorAll("text")].filter((text) => {
          const box = text.getBoundingClientRect();
          return box.width && (box.left < room.left - 1 || box.right > room.right + 1
            || box.top < room.top - 1 || box.bottom > room.bottom + 1);
        }).map((text) => plot.id + ": " + text.textContent);
      }),
    };
  });
  document.title = JSON.stringify(seen);
}, 4000);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on this machine")
def test_a_browser_draws_every_plot_and_nothing_overflows(page, tmp_path):
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(PROBE.replace("PAGE", in_script(page)))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=8000", "--window-size=1400,2000", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    for seen in json.loads(html.unescape(title[1])):
        assert seen == {"overflow": 0, "images": 0, "plots": len(specs(page)), "empty": [], "clipped": []}
