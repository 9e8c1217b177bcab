"""This project's encoders alone, without files, Ray or tables; a process like those of serve.py.

`mode: tokens` is the roof: the forward loop over batches whose tokens are ready. `mode: texts` tokenises them too.
"""

import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.embed import serve

TOKENS = {"torch": 4_096, "openvino": 4_096, "static": 65_536}
"""Tokens of a batch where none are asked for."""


class Raw:
    """One backend at one precision; `calibration` names a file of texts, for int8."""

    def __init__(self, options: serve.Options) -> None:
        serve.quiet()
        self._options, self._made = options, {}
        self._budget = options.get("batch_tokens") or TOKENS[options["backend"]]

    def __call__(self, asked: serve.Options) -> dict[str, Any]:
        """One run over the texts of a file, cut to `max_tokens` (none: the model's own limit)."""
        from pipeline.encoders.batches import encode_rows

        prompt = asked.get("prompt") or ""
        encoder = self._encoder(asked.get("max_tokens"), prompt)
        if asked.get("mode") != "tokens":
            told = serve.timed(
                asked, lambda given: encode_rows(encoder, given, "document", prompt, self._budget).vectors
            )
        else:
            told = self._loop(encoder, asked, prompt)
        tokenizer = getattr(encoder, "tokenizer", None)
        return {**told, "tokenizer": getattr(tokenizer, "name", None)}

    def _loop(self, encoder: Any, asked: serve.Options, prompt: str) -> dict[str, Any]:
        """Seconds of the forward loop over batches that are ready."""
        from pipeline.encoders.batches import plan

        tokens = encoder.tokenize(serve.texts(asked["texts"]), prompt)
        rows = plan(tokens.lengths, self._budget, encoder.pads)
        parts = [tokens.take(some) for some in rows]
        vectors = np.zeros((len(tokens), encoder.dim), np.float32)
        _forward(encoder, rows[:2], parts[:2], prompt, vectors)
        start, cpu = time.perf_counter(), time.process_time()
        _forward(encoder, rows, parts, prompt, vectors)
        told = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        if asked.get("out"):
            np.save(asked["out"], vectors)
        padded = sum(len(some) * int(part.lengths.max()) for some, part in zip(rows, parts, strict=True))
        real = int(tokens.lengths.sum())
        return {**told, "tokens": real, "padded_tokens": padded if encoder.pads else real}

    def _encoder(self, limit: int | None, prompt: str) -> Any:
        """Each limit and prompt has its own, as each job would; loaded outside the clock."""
        key = (limit, prompt)
        if key not in self._made:
            self._made = {key: build(self._options, limit, prompt)}
        return self._made[key]


def build(options: serve.Options, limit: int | None, prompt: str) -> Any:
    """An encoder as the job's worker builds it."""
    from pipeline.encoders import choose, models, openvino
    from pipeline.encoders.sentence import SentenceEncoder

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    base = SentenceEncoder(models.resolve(str(options["model"])), limit, "cpu", threads)
    graph = None
    if options["precision"] == "int8":
        texts = serve.texts(options["calibration"])
        graph = openvino.quantized(
            base, prompt, openvino.converted(base, prompt), texts, options.get("batch_tokens") or TOKENS["openvino"]
        )
    backend = options["backend"].replace("static", "torch")  # which a static model turns into its own path
    choice = choose.Choice(backend, options["precision"], options.get("attention") or "padded")
    return choose.build(base, choice, prompt, graph)


def _forward(encoder: Any, rows: Sequence[Any], parts: Sequence[Any], prompt: str, out: np.ndarray) -> None:
    waiting: deque[tuple[Any, Any]] = deque()
    for some, part in zip(rows, parts, strict=True):
        waiting.append((some, encoder.begin(part, "document", prompt)))
        while len(waiting) >= encoder.in_flight:
            _end(waiting, out)
    while waiting:
        _end(waiting, out)


def _end(waiting: deque[tuple[Any, Any]], out: np.ndarray) -> None:
    some, ending = waiting.popleft()
    out[some] = ending()


def shape(model: Path) -> Mapping[str, int] | None:
    """Layers, width and inner width of a transformer; None for a model that has none."""
    file = model / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    names = {"layers": "num_hidden_layers", "width": "hidden_size", "inner": "intermediate_size"}
    found = {name: config.get(field) for name, field in names.items()}
    return found if all(isinstance(value, int) for value in found.values()) else None


def flops(of: Mapping[str, int] | None, tokens: np.ndarray) -> float | None:
    """Operations of texts of so many tokens, padding not counted: 2·L·(4h² + 2·h·inner)·n + 4·L·h·n² each."""
    if of is None:
        return None
    n = tokens.astype(np.float64)
    each = 2 * of["layers"] * (4 * of["width"] ** 2 + 2 * of["width"] * of["inner"])
    return float(each * n.sum() + 4 * of["layers"] * of["width"] * (n**2).sum())


if __name__ == "__main__":
    serve.serve(Raw)
