"""Packed batches give the vectors of padded ones, or are refused. Models are tiny, random, made from configs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.encoders import packed, sentence
from pipeline.encoders.packed import features

WORDS = 90
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SHAPE = {"vocab_size": len(SPECIAL) + WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 64}


def configs():
    import transformers as hf

    modern = {"global_attn_every_n_layers": 2, "local_attention": 16, "pad_token_id": 0}
    return {
        "bert": hf.BertConfig(**WIDE),
        "roberta": hf.RobertaConfig(**WIDE, max_position_embeddings=200, pad_token_id=0),
        "xlm_roberta": hf.XLMRobertaConfig(**WIDE, max_position_embeddings=200, pad_token_id=1),
        "distilbert": hf.DistilBertConfig(vocab_size=SHAPE["vocab_size"], dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        "modernbert": hf.ModernBertConfig(**WIDE, **modern),
        "qwen3": hf.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8, pad_token_id=0),
        "qwen3_sliding": hf.Qwen3Config(
            **WIDE, num_key_value_heads=2, head_dim=8, pad_token_id=0, use_sliding_window=True, sliding_window=8,
            max_window_layers=1,
        ),
        "mpnet": hf.MPNetConfig(**WIDE),
        "t5": hf.T5Config(vocab_size=SHAPE["vocab_size"], d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    }  # fmt: skip


FITTING = ["bert", "roberta", "xlm_roberta", "distilbert", "modernbert", "qwen3", "qwen3_sliding"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where each model lies, made when first asked for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModel, PreTrainedTokenizerFast

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            where = made[kind] = tmp_path_factory.mktemp("packed") / kind
            torch.manual_seed(0)
            config = configs()[kind]
            model = AutoModel.from_config(config)
            for weight in model.parameters():  # of a size at which attention and positions tell
                torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
            model.save_pretrained(where)
            names = [*SPECIAL, *(f"w{number}" for number in range(WORDS))]
            if config.pad_token_id == 1:
                names[:2] = names[1::-1]
            core = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
            core.pre_tokenizer = Whitespace()
            core.post_processor = TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
            PreTrainedTokenizerFast(
                tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                model_max_length=150, padding_side="left" if kind.startswith("qwen") else "right",
            ).save_pretrained(where)  # fmt: skip
        return made[kind]

    return folder


@pytest.fixture
def load(folders):
    """A fresh model of a kind."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    def make(kind, pooling="mean", include_prompt=True, extra=()):
        first = Transformer(str(folders(kind)))
        modules = [first, Pooling(32, pooling, include_prompt=include_prompt), Normalize(), *extra]
        return SentenceTransformer(modules=modules, device="cpu").eval()

    return make


