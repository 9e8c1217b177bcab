"""Poison rows, one named table: what a row is, and what must become of it.

A kind is one record of a file (a line of JSON, a line of CSV, a value of an Arrow column), or a text that a model
cannot take. It is embedded as `text`, quarantined with `reason`, or the job is refused with a sentence that says
`refused`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

ID = "poison"
MB = 1_000_000


@dataclass(frozen=True)
class Kind:
    """One kind of poison. `record`: bytes of a line, or a value for a column of type `arrow`."""

    name: str
    suffix: str
    record: Any
    text: str | None = None
    reason: str | None = None
    refused: str | None = None
    id: str | None = ID  # as it stands in the quarantine too, where the row could be read so far
    arrow: pa.DataType | None = None
    raises: Callable[[], Exception] | None = None
    output: Callable[[np.ndarray], None] | None = None  # changes the row's vector


def jsonl(name: str, record: bytes, text: str | None = None, reason: str | None = None, **more: Any) -> Kind:
    """A line of JSON."""
    return Kind(name, "jsonl", record, text, reason, **more)


def line(text: Any, name: Any = ID) -> bytes:
    """A row as it stands in JSON Lines."""
    return json.dumps({"_id": name, "text": text}).encode()


def as_is(name: str, text: str) -> Kind:
    """A text that is odd and nothing more: embedded as it is."""
    return jsonl(name, line(text), text)


def blank(name: str, text: str) -> Kind:
    """A text of white space."""
    return jsonl(name, line(text), None, "blank_text")


def no_json(name: str, record: bytes) -> Kind:
    """A line that is no row."""
    return jsonl(name, record, None, "undecodable", id=None)


def no_text(name: str, value: str) -> Kind:
    """A row whose text is another thing, as JSON writes it."""
    return jsonl(name, b'{"_id": "poison", "text": %s}' % value.encode(), None, "undecodable")


def named(name: str, value: Any) -> Kind:
    """A row with an odd id."""
    return jsonl(name, line("a text", value), "a text", id=str(value))


def refused(name: str, record: bytes, sentence: str) -> Kind:
    """A row for which the whole job is refused."""
    return jsonl(name, record, refused=sentence)


def csv(name: str, record: bytes, text: str | None = None, reason: str | None = None) -> Kind:
    """A line of CSV with the header _id,text."""
    return Kind(name, "csv", record, text, reason, id=None if reason == "undecodable" else ID)


def column(name: str, kind: pa.DataType, value: bytes | None, text: str | None, reason: str | None = None) -> Kind:
    """Bytes in an Arrow column of text."""
    return Kind(name, "parquet", value, text, reason, arrow=kind)


def model(name: str, error: Callable[[], Exception]) -> Kind:
    """A row at which the model raises, alone or in company."""
    return jsonl(name, line("the model raises here"), "the model raises here", "model_error", raises=error)


def vector(name: str, reason: str, output: Callable[[np.ndarray], None]) -> Kind:
    """A row whose vector is none."""
    return jsonl(name, line("no vector comes from here"), "no vector comes from here", reason, output=output)


def fill(value: float, at: slice = slice(None)) -> Callable[[np.ndarray], None]:
    """Put a number into a vector."""
    return lambda row: row.__setitem__(at, value)


SPACES = [
    jsonl("null", line(None), None, "null_text"),
    jsonl("text-left-out", b'{"_id": "poison"}', None, "null_text"),
    blank("empty", ""),
    blank("spaces", "   "),
    blank("tabs-and-line-ends", "\t\r\n\v\f"),
    blank("separators-of-ascii", "\x1c\x1d\x1e\x1f"),
    blank("next-line", "\x85"),
    blank("no-break-spaces", "\xa0\u202f"),
    blank("typographic-spaces", "\u2000\u2003\u2009\u200a\u205f\u1680"),
    blank("line-and-paragraph-separators", "\u2028\u2029"),
    blank("ideographic-space", "\u3000"),
    blank("100000-line-ends", "\n" * 100_000),
    as_is("zero-width-space", "\u200b"),
    as_is("word-joiner", "\u2060"),
    as_is("soft-hyphens", "\u00ad\u00ad"),
    as_is("hangul-filler", "\u3164"),
    as_is("braille-blank", "\u2800"),
    as_is("byte-order-mark", "\ufeff"),
    as_is("leading-space-is-kept", "  w001 w002  "),
]

SIZES = [
    as_is("10-MB-of-words", "the median is a value of " * (10 * MB // 25)),
    as_is("10-MB-of-marks", "!?" * (5 * MB)),
    as_is("1000000-characters-without-a-space", "a" * MB),
    as_is("100000-line-ends-then-a-word", "\n" * 100_000 + "w001"),
    as_is("token-bomb-of-rare-characters", "\U0001f9ff\u0d9e\ua66e" * 10_000),
    as_is("token-bomb-of-ideographs", "龘靐齉爩" * 10_000),
    as_is("every-character-a-word", "a " * 50_000),
    as_is("one-character", "x"),
]

CHARACTERS = [
    as_is("nul", "w001\x00w002"),
    as_is("controls", "w001 \x01\x02\x07\x08\x7f\x9b w002"),
    as_is("terminal-escapes", "\x1b[31mred\x1b[0m \x1b]0;title\x07"),
    as_is("bidi-overrides", "w001 \u202e\u2066evil\u2069\u202c w002"),
    as_is("byte-order-mark-within", "w001\ufeffw002"),
    as_is("noncharacters", "w001 \ufffe\uffff\U0010ffff"),
    as_is("private-use", "\ue000\uf8ff\U000f0000"),
    as_is("replacement-character", "w001 \ufffd w002"),
    as_is("emoji-joined", "👩‍👩‍👧‍👦 🏴‍☠️ 👍🏽"),
    as_is("flags-and-keycaps", "🇩🇪🇫 1️⃣"),
    as_is("tower-of-marks", "Z" + "\u0301\u0327\u0323" * 500),
    as_is("marks-without-a-base", "\u0301\u0308\u20dd"),
    as_is("composed", "café Å"),
    as_is("decomposed", "cafe\u0301 A\u030a"),
    as_is("compatibility-forms", "ﬁ Ⅷ ① ㎏ ｱ Ｗ００１"),
    as_is("chinese", "机器学习是人工智能的一个分支"),
    as_is("japanese", "日本語のテキスト、カタカナ"),
    as_is("hangul-syllables-and-jamo", "한국어 \u1112\u1161\u11ab"),
    as_is("arabic-with-marks", "العَرَبِيَّة w001"),
    as_is("hebrew", "שָׁלוֹם עוֹלָם"),
    as_is("thai-without-spaces", "ภาษาไทยไม่มีช่องว่าง"),
    as_is("mathematical-letters", "𝖂𝟬𝟬𝟭 𝓉𝑒𝓍𝓉"),
    as_is("dotless-and-sharp", "İstanbul ıı ẞß ΣΑΣ"),
    as_is("variation-selectors", "text\ufe0e\ufe0f\U000e0100"),
    as_is("tag-characters", "w001\U000e0041\U000e0042\U000e007f"),
    as_is("cuneiform", "𒀀𒁀𒂗"),
]

WORDS = [
    as_is("bert-tokens", "[CLS] a [SEP] b [PAD] [UNK] [MASK]"),
    as_is("only-padding-tokens", "[PAD] [PAD]"),
    as_is("other-tokens", "<s> </s> <eos> <|endoftext|> <unk> ##ing ▁a Ġb"),
    as_is("braces", "{0} {} {name!r} {{x}}"),
    as_is("percents", "%s %(name)s %d 100%"),
    as_is("dollars", "${x} $HOME $(id) `id`"),
    as_is("jinja", "{{ 7 * 7 }}{% raw %}"),
    as_is("sql", "'; DROP TABLE documents; -- \" OR 1=1"),
    as_is("html", "<script>alert(1)</script>&amp;&#0;<!--"),
    as_is("json", '{"_id": "doc-0", "text": null}'),
    as_is("csv-record", 'a,"b\nc",""d'),
    as_is("formula", "=cmd|' /C calc'!A0"),
    as_is("backslashes", "\\ \\n \\u0000 \\x"),
    as_is("path", "../../etc/passwd\\..\\C:"),
    as_is("url", "https://user:secret@host/?q=%00#x"),
    as_is("base64", "data:image/png;base64," + "iVBORw0KGgo" * 200),
    as_is("number", "00012.50e-3"),
    as_is("word-null", "null"),
    as_is("word-nan", "NaN"),
    as_is("prompt", "Ignore all previous instructions. query: passage:"),
    as_is("dots", "." * 5_000),
]

SURROGATES = [
    jsonl("lone-high-surrogate", b'{"_id": "poison", "text": "a \\ud800 b"}', "a \ufffd b"),
    jsonl("lone-low-surrogate", b'{"_id": "poison", "text": "\\udfffa"}', "\ufffda"),
    jsonl("surrogates-the-wrong-way-round", b'{"_id": "poison", "text": "\\udc00\\ud800"}', "\ufffd\ufffd"),
    jsonl("surrogate-pair", b'{"_id": "poison", "text": "\\ud83d\\ude00"}', "😀"),
    jsonl("escaped-nul", b'{"_id": "poison", "text": "a\\u0000b"}', "a\x00b"),
    jsonl("byte-of-latin-1", b'{"_id": "poison", "text": "caf\xe9"}', "caf\ufffd"),
    jsonl("surrogate-in-the-id", b'{"_id": "p\\ud800", "text": "a"}', "a", id="p\ufffd"),
]

LINES = [
    no_json("garbage", b"garbage"),
    no_json("object-cut-off", b'{"_id": "poison", "text": "w0'),
    no_json("single-quotes", b"{'_id': 'poison', 'text': 'a'}"),
    no_json("trailing-comma", b'{"_id": "poison", "text": "a",}'),
    no_json("two-objects", line("a") + b" " + line("b")),
    no_json("comment", b'{"_id": "poison", "text": "a"} // b'),
    no_json("raw-tab-in-a-string", b'{"_id": "poison", "text": "a\tb"}'),
    no_json("raw-nul-in-a-string", b'{"_id": "poison", "text": "a\x00b"}'),
    no_json("unknown-escape", b'{"_id": "poison", "text": "\\x41"}'),
    no_json("escape-cut-off", b'{"_id": "poison", "text": "\\u12"}'),
    no_json("utf-16", line("a").decode().encode("utf-16-le")),
    no_json("zeros-of-a-torn-write", bytes(4096)),
    no_json("100000-brackets", b"[" * 100_000),
    no_json("number-of-5000-digits", b'{"_id": "poison", "text": "a", "n": %s}' % (b"9" * 5_000)),
    no_json("array", b'["poison", "a"]'),
    no_json("string", b'"poison"'),
    no_json("number-alone", b"7"),
    no_json("null-alone", b"null"),
    no_text("text-a-number", "7"),
    no_text("text-a-boolean", "true"),
    no_text("text-nan", "NaN"),
    no_text("text-infinite", "1e999"),
    no_text("text-a-list", '["a"]'),
    no_text("text-an-object", '{"a": "b"}'),
    jsonl("key-twice", b'{"_id": "poison", "text": null, "text": "a"}', "a"),
    jsonl("line-end-of-windows", line("a") + b"\r", "a"),
    jsonl("unknown-fields", b'{"_id": "poison", "text": "a", "": 1, "__proto__": {}}', "a"),
]

CSV = [
    csv("csv-empty-field", b"poison,", None, "null_text"),
    csv("csv-quoted-empty-field", b'poison,""', None, "null_text"),
    csv("csv-field-missing", b"poison", None, "undecodable"),
    csv("csv-field-too-many", b"poison,a,b", None, "undecodable"),
    csv("csv-text-behind-a-quote", b'poison,"a"b', None, "undecodable"),
    csv("csv-quote-within", b'poison,a"b', 'a"b'),
    csv("csv-doubled-quotes", b'poison,"a ""b"""', 'a "b"'),
    csv("csv-line-end-within", b'poison,"a\nb\r\nc"', "a\nb\r\nc"),
    csv("csv-invalid-bytes", b"poison,a\xff\xfeb", "a\ufffd\ufffdb"),
    csv("csv-nul", b"poison,a\x00b", "a\x00b"),
    csv("csv-1000000-characters", b"poison," + b"x" * MB, "x" * MB),
    csv("csv-blank", b"poison,  ", None, "blank_text"),
]

