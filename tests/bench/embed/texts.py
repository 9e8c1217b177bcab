"""The texts that everyone embeds, as files: a JSON list for peers, Parquet for this project, their tokens for the sums.

Each set holds different, non-blank texts only, so that nobody gains from repeats.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.docstrings import stdlib
from tests.bench.embed.models import is_static

LONGEST, SHORTEST = 500, 5
"""Tokens of mixed texts."""
TOKENS_PER_WORD = 1.35
"""Of English abstracts in MiniLM's vocabulary, so that mixed texts have about the length that was drawn."""
SHARE = {"docstrings": 1.0, "abstracts": 0.5, "questions": 4.0, "xquad": 0.5, "mixed": 0.5}
"""Texts of a set for each row asked for, so that sets take about the same time."""


@dataclass(frozen=True)
class Texts:
    """One set on disk. `limit` is the cut in tokens, None: the model's own; `tokens` are what is left, by text."""

    name: str
    folder: str
    count: int
    limit: int | None
    tokens: np.ndarray

    @property
    def json(self) -> str:
        """The file for peers."""
        return str(Path(self.folder, f"{self.name}.json"))

    @property
    def parquet(self) -> str:
        """The file for this project: _id, text."""
        return str(Path(self.folder, f"{self.name}.parquet"))

    def told(self) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "documents": self.count,
            "tokens": int(self.tokens.sum()),
            "mean_tokens": float(self.tokens.mean()),
            "longest": int(self.tokens.max()),
            "limit": self.limit,
        }


@dataclass(frozen=True)
class Counter:
    """Tokens of texts after the cut, by the model's own tokenizer; static models have no limit, no special tokens."""

    tokenizer: Any
    limit: int | None

    @classmethod
    def of(cls, model: Path) -> "Counter":
        """The counter of a folder."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(next(iter(sorted(model.rglob("tokenizer.json"))))))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if is_static(model):
            return cls(tokenizer, None)
        configs = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
        found = [json.loads((model / file).read_text()).get(name) for file, name in configs if (model / file).is_file()]
        return cls(tokenizer, next((limit for limit in found if limit), 512))

    def __call__(self, texts: Sequence[str], limit: int | None) -> np.ndarray:
        """int64[n]; `limit` stands for the model's own."""
        read = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=self.limit is not None)
        counts = np.array([len(one.ids) for one in read], np.int64)
        most = limit or self.limit
        return counts if most is None else np.minimum(counts, most)


def sources(data: Path | None) -> dict[str, list[str]]:
    """Every text of each set that can be made, mixed ones left out."""
    found = {"docstrings": [f"{row['title']}\n{row['text']}" for row in stdlib()]}
    if data is not None:
        found |= {
            "abstracts": joined(data / "arxiv-abstracts" / "corpus.parquet", ("title", "text")),
            "questions": joined(data / "squad-dev" / "queries.parquet", ("text",)),
            "xquad": joined(data / "xquad" / "corpus.parquet", ("text",)),
        }
    return {name: list(dict.fromkeys(text for text in texts if text.strip())) for name, texts in found.items()}


def joined(file: Path, columns: Sequence[str]) -> list[str]:
    """Texts of a Parquet file: its columns, joined by a newline."""
    if not file.is_file():
        raise SystemExit(f"{file} is not there; DATA is a folder with {file.parent.name}/{file.name}")
    table = pq.read_table(file, columns=list(columns))
    return ["\n".join(parts) for parts in zip(*(table[name].to_pylist() for name in columns), strict=True)]


def mixed(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Runs of words of other texts, of 5 to 500 tokens, every length as likely."""
    words, rng = [word for text in texts for word in text.split()], np.random.default_rng(seed)
    lengths = np.maximum(1, rng.integers(SHORTEST, LONGEST + 1, count) / TOKENS_PER_WORD).astype(int)
    starts = rng.integers(0, max(1, len(words) - LONGEST), count)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def prepare(
    folder: Path, found: Mapping[str, Sequence[str]], names: Sequence[str], rows: int, counter: Counter,
    positions: int | None, seed: int,
) -> list[Texts]:  # fmt: skip
    """Write a seeded sample of each set asked for; mixed texts may be as long as the model has positions."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in names:
        count, limit = max(1, int(rows * SHARE[name])), None
        if name == "mixed":
            texts = list(dict.fromkeys(mixed(found.get("abstracts", found["docstrings"]), count, seed)))
            limit = min(positions, 512) if positions else None
        else:
            texts = sample(found[name], count, seed)
        made.append(write(folder, name, texts, limit, counter))
    return made


def sample(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """A seeded sample, in order."""
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[row] for row in np.sort(chosen)]


def write(folder: Path, name: str, texts: Sequence[str], limit: int | None, counter: Counter) -> Texts:
    """Both files of a set."""
    made = Texts(name, str(folder), len(texts), limit, counter(texts, limit))
    Path(made.json).write_text(json.dumps(list(texts)))
    pq.write_table(pa.table({"_id": [str(row) for row in range(len(texts))], "text": list(texts)}), made.parquet)
    return made


SHORT = pa.schema({"_id": pa.string(), "text": pa.string()})


def short(count: int, words: Sequence[str], seed: int) -> Iterator[pa.Table]:
    """Tables _id, text of short documents: 8 to 24 words drawn by seed."""
    rng, vocabulary = np.random.default_rng(seed), np.array(words)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        ends = np.cumsum(rng.integers(8, 25, size))
        drawn = np.split(vocabulary[rng.integers(0, len(vocabulary), ends[-1])], ends[:-1])
        texts = [" ".join(one) for one in drawn]
        yield pa.table({"_id": [str(row) for row in range(start, start + size)], "text": texts}, SHORT)
