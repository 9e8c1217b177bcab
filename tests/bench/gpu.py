"""The embedding benchmark for one NVIDIA GPU: needs torch, transformers, sentence-transformers, pyarrow, this checkout.

    PYTHONPATH=. OUT=output/bench-gpu python -m tests.bench.gpu
    PYTHONPATH=. python -m tests.bench.gpu --tiny          # the same on a CPU, in seconds: a check, no result

Random models of the shapes of MiniLM, BERT-base and BERT-large; nothing is downloaded. Each way of running them is
compared with float32 first, and only then timed: ours (packed, padded, compiled; several processes), and
sentence-transformers at its default and swept. The best of each then run from texts to vectors in turns. A way that
fails or has no time left says so. Writes gpu.json; the table goes to stdout, with the best of each at the end.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from tests.bench.gpu_models import SHAPES, Shape, encoders_alone, flops, save, texts
from tests.bench.gpu_variants import Way, limited, loaded, together

SECONDS = 440
"""Of the whole run; what would begin later is left out, and says so."""
BUDGETS = (65_536, 131_072, 262_144)
PEER_BATCHES = (32, 128, 256, 512)
LEAST_COSINE = 0.999
"""Mean against float32, for a way whose speed counts."""
JUDGED = 256
"""Texts that are compared with float32."""
COLUMNS = ("shape", "set", "way", "precision", "batch", "tokens_per_second", "texts_per_second", "mfu", "padding",
           "cosine", "peak_gib", "note")  # fmt: skip


class Bench:
    """One run: its clock, its rows, the device's peak."""

    def __init__(self, asked: argparse.Namespace, out: Path) -> None:
        """Nothing is loaded yet."""
        import torch

        self.torch, self.tiny, self.out = torch, asked.tiny, out
        self.passes = 1 if asked.tiny else asked.passes
        self.end = time.monotonic() + asked.seconds
        self.cuda = torch.cuda.is_available()
        if not self.cuda:
            torch.set_num_threads(1)
        self.rows: list[dict[str, Any]] = []
        self.peak = self.measured_peak()
        from pipeline.encoders import packed, sentence

        packed.register()
        if not self.cuda:  # compiled in name alone: a check of the way there
            sentence.COMPILER, sentence.COMPILER_OPTIONS = "eager", {}
            packed._plain = torch.compiler.disable(packed._plain)
        self.has_kernel = packed.kernel_serves(self.device, torch.bfloat16, 64)

    def measured_peak(self) -> float:
        """Operations per second of a bfloat16 matrix product, the best of ten."""
        torch, size = self.torch, 8192 if self.cuda else 512
        one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        seconds = []
        for _ in range(13):
            self.wait()
            start = time.perf_counter()
            torch.matmul(one, other)
            self.wait()
            seconds.append(time.perf_counter() - start)
        return float(2 * size**3 / min(seconds[3:]))

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def left(self) -> float:
        return self.end - time.monotonic()

    def row(self, what: dict[str, Any], measure: Callable[[], dict[str, Any]], needs: float = 10) -> dict[str, Any]:
        """Add the figures of a way, or why it has none: failed, too slow to wait for, no time left."""
        figures: dict[str, Any] = {}
        if self.left() < needs:
            figures["note"] = "left out: no time left"
        else:
            if self.cuda:
                self.torch.cuda.empty_cache()
                self.torch.cuda.reset_peak_memory_stats()
            try:
                with limited(min(self.left(), 90)):
                    figures = measure()
            except Exception as error:  # whatever a way raises costs its own figures
                figures["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]
            if self.cuda and "tokens_per_second" in figures:
                figures.setdefault("peak_gib", self.torch.cuda.max_memory_allocated() / 2**30)
        made_row = {**dict.fromkeys(COLUMNS), **what, **figures}
        self.rows.append(made_row)
        print(line(made_row), flush=True)
        self.write()
        return made_row

    def write(self) -> None:
        """All figures so far, so that a run that is cut short leaves them."""
        packages = ("torch", "transformers", "sentence-transformers", "numpy", "tokenizers")
        card = self.torch.cuda.get_device_name() if self.cuda else platform.processor()
        machine = {"device": card, "cores": os.cpu_count(), "packages": {name: version(name) for name in packages}}
        machine |= {"peak_flops": self.peak, "varlen_kernel": self.has_kernel}
        figures = {"machine": machine, "tiny": self.tiny, "rows": self.rows}
        (self.out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")


class Case:
    """One shape with one set of texts: what is true of it, and how ways of running it are measured."""

    def __init__(self, bench: Bench, shape: Shape, encoder: Any, folder: Path, name: str, tokens: int) -> None:
        """Tokenize, and embed the judged texts in float32."""
        from pipeline.encoders.batches import encode_rows, prepare

        self.bench, self.shape, self.encoder, self.folder, self.name = bench, shape, encoder, folder, name
        self.texts, self.lengths = texts(name, tokens)
        self.prepared = prepare(encoder, self.texts, "")
        if not np.array_equal(self.prepared.tokens.lengths, self.lengths):
            raise RuntimeError("the tokenizer splits the words of the benchmark")
        self.judged = self.texts[:JUDGED]
        self.truth = encode_rows(encoder, self.judged, "document", "", 16_384).vectors

    def what(self, way: str, precision: str, batch: int) -> dict[str, Any]:
        return {"shape": self.shape.name, "set": self.name, "way": way, "precision": precision, "batch": batch}

    def figures(self, seconds: Sequence[float], lengths: np.ndarray, padded: float) -> dict[str, Any]:
        """Rates of the median pass over texts of these lengths."""
        middle = statistics.median(seconds)
        return {
            "tokens_per_second": float(lengths.sum()) / middle,
            "texts_per_second": len(lengths) / middle,
            "mfu": flops(self.shape, lengths) / middle / self.bench.peak,
            "padding": 1 - float(lengths.sum()) / padded,
            "seconds": list(seconds),
        }

    def checked(self, vectors: np.ndarray) -> dict[str, Any]:
        """Cosines to float32; RuntimeError where they are too far off."""
        vectors = np.asarray(vectors[: len(self.judged)], np.float64)
        cosines = np.sum(vectors * self.truth[: len(vectors)], axis=1) / np.linalg.norm(vectors, axis=1)
        if not cosines.mean() >= LEAST_COSINE:
            raise RuntimeError(f"mean cosine to float32 is {cosines.mean():.6f}")
        return {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}

    def built(self, way: Way) -> Any:
        return self.encoder.variant(way.precision, way.attention, way.compiled)

    def ours(self, way: Way, passes: int, needs: float = 10) -> dict[str, Any]:
        """Ids that are ready, to vectors in host memory."""
        from pipeline.encoders.batches import encode, encode_rows

        def measure() -> dict[str, Any]:
            start = time.perf_counter()
            ours = self.built(way)
            told = self.checked(encode_rows(ours, self.judged, "document", "", way.budget).vectors)
            encode(ours, self.prepared, "document", "", way.budget)
            told["start_seconds"] = time.perf_counter() - start
            done = [encode(ours, self.prepared, "document", "", way.budget) for _ in range(passes)]
            if any(one.failed for one in done):
                raise RuntimeError(next(iter(done[0].failed.values()))[1])
            if done[0].halvings:
                raise RuntimeError("out of memory at this budget")
            if any(not np.array_equal(one.vectors, done[0].vectors) for one in done):
                told["note"] = "bits differ from pass to pass"
            return told | self.figures([one.forward_seconds for one in done], self.lengths, done[0].padded_tokens)

        return self.bench.row(self.what(way.name, way.precision, way.budget), measure, needs) | {"how": way}

    def peer(self, precision: str, batch: int, attention: str | None, share: int) -> dict[str, Any]:
        """sentence-transformers' encode, from texts, of the first `share` of them."""

        def measure() -> dict[str, Any]:
            model = peer_model(self.folder, precision, attention, self.bench.device)
            told = self.checked(model.encode(self.judged, batch_size=batch))
            seconds, lengths = [], self.lengths[:share]
            for _ in range(1 if precision == "float32" else min(2, self.bench.passes)):
                start = time.perf_counter()
                model.encode(self.texts[:share], batch_size=batch)
                seconds.append(time.perf_counter() - start)
            padded = lengths.sum() if (attention or "").startswith("flash") else padded_tokens(lengths, batch)
            return told | self.figures(seconds, lengths, float(padded))

        name = "sentence-transformers" + (f" {attention}" if attention else " default")
        row = self.bench.row(self.what(name, precision, batch), measure)
        return row | {"how": (precision, batch, attention)}


def padded_tokens(lengths: np.ndarray, batch: int) -> int:
    """Of batches of so many texts, sorted by length as sentence-transformers does."""
    order = np.sort(lengths)[::-1]
    return int(sum(order[start] * len(order[start : start + batch]) for start in range(0, len(order), batch)))


def peer_model(folder: Path, precision: str, attention: str | None, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    settings: dict[str, Any] = {} if precision == "float32" else {"dtype": precision}
    if attention:
        settings["attn_implementation"] = attention
    return SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=settings)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    counted = [row for row in rows if row.get("tokens_per_second")]
    return max(counted, key=lambda row: row["tokens_per_second"]) if counted else None


def of_case(bench: Bench, shape: Shape, folder: Path, name: str) -> None:
    """All ways of one shape with one set of texts."""
    tokens = shape.tokens if name == "mixed" else shape.tokens // 2
    case = Case(bench, shape, loaded(folder), folder, name, tokens)
    swept = of_ours(case, full=name == "mixed")
    champion, rival = best(swept), best(of_peers(case, full=name == "mixed"))
    if champion and rival:
        turns(case, champion["how"], rival["how"])
    if champion and name == "mixed" and shape.name in ("minilm", "tiny"):
        way = replace(champion["how"], compiled=False) if bench.tiny else champion["how"]
        for count in (1,) if bench.tiny else (1, 2):
            processes(case, way, count)


def of_ours(case: Case, full: bool) -> list[dict[str, Any]]:
    """Budgets first, then the rest at the best of them."""
    bench = case.bench
    budgets = (512, 1024) if bench.tiny else BUDGETS if full else BUDGETS[1:]
    rows = [case.ours(Way(budget=budget), bench.passes) for budget in budgets]
    leading = best(rows)
    way = leading["how"] if leading else Way(budget=budgets[-1])
    rows += [case.ours(replace(way, attention="padded"), bench.passes)]
    if full:
        rows += [case.ours(replace(way, precision="float16"), bench.passes)]
    rows += [case.ours(replace(way, compiled=True), bench.passes, needs=30)]
    return rows


def of_peers(case: Case, full: bool) -> list[dict[str, Any]]:
    """The default, then batch sizes at half precision with padded and, where it is installed, flash attention."""
    tiny, share = case.bench.tiny, max(1, len(case.texts) // 8)
    case.peer("float32", 32, None, share)
    sizes = (8,) if tiny else PEER_BATCHES if full else PEER_BATCHES[1:]
    rows = [case.peer("bfloat16", size, "sdpa", share) for size in sizes]
    leading = best(rows)
    size = leading["batch"] if leading else sizes[0]
    rows += [case.peer("float16", size, "sdpa", share)]
    if importlib.util.find_spec("kernels") or importlib.util.find_spec("flash_attn"):
        rows += [case.peer("bfloat16", some, "flash_attention_2", share) for some in {size, sizes[-1]}]
    return rows


def turns(case: Case, way: Way, rival: tuple[str, int, str | None]) -> None:
    """From texts to vectors, five rounds in turns: ours, sentence-transformers at its best, at its default."""
    bench = case.bench
    share = case.texts[: max(1, len(case.texts) // 2)]
    few = share[: max(1, len(share) // 8)]

    def measure() -> dict[str, Any]:
        ours = case.built(way)
        best_peer = peer_model(case.folder, rival[0], rival[2], bench.device)
        default = peer_model(case.folder, "float32", None, bench.device)
        contenders: dict[str, tuple[list[str], Callable[[list[str]], Any]]] = {
            "ours": (share, lambda some: from_texts(ours, some, way.budget)),
            "best": (share, lambda some: best_peer.encode(some, batch_size=rival[1])),
            "default": (few, lambda some: default.encode(some)),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(1 if bench.tiny else 6):
            for name, (some, run) in contenders.items():
                start = time.perf_counter()
                vectors = run(some)
                if turn or bench.tiny:  # the first round warms up
                    rates[name].append(float(case.lengths[: len(some)].sum()) / (time.perf_counter() - start))
                if name == "ours":
                    case.checked(vectors)
        middle = {name: statistics.median(rate) for name, rate in rates.items()}
        note = f"{middle['ours'] / middle['default']:.1f} x default, {middle['ours'] / middle['best']:.2f} x best"
        seconds = [float(case.lengths[: len(share)].sum()) / rate for rate in rates["ours"]]
        told = case.figures(seconds, case.lengths[: len(share)], float(case.lengths[: len(share)].sum()))
        return told | {"padding": None, "note": note, "rates": rates, "rival": rival}

    bench.row(case.what(f"{way.name}, from texts in turns", way.precision, way.budget), measure, needs=20)


def from_texts(encoder: Any, some: list[str], budget: int) -> np.ndarray:
    """Vectors of texts; while the device computes one part, a thread tokenizes the next."""
    from pipeline.encoders.batches import encode, prepare

    ready: Queue[Any] = Queue(2)
    size = max(256, -(-len(some) // 8))

    def tokenize() -> None:
        for start in range(0, len(some), size):
            try:
                ready.put(prepare(encoder, some[start : start + size], ""))
            except Exception as error:  # raised where it is waited for
                ready.put(error)
                return
        ready.put(None)

    threading.Thread(target=tokenize, daemon=True).start()
    parts = []
    for part in iter(ready.get, None):
        if isinstance(part, Exception):
            raise part
        parts.append(encode(encoder, part, "document", "", budget).vectors)
    return np.concatenate(parts)


def processes(case: Case, way: Way, count: int) -> None:
    """Several processes on one device, the best way in each."""

    def measure() -> dict[str, Any]:
        seconds, passes = min(75, case.bench.left()), max(2, case.bench.passes)
        told = together(case.folder, way, case.name, case.shape.tokens, count, passes, seconds)
        per_token = flops(case.shape, case.lengths) / float(case.lengths.sum())
        return told | {"mfu": told["tokens_per_second"] * per_token / case.bench.peak, "peak_gib": None}

    case.bench.row(case.what(f"{way.name}, {count} process(es)", way.precision, way.budget), measure, needs=45)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def shown(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    return (
        f"{row['shape']:7}{row['set']:6}{row['way']:42}{row['precision']:9}{row['batch']:>7}"
        f"{shown('tokens_per_second', ',.0f'):>12} tok/s{shown('texts_per_second', ',.0f'):>10} texts/s"
        f"{shown('mfu', '.1%'):>7} MFU{shown('padding', '.1%'):>7} pad{shown('cosine', '.6f'):>9}"
        f"{shown('peak_gib', '.1f'):>6} GiB  {row['note'] or ''}"
    )


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The best of each, and what the turns said."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for name in ("mixed", "short"):
            mine = [row for row in rows if (row["shape"], row["set"]) == (shape, name)]
            for prefix in ("ours", "sentence-transformers"):
                leading = best([row for row in mine if row["way"].startswith(prefix) and "turns" not in row["way"]])
                yield line(leading) if leading else f"{shape} {name}: no {prefix} ran"
            yield from (line(row) for row in mine if "turns" in row["way"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tiny", action="store_true", help="a model of nothing, in seconds, on a CPU too: no result")
    options.add_argument("--shapes", default="base,minilm,large", help="in this order, as far as the time lasts")
    options.add_argument("--sets", default="mixed,short")
    options.add_argument("--seconds", type=float, default=SECONDS)
    options.add_argument("--passes", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "output/bench-gpu")))
    asked = options.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    encoders_alone()
    asked.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked, asked.out)
    if not (bench.cuda or bench.tiny):
        sys.exit("no CUDA device; --tiny runs on a CPU")
    kernel = "torch's kernel" if bench.has_kernel else "no kernel, right but slow"
    print(f"peak {bench.peak / 1e12:,.1f} TFLOP/s (bfloat16 matrix product); packed batches: {kernel}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shapes = [SHAPES[name] for name in (["tiny"] if bench.tiny else asked.shapes.split(","))]
        folders = [save(shape, Path(folder) / shape.name) for shape in shapes]
        for name in asked.sets.split(","):
            for shape, saved in zip(shapes, folders, strict=True):
                of_case(bench, shape, saved, name)
    print("\n" + "\n".join(summary(bench.rows)))


if __name__ == "__main__":
    main()
