"""Backends: which one is taken and why, the verdict that is kept, and OpenVINO beside torch."""

import json
import sys

import numpy as np
import pytest

from pipeline import run
from pipeline.encoders import batches, choose, models, openvino
from pipeline.encoders.choose import Choice
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.static import StaticEncoder
from pipeline.errors import PipelineError, SpecError
from pipeline.spec import Model

WORDS = [
    "A short one.",
    "The median is the middle value of a list.",
    "Threads wait for an event. " * 9,
    "日本語 and 👩‍🚀",
]
TEXTS = [f"{text} {number}" for number, text in enumerate(WORDS * 2)]


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder(models.resolve("all-MiniLM-L6-v2"), 64, None, 2)


@pytest.fixture(scope="module")
def exact(minilm):
    return batches.encode_rows(minilm, TEXTS, "document", "", 512).vectors


@pytest.fixture(scope="module")
def graph(minilm):
    return openvino.converted(minilm, "")


def wanted(**fields):
    return Model(name="all-MiniLM-L6-v2", **fields)


@pytest.fixture
def timed(monkeypatch, graph):
    """The probe's clock: rows per second by the encoder's kind, and what it loses; counts the probes."""
    monkeypatch.setattr(openvino, "converted", lambda *given: graph)
    monkeypatch.setattr(openvino, "precisions", lambda: ["bfloat16", "float32"])

    def make(**rates):
        count = []

        def clock(self, encoder, texts):
            name = type(encoder).__name__ if isinstance(encoder, openvino.OpenVINOEncoder) else encoder.precision
            rate, loss = rates[name]
            count.append(name)
            return np.tile(np.float32([1 - loss, np.sqrt(1 - (1 - loss) ** 2)]), (len(texts), 1)), rate

        monkeypatch.setattr(choose._Probe, "_timed", clock)
        return count

    return make


QUICK = {"float32": (10, 0), "bfloat16": (20, 1e-5), "OpenVINOEncoder": (30, 1e-5)}


@pytest.mark.parametrize(
    ("rates", "fields", "taken"),
    [
        (QUICK, {}, Choice("openvino", "bfloat16")),
        (QUICK, {"backend": "torch"}, Choice("torch", "bfloat16")),
        (QUICK, {"precision": "bfloat16"}, Choice("openvino", "bfloat16")),
        (QUICK, {"min_cosine": 1.0}, Choice("torch", "float32")),
        (QUICK | {"OpenVINOEncoder": (30, 2e-4)}, {}, Choice("torch", "bfloat16")),
        (QUICK | {"OpenVINOEncoder": (11, 0), "bfloat16": (11, 0)}, {}, Choice("torch", "float32")),  # not worth it
    ],
)
def test_the_fastest_that_keeps_the_cosine_is_taken(minilm, timed, rates, fields, taken):
    timed(**rates)
    chosen = choose.choose(minilm, wanted(**fields), TEXTS, "", 512)
    assert chosen.choice == taken
    assert chosen.figures["candidates"]["torch/float32"] == {"rows_per_second": 10, "cosine": 1.0}
    assert chosen.figures["rows"] == len(TEXTS)


def test_what_is_asked_for_outright_is_not_probed(minilm, timed):
    count = timed()
    assert (
        choose.choose(minilm, wanted(backend="torch", precision="bfloat16"), TEXTS, "", 512).choice.precision
        == "bfloat16"
    )
    assert choose.choose(minilm, wanted(backend="torch", precision="float32"), TEXTS, "", 512).encoder is minilm
    assert (
        choose.choose(minilm, wanted(backend="openvino", precision="float32"), TEXTS, "", 512).choice.backend
        == "openvino"
    )
    assert count == []


