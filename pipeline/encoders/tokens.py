"""Texts to token ids, flat: the tokenizer's own ids, its special tokens around them, cut to the model's limit.

The plain tokenizer is Hugging Face's `tokenizers`; `nanotoken`, where installed, takes its place only if it gives
the same ids on the texts it is tried on when a model is loaded.
"""

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Ids = NDArray[np.int32]
Rows = NDArray[np.int64]
HUGE = 100_000
"""Characters from which a text is read no further than it must be: 10 MB take a tokenizer 2 to 25 s and 0.5 to 5 GB
(measured, by its kind)."""
HEAD = 64
"""Characters read of a huge text for each token of the limit (English has four); four times as many if they are few."""
PLAIN = "tokenizers"
CHUNK = 1_024
"""Texts that `tokenizers` is given at once: each costs kilobytes until its ids are taken."""
TRIALS = (
    "The quick brown fox jumps over 13 lazy dogs; naïve café, ÅNGSTRÖM — “quotes” … don't!",
    "  two  spaces\tand\na line [SEP] [MASK] <s> </s> ##ing  e\u0301 \u0301\u0301 ﬁ ½ Ⅷ İstanbul ß",
    "日本語のテキスト 漢字かな交じり文 한국어 텍스트 ภาษาไทย हिन्दी العربية עברית ελληνικά русский",
    "emoji 👩‍🚀👍🏽🇩🇪 zero\u200bwidth \ufeffbom soft\u00adhyphen nbsp\u00a0here \u2028line \x00nul \x7f \ufffd",
    "https://example.org/a_b-c?d=e%20f#g x86_64 C++ f(x)=∫₀^∞e^{-x²}dx $\\alpha_{i}$ 1,234.56 snake_case CamelCase",
    "a" * 90 + " " + "b" * 300 + " " + "!?" * 40,
    "",
    " ",
)
"""Texts on which two tokenizers would differ, if anywhere."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of some texts, cut to the model's limit: those of row i are ids[offsets[i]:offsets[i + 1]].

    `counts` are before the cut (of a huge text a lower bound). `texts` is set for models that read texts themselves:
    their ids stand for nothing but their number.
    """

    ids: Ids
    offsets: Rows
    counts: Rows
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        """How many texts."""
        return len(self.counts)

    @property
    def lengths(self) -> Rows:
        """int64[n]: tokens of each text after the cut."""
        return np.diff(self.offsets)

    def take(self, rows: Rows) -> "Tokens":
        """The given rows, in their order."""
        lengths = self.lengths[rows]
        offsets = _offsets(lengths)
        at = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        return Tokens(self.ids[at], offsets, self.counts[rows], texts)

    def slice(self, start: int, stop: int) -> "Tokens":
        """Rows start … stop, without a copy of their ids."""
        offsets = self.offsets[start : stop + 1]
        ids = self.ids[offsets[0] : offsets[-1]]
        texts = None if self.texts is None else self.texts[start:stop]
        return Tokens(ids, offsets - offsets[0], self.counts[start:stop], texts)

    def padded(self, pad: int, left: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64[n, longest] ids, filled up with `pad` behind (or, `left`, before) each text, and the mask."""
        lengths = self.lengths[:, None]
        longest = int(lengths.max(initial=0))
        at = np.arange(longest)
        mask = at >= longest - lengths if left else at < lengths
        ids = np.full(mask.shape, pad, np.int64)
        ids[mask] = self.ids
        return ids, mask.astype(np.int64)


def unread(counts: Rows, limit: int | None, texts: Sequence[str]) -> Tokens:
    """Tokens of which only the numbers are known."""
    offsets = _offsets(counts if limit is None else np.minimum(counts, limit))
    return Tokens(np.zeros(offsets[-1], np.int32), offsets, counts, texts)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """One after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    texts = [text for part in parts for text in part.texts or ()] if parts[0].texts is not None else None
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        _offsets(lengths),
        np.concatenate([part.counts for part in parts]),
        texts,
    )


def _offsets(lengths: Rows) -> Rows:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


Raw = Callable[[Sequence[str]], tuple[Ids, Rows]]
"""Texts to their flat ids and offsets, without special tokens and uncut."""


def plain(tokenizer: Any) -> Raw:
    """A `tokenizers.Tokenizer` of its own, so that nobody else's settings of padding and cutting reach it."""
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()

    def raw(texts: Sequence[str]) -> tuple[Ids, Rows]:
        parts, lengths = [], []
        for start in range(0, len(texts), CHUNK):
            ids = [one.ids for one in own.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)]
            lengths += list(map(len, ids))
            parts.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32, sum(lengths[start:])))
        return np.concatenate([np.zeros(0, np.int32), *parts]), _offsets(np.array(lengths, np.int64))

    return raw


