"""What is measured beside speed: answers of every backend, what int8 costs in ranking, memory of a worker."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.bench.embed import ours, texts
from tests.bench.embed.drive import Ask, Bench, Failed, say
from tests.bench.embed.speed import compared
from tests.bench.embed.texts import Counter, Texts

BACKENDS = (("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16"),
            ("openvino", "int8"))  # fmt: skip
STATIC = (("static", "float32"),)
PROMPTS = ("", "passage: ")
SIZES = (10_000, 50_000, 250_000)
K = 10
Row = dict[str, Any]


def everything(data: Path | None, found: Mapping[str, Sequence[str]], rows: int, seed: int) -> dict[str, list[str]]:
    """A seeded sample of every corpus below the data folder, beside the sets that speed is measured on."""
    every = dict(found)
    for file in sorted(data.glob("*/corpus.parquet")) if data is not None else ():
        if file.parent.name not in ("arxiv-abstracts", "xquad"):  # those are sets already
            every[file.parent.name] = texts.joined(file, ("title", "text"))
    return {
        name: list(dict.fromkeys(text for text in texts.sample(given, rows, seed) if text.strip()))
        for name, given in every.items()
    }


def fidelity(
    bench: Bench, model: str, sets: Sequence[Texts], backends: Iterable[tuple[str, str]], calibration: Texts,
    reference: Ask,
) -> list[Row]:  # fmt: skip
    """Mean and least cosine of every backend to sentence-transformers' own encode, on each set, with each prompt."""
    truth = {(of.name, prompt): bench.work / f"truth-{of.name}-{bool(prompt)}.npy" for of in sets for prompt in PROMPTS}
    for of in sets:
        for prompt in PROMPTS:
            say(f"fidelity: {of.name}, {prompt!r}: sentence-transformers")
            reference(texts=of.json, max_tokens=of.limit, prompt=prompt, out=str(truth[of.name, prompt]))
    rows = []
    for backend, precision in backends:
        name = f"fidelity-{backend}-{precision}"
        ask = bench.own(
            name, {"model": model, "backend": backend, "precision": precision, "calibration": calibration.json}
        )
        try:
            for prompt in PROMPTS:
                for of in sets:
                    say(f"fidelity: {of.name}, {prompt!r}: {backend} {precision}")
                    out = bench.work / "fidelity.npy"
                    ask(texts=of.json, max_tokens=of.limit, prompt=prompt, out=str(out))
                    rows.append({"backend": backend, "precision": precision, "set": of.name, "prompt": prompt,
                                 "documents": of.count, **compared(out, truth[of.name, prompt])})  # fmt: skip
        except Failed as error:
            bench.leave_out(name, str(error))
        bench.close(name)
    return rows


def quality(
    bench: Bench, data: Path, questions: int, seed: int, counter: Counter, calibration: Texts
) -> list[Row]:  # fmt: skip
    """nDCG@10 on squad-dev: documents by each backend, questions always in float32, as searches embed them."""
    folder = data / "squad-dev"
    corpus, asked, judged = (pq.read_table(folder / f"{one}.parquet") for one in ("corpus", "queries", "qrels"))
    place = {name: row for row, name in enumerate(corpus["_id"].to_pylist())}
    right = dict(zip(judged["query_id"].to_pylist(), judged["corpus_id"].to_pylist(), strict=True))
    chosen = np.sort(np.random.default_rng(seed).permutation(asked.num_rows)[:questions])
    ids, given = asked["_id"].take(chosen).to_pylist(), asked["text"].take(chosen).to_pylist()
    wanted = np.array([place[right[name]] for name in ids])
    documents = texts.write(
        bench.work, "squad", texts.joined(folder / "corpus.parquet", ("title", "text")), None, counter
    )
    queries = texts.write(bench.work, "squad-questions", given, None, counter)
    rows: list[Row] = []
    for backend, precision in BACKENDS:
        name, out = f"quality-{backend}-{precision}", bench.work / "quality.npy"
        options = {"model": bench.name, "backend": backend, "precision": precision, "calibration": calibration.json}
        ask = bench.own(name, options)
        try:
            say(f"quality: {backend} {precision}")
            if not rows:
                ask(texts=queries.json, out=str(bench.work / "questions.npy"))
            ask(texts=documents.json, out=str(out))
        except Failed as error:
            bench.leave_out(name, str(error))
            continue
        finally:
            bench.close(name)
        ndcg = _ndcg(np.load(bench.work / "questions.npy"), np.load(out), wanted)
        share = ndcg / rows[0]["ndcg"] if rows else 1.0
        rows.append({"backend": backend, "precision": precision, "documents": documents.count,
                     "questions": queries.count, "ndcg": ndcg, "share": share})  # fmt: skip
    return rows


def _ndcg(queries: np.ndarray, documents: np.ndarray, wanted: np.ndarray) -> float:
    """Mean nDCG@10 where each query has one right document; ties are for the others."""
    scores = queries @ documents.T
    own = scores[np.arange(len(wanted)), wanted]
    ranks = (scores >= own[:, None]).sum(axis=1)
    return float(np.where(ranks <= K, 1 / np.log2(ranks + 1), 0).mean())


def memory(bench: Bench, model: Path, sizes: Sequence[int], words: Sequence[str], seed: int) -> list[Row]:
    """Peak resident memory of a worker over corpora of growing size, with the static model."""
    rows = []
    for size in sizes:
        say(f"memory: {size:,} documents")
        file = bench.work / "short.parquet"
        with pq.ParquetWriter(file, texts.SHORT) as writer:
            for table in texts.short(size, words, seed):
                writer.write_table(table)
        told = bench.job(ours.job(str(file), str(model), bench.work / "root", None), None)
        rows.append({"documents": size, "shards": told["shards"], "peak_memory_bytes": told["peak_memory_bytes"],
                     "seconds": told["seconds"], "documents_per_second": size / told["seconds"],
                     "startup_seconds": told["startup_seconds"]})  # fmt: skip
    return rows
