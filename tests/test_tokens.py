"""Token ids: those of the model's own library, whoever makes them; special tokens, the cut, huge texts."""

import sys

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from pipeline.docstrings import stdlib
from pipeline.encoders import models, tokens
from pipeline.encoders.tokens import TRIALS, Tokenizer, Tokens

PASSAGES = [
    "A short one.",
    "The median is the middle value of a sorted list of numbers. " * 3,
    "Threads wait for an event until another thread sets it. " * 30,
    "日本語のテキスト and emoji 👩‍🚀, all in one row",
]


def trained(kind):
    """A small tokenizer that reads bytes, or pieces without a break at spaces."""
    from tokenizers import Tokenizer as Plain, models as kinds, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        tokenizer, trainer = Plain(kinds.BPE()), trainers.BpeTrainer(vocab_size=400, show_progress=False)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    else:
        tokenizer = Plain(kinds.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator(PASSAGES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def libraries():
    """Tokenizers of transformers, by kind."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(models.resolve("all-MiniLM-L6-v2").path)
    return {"words": words, "bytes": trained("bytes"), "pieces": trained("pieces")}


@pytest.fixture(scope="module")
def made(libraries):
    """Ours of each kind, without a limit."""
    return {kind: Tokenizer.of(library._tokenizer, True, None) for kind, library in libraries.items()}


def by_library(library, texts, limit):
    return library(list(texts), truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]


def as_lists(made):
    return [part.tolist() for part in np.split(made.ids, made.offsets[1:-1])]


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
@pytest.mark.parametrize("limit", [None, 3, 16])
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_ids_are_the_librarys(libraries, made, kind, limit, prompt):
    texts = [*TRIALS, *PASSAGES]
    library = libraries[kind]
    ours = tokens.replace(made[kind], limit=limit)(texts, prompt)
    assert as_lists(ours) == by_library(library, [prompt + text for text in texts], limit)
    assert ours.counts.tolist() == [len(ids) for ids in by_library(library, [prompt + text for text in texts], None)]


def test_the_quick_tokenizer_is_taken_where_it_knows_the_kind(libraries):
    assert Tokenizer.of(libraries["words"]._tokenizer, True, 16).name == "nanotoken"
    assert Tokenizer.of(libraries["bytes"]._tokenizer, True, 16).name == "tokenizers"


def test_the_quick_tokenizer_can_be_ruled_out(libraries, monkeypatch):
    monkeypatch.setenv("MATRYOSHKA_TOKENIZER", "huggingface")
    assert Tokenizer.of(libraries["words"]._tokenizer, True, 16).name == "tokenizers"


def test_without_the_extra_it_is_not_missed(libraries, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanotoken", None)
    assert Tokenizer.of(libraries["words"]._tokenizer, True, 16).name == "tokenizers"


def test_a_quick_tokenizer_with_other_ids_is_refused(libraries, monkeypatch, caplog):
    import nanotoken

    class Wrong(nanotoken.Tokenizer):
        def encode_batch(self, texts, **options):
            return super().encode_batch([text.replace("Ⅷ", "8") for text in texts], **options)

    monkeypatch.setattr(nanotoken, "Tokenizer", Wrong)
    made = Tokenizer.of(libraries["words"]._tokenizer, True, 16)
    assert made.name == "tokenizers"
    assert "other ids" in caplog.text
    assert as_lists(made(["Ⅷ"])) == by_library(libraries["words"], ["Ⅷ"], 16)


def test_a_difference_in_the_corpus_rules_it_out_too(libraries, caplog):
    made = Tokenizer.of(libraries["words"]._tokenizer, True, 16)
    assert made.agreeing(["the same"]).name == "nanotoken"
    other = tokens.replace(made, raw=lambda texts: made.plain([text.upper() + "?" for text in texts]))
    assert other.agreeing(["the same"]).name == "tokenizers"
    assert as_lists(other.agreeing(["the same"])(["the same"])) == as_lists(made(["the same"]))


CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    "aAéß ıİ\u0301\u0130ﬁ⅓漢字 \t\n\r\x00\x1f\x7f\u200d\ufeff[]#'-_"
)


@given(st.lists(st.text(CHARACTERS, max_size=40), max_size=5))
@example(["[CLS] [SEP]", "##a", "İ", "ǅ", "\u2028", "\ufffd"])
def test_the_quick_tokenizer_gives_the_same_ids(made, texts):
    words = made["words"]
    assert words.name == "nanotoken"
    ids, offsets = words.raw(texts)
    others, places = words.plain(texts)
    assert (ids.tolist(), offsets.tolist()) == (others.tolist(), places.tolist())


def test_the_quick_tokenizer_gives_the_same_ids_on_a_real_corpus(made):
    texts = [row["text"] for row in stdlib()]
    assert len(texts) > 3_000
    assert made["words"].agreeing(texts).name == "nanotoken"


def test_a_frame_that_depends_on_the_text_is_left_to_the_library():
    from tokenizers import Tokenizer as Plain
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing

    plain = Plain(WordLevel({"[UNK]": 0, "[A]": 1, "[B]": 2}, unk_token="[UNK]"))
    assert Tokenizer.of(plain, True, 1) is not None
    plain.post_processor = TemplateProcessing(single="[A] $A [B]", special_tokens=[("[A]", 1), ("[B]", 2)])
    made = Tokenizer.of(plain, True, 3)
    assert (made.before.tolist(), made.after.tolist()) == ([1], [2])
    assert Tokenizer.of(plain, True, 2) is None  # nothing of a text would be left


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=8), st.data())
def test_rows_are_taken_and_padded_as_lists_would_be(rows, data):
    flat = np.array([token for row in rows for token in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    made = Tokens(flat, offsets, np.diff(offsets) + 1)
    some = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9)))
    taken = made.take(some)
    assert as_lists(taken) == [rows[at] for at in some]
    assert taken.counts.tolist() == [len(rows[at]) + 1 for at in some]
    longest = max(len(rows[at]) for at in some)
    for left in (False, True):
        ids, mask = taken.padded(0, left)
        fill = [[0] * (longest - len(rows[at])) for at in some]
        wanted = [gap + rows[at] if left else rows[at] + gap for at, gap in zip(some, fill, strict=True)]
        assert ids.tolist() == wanted
        assert mask.tolist() == [[int(token > 0) for token in row] for row in wanted]
    start = data.draw(st.integers(0, len(rows) - 1))
    assert as_lists(made.slice(start, len(rows))) == rows[start:]


PARTS = st.sampled_from(
    [
        "the", "median", "日本", "[SEP]", "a" * 90, "b" * 3_000, " ", "\n" * 700, "!?", "e\u0301", "\u0301" * 200,
        "👩‍🚀", "-",
    ]
)  # fmt: skip


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
@given(st.lists(st.tuples(PARTS, st.integers(1, 40)), max_size=12), st.sampled_from(["", "query: "]), st.integers(3, 9))
@example([(" ", 80), ("b" * 3_000, 1)], "", 3)  # cut, the word would be short enough to have pieces
def test_the_start_of_a_huge_text_gives_the_tokens_of_the_whole(libraries, made, kind, parts, prompt, limit):
    text = "".join(part * times for part, times in parts)
    library, lengths, raw = libraries[kind], [], made[kind].raw
    watch = lambda some: lengths.append([len(one) for one in some]) or raw(some)  # noqa: E731
    watched = tokens.replace(made[kind], raw=watch, limit=limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "HUGE", 300)
        out = watched([text], prompt)
    assert as_lists(out) == by_library(library, [prompt + text], limit)
    (size,) = (length - len(prompt) for length in lengths[-1])
    assert size in {len(text), *(tokens.HEAD * limit * 4**times for times in range(6))}
    true = len(library(prompt + text, verbose=False)["input_ids"])
    assert out.counts[0] == true if size == len(text) else limit < out.counts[0] <= true


@pytest.mark.parametrize("text", ["!?" * 5_000_000, "the median " * 900_000, "\n" * 50_000 + "日" * 5_000_000])
@pytest.mark.parametrize("quick", [True, False])
def test_a_huge_text_is_not_tokenized_whole(made, text, quick):
    read, words = [], made["words"]
    raw = words.raw if quick else words.plain
    watched = tokens.replace(words, raw=lambda some: read.extend(map(len, some)) or raw(some), limit=64)
    out = watched(["short", text])
    assert sum(read) < 10 * 50_000 * 4
    assert out.counts[0] == 3
    assert out.counts[1] > 64 == out.lengths[1]


def test_a_word_of_a_megabyte_is_one_unknown_token(made):
    assert made["words"](["a" * 1_000_000, "a" * 1_000_000 + " b"]).counts.tolist() == [3, 4]


def test_models_that_read_bytes_are_read_by_their_library(tmp_path):
    """A tokenizer without a fast version: the model's own preprocessing is used, and its tokens counted."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from pipeline.encoders import batches
    from pipeline.encoders.sentence import SentenceEncoder

    inner = tmp_path / "inner"
    config = T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
    T5EncoderModel(config).save_pretrained(inner)
    ByT5Tokenizer().save_pretrained(inner)
    first = Transformer(str(inner), max_seq_length=12)
    SentenceTransformer(modules=[first, Pooling(16)], device="cpu").save(
        str(tmp_path / "bytes"), create_model_card=False
    )
    encoder = SentenceEncoder(models.resolve(str(tmp_path / "bytes")), None, "cpu", 1)
    assert encoder.tokenizer is None
    texts = ["abc", "a longer text than twelve bytes", "é"]
    out = batches.encode_rows(encoder, texts, "document", "", 100)
    theirs = encoder.model.encode(texts, normalize_embeddings=True)
    assert np.sum(out.vectors * theirs, axis=1).min() > 0.99999
    assert (out.cut_rows, out.tokens) == (1, 4 + 12 + 3)
