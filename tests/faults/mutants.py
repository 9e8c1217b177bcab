"""Damaged Parquet files, read as the scan reads them: `python -m tests.faults.mutants --seed 0 --count 10000`.

Each mutant is one seeded wound to one of a few originals. It must be refused, or read like its original. Half of the
originals carry a checksum per page. The others show what no reader can see: a page without one may hold anything.
Mutants run in batches, each in a process with bounded memory and time; one that dies is cut in halves until the
mutant that killed it is named.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import corpus, rows, sources
from pipeline.errors import DataError, SpecError
from pipeline.spec import Corpus

CHECKOUT = Path(__file__).parents[2]

Rng = np.random.Generator
ROWS = 60
SPEC = {"id": "_id", "text": ["title", "text"], "keep": ["tags"], "filter": ["lang", "year"]}
BATCH, BATCH_SECONDS, BATCH_MEMORY = 500, 120, 4 * 2**30
PAGES = {
    "plain": {"compression": "none", "use_dictionary": False},
    "dictionary": {"compression": "none"},
    "snappy": {"compression": "snappy", "row_group_size": 17},
    "zstd": {"compression": "zstd", "use_dictionary": False, "row_group_size": 40},
    "pages-v2": {"compression": "zstd", "data_page_version": "2.0", "data_page_size": 200, "write_batch_size": 8},
    "delta": {
        "compression": "none",
        "use_dictionary": False,
        "column_encoding": {
            "_id": "DELTA_BYTE_ARRAY",
            "text": "DELTA_LENGTH_BYTE_ARRAY",
            "year": "DELTA_BINARY_PACKED",
        },
    },
}
ORIGINALS = [(name, checked) for checked in (True, False) for name in PAGES]


@lru_cache
def original(name: str, checked: bool) -> bytes:
    """A small corpus: strings with nulls, numbers, a list, a column that Arrow calls a dictionary."""
    words = np.array([f"w{number:03d}" for number in range(300)])
    texts = [" ".join(np.random.default_rng(row).choice(words, 5)) for row in range(ROWS)]
    table = pa.table(
        {
            "_id": [f"doc-{row}" for row in range(ROWS)],
            "title": [None if row % 7 == 3 else words[row] for row in range(ROWS)],
            "text": texts,
            "lang": pa.array([("en", "de", "fr")[row % 3] for row in range(ROWS)]).dictionary_encode(),
            "year": [None if row % 11 == 5 else 1990 + row for row in range(ROWS)],
            "tags": [None if row % 5 == 4 else [texts[row][:4]] * (row % 4) for row in range(ROWS)],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=checked, **PAGES[name])
    return sink.getvalue().to_pybytes()


# Wounds


def parts(data: bytes) -> dict[str, tuple[int, int]]:
    """Where the parts of a Parquet file lie: pages begin with their headers, the footer ends 8 bytes before the end."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return {"pages": (4, footer), "footer": (footer, len(data) - 8), "length": (len(data) - 8, len(data) - 4)}


def headers(data: bytes) -> list[int]:
    """Where column chunks, and so their first page headers, begin."""
    footer = pq.ParquetFile(pa.BufferReader(data)).metadata
    chunks = [footer.row_group(group).column(at) for group in range(footer.num_row_groups) for at in range(6)]
    return [min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset) for chunk in chunks]


def flip(data: bytearray, low: int, high: int, rng: Rng) -> None:
    """One bit."""
    data[rng.integers(low, high)] ^= 1 << rng.integers(8)


def scribble(data: bytearray, low: int, high: int, rng: Rng) -> None:
    """Up to 16 random bytes."""
    start = int(rng.integers(low, high))
    stop = min(start + int(rng.integers(1, 17)), high)
    data[start:stop] = rng.bytes(stop - start)


def bit_anywhere(data: bytearray, rng: Rng) -> None:
    """One bit."""
    flip(data, 0, len(data), rng)


