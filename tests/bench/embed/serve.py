"""A peer in a process of its own: loads once, then does one run per line of stdin and answers with a line of JSON.

    python serve.py '{"kind": "sentence-transformers", "model": "FOLDER", "backend": "onnx"}'

Peers' own environments run this file, so it needs NumPy and the peer alone. A request names a file of texts (a JSON
list); loading the peer, reading the texts and saving the vectors are not timed.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Options = Mapping[str, Any]
Handler = Callable[[Options], dict[str, Any]]
VERSIONS = ("sentence-transformers", "transformers", "tokenizers", "torch", "optimum-intel", "optimum-onnx", "openvino",
            "nncf", "onnxruntime", "model2vec", "nanotoken", "numpy")  # fmt: skip
WARM = 64
"""Texts of the run before the first one that counts."""


@lru_cache(maxsize=8)
def texts(path: str) -> list[str]:
    """The texts of a file."""
    return list(json.loads(Path(path).read_text()))


def timed(asked: Options, encode: Callable[[list[str]], Any], warm: bool = True) -> dict[str, Any]:
    """Seconds of one run over all texts; the vectors go to the file `out`, where one is named."""
    given = texts(asked["texts"])
    if warm:
        encode(given[:WARM])
    start, cpu = time.perf_counter(), time.process_time()
    vectors = encode(given)
    told = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    if asked.get("out"):
        np.save(asked["out"], np.asarray(vectors, np.float32))
    return told


class SentenceTransformers:
    """`SentenceTransformer.encode` on the CPU, on one of its backends."""

    def __init__(self, options: Options) -> None:
        load = {"torch": _torch, "openvino": _openvino, "onnx": _onnx}[options.get("backend", "torch")]
        self._model = load(options, options.get("precision", "float32"))
        self._limit, self._warm = self._model.max_seq_length, set[Any]()

    def __call__(self, asked: Options) -> dict[str, Any]:
        """One `encode` with a batch size and a prompt; `max_tokens` stands for the model's own limit."""
        if asked.get("max_tokens") or self._model.max_seq_length != self._limit:
            self._model.max_seq_length = asked.get("max_tokens") or self._limit
        settings = {"batch_size": asked.get("batch", 32), "prompt": asked.get("prompt") or None}
        key = (asked["texts"], settings["batch_size"])
        cold, _ = key not in self._warm, self._warm.add(key)
        return timed(asked, lambda given: self._model.encode(given, show_progress_bar=False, **settings), cold)


def _torch(options: Options, precision: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    given = {} if precision == "float32" else {"model_kwargs": {"dtype": getattr(torch, precision)}}
    return SentenceTransformer(options["model"], device="cpu", local_files_only=True, **given)


def _openvino(options: Options, precision: str) -> Any:
    """bfloat16 is OpenVINO's hint; int8 is what the export helper makes of texts that the benchmark gives, once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_static_quantized_openvino_model

    load = {"device": "cpu", "backend": "openvino", "local_files_only": True}
    hint = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}.get(precision, "f32")}
    if precision != "int8":
        return SentenceTransformer(options["model"], model_kwargs={"ov_config": hint}, **load)
    folder, file = options["exports"], "openvino_model_qint8_quantized.xml"
    if not Path(folder, "openvino", file).is_file():
        model = SentenceTransformer(options["model"], **load)
        calibration = Path(folder, "calibration")
        calibration.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) for text in texts(options["calibration"])]
        Path(calibration, "train.jsonl").write_text("\n".join(lines))
        model.save_pretrained(folder, create_model_card=False)
        export_static_quantized_openvino_model(model, None, folder, str(calibration), "default", "train", "text")
    return SentenceTransformer(folder, model_kwargs={"file_name": file, "ov_config": hint}, **load)


def _onnx(options: Options, precision: str) -> Any:
    """float32 as exported, `O3` with the optimizer's fusions, int8 with dynamic quantisation for AVX512 VNNI."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model, export_optimized_onnx_model

    load = {"device": "cpu", "backend": "onnx", "local_files_only": True}
    given = {"provider": "CPUExecutionProvider"}
    if precision == "float32":
        return SentenceTransformer(options["model"], model_kwargs=given, **load)
    folder = options["exports"]
    file = "model_qint8_avx512_vnni.onnx" if precision == "int8" else f"model_{precision}.onnx"
    if not Path(folder, "onnx", file).is_file():
        model = SentenceTransformer(options["model"], model_kwargs=given, **load)
        model.save_pretrained(folder, create_model_card=False)
        if precision == "int8":
            export_dynamic_quantized_onnx_model(model, "avx512_vnni", folder)
        else:
            export_optimized_onnx_model(model, precision, folder)
    return SentenceTransformer(folder, model_kwargs={**given, "file_name": file}, **load)


class Model2Vec:
    """model2vec over the table and tokenizer of a folder with one StaticEmbedding."""

    def __init__(self, options: Options) -> None:
        from model2vec import StaticModel
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = next(file.parent for file in sorted(Path(options["model"]).rglob("tokenizer.json")))
        (table,) = load_file(folder / "model.safetensors").values()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = StaticModel(table, tokenizer, normalize=True, max_length=None)
        self._model.unk_token_id = None  # the others keep unknown tokens

    def __call__(self, asked: Options) -> dict[str, Any]:
        """One `encode`, uncut; `threads`: by its own threads above 10,000 texts, which is its default."""
        settings = {"batch_size": asked.get("batch", 1024), "use_multiprocessing": asked.get("threads", True)}
        return timed(asked, lambda given: self._model.encode(given, **settings))


class Peak:
    """The machine's rate for bfloat16 matrix products, by torch."""

    def __init__(self, options: Options) -> None:
        import torch

        self._torch, size = torch, options.get("size", 2048)
        self._flops, self._seconds = 2.0 * size**3, options.get("seconds", 0.25)
        self._pair = [torch.randn(size, size).to(torch.bfloat16) for _ in range(2)]

    def __call__(self, asked: Options) -> dict[str, Any]:
        """The best of some short measures."""
        best, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < self._seconds:
            start = time.perf_counter()
            self._torch.matmul(*self._pair)
            best = min(best, time.perf_counter() - start)
        return {"flops_per_second": self._flops / best}


KINDS: Mapping[str, Callable[[Options], Handler]] = {
    "sentence-transformers": SentenceTransformers,
    "model2vec": Model2Vec,
    "peak": Peak,
}


def make(options: Options) -> Handler:
    """The peer that options name."""
    return KINDS[options["kind"]](options)


def quiet() -> None:
    """No bars, no look-ups on a hub, and no usage data: openvino and nncf send some where this module is found."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                      HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="true")  # fmt: skip
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def serve(made: Callable[[Options], Handler]) -> None:
    """Load as the first argument says, then answer until stdin ends; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(told: Mapping[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    def attempt(do: Callable[[], Mapping[str, Any]]) -> bool:
        try:
            answer(do())
        except Exception as error:  # whatever a peer raises: it costs that peer its figures
            answer({"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]})
            return False
        return True

    quiet()
    start, held = time.perf_counter(), []

    def load() -> dict[str, Any]:
        held.append(made(json.loads(sys.argv[1])))
        return {"seconds": time.perf_counter() - start, "versions": versions()}

    if attempt(load):
        for line in sys.stdin:
            attempt(lambda line=line: held[0](json.loads(line)))


if __name__ == "__main__":
    serve(make)
