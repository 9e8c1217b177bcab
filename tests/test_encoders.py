"""Models: which files they are, and the same vectors as sentence-transformers by every way to run them."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from pipeline import run
from pipeline.encoders import batches, models
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.static import StaticEncoder
from pipeline.errors import DataError, SpecError
from tests.conftest import DIM, WORDS, corpus_frame, save_model, texts


@pytest.fixture(scope="module")
def encoder(model):
    return SentenceEncoder(models.resolve(str(model)), None, None, 1)


@pytest.mark.parametrize("prompt", ["", "w001 "])
@pytest.mark.parametrize("way", ["modules", "table"])
def test_vectors_are_those_of_sentence_transformers(encoder, model, way, prompt):
    from sentence_transformers import SentenceTransformer

    some = texts(200)
    by = StaticEncoder.of(encoder) if way == "table" else encoder
    ours = batches.encode_rows(by, some, "document", prompt, 64)
    theirs = SentenceTransformer(str(model), device="cpu").encode(some, prompt=prompt or None)
    assert np.sum(ours.vectors * theirs, axis=1).min() > 0.999999
    assert ours.tokens == sum(len((prompt + text).split()) for text in set(some))
    assert (ours.padded_tokens == ours.tokens) == (way == "table")


def test_a_static_model_without_unit_length_is_left_so(tmp_path):
    folder = save_model(tmp_path / "plain")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    table = StaticEncoder.of(SentenceEncoder(models.resolve(str(folder)), None, None, 1))
    weights = table._table.numpy()
    ids = [2, 3, 4]  # w000 w001 w002, behind the two unknown ones
    got = table.begin(table.tokenize(["w000 w001 w002"], ""), "document", "")()
    assert np.allclose(got[0], weights[ids].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_model2vec_folder_is_a_static_model(tmp_path, kind):
    """As model2vec writes it: fewer vectors than words, a weight for each word."""
    from safetensors.numpy import save_file

    folder = save_model(tmp_path / "plain")
    count = len(WORDS) + 2
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((50, DIM)).astype(kind)
    mapping, weights = rng.integers(0, 50, count), rng.random(count).astype(np.float64)
    for path in folder.glob("0_StaticEmbedding/*"):
        shutil.move(path, folder / path.name)
    save_file({"embeddings": stored, "mapping": mapping, "weights": weights}, folder / "model.safetensors")
    kinds = [("StaticEmbedding", "."), ("Normalize", "1_Normalize")]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{name}"}
        for at, (name, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = SentenceEncoder(models.resolve(str(folder)), None, None, 1)
    got = batches.encode_rows(StaticEncoder.of(encoder), ["w000 w001 w005"], "document", "", 100).vectors[0]
    ids = [2, 3, 7]
    wanted = (stored[mapping[ids]].astype(np.float64) * weights[ids, None]).mean(axis=0)
    assert np.allclose(got, wanted / np.linalg.norm(wanted), atol=2e-3)


def test_a_model_with_a_layer_behind_the_table_is_run_as_it_is(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.dense import Dense

    model = SentenceTransformer(str(save_model(tmp_path / "plain")), device="cpu")
    SentenceTransformer(modules=[model[0], Dense(DIM, 8), model[1]], device="cpu").save(
        str(tmp_path / "dense"), create_model_card=False
    )
    encoder = SentenceEncoder(models.resolve(str(tmp_path / "dense")), None, None, 1)
    assert StaticEncoder.of(encoder) is None
    ours = batches.encode_rows(encoder, texts(20), "document", "", 64).vectors
    theirs = SentenceTransformer(str(tmp_path / "dense"), device="cpu").encode(texts(20))
    assert np.abs(ours - theirs).max() < 1e-5


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
    theirs = minilm.model.encode(PASSAGES)
    out = batches.encode_rows(minilm, PASSAGES, "document", "", 512)
    assert np.sum(out.vectors * theirs, axis=1).min() > 0.99999
    assert (out.cut_rows, out.repeats) == (1, 28)


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("role", ["document", "query"])
def test_prompts_are_read_as_the_library_does(minilm, role, prompt):
    theirs = minilm.model.encode(PASSAGES[:4], prompt=prompt or None)
    out = batches.encode_rows(minilm, PASSAGES[:4], role, prompt, 512)
    assert np.sum(out.vectors * theirs, axis=1).min() > 0.999999
    assert minilm.tokenize(["a"], prompt).texts is None  # on ids that are ready


def test_a_prompt_that_is_not_pooled_is_left_out(tmp_path):
    from sentence_transformers import SentenceTransformer

    source = models.resolve("all-MiniLM-L6-v2").path
    folder = shutil.copytree(source, tmp_path / "bare")
    config = json.loads((folder / "1_Pooling/config.json").read_text())
    (folder / "1_Pooling/config.json").write_text(json.dumps(config | {"include_prompt": False}))
    encoder = SentenceEncoder(models.resolve(str(folder)), 64, None, 2)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(PASSAGES[:1], prompt="query: ")
    ours = batches.encode_rows(encoder, PASSAGES[:1], "document", "query: ", 512).vectors
    pooled = batches.encode_rows(
        SentenceEncoder(models.resolve(source), 64, None, 2), PASSAGES[:1], "document", "query: ", 512
    )
    assert np.sum(ours * theirs) > 0.999999
    assert np.sum(ours * pooled.vectors) < 0.999


def test_operations_are_those_of_the_formula(minilm):
    assert minilm.flops() == (24 * 6 * 384**2, 4 * 6 * 384)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_the_direction(minilm, precision):
    exact = batches.encode_rows(minilm, PASSAGES[:8], "document", "", 512).vectors
    half = batches.encode_rows(minilm.variant(precision), PASSAGES[:8], "document", "", 512)
    again = batches.encode_rows(minilm, PASSAGES[:8], "document", "", 512).vectors
    assert 0.999 < np.sum(exact * half.vectors, axis=1).min() < 1 - 1e-8
    assert half.renormalised == 0
    assert exact.tobytes() == again.tobytes()  # the one it was made of is as it was