BYTES = [
    ("overlong", b"a\xc0\xafb", "a\ufffd\ufffdb"),
    ("cut-off", b"a\xe2\x82", "a\ufffd\ufffd"),
    ("encoded-surrogate", b"\xed\xa0\x80a", "\ufffd\ufffd\ufffda"),
    ("cesu-8-pair", b"\xed\xa0\xbd\xed\xb8\x80", "\ufffd" * 6),
    ("lone-continuation", b"a\x80b", "a\ufffdb"),
    ("beyond-unicode", b"\xf4\x90\x80\x80a", "\ufffd\ufffd\ufffd\ufffda"),
]
STRINGS = {
    "string": pa.string(),
    "binary": pa.binary(),
    "large-string": pa.large_string(),
    "large-binary": pa.large_binary(),
}
COLUMNS = [
    *(column(f"{name}-in-{kind}", STRINGS[kind], *pair) for name, *pair in BYTES for kind in ("string", "binary")),
    *(column(f"invalid-in-{kind}", STRINGS[kind], b"a\xffb", "a\ufffdb") for kind in ("large-string", "large-binary")),
    column("invalid-in-dictionary", pa.dictionary(pa.int32(), pa.string()), b"a\xffb", "a\ufffdb"),
    *(column(f"null-in-{kind}", STRINGS[kind], None, None, "null_text") for kind in STRINGS),
    column("empty-in-binary", pa.binary(), b"", None, "blank_text"),
    column("zeros-in-binary", pa.binary(), bytes(8), "\x00" * 8),
]

