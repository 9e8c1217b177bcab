"""The embedding benchmark runs, tells what it promises, and lets no contender's seconds count whose answers differ."""

import json
import math
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.docstrings import stdlib
from tests.bench.embed import drive, parts, raw, report, serve, speed, texts
from tests.bench.embed.__main__ import main
from tests.bench.embed.drive import Apart, Bench, Failed
from tests.bench.embed.speed import Contender
from tests.bench.embed.texts import Texts

MINILM = {"layers": 6, "width": 384, "inner": 1536}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A static model of the words that docstrings have most often."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Counter(word for row in stdlib() for word in row["text"].split())
    names = ["[UNK]", *(word for word, _ in words.most_common(300))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).standard_normal((len(names), 16)).astype(np.float32)
    modules = [StaticEmbedding(tokenizer, embedding_weights=weights), Normalize()]
    folder = tmp_path_factory.mktemp("model") / "static"
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def told(static, tmp_path_factory):
    """The results of a quick run of everything that needs no other environment."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--quick", "--rows", "12", "--rounds", "3", "--fidelity-rows", "5", "--model", str(static)]
    main([*options, "--out", str(out)])
    assert not (out / "work").exists()
    return json.loads((out / "results.json").read_text())


def test_a_quick_run_tells_every_figure_of_every_contender(told):
    rows = {(row["set"], row["contender"]): row for row in told["speed"]}
    wanted = {"st-default", "st-best", "ours", "roof"}
    assert set(rows) == {(name, one) for name in ("docstrings", "mixed") for one in wanted}
    for (name, _), row in rows.items():
        assert len(row["seconds"]) == 3
        assert row["median_seconds"] == sorted(row["seconds"])[1]
        assert math.isclose(row["documents_per_second"] * row["median_seconds"], told["sets"][name]["documents"])
        assert row["cosine"] > speed.SAME
    ours = rows["docstrings", "ours"]["details"]
    assert ours["facts"]["precision"] == "float32"
    assert 0 < ours["startup_seconds"] < ours["total_seconds"]
    assert ours["tokens"] == told["sets"]["docstrings"]["tokens"]
    assert {"cpu", "cores", "packages", "date", "commit"} <= set(told["machine"])


def test_static_models_are_measured_with_both_tokenizers(told):
    names = {row["contender"] for row in told["static"]}
    assert {"st-default", "st-best", "ours", "ours-plain", "encoder", "encoder-plain"} <= names
    assert ("model2vec-default" in names) == ("model2vec" not in told["left_out"])
    plain = next(row for row in told["static"] if row["contender"] == "encoder-plain")
    assert plain["details"]["tokenizer"] == "tokenizers"
    assert all(row["cosine"] > speed.SAME for row in told["static"])


def test_answers_are_compared_on_every_set_with_prompts(told):
    assert {(row["set"], row["prompt"]) for row in told["fidelity"]} == {
        (name, prompt) for name in ("docstrings", "mixed") for prompt in parts.PROMPTS
    }
    assert all(row["least_cosine"] > speed.SAME for row in told["fidelity"])


def test_memory_is_told_for_growing_corpora(told):
    assert [row["documents"] for row in told["memory"]] == [10, 50, 250]
    assert all(row["peak_memory_bytes"] > 10_000_000 for row in told["memory"])


def test_the_tables_have_a_line_for_each_row(told):
    lines = report.text(told).splitlines()
    for row in [*told["speed"], *told["static"]]:
        assert any(line.startswith(row["set"]) and f" {row['contender']} " in line for line in lines)
    for title in ("sweep", "file to table", "static model", "cosine to", "memory of a worker", "ours, times as fast"):
        assert any(line.startswith(title) for line in lines), title


def bench(tmp_path):
    (tmp_path / "work").mkdir(exist_ok=True)
    return Bench(tmp_path, tmp_path, "model", "0" * 64, quick=True)


def some(tmp_path, count=2):
    return Texts("some", str(tmp_path), count, None, np.array([128] * count))


def fake(name, seconds, vectors, order=None):
    """A contender that takes so many seconds, by round, and answers with these vectors."""
    left = list(seconds)

    def run(of, out):
        if order is not None:
            order.append(name)
        if out:
            np.save(out, np.array(vectors, np.float32))
        return {"seconds": left.pop(0)}

    return Contender(name, run)


def test_seconds_of_other_answers_do_not_count(tmp_path):
    held = bench(tmp_path)
    taken = [fake(speed.DEFAULT, [4], [[1, 0], [0, 1]]), fake("quick-and-wrong", [1], [[1, 0], [1, 0]])]
    rows = speed.rounds(held, some(tmp_path), taken, 1, None, None)
    assert [row["contender"] for row in rows] == [speed.DEFAULT]
    assert "mean cosine 0.5000" in held.left_out["quick-and-wrong on some"]


def test_rounds_alternate_and_ratios_are_of_the_same_round(tmp_path):
    order = []
    taken = [fake(speed.DEFAULT, [4, 40, 9], np.eye(2), order), fake("ours", [2, 10, 3], np.eye(2), order)]
    default, ours = speed.rounds(bench(tmp_path), some(tmp_path), taken, 3, None, None)
    assert order == ["st-default", "ours", "ours", "st-default", "st-default", "ours"]
    assert default["times_default"] == 1
    assert (ours["median_seconds"], ours["times_default"]) == (3, 3)
    assert speed.ratios([default, ours]) == [{"set": "some", "ours": "ours", "other": "st-default", "times": 3.0}]


def test_utilisation_is_of_the_best_rate_measured_beside_a_run(tmp_path):
    work = raw.flops(MINILM, np.array([128, 128]))
    rates = iter([work, 4 * work, 2 * work])
    peak = lambda **_: {"flops_per_second": next(rates)}  # noqa: E731
    taken = [fake(speed.DEFAULT, [0.5], np.eye(2)), fake("ours", [0.5], np.eye(2))]
    first, second = speed.rounds(bench(tmp_path), some(tmp_path), taken, 1, peak, MINILM)
    assert (first["mfu"], second["mfu"]) == (0.5, 0.5)


def test_operations_are_those_of_the_formula():
    """24·L·h² a token and 4·L·h a token squared, by hand for MiniLM at 128 tokens: 22.4 MFLOP a token."""
    assert raw.flops(MINILM, np.array([128])) == 128 * (24 * 6 * 384**2 + 4 * 128 * 384 * 6)
    assert raw.flops(None, np.array([128])) is None


def test_the_sweep_takes_the_quickest_of_each_class_and_names_who_is_missing(tmp_path):
    held, tried = bench(tmp_path), []

    def variant(vector, rate):
        def ask(texts, max_tokens, batch, out):
            tried.append(batch)
            np.save(out, np.array([vector], np.float32))
            return {"seconds": 1 / (rate + (batch == 64))}

        return ask

    def missing(**asked):
        raise Failed("cannot be installed")

    variants = {
        ("torch", "float32"): variant([1, 0], 10), ("torch", "bfloat16"): variant([1, 0.001], 30),
        ("openvino", "int8"): variant([1, 0.1], 50), ("onnx", "int8"): missing, ("onnx", "O3"): variant([0, 1], 99),
    }  # fmt: skip
    one = some(tmp_path, 1)
    best, rows = speed.sweep(held, one, (one, one), variants, (16, 64))
    assert [(found.name, found.setting) for found in best] == [
        ("st-best", {"backend": "torch", "precision": "bfloat16", "batch": 64}),
        ("st-best-int8", {"backend": "openvino", "precision": "int8", "batch": 64}),
    ]
    assert held.left_out == {"st-onnx-int8": "cannot be installed"}
    assert len(rows) == 4 + 1 + 2 + 2


def test_a_peer_in_its_own_process_answers_and_fails_in_words(tmp_path):
    program = "\n".join(
        [
            "from tests.bench.embed import serve",
            "def make(options):",
            "    def handle(asked):",
            "        print('noise')",
            "        if asked['value'] == 2: raise ValueError('no twos')",
            "        if asked['value'] == 3: raise SystemExit('gone')",
            "        return {'value': asked['value'] * options['by']}",
            "    return handle",
            "serve.serve(make)",
        ]
    )
    peer = Apart([sys.executable, "-c", program, '{"by": 10}'], tmp_path / "log", {})
    try:
        assert peer.loaded["versions"]["numpy"] == np.__version__
        assert peer(value=4) == {"value": 40}
        with pytest.raises(Failed, match="ValueError: no twos"):
            peer(value=2)
        assert peer(value=5) == {"value": 50}
        with pytest.raises(Failed, match="its process ended with 1: gone"):
            peer(value=3)
    finally:
        peer.close()


def test_an_environment_that_pip_cannot_make_is_a_reason(tmp_path, monkeypatch):
    calls = []

    class Done:
        returncode, stderr = 1, "some words\nERROR: No matching distribution found for optimum-onnx"

    monkeypatch.setattr(drive.subprocess, "run", lambda command, **_: calls.append(command) or Done)
    held = Bench(tmp_path, tmp_path, "model", "0" * 64)
    ask = held.peer("st-onnx-float32", {"kind": "sentence-transformers", "backend": "onnx"})
    for _ in range(2):
        with pytest.raises(Failed, match="cannot be installed: ERROR: No matching distribution found for optimum-onnx"):
            ask(texts="none")
    assert len(calls) == 1


def test_cosines_are_row_by_row(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[2, 0], [0, 3], [0, 0]], np.float32))
    np.save(tmp_path / "b.npy", np.array([[1, 0], [3, 4], [0, 0]], np.float32))
    found = speed.compared(tmp_path / "a.npy", tmp_path / "b.npy")
    assert math.isclose(found["cosine"], (1 + 0.8 + 1) / 3)
    assert math.isclose(found["least_cosine"], 0.8)
    np.save(tmp_path / "b.npy", np.zeros((2, 2), np.float32))
    assert speed.compared(tmp_path / "a.npy", tmp_path / "b.npy")["cosine"] == 0


def test_the_quality_of_a_ranking_by_hand():
    documents = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    assert math.isclose(
        parts._ndcg(np.array([[1.0, 0], [0, 1]]), documents, np.array([0, 2])), (1 + 1 / math.log2(3)) / 2
    )


def test_sets_hold_different_texts_and_are_the_same_for_everyone(tmp_path):
    data = tmp_path / "data"
    for name, file, columns in (
        ("arxiv-abstracts", "corpus", {"title": ["t", "t", "u"], "text": ["a b c", "a b c", "d e"]}),
        ("squad-dev", "queries", {"text": ["why", " ", "who"]}),
        ("xquad", "corpus", {"text": ["eins", "zwei"]}),
    ):
        (data / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), data / name / f"{file}.parquet")
    found = texts.sources(data)
    assert (found["abstracts"], found["questions"], found["xquad"]) == (
        ["t\na b c", "u\nd e"], ["why", "who"], ["eins", "zwei"],
    )  # fmt: skip
    with pytest.raises(SystemExit, match="DATA is a folder with arxiv-abstracts/corpus.parquet"):
        texts.sources(tmp_path)
    count = lambda given, limit: np.minimum([len(text.split()) for text in given], limit or 99)  # noqa: E731
    made = texts.write(tmp_path, "some", found["abstracts"], 3, count)
    assert serve.texts(made.json) == pq.read_table(made.parquet)["text"].to_pylist() == found["abstracts"]
    assert made.tokens.tolist() == [3, 3]


def test_mixed_texts_have_every_length():
    words = [" ".join(f"w{number}" for number in range(5_000))]
    lengths = [len(text.split()) * texts.TOKENS_PER_WORD for text in texts.mixed(words, 2_000, 0)]
    assert min(lengths) < 10
    assert 480 < max(lengths) <= 500
    assert abs(np.mean(lengths) - 252) < 10
    assert texts.mixed(words, 5, 0) == texts.mixed(words, 5, 0) != texts.mixed(words, 5, 1)


def test_parts_and_sets_that_nobody_knows_are_refused(tmp_path, static):
    with pytest.raises(SystemExit, match="there are speed, static, fidelity, memory, quality"):
        main(["--parts", "sped", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no set 'abstracts' here; there are: docstrings, mixed"):
        main(["--sets", "abstracts", "--quick", "--model", str(static), "--out", str(tmp_path)])
