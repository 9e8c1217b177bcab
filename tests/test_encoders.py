"""Models and batches: the same vectors as sentence-transformers, whatever the batch; failures cost one row."""

import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, strategies as st

from pipeline import run
from pipeline.encoders import batches, models, sentence
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.errors import DataError, PipelineError, SpecError
from tests.conftest import DIM, corpus_frame, save_model, texts


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget_in_order(tokens, budget):
    tokens = np.array(tokens)
    planned = batches.plan(tokens, budget)
    order = np.concatenate(planned)
    assert sorted(order.tolist()) == list(range(len(tokens)))
    assert [(tokens[row], row) for row in order] == sorted((tokens[row], row) for row in order)
    assert all(len(rows) == 1 or tokens[rows].max() * len(rows) <= budget for rows in planned)


class Fragile:
    """Refuses batches over a size and any batch with the word `poison`; counts its calls."""

    dim, max_tokens = 2, 4

    def __init__(self, largest=100):
        self.largest, self.sizes = largest, []

    def count_tokens(self, texts, prompt):
        return np.array([len((prompt + text).split()) for text in texts], np.int64)

    def encode(self, texts, role, prompt):
        self.sizes.append(len(texts))
        if len(texts) > self.largest:
            raise MemoryError("out of memory")
        if "poison" in texts:
            raise ValueError("index out of range")
        special = {"nan": [np.nan, 1], "huge": [np.inf, 0], "zero": [0, 0], "long": [3, 4], "near": [0.6, 0.8003]}
        return np.array([special.get(text, [1, 0]) for text in texts], np.float32)


def test_out_of_memory_halves_the_batch():
    encoder = Fragile(largest=3)
    out = batches.encode_rows(encoder, ["a"] * 10, "document", "", 1000)
    assert (out.vectors == [1, 0]).all()
    assert out.failed == {}
    assert max(encoder.sizes[1:]) < 10
    assert out.halvings == 3


def test_a_poison_row_costs_only_itself():
    out = batches.encode_rows(Fragile(), ["a", "poison", "nan", "zero", "huge", "long", "b"], "document", "", 1000)
    assert {row: reason for row, (reason, _) in out.failed.items()} == {
        1: "model_error", 2: "non_finite", 3: "zero_norm", 4: "non_finite",
    }  # fmt: skip
    assert out.vectors[[0, 5, 6]].tolist() == [[1, 0], [np.float32(0.6), np.float32(0.8)], [1, 0]]
    assert out.renormalised == 1


@pytest.mark.parametrize("largest", [1, 2, 3, 5])
@pytest.mark.parametrize("poison", ["poison", "nan", "zero"])
def test_out_of_memory_and_a_poison_row_at_once(largest, poison):
    texts = ["a", "long", "near", "c", "d", "long", "e", "f", "g"]
    plain = batches.encode_rows(Fragile(largest), texts, "document", "", 1000)
    for at in range(len(texts) + 1):
        out = batches.encode_rows(Fragile(largest), [*texts[:at], poison, *texts[at:]], "document", "", 1000)
        assert [*out.failed] == [at]
        assert out.vectors[at].tolist() == [0, 0]
        assert np.delete(out.vectors, at, axis=0).tobytes() == plain.vectors.tobytes()
        for counter in ("tokens", "padded_tokens", "cut_tokens", "halvings", "renormalised"):
            assert getattr(out, counter) == getattr(plain, counter)


class Raising(Fragile):
    """Raises what it is given, for batches of which `when` holds."""

    def __init__(self, error, when):
        super().__init__()
        self.error, self.when = error, when

    def encode(self, texts, role, prompt):
        if self.when(texts):
            self.sizes.append(len(texts))
            raise self.error
        return super().encode(texts, role, prompt)


AcceleratorError = type("AcceleratorError", (RuntimeError,), {})  # torch's, which older versions lack