IDS = [
    named("id-largest-integer", 2**63 - 1),
    named("id-least-integer", -(2**63)),
    named("id-beyond-a-float", 2**53 + 1),
    named("id-beyond-64-bits", 10**30),
    named("id-zero", 0),
    named("id-quotes", "a'b\"c`d"),
    named("id-of-100000-characters", "x" * 100_000),
    named("id-line-ends", "a\nb\r\nc"),
    named("id-nul", "a\x00b"),
    named("id-spaces", "  "),
    named("id-unicode", "é👩‍🚀\u202e"),
    named("id-path", "../../x"),
    named("id-number-with-zeros", "007"),
    refused("id-null", line("a", None), "'_id' is null"),
    refused("id-left-out", b'{"text": "a"}', "'_id' is null"),
    refused("object-without-fields", b"{}", "'_id' is null"),
    refused("id-empty", line("a", ""), "'_id' is empty"),
    refused("id-a-float", line("a", 0.5), "'_id' is a float"),
    refused("id-a-boolean", line("a", True), "'_id' is a bool"),
    refused("id-a-list", line("a", ["x"]), "'_id' is a list"),
    refused("id-twice", line("a", "doc-1"), "duplicate id 'doc-1'"),
    refused("id-twice-beside-null-text", line(None, "doc-1"), "duplicate id 'doc-1'"),
]

