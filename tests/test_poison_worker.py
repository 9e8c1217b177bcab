"""Rows that end their worker: the hunt for them, and a real job on Ray whose workers die for real."""

import math
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, strategies as st

from pipeline import embed, embedder, run, verify
from pipeline.embedder import Embedder, Trial, Work
from pipeline.encoders import tokens
from pipeline.errors import PipelineError
from pipeline.spec import Workers
from pipeline.workers import MAX_TRIES, Died, Pool, Team

# The hunt, with workers that only say that they died


class Fragile(Team):
    """Dies of any of some sets of rows that stand in one call together, and counts."""

    def __init__(self, count: int, deadly: Iterable[set[int]], always: bool = False) -> None:
        self.count, self.deadly, self.always = count, [frozenset(rows) for rows in deadly], always
        self.tried: list[tuple[int, int]] = []
        self.deaths = 0

    def outcomes(self, items, tries=MAX_TRIES) -> Iterator[object]:
        for item in items:
            if isinstance(item, Trial):
                self.tried.append((item.start, item.stop))
                here = set(range(item.start, item.stop))
            else:
                here = set(range(self.count)) - set(item.poison)
            if self.always or any(rows <= here for rows in self.deadly):
                self.deaths += tries
                yield Died(item, tries, "Worker exit type: SYSTEM_ERROR")
            else:
                yield self.count if isinstance(item, Trial) else done(item)


def done(work):
    quarantined = {"model_error": len(work.poison)}
    record = {"shard": 0, "rows": 1, "set_aside": [], "quarantined": quarantined, "fragments": [], "files": {}}
    return record | {"digest": "", **dict.fromkeys(embed.SUMMED, 1), "peak_memory_bytes": 1}


SHARD = SimpleNamespace(name="0000000", number=0)
WORK = Work(SHARD, None, "0000000")


def hunted(team):
    return embed._Hunt(team, Died(WORK, MAX_TRIES, "Worker exit type: SYSTEM_ERROR")).rows()


@pytest.mark.parametrize("count", range(1, 10))
def test_one_row_is_found_wherever_it_stands(count):
    for row in range(count):
        team = Fragile(count, [{row}])
        assert hunted(team) == {row: "ends the worker: Worker exit type: SYSTEM_ERROR"}
        assert team.deaths <= math.ceil(math.log2(count)) + 1
        assert len(team.tried) <= 2 * math.ceil(math.log2(count)) + 2
        assert team.tried[0] == (0, 0)


@pytest.mark.parametrize("deadly", [{0, 7}, {3, 4}, {0, 1}, {6, 7}, {2, 3, 4}, set(range(8))], ids=str)
def test_several_rows_are_found_together(deadly):
    team = Fragile(8, [{row} for row in deadly])
    assert set(hunted(team)) == deadly
    assert len(team.tried) == len(set(team.tried)) <= 16


@given(
    st.integers(1, 200).flatmap(
        lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), min_size=1, max_size=5))
    )
)
def test_any_few_rows_are_found(drawn):
    count, deadly = drawn
    team = Fragile(count, [{row} for row in deadly])
    assert set(hunted(team)) == deadly
    assert len(team.tried) <= len(deadly) * (2 * math.ceil(math.log2(count)) + 1) + 2


def test_rows_that_end_a_worker_only_together_are_told():
    team = Fragile(8, [{2, 3}])
    with pytest.raises(
        PipelineError, match="a worker died 3 times on 0000000 .* no single row does it: too little mem"
    ):
        hunted(team)
    assert len(team.tried) <= 16


def test_a_worker_that_dies_of_nothing_is_told():
    team = Fragile(8, [], always=True)
    with pytest.raises(
        PipelineError, match="died 1 times on 0000000.0:0. .*, before any row of it was read; run again"
    ):
        hunted(team)
    assert team.tried == [(0, 0)]


def test_too_many_rows_end_the_hunt():
    team = Fragile(4_096, [{row} for row in range(4_096)])
    with pytest.raises(PipelineError, match="too many rows do it to look for all; run again"):
        hunted(team)
    assert len(team.tried) == embed.MAX_TRIALS


def test_shards_are_done_without_their_rows(caplog):
    team = Fragile(8, [{1}, {5}])
    caplog.set_level("INFO")
    embed._embed([(SHARD, "0000000"), (SimpleNamespace(name="0000001", number=1), "0000001")], None, team)
    for name in ("0000000", "0000001"):
        assert f"shard={name} rows=[1, 5] end a worker" in caplog.text
    assert caplog.text.count("quarantined=2") == 2


def test_a_shard_that_dies_all_the_same_ends_the_job():
    team = Fragile(8, [{1}, {4, 7}])
    with pytest.raises(
        PipelineError, match="died 3 times on 0000000 .*, also without the rows that end a worker by them"
    ):
        embed._embed([(SHARD, "0000000")], None, team)
    assert team.deaths <= 2 * MAX_TRIES + len(team.tried)


# Real workers


DEADLY, CURSED = "w300", "w301"
"""A word that ends the worker in a batch, and one that ends it as soon as its shard is read."""
ROWS, SHARD_ROWS, FILE_ROWS, DIM = 8, 4, 3, 16


