"""sentence-transformers models on torch: their own modules run as they are, on ids that are ready.

At half precision only the transformer runs so; pooling and what follows stay float32.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.encoders import packed, tokens as tokens_
from pipeline.encoders.batches import Ending, Role
from pipeline.encoders.models import ModelFolder, folder_digest
from pipeline.encoders.tokens import CHUNK, HUGE, TRIALS, Tokenizer, Tokens, head
from pipeline.errors import DataError, SpecError

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names sentence-transformers itself tries for a document's prompt, in its order."""
CUDA_IN_FLIGHT = 3
"""Batches on the way on CUDA: one computes while the next one's ids and the last one's vectors travel (assumed)."""
COMPILER = "inductor"
COMPILER_OPTIONS: dict[str, Any] = {"options": {"deterministic": True}}
"""Nothing is chosen by timing it, so that two processes compute the same bits."""
COMPILED_TEXTS = ["one two three " * count for count in range(8, 40)]
"""The batch that a model is compiled with."""
BLOCK = re.compile(r"\.\d+\.")
"""In the name of a weight: it belongs to a layer, so that every token meets it."""


def prompts(model: Any) -> dict[str, str]:
    """A sentence-transformers model's prompts by role; "" where it has none."""
    stored = model.prompts or {}
    document = next((stored[name] for name in DOCUMENT_PROMPTS if stored.get(name)), "")
    return {"query": stored.get("query") or "", "document": document}


