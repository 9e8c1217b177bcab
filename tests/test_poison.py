"""A poison row costs its neighbours nothing, wherever it stands: not one bit of a vector, not one row of the count."""

import functools
import json
import zlib
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import corpus, rows, run, sources, storage
from pipeline.encoders import models, tokens
from pipeline.encoders.batches import encode_rows
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.errors import DataError
from pipeline.spec import Corpus, Workers
from pipeline.storage import Root
from pipeline.workers import Pool
from tests import conftest, poison
from tests.poison import KINDS, Kind

ROWS = 24
POSITIONS = {"first": 0, "middle": 12, "last": ROWS - 1}
BUDGET = 32
GOOD = conftest.texts(ROWS - 1, seed=5)
ORDINARY = "w001 w002 w003"
AT = pytest.mark.parametrize("at", [pytest.param(at, id=name) for name, at in POSITIONS.items()])


def of(kinds):
    return pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in kinds])


class Sensitive:
    """Vectors that tell where in which batch they were made, by a millionth; a batch is eight rows."""

    dim, max_tokens, tokenizer, pads, in_flight = 16, None, None, True, 2

    def __init__(self, kind=None):
        self.kind = kind

    def tokenize(self, texts, prompt):
        return tokens.unread(np.full(len(texts), BUDGET // 8, np.int64), None, texts)

    def begin(self, part, role, prompt):
        return lambda: self.vectors(part.texts)

    def vectors(self, texts):
        out = np.zeros((len(texts), self.dim), np.float32)
        for place, text in enumerate(texts):
            seed = zlib.crc32(text.encode())
            out[place] = np.random.default_rng(seed).standard_normal(self.dim)
            out[place] = out[place] / np.linalg.norm(out[place]) + 1e-6 * (place + len(texts))
            if self.kind is not None and text == self.kind.text:
                if self.kind.raises:
                    raise self.kind.raises()
                if self.kind.output:
                    self.kind.output(out[place])
        return out


def filed(kind: Kind, at: int, folder):
    """A corpus file with the row at this place among good ones."""
    path = folder / f"c.{kind.suffix}"
    if kind.suffix == "parquet":
        values: list[bytes | None] = [text.encode() for text in GOOD]
        values.insert(at, kind.record)
        names = [f"doc-{number}" for number in range(ROWS - 1)]
        names.insert(at, kind.id)
        pq.write_table(pa.table({"_id": names, "text": arrow(values, kind.arrow)}), path)
        return path
    lines = [
        poison.line(text, f"doc-{number}") if kind.suffix == "jsonl" else f"doc-{number},{text}".encode()
        for number, text in enumerate(GOOD)
    ]
    lines.insert(at, kind.record)
    path.write_bytes(b"\n".join([b"_id,text"] * (kind.suffix == "csv") + lines) + b"\n")
    return path


def arrow(values, kind):
    """An array of these bytes, whether the type allows them or not."""
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array(range(len(values)), pa.int32()), arrow(values, kind.value_type))
    wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    held = pa.array(values, pa.large_binary() if wide else pa.binary())
    return pa.Array.from_buffers(kind, len(held), held.buffers())


def embedded(kind, at, folder):
    """The cleaned rows of such a file, and what the sensitive model makes of them."""
    settings = Corpus(source="x", id="_id", text="text")
    reader = sources.Reader(rows.columns(settings))
    clean = [
        rows.clean(raw, "x", settings, {}) for raw in reader.read(sources.resolve([str(filed(kind, at, folder))])[0])
    ]
    assert len(clean) == 1
    return clean[0], encode_rows(Sensitive(kind), clean[0].texts, "document", "", BUDGET)


@functools.cache
def undisturbed(quarantined, at):
    """The neighbours' vectors beside a null text, or beside an ordinary one."""
    texts = [*GOOD] if quarantined else [*GOOD[:at], ORDINARY, *GOOD[at:]]
    out = encode_rows(Sensitive(), texts, "document", "", BUDGET)
    return (out.vectors if quarantined else np.delete(out.vectors, at, axis=0)).tobytes(), out.padded_tokens, out.tokens


def test_the_table_has_names_for_all_kinds_and_one_fate_for_each():
    assert len({kind.name for kind in KINDS}) == len({replace(kind, name="") for kind in KINDS}) == len(KINDS)
    assert len(KINDS) > 150
    assert all((kind.reason or kind.text or kind.refused) is not None for kind in KINDS)
    assert {kind.reason for kind in KINDS} == {*rows.REASONS, None} - {"duplicate_text"}


@AT
@of(kind for kind in KINDS if not kind.refused)
def test_a_poison_row_costs_only_itself(kind, at, tmp_path):
    clean, out = embedded(kind, at, tmp_path)
    failed = [(clean.offsets[row], clean.ids[row], reason) for row, (reason, _) in out.failed.items()]
    aside = failed + [(offset, name, reason) for offset, name, reason, _ in clean.rejected]
    usable = [row for row in range(len(clean.ids)) if row not in out.failed]
    assert sorted([clean.offsets[row] for row in usable] + [offset for offset, _, _ in aside]) == list(range(ROWS))
    mine = [row for row in usable if clean.offsets[row] == at]
    if kind.reason:
        assert [(offset, reason) for offset, _, reason in aside] == [(at, kind.reason)]
        assert aside[0][1] == kind.id
    else:
        assert aside == []
        assert [(clean.ids[row], clean.texts[row]) for row in mine] == [(kind.id, kind.text)]
        alone = encode_rows(Sensitive(), [kind.text], "document", "", BUDGET).vectors
        assert np.abs(out.vectors[mine] - alone).max() < 1e-4
    others = [row for row in usable if row not in mine]
    assert [(clean.ids[row], clean.texts[row]) for row in others] == [(f"doc-{n}", text) for n, text in enumerate(GOOD)]
    found = out.vectors[others].tobytes(), out.padded_tokens, out.tokens
    assert found == undisturbed(kind.reason is not None, at)
    assert (out.halvings, out.renormalised) == (0, 0)
    for _, detail in out.failed.values():
        assert len(detail.encode()) <= 600  # valid, and short


@AT
@of(kind for kind in KINDS if kind.refused)
def test_a_row_that_no_job_may_have_is_named(kind, at, tmp_path):
    root = Root(tmp_path / "root")
    storage.prepare(root)
    path = filed(kind, at, tmp_path)
    with Pool(Workers(count=0)) as pool, pytest.raises(DataError, match=kind.refused):
        corpus.run(Corpus(source=str(path), id="_id", text="text"), root, pool)


def test_a_batch_is_seen_in_the_vectors():
    out = encode_rows(Sensitive(), GOOD, "document", "", BUDGET).vectors
    other = encode_rows(Sensitive(), GOOD[1:], "document", "", BUDGET).vectors
    assert (out[1:] != other).any(axis=1).all()


@of(kind for kind in KINDS if kind.raises or kind.output)
def test_many_poison_rows_in_one_batch(kind):
    texts = [kind.text if number % 3 == 0 else text for number, text in enumerate(GOOD)]
    good = [text for text in texts if text != kind.text]
    out = encode_rows(Sensitive(kind), texts, "document", "", BUDGET)
    plain = encode_rows(Sensitive(), good, "document", "", BUDGET)
    assert sorted(out.failed) == list(range(0, ROWS - 1, 3))
    assert out.vectors[[number for number in range(ROWS - 1) if number % 3]].tobytes() == plain.vectors.tobytes()
    assert (out.tokens, out.padded_tokens, out.halvings) == (plain.tokens, plain.padded_tokens, 0)


# Whole jobs: every kind of a format in one corpus

LARGE = 200_000


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_corpus_full_of_poison(suffix, spec, model, tmp_path):
    kinds = [kind for kind in KINDS if kind.suffix == suffix and not kind.refused and len(kind.record or b"") < LARGE]
    kinds = [kind for kind in kinds if not kind.raises and not kind.output]
    if suffix == "parquet":
        kinds = [kind for kind in kinds if kind.arrow == pa.string()]
    kinds += [kind for kind in OF_THE_MODEL if suffix == "jsonl"]
    good = {f"doc-{number}": text for number, text in enumerate(conftest.texts(120))}
    path = tmp_path / f"poison.{suffix}"
    write_all(path, good, kinds)
    settings = {"corpus__id": "_id", "corpus__text": "text", "embed__vectors": "float32", "corpus__shard_rows": 64}
    job = spec(corpus__source=str(path), corpus__max_quarantined=1, **settings)
    run(job)
    table = pl.scan_lance(f"{job.root}/lancedb/documents.lance").select("row", "text", "vector").collect().sort("row")
    aside = pl.read_parquet(f"{job.root}/quarantine.parquet")
    assert sorted([*table["row"], *aside["row"]]) == list(range(len(good) + len(kinds)))
    encoder = SentenceEncoder(models.resolve(str(model)), None, None, 1)
    held = {row: (text, vector) for row, text, vector in table.iter_rows()}
    reasons = dict(aside.select("row", "reason").iter_rows())
    wanted = iter(good.values())
    for row, kind in enumerate(places(good, kinds)):
        text = next(wanted) if kind is None else kind.text
        if kind is not None and kind.reason:
            assert reasons[row] == kind.reason, kind.name
            continue
        alone = encode_rows(encoder, [text], "document", "", 4_096)
        if alone.failed:  # words that the stand-in does not know
            assert reasons[row] == alone.failed[0][0] == "zero_norm", kind.name
        else:
            assert held[row][0] == text
            assert np.float32(held[row][1]).tobytes() == alone.vectors[0].tobytes()


OF_THE_MODEL = [
    poison.jsonl("broken", poison.line("broken w001", "b1"), "broken w001", "non_finite"),
    poison.jsonl("unknown", poison.line("unheard words", "b2"), "unheard words", "zero_norm"),
]


def places(good, kinds):
    """Kinds in the order of rows, None for a good row: a poison row after each good one, while there are any."""
    order = []
    for number in range(max(len(good), len(kinds))):
        order += [None] * (number < len(good)) + kinds[number : number + 1]
    return order


def write_all(path, good, kinds):
    pairs = iter(good.items())
    order = places(good, kinds)
    if path.suffix == ".parquet":
        pairs = [next(pairs) if kind is None else (kind.name, kind.record) for kind in order]
        values = [text.encode() if isinstance(text, str) else text for _, text in pairs]
        pq.write_table(pa.table({"_id": [name for name, _ in pairs], "text": arrow(values, pa.string())}), path)
        return
    lines = []
    for number, kind in enumerate(order):
        if kind is None:
            name, text = next(pairs)
            lines.append(poison.line(text, name) if path.suffix == ".jsonl" else f"{name},{text}".encode())
        else:
            lines.append(
                kind.record.replace(b'"poison"', b'"poison-%d"' % number).replace(b"poison,", b"poison-%d," % number)
            )
    path.write_bytes(b"\n".join([b"_id,text"] * (path.suffix == ".csv") + lines) + b"\n")


CARRIED = {"filter": "", "keep": "", "keep a list": [""], "keep an object": {"name": [""]}}


@pytest.mark.parametrize(("place", "shape"), CARRIED.items())
def test_a_lone_surrogate_in_a_carried_column(place, shape, spec, tmp_path):
    lines = [json.dumps({"_id": str(n), "text": f"w{n:03d}", "k": shape}).replace('""', '"a"') for n in range(20)]
    lines[7] = lines[7].replace('"a"', '"\\ud800"')
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    source = {"source": str(tmp_path / "c.jsonl"), "id": "_id", "text": "text", place.partition(" ")[0]: ["k"]}
    job = spec(corpus=source)
    run(job)
    kept = pl.scan_lance(f"{job.root}/lancedb/documents.lance").collect().sort("row")["k"].to_list()
    assert [str(one) for one in kept] == [
        str(shape).replace("''", "'�'" if n == 7 else "'a'") if shape else "�" if n == 7 else "a" for n in range(20)
    ]


# The real model


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder(models.resolve("all-MiniLM-L6-v2"), 64, None, 2)


NEIGHBOURS = ["A short one.", *(f"The median of {n} numbers." for n in range(7))]
REAL = [
    "10-MB-of-marks", "1000000-characters-without-a-space", "token-bomb-of-ideographs", "zero-width-space", "nul",
    "bert-tokens", "only-padding-tokens", "emoji-joined", "tower-of-marks", "decomposed", "arabic-with-marks", "braces",
]  # fmt: skip


@pytest.fixture(scope="module")
def beside(minilm):
    """Vectors of the neighbours of an ordinary text of so many tokens."""

    @functools.cache
    def make(tokens, at):
        texts = [*NEIGHBOURS[:at], " ".join(["the"] * (tokens - 2)), *NEIGHBOURS[at:]]
        assert minilm.tokenize(texts, "").counts[at] == tokens
        return np.delete(encode_rows(minilm, texts, "document", "", 512).vectors, at, axis=0).tobytes()

    return make


@of(kind for kind in KINDS if kind.name in REAL)
def test_neighbours_in_the_real_model(kind, minilm, beside):
    tokens = min(int(minilm.tokenize([kind.text], "").counts[0]), minilm.max_tokens)
    theirs = minilm.model.encode([kind.text[:10_000]])[0]
    for at in (0, 4, 8):
        out = encode_rows(minilm, [*NEIGHBOURS[:at], kind.text, *NEIGHBOURS[at:]], "document", "", 512)
        assert out.failed == {}
        assert np.delete(out.vectors, at, axis=0).tobytes() == beside(tokens, at)
        assert out.vectors[at] @ theirs > 0.99999


class Refusing:
    """The real model, in which one text raises, or comes back as no number."""

    in_flight = 2

    def __init__(self, encoder, text, raises):
        self.encoder, self.text, self.raises = encoder, text, raises
        self.dim, self.max_tokens, self.pads = encoder.dim, encoder.max_tokens, encoder.pads

    def tokenize(self, texts, prompt):
        return replace(self.encoder.tokenize(texts, prompt), texts=texts)

    def begin(self, part, role, prompt):
        if self.raises and self.text in part.texts:
            raise self.raises
        out = self.encoder.begin(replace(part, texts=None), role, prompt)()
        out[[text == self.text for text in part.texts]] = np.nan
        return lambda: out


@pytest.mark.parametrize("raises", [None, IndexError("index out of range"), MemoryError()])
def test_rows_that_the_real_model_refuses(raises, minilm):
    without = encode_rows(minilm, NEIGHBOURS, "document", "", 64)
    for at in (0, 4, 8):
        texts = [*NEIGHBOURS[:at], "The median of 9 numbers.", *NEIGHBOURS[at:]]
        out = encode_rows(Refusing(minilm, texts[at], raises), texts, "document", "", 64)
        assert [*out.failed] == [at]
        assert np.delete(out.vectors, at, axis=0).tobytes() == without.vectors.tobytes()
        assert (out.tokens, out.padded_tokens) == (without.tokens, without.padded_tokens)