def fastest(tokenizer: Any, slow: Raw, threads: int | None) -> tuple[Raw, str]:
    """The quickest way to the ids of a `tokenizers.Tokenizer`, of which `slow` is the plain one, and its name.

    `nanotoken` (the extra [nanotoken]) is taken where it knows the tokenizer's kind and agrees on every trial;
    MATRYOSHKA_TOKENIZER=huggingface in the environment rules it out.
    """
    if os.environ.get("MATRYOSHKA_TOKENIZER") == "huggingface":
        return slow, PLAIN
    try:
        import nanotoken

        inner = nanotoken.Tokenizer.from_json(tokenizer.to_str())
    except (ImportError, ValueError):  # not installed; a kind it does not know
        return slow, PLAIN

    def raw(texts: Sequence[str]) -> tuple[Ids, Rows]:
        got = inner.encode_batch(texts, add_special_tokens=False, parallel=threads != 1)
        return got.ids.view(np.int32), got.offsets

    return (raw, "nanotoken") if _agree(slow, raw, TRIALS) else (slow, PLAIN)


def _agree(slow: Raw, raw: Raw, texts: Sequence[str]) -> bool:
    (ids, offsets), (others, places) = slow(texts), raw(texts)
    same = np.array_equal(ids, others) and np.array_equal(offsets, places)
    if not same:
        log.warning("nanotoken gives other ids than tokenizers for this model or corpus; tokenizers is used")
    return same


@dataclass(frozen=True)
class Tokenizer:
    """Special tokens around raw ids, and the cut: `limit` counts the special tokens too; None cuts nothing."""

    raw: Raw
    name: str
    plain: Raw
    before: Ids
    after: Ids
    limit: int | None

    @classmethod
    def of(cls, tokenizer: Any, special: bool, limit: int | None, threads: int | None = None) -> "Tokenizer | None":
        """From a `tokenizers.Tokenizer`; None where its special tokens are no constant frame, or the limit is less."""
        slow = plain(tokenizer)
        raw, name = fastest(tokenizer, slow, threads)
        before, after = np.zeros(0, np.int32), np.zeros(0, np.int32)
        if special:
            found = _frame(tokenizer, raw)
            if found is None:
                return None
            before, after = found
        if limit is not None and limit <= len(before) + len(after):
            return None
        return cls(raw, name, slow, before, after, limit)

    def agreeing(self, texts: Sequence[str]) -> "Tokenizer":
        """The same, plain if it gives other ids than the plain one on these texts."""
        return self if self.name == PLAIN or _agree(self.plain, self.raw, texts) else self.plainly()

    def plainly(self) -> "Tokenizer":
        """The same with the ids of `tokenizers`."""
        return replace(self, raw=self.plain, name=PLAIN)

    def __call__(self, texts: Sequence[str], prompt: str = "") -> Tokens:
        """Tokens of each text with its prompt."""
        ids, offsets = self.raw(self._heads([prompt + text for text in texts] if prompt else texts, len(prompt)))
        frame = len(self.before) + len(self.after)
        lengths = np.diff(offsets)
        kept = lengths if self.limit is None else np.minimum(lengths, self.limit - frame)
        if not frame and (kept == lengths).all():
            return Tokens(ids, offsets, lengths)
        whole = _offsets(kept + frame)
        out = np.empty(whole[-1], np.int32)
        starts = whole[:-1] + len(self.before)
        here = np.arange(int(kept.sum()))
        moved = np.repeat(_offsets(kept)[:-1], kept)
        out[here - moved + np.repeat(starts, kept)] = ids[here - moved + np.repeat(offsets[:-1], kept)]
        for place, token in enumerate(self.before):
            out[whole[:-1] + place] = token
        for place, token in enumerate(self.after):
            out[starts + kept + place] = token
        return Tokens(out, whole, lengths + frame)

    def _heads(self, whole: Sequence[str], prompt: int) -> Sequence[str]:
        """The texts; of huge ones as much as holds the first `limit` tokens, which are all that is read."""
        if self.limit is None or not any(len(text) > HUGE for text in whole):
            return whole
        return [
            head(text, lambda start: self.raw([start])[0], self.limit, prompt) if len(text) > HUGE else text
            for text in whole
        ]


def head(text: str, read: Callable[[str], Any], limit: int, prompt: int = 0) -> str:
    """A start of a text (behind its prompt of so many characters) whose first tokens are the text's.

    A shorter start has the same ones. Where none has tokens enough (one word of a megabyte) it is the whole text.
    """
    size = HEAD * limit
    while size + prompt < len(text):
        short = read(text[: prompt + size * 3 // 4])
        if len(short) >= 2 * limit and list(short[:limit]) == list(read(text[: prompt + size])[:limit]):
            return text[: prompt + size]
        size *= 4
    return text


def _frame(tokenizer: Any, raw: Raw) -> tuple[Ids, Ids] | None:
    """The special tokens before and behind a text, where they are the same for every text."""
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()
    frames = set()
    for text in TRIALS[:5]:
        whole, inner = own.encode(text).ids, raw([text])[0].tolist()
        at = next((i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner), None)
        if at is None:
            return None
        frames.add((tuple(whole[:at]), tuple(whole[at + len(inner) :])))
    if len(frames) != 1:
        return None
    (before, after) = frames.pop()
    return np.array(before, np.int32), np.array(after, np.int32)