def test_a_verdict_is_kept_by_machine_and_model(minilm, timed, monkeypatch):
    count = timed(**QUICK)
    first = choose.choose(minilm, wanted(), TEXTS, "", 512)
    probed = len(count)
    again = choose.choose(minilm, wanted(), TEXTS, "", 512)
    assert (again.choice, len(count)) == (first.choice, probed)
    assert again.figures["candidates"] == first.figures["candidates"]
    assert again.figures["cached"]
    choose.choose(minilm, wanted(min_cosine=0.99991), TEXTS, "", 512)
    assert len(count) > probed
    monkeypatch.setattr(choose, "_processor", lambda base: "another one")
    probed = len(count)
    choose.choose(minilm, wanted(), TEXTS, "", 512)
    assert len(count) > probed


@pytest.mark.parametrize(
    ("rows", "taken"),
    [(0, Choice("torch", "bfloat16", "packed")), (choose.COMPILED_ROWS, Choice("torch", "bfloat16", "packed", True))],
)
def test_on_a_gpu_compiling_is_tried_where_it_can_pay(minilm, monkeypatch, rows, taken):
    monkeypatch.setattr(minilm, "device", "cuda")
    monkeypatch.setattr(choose, "_processor", lambda base: "a GPU")
    speeds = {"packed": 20, "compiled": 30}
    monkeypatch.setattr(choose, "build", lambda base, choice, prompt, graph=None: choice)

    def clock(self, encoder, texts):
        rate = speeds.get(encoder.name.split("/")[-1], 15) if isinstance(encoder, Choice) else 10
        return np.eye(len(texts), 8) + 1, rate

    monkeypatch.setattr(choose._Probe, "_timed", clock)
    for _ in range(2):  # probed, then kept
        assert choose.choose(minilm, wanted(backend="torch"), TEXTS, "", 512, rows).choice == taken


def test_names_of_choices():
    assert Choice("torch", "float16").name == "torch/float16"
    assert Choice("torch", "float16", "packed", True).name == "torch/float16/packed/compiled"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"choice": {"backend": "torch"}}', '{"choice": 7, "figures": 1}'])
def test_a_damaged_verdict_is_made_anew(minilm, timed, tmp_path, damage):
    count = timed(**QUICK)
    choose.choose(minilm, wanted(), TEXTS, "", 512)
    (path,) = tmp_path.glob("**/probe/*.json")
    assert json.loads(path.read_text())["choice"]["backend"] == "openvino"
    path.write_text(damage)
    probed = len(count)
    assert choose.choose(minilm, wanted(), TEXTS, "", 512).choice.backend == "openvino"
    assert len(count) == 2 * probed


def test_an_engine_that_fails_is_no_candidate(minilm, timed, monkeypatch):
    timed(**QUICK)
    monkeypatch.setattr(openvino, "converted", lambda *given: 1 / 0)
    chosen = choose.choose(minilm, wanted(), TEXTS, "", 512)
    assert chosen.choice == Choice("torch", "bfloat16")
    assert chosen.figures["candidates"]["openvino/bfloat16"] == {"refused": "division by zero"}


def test_int8_is_tried_only_where_the_user_allows_a_loss(minilm, timed, monkeypatch):
    timed(**QUICK)
    monkeypatch.setattr(openvino, "quantized", lambda *given: pytest.fail("quantized"))
    choose.choose(minilm, wanted(), TEXTS, "", 512)
    tried = []
    monkeypatch.setattr(openvino, "quantized", lambda *given: tried.append(given[2]) or given[2])
    chosen = choose.choose(minilm, wanted(min_cosine=0.99), TEXTS, "", 512)
    assert len(tried) == 1
    assert "openvino/int8" in chosen.figures["candidates"]


def test_the_probe_on_this_machine_keeps_what_it_promises(minilm, exact):
    chosen = choose.choose(minilm, wanted(), TEXTS, "", 512)
    vectors = batches.encode_rows(chosen.encoder, TEXTS, "document", "", 512).vectors
    assert np.mean(np.sum(exact * vectors, axis=1)) >= 0.9999
    assert "torch/float32" in chosen.figures["candidates"]


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.999999), ("bfloat16", 0.9995)])
def test_openvino_gives_torchs_vectors(minilm, exact, graph, precision, least):
    encoder = openvino.OpenVINOEncoder(minilm, "", precision, graph)
    for budget in (64, 4_096):
        out = batches.encode_rows(encoder, TEXTS, "document", "", budget)
        assert np.sum(exact * out.vectors, axis=1).min() > least
        assert (out.failed, out.renormalised) == ({}, 0)
    again = batches.encode_rows(encoder, TEXTS, "document", "", 4_096)
    assert again.vectors.tobytes() == out.vectors.tobytes()
    assert len(encoder._idle) == encoder.in_flight