@pytest.mark.parametrize(
    "error", [AcceleratorError("unspecified launch failure"), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_a_lost_device_is_no_rows_fault(error):
    encoder = Raising(error, lambda texts: "b" in texts)
    with pytest.raises(batches.DeviceLost, match=str(error)):
        batches.encode_rows(encoder, ["a", "b", "c"], "document", "", 1000)
    assert encoder.sizes == [3]
    assert isinstance(pickle.loads(pickle.dumps(batches.DeviceLost("gone"))), PipelineError)


def test_a_device_without_memory_is_not_lost():
    encoder = Raising(AcceleratorError("CUDA error: out of memory"), lambda texts: len(texts) > 2)
    out = batches.encode_rows(encoder, ["a"] * 8, "document", "", 1000)
    assert (out.failed, out.halvings) == ({}, 3)


def test_a_poison_row_is_found_in_a_logarithm_of_tries():
    encoder = Raising(ValueError(), lambda texts: "b" in texts)
    out = batches.encode_rows(encoder, ["a"] * 40 + ["b"] + ["a"] * 23, "document", "", 1000)
    assert [*out.failed] == [40]
    assert len(encoder.sizes) <= 2 * 6 + 2
    assert out.halvings == 0


def test_rows_that_raise_only_together_are_halved():
    encoder = Raising(ValueError(), lambda texts: {"b", "c"} <= {*texts})
    out = batches.encode_rows(encoder, ["a", "b", "c", "d"], "document", "", 1000)
    assert (out.failed, out.halvings) == ({}, 1)


class Spreading(Fragile):
    """One vector that is not a number makes the whole batch so."""

    def encode(self, texts, role, prompt):
        out = super().encode(texts, role, prompt)
        return out * (np.nan if "nan" in texts else 1)


def test_a_vector_that_spoils_its_batch_costs_only_itself():
    out = batches.encode_rows(Spreading(), ["a", "nan", "b", "nan", "c"], "document", "", 1000)
    assert [*out.failed] == [1, 3]


class Uncounting(Fragile):
    """Its tokenizer refuses a text."""

    def count_tokens(self, texts, prompt):
        if "b" in texts:
            raise UnicodeError("no token")
        return super().count_tokens(texts, prompt)


def test_a_text_that_cannot_be_counted_costs_only_itself():
    texts = ["a", "a a", "b", "a a a"]
    out = batches.encode_rows(Uncounting(), texts, "document", "", 4)
    assert out.failed == {2: ("model_error", "UnicodeError: no token")}
    assert (out.tokens, out.padded_tokens) == (6, 7)
    assert out.vectors[2].tolist() == [0, 0]


def test_progress_tells_of_each_kept_row_once():
    told = []
    texts = ["a", "poison", "nan", "b c", "zero"]
    batches.encode_rows(Fragile(), texts, "document", "", 2, lambda rows, tokens: told.append((rows, tokens)))
    assert told == [(1, 1), (1, 2)]


def test_bringing_a_vector_to_length_1_leaves_the_others_of_its_batch():
    alone = batches.encode_rows(Fragile(), ["near"], "document", "", 1000)
    beside = batches.encode_rows(Fragile(), ["near", "long"], "document", "", 1000)
    assert (alone.renormalised, beside.renormalised) == (0, 1)
    assert beside.vectors[0].tolist() == alone.vectors[0].tolist() == np.float32([0.6, 0.8003]).tolist()


def test_cut_tokens_are_counted():
    out = batches.encode_rows(Fragile(), ["a b c d e f", "a b c d", "a"], "document", "", 1000)
    assert (out.tokens, out.cut_rows, out.cut_tokens) == (9, 1, 2)


def test_a_model_that_returns_another_shape_stops_the_job():
    encoder = Fragile()
    encoder.dim = 3
    with pytest.raises(RuntimeError, match="returned"):
        batches.encode_rows(encoder, ["a"], "document", "", 10)


@pytest.fixture(scope="module")
def encoder(model):
    return SentenceEncoder(models.resolve(str(model)), None, None, 1)


def test_vectors_are_those_of_sentence_transformers(encoder, model):
    from sentence_transformers import SentenceTransformer

    some = texts(200)
    ours = batches.encode_rows(encoder, some, "document", "", 64).vectors
    theirs = SentenceTransformer(str(model), device="cpu").encode(some)
    assert np.sum(ours * theirs, axis=1).min() > 0.999999


def test_the_folder_tells_the_dimension_without_loading(model, tmp_path):
    assert models.resolve(str(model)).dim == DIM
    assert models.resolve("all-MiniLM-L6-v2").dim == 384


def test_prompts_of_the_model_are_used_unless_the_spec_has_its_own(model, tmp_path, spec):
    copy = shutil.copytree(model, tmp_path / "prompted")
    config = json.loads((copy / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "w001 ", "passage": "w002 "}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert SentenceEncoder(models.resolve(str(copy)), None, None, 1).prompts == {"query": "w001 ", "document": "w002 "}
    own = run(spec(model={"name": str(copy)}))["model"]["prompts"]
    assert own == {"query": "w001 ", "document": "w002 "}
    given_ = run(spec(model={"name": str(copy), "prompts": {"query": "", "document": "w009 "}}, root="other"))
    assert given_["model"]["prompts"] == {"query": "", "document": "w009 "}


def test_declared_dims_mean_no_transform(model, tmp_path, spec):
    copy = shutil.copytree(model, tmp_path / "mrl")
    (copy / "config.json").write_text(json.dumps({"matryoshka_dims": [32, 16, 8]}))
    generation = run(spec(model={"name": str(copy)}))  # 120 rows are too few to measure: the declaration decides
    assert (generation["transform"]["kind"], generation["transform"]["verdict"]["says"]) == ("none", "unsure")
    assert generation["tables"]["parameters"]["rows"] == 1  # the rotation of the bits
    assert (
        run(spec(root="plain", prefixes=[{"dim": 8, "precision": "int8"}], model={"name": str(copy)}))["tables"][
            "parameters"
        ]["rows"]
        == 0
    )
    assert run(spec(root="other", transform={"kind": "pca"}))["transform"]["kind"] == "pca"


def test_a_model_without_unit_length_is_normalised_with_a_warning(tmp_path, spec, caplog):
    folder = save_model(tmp_path / "plain")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    generation = run(spec(model={"name": str(folder)}))
    vectors = pl.scan_lance(f"{generation['spec']['root']}/lancedb/documents.lance").collect()["vector"].to_numpy()
    assert np.abs(np.linalg.norm(vectors.astype(np.float32), axis=1) - 1).max() < 1e-3
    assert "dot-product scores are lost" in caplog.text


def test_rows_the_model_cannot_embed_are_quarantined_with_their_reason(tmp_path, spec, corpus_file):
    frame = corpus_frame()
    bad = frame.with_columns(
        title=pl.lit(None, pl.String),
        text=pl.when(pl.int_range(120) == 7).then(pl.lit("unknown words")).when(pl.int_range(120) == 9)
        .then(pl.lit("broken w001")).otherwise(pl.col("text")),
    )  # fmt: skip
    bad.write_parquet(corpus_file)
    job = spec(corpus__shard_rows=50)
    generation = run(job)
    aside = pl.read_parquet(f"{job.root}/quarantine.parquet")
    assert aside.select("row", "id", "shard", "offset", "reason").rows() == [
        (7, "doc-7", 0, 7, "zero_norm"),
        (9, "doc-9", 0, 9, "non_finite"),
    ]
    assert generation["corpus"]["quarantined"] == 2
    kept = pl.scan_lance(f"{job.root}/lancedb/documents.lance").collect()
    assert kept["row"].to_list() == [row for row in range(120) if row not in (7, 9)]
    from pipeline import open_index

    assert open_index(job.root).search("w001", k=5)["row"].to_list() != []


def test_a_folder_with_a_changed_file_is_not_loaded(model, tmp_path):
    folder = models.resolve(str(shutil.copytree(model, tmp_path / "copy")))
    (tmp_path / "copy" / "modules.json").write_text("[]")
    with pytest.raises(DataError, match="one copy of the model"):
        SentenceEncoder(folder, None, None, 1)


def test_a_hub_id_is_read_from_the_local_cache(model, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(model, tmp_path / "models--org--stand-in" / "snapshots" / commit)
    folder = models.resolve("org/stand-in", commit)
    assert (folder.digest, folder.revision) == (models.resolve(str(model)).digest, commit)


def test_limits_of_max_tokens(model):
    with pytest.raises(SpecError, match="texts of any length"):
        SentenceEncoder(models.resolve(str(model)), 5, None, 1)
    with pytest.raises(SpecError, match="512 positions, 513 were asked for"):
        SentenceEncoder(models.resolve("all-MiniLM-L6-v2"), 513, None, 1)


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder(models.resolve("all-MiniLM-L6-v2"), 64, None, 2)


PASSAGES = [
    "A short one.",
    "The median is the middle value of a sorted list of numbers. " * 3,
    "Threads wait for an event until another thread sets it. " * 30,
    "日本語のテキスト and emoji 👩‍🚀, all in one row",
] * 8


def test_the_real_model_agrees_with_its_library(minilm):
    theirs = minilm._model.encode(PASSAGES)
    out = batches.encode_rows(minilm, PASSAGES, "document", "", 512)
    assert np.sum(out.vectors * theirs, axis=1).min() > 0.99999
    assert out.cut_rows == 8
    assert out.padded_tokens <= 1.2 * out.tokens


def trained(kind):
    """A small tokenizer that reads bytes, or pieces without a break at spaces."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        tokenizer, trainer = Tokenizer(kinds.BPE()), trainers.BpeTrainer(vocab_size=400, show_progress=False)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    else:
        tokenizer = Tokenizer(kinds.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator(PASSAGES[:4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizers(minilm):
    made = {"words": minilm._model.tokenizer, "bytes": trained("bytes"), "pieces": trained("pieces")}
    return {name: SimpleNamespace(_model=SimpleNamespace(tokenizer=one)) for name, one in made.items()}


PARTS = st.sampled_from(
    [
        "the",
        "median",
        "日本",
        "[SEP]",
        "a" * 90,
        "b" * 3_000,
        " ",
        "\n" * 700,
        "!?",
        "e\u0301",
        "\u0301" * 200,
        "👩‍🚀",
        "-",
    ]
)


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
@given(st.lists(st.tuples(PARTS, st.integers(1, 40)), max_size=12), st.sampled_from(["", "query: "]), st.integers(3, 9))
@example([(" ", 80), ("b" * 3_000, 1)], "", 3)  # cut, the word would be short enough to have pieces
def test_the_start_of_a_huge_text_gives_the_tokens_of_the_whole(tokenizers, kind, parts, prompt, limit):
    text = "".join(part * times for part, times in parts)
    encoder = SentenceEncoder.__new__(SentenceEncoder)
    encoder._model, encoder.max_tokens = tokenizers[kind]._model, limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentence, "HUGE", 300)
        (head,) = encoder._heads([text], prompt)
        (count,) = encoder.count_tokens([text], prompt)
    whole, read = (
        tokenizers[kind]._model.tokenizer(prompt + one, truncation=True, max_length=limit)["input_ids"]
        for one in (text, head)
    )
    assert read == whole
    assert text.startswith(head)
    assert len(head) in {len(text), *(sentence.HEAD * limit * 4**times for times in range(6))}
    true = len(tokenizers[kind]._model.tokenizer(prompt + text)["input_ids"])
    assert count == true if head == text else limit < count <= true


@pytest.mark.parametrize("text", ["!?" * 5_000_000, "the median " * 900_000, "\n" * 50_000 + "日" * 5_000_000])
def test_a_huge_text_is_not_tokenized_whole(minilm, monkeypatch, text):
    read = []
    inner = SentenceEncoder._ids
    monkeypatch.setattr(SentenceEncoder, "_ids", lambda self, whole: read.extend(map(len, whole)) or inner(self, whole))
    out = batches.encode_rows(minilm, ["short", text], "document", "", 512)
    assert sum(read) < 10 * 50_000 * 4
    assert (out.failed, out.cut_rows) == ({}, 1)


def test_a_word_of_a_megabyte_is_one_unknown_token(minilm):
    assert minilm.count_tokens(["a" * 1_000_000, "a" * 1_000_000 + " b"], "").tolist() == [3, 4]


def test_the_probe_switches_only_within_min_cosine(minilm):
    figures = minilm.probe(PASSAGES, "", 512, min_cosine=1.0)
    assert figures["precision"] == minilm.precision == "float32"
    assert 0.999 < figures["cosine"] < 1.0


def test_bfloat16_keeps_the_direction():
    full = SentenceEncoder(models.resolve("all-MiniLM-L6-v2"), 64, None, 2)
    exact = batches.encode_rows(full, PASSAGES[:8], "document", "", 512).vectors
    full.use("bfloat16")
    half = batches.encode_rows(full, PASSAGES[:8], "document", "", 512)
    assert np.sum(exact * half.vectors, axis=1).min() > 0.999
    assert half.renormalised == 0