class SentenceEncoder:
    """A loaded sentence-transformers model on one device."""

    def __init__(self, folder: ModelFolder, max_tokens: int | None, device: str | None, threads: int | None) -> None:
        """Load from files only, in float32. DataError where they are not those that were resolved."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import torch
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if folder_digest(Path(folder.path)) != folder.digest:
            raise DataError(
                f"{folder.path} holds other files than the job resolved; use one copy of the model everywhere"
            )
        if threads:
            torch.set_num_threads(threads)
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of both tokenizers, before their first batch
        self.folder, self._torch, self.threads = folder, torch, threads or torch.get_num_threads()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _loaded(folder, self.device)
        self.precision = "float32"
        self.attention = "padded"
        self._padding_idx: int | None = None
        self._asked: dict[tuple[Role, str], Mapping[str, Any] | None] = {}
        self.max_tokens = self._limit(folder, max_tokens)
        self.tokenizer = self._own_tokenizer()
        self.dim = int(self.model.get_embedding_dimension() or self._measured_dim())
        self.prompts = prompts(self.model)

    @property
    def pads(self) -> bool:
        """Whether a batch costs its longest text times its rows."""
        return self.attention == "padded"

    @property
    def in_flight(self) -> int:
        """Batches that may have begun before the first one is ended."""
        return CUDA_IN_FLIGHT if self.device.startswith("cuda") else 1

    def _limit(self, folder: ModelFolder, wanted: int | None) -> int | None:
        own = self.model.max_seq_length
        limit = None if own is None or own == float("inf") else int(own)
        if wanted is None:
            return limit
        if folder.positions is not None and wanted > folder.positions:
            raise SpecError(
                f"model.max_tokens: {folder.name} has {folder.positions} positions, {wanted} were asked for"
            )
        if limit is None:
            raise SpecError(f"model.max_tokens: {folder.name} reads texts of any length; leave max_tokens null")
        self.model.max_seq_length = wanted
        return wanted

    def _own_tokenizer(self) -> Tokenizer | None:
        """The model's fast tokenizer, where its first module is a transformer that reads texts."""
        inner = getattr(getattr(self.model[0], "tokenizer", None), "_tokenizer", None)
        if not self.has_transformer or inner is None:
            return None
        return Tokenizer.of(inner, special=True, limit=self.max_tokens, threads=self.threads)

    def _measured_dim(self) -> int:
        return int(self.begin(self._slow(["a"], ""), "document", "")().shape[1])

    def flops(self) -> tuple[float, float]:
        """Operations per token, and per token squared of each text: 2 · weights of the layers, 4 · width · layers.

        For BERT's shape the sum over a text of n tokens is 24·L·h²·n + 4·L·h·n². (0, 0) without a transformer.
        """
        config = getattr(getattr(self.model[0], "model", None), "config", None)
        width, layers = (getattr(config, name, 0) or 0 for name in ("hidden_size", "num_hidden_layers"))
        weights = sum(
            weight.numel()
            for name, weight in self.model[0].named_parameters()
            if weight.dim() == 2 and BLOCK.search(name)
        )
        return (2.0 * weights, 4.0 * width * layers) if width and layers else (0.0, 0.0)

    def tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        """The ids of each text with its prompt."""
        if self.tokenizer is not None and self._constants("document", prompt) is not None:
            return self.tokenizer(texts, prompt)
        return self._slow(texts, prompt)

    def _slow(self, texts: Sequence[str], prompt: str) -> Tokens:
        """For models that must read texts themselves: how many tokens each has."""
        tokenizer = self.model.tokenizer
        heads = list(texts)
        if self.max_tokens is not None and getattr(tokenizer, "truncation_side", "right") == "right":
            heads = [
                head(prompt + text, lambda start: _ids(tokenizer, [start])[0], self.max_tokens, len(prompt))[
                    len(prompt) :
                ]
                if len(text) > HUGE
                else text
                for text in texts
            ]
        counts: list[int] = []
        for start in range(0, len(heads), CHUNK):
            whole = [prompt + text for text in heads[start : start + CHUNK]]
            counts += [len(one) for one in _ids(tokenizer, whole)]
        return tokens_.unread(np.array(counts, np.int64), self.max_tokens, heads)

    def _constants(self, role: Role, prompt: str) -> Mapping[str, Any] | None:
        """What the model wants beside ids and mask; None where it makes other ids or tensors of a text than we do."""
        if (role, prompt) not in self._asked:
            self._asked[role, prompt] = self._found_constants(role, prompt)
        return self._asked[role, prompt]

    def _found_constants(self, role: Role, prompt: str) -> Mapping[str, Any] | None:
        assert self.tokenizer is not None
        trials = [*TRIALS, "one two " * (self.max_tokens or 8)]
        theirs = self.model.preprocess(trials, prompt=prompt or None, task=role)
        ours = self._padded(self.tokenizer(trials, prompt))
        tensors = {name: value for name, value in theirs.items() if isinstance(value, self._torch.Tensor)}
        if set(tensors) - set(ours) or any(not self._torch.equal(tensors[name], ours[name]) for name in tensors):
            return None
        return {name: value for name, value in theirs.items() if name not in tensors} | {"": set(tensors)}

    def _padded(self, tokens: Tokens) -> dict[str, Any]:
        """The tensors of a batch of one width."""
        tokenizer = self.model[0].tokenizer
        ids, mask = tokens.padded(tokenizer.pad_token_id or 0, left=tokenizer.padding_side == "left")
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: self._torch.from_numpy(array) for name, array in made.items()}

    def features(self, tokens: Tokens, role: Role, prompt: str) -> dict[str, Any]:
        """What the modules read, tensors still on the host."""
        if tokens.texts is not None:
            return dict(self.model.preprocess(list(tokens.texts), prompt=prompt or None, task=role))
        constants = self._constants(role, prompt)
        if constants is None:
            raise DataError(f"the {role} prompt is read otherwise by this model than its document prompt")
        others = {name: value for name, value in constants.items() if name}
        if self.attention == "packed":
            prompt_tokens = int(others.get("prompt_length") or 0)
            return others | packed.features(tokens.ids, tokens.offsets, constants[""], self._padding_idx, prompt_tokens)
        return {name: value for name, value in self._padded(tokens).items() if name in constants[""]} | others

    def begin(self, tokens: Tokens, role: Role, prompt: str) -> Ending:
        """Start one batch; on CUDA it is under way when this returns."""
        torch = self._torch
        with torch.inference_mode():
            features = {name: self._on_device(value) for name, value in self.features(tokens, role, prompt).items()}
            vectors = self.model(features, task=role)["sentence_embedding"].float()
            if vectors.device.type == "cpu":
                array: NDArray[np.float32] = vectors.numpy()
                return lambda: array
            host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def ending() -> NDArray[np.float32]:
            done.synchronize()
            landed: NDArray[np.float32] = host.numpy()
            return landed

        return ending

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, self._torch.Tensor) or self.device == "cpu":
            return value
        return (value.pin_memory() if self.device.startswith("cuda") else value).to(self.device, non_blocking=True)

    @property
    def has_transformer(self) -> bool:
        """Whether half precision or another engine gains anything: only transformers do."""
        return type(self.model[0]).__name__ == "Transformer"

    def variant(self, precision: str, attention: str = "padded", compiled: bool = False) -> "SentenceEncoder":
        """The same model otherwise, beside this one; `compiled` is for packed attention.

        SpecError where it has no transformer, or cannot run packed or compiled.
        """
        if (precision, attention) == ("float32", "padded"):
            return self
        if not self.has_transformer:
            raise SpecError(
                f"model.precision: this model has no transformer to run in {precision}; use float32 or auto"
            )
        other = copy.copy(self)
        other._asked = {}
        other.model = copy.copy(self.model)
        other.model._modules = dict(self.model._modules)
        other.model[0] = self._halved(copy.deepcopy(self.model[0]), precision)
        other.precision, other.attention = precision, attention
        if attention == "packed":
            other._pack(None if precision == self.precision else self.model)
        if compiled:
            other._compile()
        return other

    def _pack(self, reference: Any) -> None:
        """Packed attention from here on. SpecError where it is not proven to give what padded batches do."""
        if self.tokenizer is None:
            raise SpecError(f"model: {self.folder.name} must read texts itself, so that its batches are padded")
        for name, module in self.model._modules.items():
            self.model._modules[name] = packed.pooling(module)
        verdict = packed.prove(self.model, self.max_tokens, reference=reference)
        if not verdict.allowed:
            raise SpecError(f"model: {self.folder.name} runs on padded batches alone: {verdict.reason}")
        self._padding_idx = packed.position_base(self.model)

    def _compile(self) -> None:
        """Compile now, on one made-up batch, so that no real one fails by it and every process begins the same."""
        assert self.attention == "packed" and self.tokenizer is not None
        _compile_layers(self.model)
        try:
            self.begin(self.tokenizer(COMPILED_TEXTS), "document", "")()
        except Exception as error:  # whatever the compiler or its tools raise
            inner = getattr(error, "inner_exception", error)
            reason = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
            raise SpecError(f"model: {self.folder.name} cannot be compiled: {reason[:200]}") from error

    def _halved(self, module: Any, precision: str) -> Any:
        if precision == "float32":
            return module
        module = module.to(getattr(self._torch, precision))
        module.register_forward_hook(
            lambda _module, _inputs, out: {key: self._full(value) for key, value in out.items()}
        )
        return module

    def _full(self, value: Any) -> Any:
        is_half = isinstance(value, self._torch.Tensor) and value.is_floating_point()
        return value.float() if is_half else value


def _compile_layers(model: Any) -> None:
    """Fuse what stands around the matrix products of each layer; a batch may have any size.

    Layers share their code, so that one is compiled.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    inner = model[0].model
    parts = [part for part in inner.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in [*parts, *filter(None, [getattr(inner, "embeddings", None)])]:
        part.compile(backend=COMPILER, dynamic=True, **COMPILER_OPTIONS)


def _loaded(folder: ModelFolder, device: str) -> Any:
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            folder.path,
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except SafetensorError as error:
        raise DataError(f"cannot read the weights of {folder.name}: {error}; fetch the model again") from None
    except (RuntimeError, MemoryError):  # of the device, not of the folder
        raise
    except Exception as error:  # whatever the libraries raise for files they cannot use
        if getattr(error, "errno", None):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"model.name: {folder.name} cannot be loaded: {reason}") from error
    return model.eval()


def _ids(tokenizer: Any, whole: Sequence[str]) -> list[list[int]]:
    if hasattr(tokenizer, "encode_batch_fast"):  # a bare `tokenizers` one, as in static models
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(whole, add_special_tokens=False)]
    ids = tokenizer(whole, verbose=False, return_attention_mask=False, return_token_type_ids=False)
    return list(ids["input_ids"])