def bit_in_the_pages(data: bytearray, rng: Rng) -> None:
    """One bit of a page or its header."""
    flip(data, *parts(data)["pages"], rng)


def bit_in_the_footer(data: bytearray, rng: Rng) -> None:
    """One bit of the footer."""
    flip(data, *parts(data)["footer"], rng)


def bit_in_a_page_header(data: bytearray, rng: Rng) -> None:
    """One bit of the first bytes of a column chunk."""
    start = int(rng.choice(headers(data)))
    flip(data, start, start + 24, rng)


def bytes_in_the_pages(data: bytearray, rng: Rng) -> None:
    """Random bytes in pages."""
    scribble(data, *parts(data)["pages"], rng)


def bytes_in_the_footer(data: bytearray, rng: Rng) -> None:
    """Random bytes in the footer."""
    scribble(data, *parts(data)["footer"], rng)


def bytes_in_a_page_header(data: bytearray, rng: Rng) -> None:
    """Random bytes in the first bytes of a column chunk."""
    start = int(rng.choice(headers(data)))
    scribble(data, start, start + 24, rng)


def magic(data: bytearray, rng: Rng) -> None:
    """One bit of the magic at either end."""
    low = int(rng.choice([0, len(data) - 4]))
    flip(data, low, low + 4, rng)


def footer_length(data: bytearray, rng: Rng) -> None:
    """Another length of the footer."""
    low, high = parts(data)["length"]
    data[low:high] = int(rng.choice([rng.integers(2**32), rng.integers(len(data))])).to_bytes(4, "little")


def zeroed(data: bytearray, rng: Rng) -> None:
    """A range of zeros."""
    start = int(rng.integers(len(data)))
    stop = min(start + int(rng.integers(1, 513)), len(data))
    data[start:stop] = bytes(stop - start)


def truncated(data: bytearray, rng: Rng) -> None:
    """The end is missing."""
    del data[rng.integers(1, len(data)) :]


def hole(data: bytearray, rng: Rng) -> None:
    """Some bytes are missing in the middle."""
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 65))]


def extended(data: bytearray, rng: Rng) -> None:
    """More bytes at the end."""
    data += rng.bytes(int(rng.integers(1, 65)))


def swapped(data: bytearray, rng: Rng) -> None:
    """Two ranges change places."""
    size = int(rng.integers(1, 129))
    first, second = sorted(rng.integers(0, len(data) - size, 2).tolist())
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


def empty(data: bytearray, rng: Rng) -> None:
    """Nothing is left."""
    data.clear()


WOUNDS: list[Callable[[bytearray, Rng], None]] = [
    bit_anywhere, bit_in_the_pages, bit_in_the_footer, bit_in_a_page_header, bytes_in_the_pages, bytes_in_the_footer,
    bytes_in_a_page_header, magic, footer_length, zeroed, truncated, hole, extended, swapped, empty,
]  # fmt: skip


def mutant(seed: int, number: int) -> tuple[str, bool, str, bytes]:
    """The name of its original, whether that has checksums, the wound, and its bytes."""
    rng = np.random.default_rng([seed, number])
    name, checked = ORIGINALS[number % len(ORIGINALS)]
    weights = np.array([0.1 if wound is empty else 0.3 if wound is magic else 1.0 for wound in WOUNDS])
    wound = WOUNDS[rng.choice(len(WOUNDS), p=weights / weights.sum())]
    data = bytearray(original(name, checked))
    wound(data, rng)
    return name, checked, wound.__name__, bytes(data)


# What a reader makes of them


def read(path: Path) -> list[object]:
    """Everything the scan and the embedding take from a file."""
    settings = Corpus(source=str(path), **SPEC)
    files = corpus.check(settings)
    corpus.known_rows(files)
    found: list[object] = []
    for raw in sources.Reader(rows.columns(settings)).read(files[0]):
        types = {name: raw.columns[name].type for name in ("tags", "lang", "year")}
        clean = rows.clean(raw, "file", settings, types)
        extras = [clean.extras[name].to_pylist() for name in sorted(types)]
        found += [sorted((name, str(kind)) for name, kind in types.items()), clean.rejected, clean.repaired]
        found += zip(clean.offsets, clean.ids, clean.texts, clean.digests, *extras, strict=True)
    return found