def test_openvino_has_its_prompt(minilm, exact):
    encoder = openvino.OpenVINOEncoder(minilm, "query: ", "float32", openvino.converted(minilm, "query: "))
    theirs = minilm.model.encode(TEXTS, prompt="query: ")
    assert (
        np.sum(theirs * batches.encode_rows(encoder, TEXTS, "document", "query: ", 512).vectors, axis=1).min() > 0.99999
    )
    with pytest.raises(ValueError, match="for documents with the prompt"):
        encoder.begin(minilm.tokenize(["a"], ""), "document", "")


def test_int8_travels_as_bytes_and_keeps_most(minilm, exact, graph):
    small = openvino.quantized(minilm, "", graph, TEXTS, 512)
    made = choose.build(minilm, Choice("openvino", "int8"), "", small)
    vectors = batches.encode_rows(made, TEXTS, "document", "", 512).vectors
    assert 0.97 < np.sum(exact * vectors, axis=1).mean() < 0.9999
    assert len(small[1]) < 30_000_000  # of 90 MB in float32


def test_a_worker_without_openvino_says_so(minilm, monkeypatch):
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(PipelineError, match=r"lacks; install the extra \[openvino\]"):
        choose.build(minilm, Choice("openvino", "bfloat16"), "")
    with pytest.raises(SpecError, match=r"model.backend: openvino is not installed; pip install"):
        choose.choose(minilm, wanted(backend="openvino"), TEXTS, "", 512)
    assert choose.choose(minilm, wanted(precision="bfloat16"), TEXTS, "", 512).choice.backend == "torch"


def test_nothing_is_sent_to_its_maker(minilm):
    openvino._openvino()
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.parametrize("fields", [{"backend": "openvino"}, {"precision": "bfloat16"}])
def test_a_static_model_has_one_way(model, fields):
    base = SentenceEncoder(models.resolve(str(model)), None, None, 1)
    (field,) = fields
    with pytest.raises(SpecError, match=f"model.{field}: this model has no transformer"):
        choose.choose(base, Model(name=str(model), **fields), ["w001"], "", 512)
    assert isinstance(choose.choose(base, Model(name=str(model)), ["w001"], "", 512).encoder, StaticEncoder)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "torch", "precision": "int8"}, "int8 is for backend: openvino"),
        ({"backend": "openvino", "precision": "float16"}, "float16 is for backend: torch"),
    ],
)
def test_engines_have_their_precisions(fields, told):
    with pytest.raises(ValueError, match=told):
        wanted(**fields)


def test_a_job_on_openvino_in_int8(spec, corpus_file):
    """From file to tables: the quantized graph is kept in the root and found again by a second run."""
    job = spec(
        model={"name": "all-MiniLM-L6-v2", "backend": "openvino", "precision": "int8", "max_tokens": 16},
        corpus__shard_rows=50,
    )
    generation = run(job)
    assert {key: generation["model"][key] for key in ("backend", "precision", "attention")} == {
        "backend": "openvino", "precision": "int8", "attention": "padded",
    }  # fmt: skip
    embed = generation["embed"]
    assert embed["tokens"] <= embed["padded_tokens"] <= 1.2 * embed["tokens"]
    assert embed["squared_tokens"] > embed["tokens"]
    for name in ("read", "tokenize", "waiting", "forward", "write"):
        assert 0 <= embed[f"{name}_seconds"] <= embed["seconds"]
    assert run(job)["generation"] == 1
