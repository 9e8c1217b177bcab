"""sentence-transformers models on OpenVINO: the modules as one graph, from ids to vectors; the extra [openvino].

Batches run side by side, one stream per thread. int8 is post-training quantisation with texts of the corpus; its
graph travels as bytes, so that every worker runs the same one.
"""

import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.encoders.batches import Ending, Role, plan
from pipeline.encoders.sentence import SentenceEncoder
from pipeline.encoders.tokens import TRIALS, Tokens
from pipeline.errors import SpecError

HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}
CALIBRATION_BATCHES = 60
"""Batches whose activations set the int8 ranges (more changed the cosine by less than 0.0002, measured)."""
CALIBRATION_TOKENS = 2_048
"""Tokens of each, padding included."""

Graph = tuple[bytes, bytes]
"""An OpenVINO model: its XML, its weights."""


def is_installed() -> bool:
    """Whether this process can use OpenVINO."""
    return importlib.util.find_spec("openvino") is not None


def _openvino() -> Any:
    # It and nncf send usage data to their maker unless this module is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def precisions(core: Any = None) -> list[str]:
    """What this machine's CPU computes in hardware, quickest first as a rule; int8 is never among them by itself."""
    core = core or _openvino().Core()
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["bfloat16", "float32"] if has_bfloat16 else ["float32"]


class OpenVINOEncoder:
    """A model for documents with one prompt, on this machine's CPU."""

    pads = True

    def __init__(self, base: SentenceEncoder, prompt: str, precision: str, graph: Any) -> None:
        """Compile what `converted` or `quantized` made, for as many streams as `base` has threads."""
        self._base, self._prompt = base, prompt
        self.dim, self.max_tokens, self.tokenizer = base.dim, base.max_tokens, base.tokenizer
        core = _openvino().Core()
        if isinstance(graph, tuple):
            graph = core.read_model(graph[0], graph[1])
        streams = base.threads
        compiled = core.compile_model(
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": streams,
                "ENABLE_CPU_PINNING": False,  # workers of one machine would share the first cores
            },
        )
        self.in_flight = streams + 1
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._idle = [compiled.create_infer_request() for _ in range(self.in_flight)]

    def tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        """The ids of each text with its prompt."""
        return self._base.tokenize(texts, prompt)

    def flops(self) -> tuple[float, float]:
        """As `SentenceEncoder.flops`."""
        return self._base.flops()

    def begin(self, tokens: Tokens, role: Role, prompt: str) -> Ending:
        """Start one batch; it is under way when this returns."""
        if (role, prompt) != ("document", self._prompt):
            raise ValueError(f"this graph is for documents with the prompt {self._prompt!r}")
        features = self._base.features(tokens, role, prompt)
        request = self._idle.pop()
        request.start_async([features[name].numpy() for name in self._names], share_inputs=True)

        def ending() -> NDArray[np.float32]:
            try:
                request.wait()
                return np.array(request.get_output_tensor(0).data, np.float32)
            finally:
                features.clear()  # held until here: the inputs are shared
                self._idle.append(request)

        return ending


def converted(base: SentenceEncoder, prompt: str) -> Any:
    """The float32 graph of all modules. SpecError where the model cannot be made one."""
    openvino, torch = _openvino(), base._torch
    examples = ["one two " * 8, *TRIALS[:2]]  # of different lengths: without padding the mask would be left out
    tokens = base.tokenize(examples, prompt)
    features = base.features(tokens, "document", prompt)
    if tokens.texts is not None:
        raise SpecError("model.backend: openvino needs a transformer with a fast tokenizer; use torch")
    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in features.items() if name not in tensors}
    names = list(tensors)

    class Whole(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = base.model

        def forward(self, *values: Any) -> Any:
            inputs = dict(zip(names, values, strict=True)) | constants
            return self.model(inputs, task="document")["sentence_embedding"]

    try:
        with torch.inference_mode(), _quiet():
            graph = openvino.convert_model(Whole(), example_input=tuple(tensors.values()))
    except Exception as error:  # whatever tracing or conversion raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SpecError(f"model.backend: openvino cannot take this model ({reason}); use torch") from error
    for name, port in zip(names, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    return graph


def quantized(base: SentenceEncoder, prompt: str, graph: Any, texts: Sequence[str], budget: int) -> Graph:
    """The graph in int8, its ranges from real texts."""
    _openvino()
    import nncf

    tokens = base.tokenize(texts, prompt)
    batches = plan(tokens.lengths, min(budget, CALIBRATION_TOKENS))
    chosen = [batches[at] for at in np.unique(np.linspace(0, len(batches) - 1, CALIBRATION_BATCHES).astype(int))]
    names = [port.get_any_name() for port in graph.inputs]
    features = [base.features(tokens.take(rows), "document", prompt) for rows in chosen]
    inputs = [{name: one[name].numpy() for name in names} for one in features]
    with _quiet():
        small = nncf.quantize(
            graph, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs)
        )
    with tempfile.TemporaryDirectory(prefix="matryoshka-int8-") as folder:
        path = Path(folder) / "model.xml"
        _openvino().save_model(small, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of tracing, no bars of progress."""
    levels = {name: logging.getLogger(name).level for name in ("nncf", "openvino")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