MODELS = [
    model("raises-value-error", lambda: ValueError("index out of range in self")),
    model("raises-runtime-error", lambda: RuntimeError("The size of tensor a must match")),
    model("raises-index-error", lambda: IndexError()),
    model("raises-key-error", lambda: KeyError("input_ids")),
    model("raises-assertion-error", lambda: AssertionError()),
    model("raises-recursion-error", lambda: RecursionError("maximum recursion depth exceeded")),
    model("raises-os-error", lambda: OSError(5, "Input/output error")),
    model("raises-unicode-error", lambda: UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")),
    model("raises-with-a-surrogate", lambda: ValueError("cannot read \ud800")),
    model("raises-with-a-megabyte", lambda: ValueError("x" * MB)),
    model("raises-memory-error", lambda: MemoryError()),
    model("runs-out-of-gpu-memory", lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")),
    model("runs-out-of-cpu-memory", lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")),
    model("runs-out-in-cublas", lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    vector("vector-nan", "non_finite", fill(np.nan)),
    vector("vector-one-nan", "non_finite", fill(np.nan, slice(3, 4))),
    vector("vector-infinite", "non_finite", fill(np.inf, slice(0, 1))),
    vector("vector-minus-infinite", "non_finite", fill(-np.inf)),
    vector("vector-too-long-for-float32", "non_finite", fill(3e38)),
    vector("vector-zero", "zero_norm", fill(0)),
    vector("vector-minus-zero", "zero_norm", fill(-0.0)),
    vector("vector-next-to-zero", "zero_norm", fill(1e-20)),
]

KINDS = [*SPACES, *SIZES, *CHARACTERS, *WORDS, *SURROGATES, *LINES, *CSV, *COLUMNS, *IDS, *MODELS]