def texts(seed=0):
    """1 to 140 words: past every window and limit here."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, 3, 3, 9, 20, 40, 140]
    return [" ".join(f"w{n}" for n in rng.integers(0, WORDS, length)) for length in rng.permutation(lengths)]


def tokens(model, prompt=""):
    ids = model.tokenizer([prompt + text for text in texts()], truncation=True)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
    return np.concatenate(ids).astype(np.int32), offsets


def packed_vectors(model, ids, offsets, **settings):
    with torch.inference_mode():
        return model(features(ids, offsets, padding_idx=packed.position_base(model), **settings))["sentence_embedding"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("kind", FITTING)
def test_packed_equals_sentence_transformers(load, kind, pooling):
    model = load(kind, pooling)
    wanted = model.encode(texts())
    assert packed.prove(model).reason == ""
    assert np.abs(packed_vectors(model, *tokens(model)).numpy() - wanted).max() < 1e-5
    packed.disable(model)
    assert np.array_equal(model.encode(texts()), wanted)


@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_prompt_is_left_out_of_pooling_where_the_model_says_so(load, kind, pooling):
    model = load(kind, pooling, include_prompt=False)
    wanted = model.encode(texts(), prompt="w1 w2 w3 ")
    length = model[0]._get_prompt_length("w1 w2 w3 ")
    assert packed.prove(model, prompt_tokens=length).allowed
    got = packed_vectors(model, *tokens(model, "w1 w2 w3 "), prompt_tokens=length).numpy()
    assert np.abs(got - wanted).max() < 1e-5
    packed.disable(model)
    assert np.abs(got - model.encode(texts())).max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_slices_of_a_larger_array_and_token_types(load, kind):
    model = load(kind)
    ids, offsets = tokens(model)
    packed.enable(model)
    whole = packed_vectors(model, ids, offsets)
    part = packed_vectors(model, ids, offsets[3:7], names=["input_ids", "token_type_ids"])
    assert torch.allclose(part, whole[3:6], atol=1e-6)


def test_a_padding_token_inside_a_text_has_the_position_the_model_gives_it(load):
    model = load("roberta", "mean")
    text = "w1 w2 [PAD] w3 w4"
    wanted = model.encode([text])
    assert packed.enable(model)
    ids = np.array(model.tokenizer(text)["input_ids"], np.int32)
    assert 0 in ids
    got = packed_vectors(model, ids, np.array([0, len(ids)])).numpy()
    assert np.abs(got - wanted).max() < 1e-5


@pytest.mark.parametrize("kind", ["mpnet", "t5"])
def test_a_model_with_biases_of_its_own_is_refused(load, kind):
    model = load(kind)
    before = model.encode(texts())
    verdict = packed.prove(model)
    assert not verdict.allowed
    assert verdict.reason
    assert np.array_equal(model.encode(texts()), before)


def test_a_model_that_drops_the_borders_is_refused(load, monkeypatch):
    model = load("bert")
    before = model.encode(texts())
    layer = model[0].model.encoder
    whole = type(layer).forward
    monkeypatch.setattr(
        layer, "forward", lambda states, attention_mask=None, **others: whole(layer, states, attention_mask)
    )
    verdict = packed.prove(model)
    assert not verdict.allowed
    assert "borders" in verdict.reason
    assert packed.enable(model)
    with pytest.raises(RuntimeError, match="borders"):
        packed_vectors(model, *tokens(model))
    with pytest.raises(RuntimeError, match="borders"):
        model.encode(texts())  # padded batches, while packed attention is on
    packed.disable(model)
    assert np.array_equal(model.encode(texts()), before)


def test_a_model_that_takes_no_keywords_is_refused(load):
    model = load("bert")
    model[0].model_forward_params = {"input_ids", "attention_mask", "position_ids"}
    assert "borders" in packed.prove(model).reason
    assert not packed.enable(model)


@pytest.mark.parametrize("leak", [1e-6, 1e-3])
def test_a_layer_that_mixes_neighbours_is_refused_however_little(load, leak):
    model = load("bert")
    assert packed.prove(model).allowed
    packed.disable(model)
    model[0].model.encoder.layer[0].register_forward_hook(
        lambda module, given, out: out + leak * out.roll(1, dims=1) * (out.shape[0] == 1)
    )
    assert not packed.prove(model).allowed
    assert model[0].model.config._attn_implementation == "sdpa"


def test_wrong_positions_are_found(load, monkeypatch):
    model = load("roberta")
    monkeypatch.setattr(packed, "position_base", lambda model: None)
    assert "differ" in packed.prove(model).reason


@pytest.mark.parametrize("kind", ["modernbert", "qwen3_sliding"])
def test_a_wrong_window_is_found(load, monkeypatch, kind):
    plain = packed._plain
    monkeypatch.setattr(
        packed, "_plain", lambda *given: plain(*given[:-1], given[-1] if given[-1] < 0 else given[-1] + 1)
    )
    assert "differ" in packed.prove(load(kind)).reason


def test_a_wrong_direction_is_found(load, monkeypatch):
    plain = packed._plain
    monkeypatch.setattr(packed, "_plain", lambda *given: plain(*given[:-2], not given[-2], given[-1]))
    assert "differ" in packed.prove(load("bert")).reason
    assert "differ" in packed.prove(load("qwen3", "lasttoken")).reason


def test_modules_that_read_padded_token_vectors_are_refused(load):
    from sentence_transformers.sentence_transformer.modules import LSTM

    model = load("bert", extra=[LSTM(32, 8)])
    assert "LSTM" in packed.prove(model).reason


def test_layers_of_another_kind_are_refused(load):
    model = load("qwen3")
    model[0].model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in packed.prove(model).reason


def test_a_padded_batch_is_refused_by_packed_attention():
    states = torch.ones(2, 4, 3, 8)
    borders = {"cu_seq_lens_q": torch.tensor([0, 1, 3], dtype=torch.int32), "max_length_q": 2}
    with pytest.raises(RuntimeError, match="padding"):
        packed.attention(None, states, states, states, None, **borders)


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)}])
def test_an_attention_with_extras_is_refused(extra):
    states = torch.ones(1, 4, 3, 8)
    borders = {"cu_seq_lens_q": torch.tensor([0, 1, 3], dtype=torch.int32), "max_length_q": 2}
    assert packed.attention(None, states, states, states, None, **borders)[0].shape == (1, 3, 4, 8)
    with pytest.raises(RuntimeError, match=next(iter(extra))):
        packed.attention(None, states, states, states, None, **borders, **extra)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_half_precision_agrees_on_average(load, kind, precision):
    model = load(kind)
    model[0].to(precision)
    assert packed.prove(model).allowed


def halved(load, precision):
    """A model at half precision, and itself in float32."""
    models = [load("bert"), load("bert")]
    models[0][0].to(precision)
    return models


def test_coarse_rounding_is_judged_by_float32(load, monkeypatch):
    model, reference = halved(load, torch.bfloat16)
    monkeypatch.setitem(packed.LEAST_COSINE, "bfloat16", 0.999999)
    assert "differ" in packed.prove(model).reason
    verdict = packed.prove(model, reference=reference)
    assert verdict.allowed
    assert verdict.mean < 0.999999
    assert reference[0].model.config._attn_implementation == "sdpa"


def test_a_kernel_that_rounds_worse_than_padded_batches_is_refused(load, monkeypatch):
    model, reference = halved(load, torch.bfloat16)
    plain = packed._plain
    monkeypatch.setattr(
        packed, "_plain", lambda query, *given: plain(query, *given) * (1.1 if query.dtype == torch.bfloat16 else 1)
    )
    assert "lose" in packed.prove(model, reference=reference).reason


def test_a_model_that_is_wrong_in_float32_is_refused_at_half_precision(load, monkeypatch):
    model, reference = halved(load, torch.bfloat16)
    plain = packed._plain
    monkeypatch.setattr(packed, "_plain", lambda query, *given: plain(query, *given) * 1.01)
    assert "in float32" in packed.prove(model, reference=reference).reason


@pytest.mark.parametrize(
    ("causal", "window", "wanted"),
    [(False, None, (-1, -1)), (True, None, (-1, 0)), (False, 9, (8, 8)), (True, 9, (8, 0))],
)
def test_what_the_kernel_is_told(monkeypatch, causal, window, wanted):
    calls = []

    def kernel(query, key, value, first, second, longest, also, **settings):
        calls.append((query.shape, key.shape, longest, also, settings))
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(packed, "kernel_serves", lambda device, dtype, head_dim: True)
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    out, _ = packed.attention(
        None, query, key, key, None, scaling=0.5, is_causal=causal, sliding_window=window,
        cu_seq_lens_q=torch.tensor([0, 1, 3], dtype=torch.int32), max_length_q=2,
    )  # fmt: skip
    assert out.shape == (1, 3, 4, 8)
    assert calls == [((3, 4, 8), (3, 2, 8), 2, 2, {"scale": 0.5, "window_size": wanted, "enable_gqa": True})]


@pytest.mark.parametrize("heads", [4, 2])
def test_the_real_kernel_takes_what_it_is_told(monkeypatch, heads):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(packed, "_HAS_KERNEL", True)
    with FakeTensorMode():
        query = torch.empty(1, 4, 30, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(1, heads, 30, 8, dtype=torch.bfloat16, device="cuda")
        borders = torch.empty(3, dtype=torch.int32, device="cuda")
        assert packed.kernel_serves(query.device.type, query.dtype, 8)
        out, _ = packed.attention(None, query, key, key, None, cu_seq_lens_q=borders, max_length_q=20)
    assert (out.shape, out.dtype, out.device.type) == ((1, 30, 4, 8), torch.bfloat16, "cuda")


def test_the_kernels_path_compiles_without_a_break(load, monkeypatch):
    model = load("bert")
    monkeypatch.setattr(packed, "kernel_serves", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(packed, "_varlen", lambda query, key, value, *others: value * 2)
    assert packed.enable(model)
    ids, offsets = tokens(model)
    plain = packed_vectors(model, ids, offsets)
    for layer in model[0].model.encoder.layer:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.allclose(packed_vectors(model, ids, offsets), plain, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean"])
def test_the_mean_over_a_text_is_that_of_sentence_transformers(load, mode):
    model = load("bert", mode)
    ids, offsets = tokens(model)
    packed.enable(model)
    wanted = packed_vectors(model, ids, offsets)
    theirs = model[1]
    model[1] = packed.pooling(theirs)
    assert (model[1] is theirs) == (mode != "mean")
    assert torch.allclose(packed_vectors(model, ids, offsets), wanted, atol=1e-6)
    packed.disable(model)
    assert np.allclose(model.encode(texts()), wanted, atol=1e-5)


def test_a_sum_in_another_order_changes_no_bit_of_the_mean():
    """What atomics do: pooling sees the tokens of one text in one order, whoever stands beside it."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    mean = packed.pooling(Pooling(8, "mean"))
    flat = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))

    def run(start, stop):
        return mean(
            {"token_embeddings": flat[:, start:stop], "cu_seq_lens_q": torch.tensor([0, 40 - start, stop - start])}
        )

    assert torch.equal(run(0, 100)["sentence_embedding"][1], run(20, 100)["sentence_embedding"][1])
    assert torch.allclose(run(0, 100)["sentence_embedding"][1], flat[0, 40:].mean(0), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", FITTING)
def test_on_a_gpu_the_kernel_agrees_with_padded_batches(load, kind):
    model = load(kind).to("cuda")
    model[0].to(torch.bfloat16)
    verdict = packed.prove(model)
    assert verdict.reason == ""


@pytest.fixture
def encoder(load, tmp_path):
    """The project's encoder of a kind, from files."""
    from pipeline.encoders.models import resolve
    from pipeline.encoders.sentence import SentenceEncoder

    def make(kind, **settings):
        model = load(kind, **settings)
        model.prompts = {"query": "w1 w2 w3 "}
        model.save(str(tmp_path / kind), create_model_card=False)
        return SentenceEncoder(resolve(str(tmp_path / kind)), None, "cpu", 1)

    return make


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("prompt", ["", "w1 w2 w3 "])
def test_the_encoder_gives_packed_what_it_gives_padded(encoder, kind, include_prompt, prompt):
    from pipeline.encoders.batches import encode_rows

    padded = encoder(kind, include_prompt=include_prompt)
    wanted = encode_rows(padded, texts(), "query", prompt, 200)
    ours = padded.variant("float32", "packed")
    got = encode_rows(ours, texts(), "query", prompt, 200)
    assert np.abs(got.vectors - wanted.vectors).max() < 1e-5
    assert got.failed == wanted.failed == {}
    assert got.padded_tokens == got.tokens == wanted.tokens < wanted.padded_tokens
    again = encode_rows(padded, texts(), "query", prompt, 200)
    assert np.array_equal(again.vectors, wanted.vectors)


def test_the_encoder_at_half_precision_is_judged_by_float32(encoder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        packed, "prove", lambda model, limit, reference=None: asked.append((limit, reference)) or packed.Verdict(True)
    )
    base = encoder("bert")
    base.variant("bfloat16", "packed")
    base.variant("float32", "packed")
    assert asked == [(150, base.model), (150, None)]


@pytest.fixture
def compiled_in_name(monkeypatch):
    """Traced, but run by torch itself: no C++ compiler is needed."""
    monkeypatch.setattr(sentence, "COMPILER", "eager")
    monkeypatch.setattr(sentence, "COMPILER_OPTIONS", {})
    monkeypatch.setattr(packed, "_plain", torch.compiler.disable(packed._plain))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
def test_a_compiled_encoder_gives_what_the_packed_one_gives(encoder, compiled_in_name, kind):
    from pipeline.encoders.batches import encode_rows

    base = encoder(kind)
    compiled = base.variant("bfloat16", "packed", compiled=True)
    wanted = encode_rows(base.variant("bfloat16", "packed"), texts(), "document", "", 60)
    got = encode_rows(compiled, texts(), "document", "", 60)
    assert np.abs(got.vectors - wanted.vectors).max() < 1e-2
    assert got.failed == {}


def test_a_model_that_cannot_be_compiled_is_refused_at_once(encoder, compiled_in_name, monkeypatch):
    from pipeline.errors import SpecError

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(sentence, "COMPILER", no_compiler)
    with pytest.raises(SpecError, match="bert cannot be compiled: .*no C"):
        encoder("bert").variant("bfloat16", "packed", compiled=True)


def test_the_encoder_refuses_what_is_not_proven(encoder):
    from pipeline.errors import SpecError

    with pytest.raises(SpecError, match="padded batches alone: the attention of MPNetModel cannot be replaced"):
        encoder("mpnet").variant("bfloat16", "packed")
    base = encoder("bert")
    base.tokenizer = None
    with pytest.raises(SpecError, match="must read texts itself"):
        base.variant("bfloat16", "packed")