def classify(seed: int, number: int, folder: Path, right: dict[str, list[object]]) -> tuple[str, str]:
    """How it was answered, and of what kind it is."""
    name, checked, wound, data = mutant(seed, number)
    kind = f"{name}{' with checksums' if checked else ''}: {wound}"
    if name not in right:
        (folder / "original.parquet").write_bytes(original(name, checked))
        right[name] = read(folder / "original.parquet")
    path = folder / "mutant.parquet"
    path.write_bytes(data)
    try:
        answer = "same" if read(path) == right[name] else "different"
    except (DataError, SpecError):
        answer = "refused"
    if answer == "different":
        answer = "different_detectable" if checked else "different_undetectable"
    return answer, kind


def run(seed: int, numbers: range) -> dict[str, list[str]]:
    """Answers, and which mutants got them."""
    answers: dict[str, list[str]] = {}
    right: dict[str, list[object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            answer, kind = classify(seed, number, Path(folder), right)
            answers.setdefault(answer, []).append(f"{number} {kind}")
    return answers


# Batches in processes of their own


def batch(seed: int, start: int, stop: int) -> dict[str, list[str]]:
    """`run` in a process of its own; where that dies, the mutants that kill it are found by halving."""
    command = [sys.executable, "-m", "tests.faults.mutants", "--seed", str(seed), "--batch", str(start), str(stop)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=BATCH_SECONDS, check=False, cwd=CHECKOUT
        )
        if ended.returncode == 0:
            return json.loads(ended.stdout)
        why = f"exit {ended.returncode}: {(ended.stderr.strip().splitlines() or [''])[-1][:200]}"
    except subprocess.TimeoutExpired:
        why = f"no end after {BATCH_SECONDS} s"
    if stop - start == 1:
        name, checked, wound, _ = mutant(seed, start)
        return {"crashes": [f"{start} {name}{' with checksums' if checked else ''}: {wound}: {why}"]}
    middle = (start + stop) // 2
    return joined([batch(seed, start, middle), batch(seed, middle, stop)])


def joined(parts: list[dict[str, list[str]]]) -> dict[str, list[str]]:
    """Answers of several batches."""
    return {answer: [one for part in parts for one in part.get(answer, [])] for answer in set().union(*parts)}


def scoreboard(seed: int, count: int) -> dict[str, object]:
    """The figures of so many mutants; each that was read wrongly or killed its reader is named."""
    begun = time.perf_counter()
    answers = joined([batch(seed, start, min(start + BATCH, count)) for start in range(0, count, BATCH)])
    kinds = ("refused", "same", "different_detectable", "different_undetectable", "crashes")
    blind = Counter(one.split(" ", 1)[1] for one in answers.get("different_undetectable", []))
    return {
        "seed": seed,
        "count": sum(map(len, answers.values())),
        **{kind: len(answers.get(kind, [])) for kind in kinds},
        "seconds": round(time.perf_counter() - begun, 1),
        "pyarrow": pa.__version__,
        "named": answers.get("crashes", []) + answers.get("different_detectable", []),
        "undetectable_by_wound": dict(blind.most_common()),
    }


def main() -> None:
    """Print the figures; exit 1 where a mutant was read wrongly in spite of checksums, or killed its reader."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, nargs=2)
    given = parser.parse_args()
    if given.batch:
        resource.setrlimit(resource.RLIMIT_AS, (BATCH_MEMORY, BATCH_MEMORY))
        sys.stdout.write(json.dumps(run(given.seed, range(*given.batch))))
        return
    figures = scoreboard(given.seed, given.count)
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    sys.exit(bool(figures["crashes"] or figures["different_detectable"]))


if __name__ == "__main__":
    main()
