"""Batches: every row once within the budget, the same vectors whatever the batch; failures cost one row."""

import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pipeline.encoders import batches, tokens
from pipeline.errors import PipelineError


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 120), st.booleans())
def test_batches_hold_every_row_once_within_the_budget_in_order(counts, budget, pads):
    counts = np.array(counts)
    planned = batches.plan(counts, budget, pads)
    order = np.concatenate(planned).tolist()
    assert sorted(order) == list(range(len(counts)))
    assert order == sorted(order, key=lambda row: (-counts[row] if pads else 0, row))
    cost = [int(counts[rows].max()) * len(rows) if pads else int(counts[rows].sum()) for rows in planned]
    assert all(len(rows) == 1 or one <= budget for rows, one in zip(planned, cost, strict=True))
    wanted = [  # one row more would have been too many
        (int(counts[rows].max()) * (len(rows) + 1) if pads else cost_ + int(counts[more[0]]))
        for rows, more, cost_ in zip(planned, planned[1:], cost, strict=False)
    ]
    assert all(one > budget for one in wanted)


class Fragile:
    """Refuses batches over a size and any batch with the word `poison`; keeps the sizes of its batches.

    `late`: it refuses when a batch ends, as a device does, not when it begins.
    """

    dim, max_tokens, tokenizer = 2, 4, None

    def __init__(self, largest=100, in_flight=1, pads=True, late=False):
        self.largest, self.sizes, self.in_flight, self.pads, self.late = largest, [], in_flight, pads, late
        self.open, self.most = 0, 0

    def tokenize(self, texts, prompt):
        counts = np.array([len((prompt + text).split()) for text in texts], np.int64)
        return tokens.unread(counts, self.max_tokens, texts)

    def begin(self, part, role, prompt):
        self.sizes.append(len(part))
        self.open += 1
        self.most = max(self.most, self.open)

        def ending():
            self.open -= 1
            return self.vectors(part.texts)

        if self.late:
            return ending
        done = ending()
        return lambda: done

    def vectors(self, texts):
        if len(texts) > self.largest:
            raise MemoryError("out of memory")
        if "poison" in texts:
            raise ValueError("index out of range")
        special = {"nan": [np.nan, 1], "huge": [np.inf, 0], "zero": [0, 0], "long": [3, 4], "near": [0.6, 0.8003]}
        return np.array([special.get(text, [1, 0]) for text in texts], np.float32)

    def flops(self):
        return 0.0, 0.0


def test_out_of_memory_halves_the_batch():
    encoder = Fragile(largest=3)
    out = batches.encode_rows(encoder, [f"a{number}" for number in range(10)], "document", "", 1000)
    assert (out.vectors == [1, 0]).all()
    assert out.failed == {}
    assert max(encoder.sizes[1:]) < 10
    assert (out.halvings, out.batch_tokens) == (3, 500)


def test_after_out_of_memory_the_budget_is_half_for_what_is_left():
    encoder = Fragile(largest=4)
    out = batches.encode_rows(encoder, [f"a{number}" for number in range(20)], "document", "", 7)
    assert encoder.sizes == [7, 3, 4, 3, 3, 3, 3, 1]
    assert (out.halvings, out.batch_tokens, out.tokens) == (1, 3, 20)


def test_a_text_that_several_rows_have_is_embedded_once():
    encoder = Fragile()
    texts = ["long", "a", "long", "poison", "a", "poison", "b b"]
    out = batches.encode_rows(encoder, texts, "document", "", 1000)
    assert out.vectors.tolist() == np.float32([[0.6, 0.8], [1, 0], [0.6, 0.8], [0, 0], [1, 0], [0, 0], [1, 0]]).tolist()
    assert sorted(out.failed) == [3, 5]
    assert (out.repeats, out.tokens, out.squared_tokens, out.padded_tokens, out.renormalised) == (2, 4, 6, 6, 1)


def test_what_is_stored_in_half_precision_is_rounded_once():
    prepared = batches.prepare(Fragile(), ["long", "a"], "")
    out = batches.encode(Fragile(), prepared, "document", "", 1000, dtype="float16")
    assert out.vectors.dtype == np.float16
    assert out.vectors.tolist() == np.float16([[0.6, 0.8], [1, 0]]).tolist()


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_batches_in_flight_change_nothing(pads, late):
    words = ["a", "poison", "near", "a b", "long", "nan", "a b c", "zero", "b", "huge", "c"]
    texts = [f"{word} {number}" if word in "abc" else word for number, word in enumerate(words * 3)]
    plain = batches.encode_rows(Fragile(3, 1, pads), texts, "document", "", 6)
    for in_flight in (2, 3, 7):
        encoder = Fragile(3, in_flight, pads, late)
        out = batches.encode_rows(encoder, texts, "document", "", 6)
        assert out.vectors.tobytes() == plain.vectors.tobytes()
        assert (out.failed, out.tokens, out.padded_tokens, out.halvings, out.batch_tokens) == (
            plain.failed, plain.tokens, plain.padded_tokens, plain.halvings, plain.batch_tokens,
        )  # fmt: skip
        assert encoder.open == 0
        if late:
            assert 2 <= encoder.most <= in_flight


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
    texts = ["a", "long", "near", "c", "d", "h", "e", "f", "g"]
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

    def vectors(self, texts):
        if self.when(texts):
            raise self.error
        return super().vectors(texts)


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
    out = batches.encode_rows(encoder, [*"abcdefgh"], "document", "", 1000)
    assert (out.failed, out.halvings) == ({}, 3)


def test_a_poison_row_is_found_in_a_logarithm_of_tries():
    encoder = Raising(ValueError(), lambda texts: "b" in texts)
    out = batches.encode_rows(
        encoder, [f"a{n}" for n in range(40)] + ["b"] + [f"c{n}" for n in range(23)], "document", "", 1000
    )
    assert [*out.failed] == [40]
    assert len(encoder.sizes) <= 2 * 6 + 2
    assert out.halvings == 0


def test_rows_that_raise_only_together_are_halved():
    encoder = Raising(ValueError(), lambda texts: {"b", "c"} <= {*texts})
    out = batches.encode_rows(encoder, ["a", "b", "c", "d"], "document", "", 1000)
    assert (out.failed, out.halvings) == ({}, 1)


class Spreading(Fragile):
    """One vector that is not a number makes the whole batch so."""

    def vectors(self, texts):
        out = super().vectors(texts)
        return out * (np.nan if "nan" in texts else 1)


def test_a_vector_that_spoils_its_batch_costs_only_itself():
    out = batches.encode_rows(Spreading(), ["a", "nan", "b", "nan", "c"], "document", "", 1000)
    assert [*out.failed] == [1, 3]


class Uncounting(Fragile):
    """Its tokenizer refuses a text."""

    def tokenize(self, texts, prompt):
        if "b" in texts:
            raise UnicodeError("no token")
        return super().tokenize(texts, prompt)


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
    assert told == [(1, 2), (1, 1)]


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