class Light:
    """A model without torch, so that workers are quick to start: words to vectors, one after the other."""

    dim, max_tokens, device, pads, in_flight, tokenizer, threads = DIM, None, "cpu", True, 1, None, 1
    has_transformer, model = False, [None]
    prompts = {"document": "", "query": ""}

    def __init__(self, die_of):
        self.die_of = die_of

    def flops(self):
        return 0.0, 0.0

    def tokenize(self, texts, prompt):
        return tokens.unread(np.array([len(text.split()) for text in texts], np.int64), None, texts)

    def begin(self, tokens, role, prompt):
        self.die_of(DEADLY, tokens.texts)
        vectors = [sum(np.sin(np.arange(DIM) * (1 + int(word[1:]))) for word in text.split()) for text in tokens.texts]
        vectors = np.array(vectors, np.float32) + 0.01
        return lambda: vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Mortal(Embedder):
    """The real thing with a light model, killed by certain words."""

    def __init__(self, spec, folder, root, types, threads):
        embedder.SentenceEncoder = lambda *given: Light(self._die_of)  # in a process of its own
        super().__init__(spec, folder, root, types, threads)

    def _read(self, shard):
        for part in super()._read(shard):
            self._die_of(CURSED, part.texts)
            yield part

    def _die_of(self, word, texts):
        if any(word in text.split() for text in texts):
            with (self._root.path.parent / "deaths").open("a") as deaths:
                deaths.write(".")
            os.kill(os.getpid(), signal.SIGKILL)


def corpus(folder, deadly, cursed=()):
    """Eight rows in files of three, so that both shards span two; row 4, the first of shard 1, has no text."""
    texts = [f"w{number:03d} w{number + 20:03d}" for number in range(ROWS)]
    for row in deadly:
        texts[row] += f" {DEADLY}"
    for row in cursed:
        texts[row] += f" {CURSED}"
    texts[4] = None
    frame = pl.DataFrame({"_id": [f"doc-{number}" for number in range(ROWS)], "text": texts})
    (folder / "corpus").mkdir(exist_ok=True)
    for start in range(0, ROWS, FILE_ROWS):
        frame[start : start + FILE_ROWS].write_parquet(folder / f"corpus/{start:02d}.parquet")
    return str(folder / "corpus")


@pytest.fixture(scope="module")
def ray():
    """A cluster that jobs of this process find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # workers must find Mortal
        with Pool(Workers(count=1)) as pool:
            assert pool.plan.count == 1
            yield


@pytest.fixture
def job(spec, monkeypatch, tmp_path, ray):
    """A spec whose workers are mortal; the corpus is yet to be written."""
    monkeypatch.setattr(embed, "Embedder", Mortal)

    def make(source):
        return spec(
            corpus={"source": source, "id": "_id", "text": "text", "shard_rows": SHARD_ROWS},
            model__precision="float32",
            model__batch_tokens=64,
            prefixes=[{"dim": 8, "precision": "float16"}],
            transform={"kind": "pca"},
            evaluate={"shortlists": [], "k": 3},
            workers={"count": 1},
        )

    return make


def deaths(folder):
    path = folder / "deaths"
    return len(path.read_text()) if path.exists() else 0


def test_rows_that_end_their_worker_are_set_aside(job, tmp_path):  # slow: seven workers are started anew
    deadly = [5, 7]  # both ends of the usable rows of shard 1, in two files
    generation = run(job(corpus(tmp_path, deadly)))
    root = tmp_path / "root"
    aside = pl.read_parquet(root / "quarantine.parquet")
    assert aside["row"].to_list() == [4, *deadly]
    assert aside["id"].to_list() == [f"doc-{row}" for row in [4, *deadly]]
    assert aside["reason"].to_list() == ["null_text", *["model_error"] * 2]
    assert all(detail.startswith("ends the worker: ") for detail in aside["detail"][1:])
    assert aside["offset"].to_list() == [1, 2, 1]
    kept = pl.scan_lance(str(root / "lancedb/documents.lance")).collect()
    assert kept["row"].to_list() == [row for row in range(ROWS) if row not in (4, *deadly)]
    assert generation["corpus"]["reasons"] == {"null_text": 1, "model_error": 2}
    assert not verify.run(root).problems
    # Both shards are on the worker when it first dies; then each is tried alone. The shard at fault is tried three
    # times in all, then halved: of its three usable rows four trials die.
    assert deaths(tmp_path) == MAX_TRIES + 4
    before = deaths(tmp_path)
    assert run(job(str(tmp_path / "corpus")))["generation"] == 1
    assert deaths(tmp_path) == before


def test_a_shard_that_always_ends_its_worker_ends_the_job(job, tmp_path):
    with pytest.raises(PipelineError) as error:
        run(job(corpus(tmp_path, [], cursed=[6])))
    assert str(error.value).endswith("before any row of it was read; run again")
    assert "0000001[0:0]" in str(error.value)
    assert deaths(tmp_path) == MAX_TRIES + 1
    assert {path.stem for path in (tmp_path / "root/_state/embed").glob("0*.json")} == {"0000000"}
    assert not (tmp_path / "root/manifest.json").exists()
