"""Packed batches: texts laid end to end without padding, each attending to itself alone.

Comes in: a sentence-transformers model whose first module is a Hugging Face Transformer. It is switched to an attention
of this module, which hands the borders of the texts to torch's varlen kernel; `prove` compares it with padded batches
first, and nothing may run packed that it has not allowed. Where a model keeps the borders from its attention, the
attention raises: there is no silent wrong answer.
"""

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "matryoshka_packed"
"""Of the attention in transformers' registry."""
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.9999, "float16": 0.9999}
"""Packed against padded at the same precision: of every text in float32, on average where rounding is coarser."""
MORE_LOST, ALWAYS_LOST = 1.5, 1e-5
"""Packed batches may be so many times as far (1 - mean cosine) from a float32 reference as padded ones, and so much."""
ROW_BY_ROW = {"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout"}
"""Modules of sentence-transformers that know flat token vectors, or read sentence vectors alone."""
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
UNDERSTOOD = {"position_ids", "seq_idx", "cu_seq_lens_k", "max_length_k", "deterministic", "use_cache", "layer_idx"}
"""Keywords of an attention call that change nothing here; any other one that is set is refused."""
MAX_HEAD_DIM = 256
"""Of the varlen kernel (FlashAttention 2), whose head dimension also is a multiple of 8."""
PROBE_LENGTHS = (1, 2, 3, 7, 7, 18, 40, 64)


@dataclass(frozen=True)
class Verdict:
    """Whether a model may run packed, else why not; the mean and the least cosine of the probe's texts."""

    allowed: bool
    reason: str = ""
    mean: float = 0.0
    least: float = 0.0


def features(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    names: Collection[str] = (),
    padding_idx: int | None = None,
    prompt_tokens: int = 0,
) -> dict[str, Any]:
    """What sentence-transformers' modules read of a packed batch: tensors in host memory, ready to be copied.

    Text i is ids[offsets[i]:offsets[i + 1]]. `names`: what the tokenizer gives (`token_type_ids` are zeros).
    `padding_idx`: of a model that counts positions as RoBERTa does (`position_base`).
    """
    import torch

    tokens = ids[offsets[0] : offsets[-1]].astype(np.int64)
    borders = (offsets - offsets[0]).astype(np.int32)
    lengths = np.diff(borders)
    longest = int(lengths.max())
    borders_tensor = torch.from_numpy(borders)
    out: dict[str, Any] = {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(_positions(tokens, borders, padding_idx))[None],
        "seq_idx": torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))[None],
        "cu_seq_lens_q": borders_tensor,
        "cu_seq_lens_k": borders_tensor,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if "token_type_ids" in names:
        out["token_type_ids"] = torch.zeros_like(out["input_ids"])
    if prompt_tokens:
        out["prompt_length"] = prompt_tokens
    return out


def _positions(ids: NDArray[np.int64], borders: NDArray[np.int32], padding_idx: int | None) -> NDArray[np.int64]:
    """From 0 in each text; RoBERTa's kind counts from padding_idx + 1 the tokens that are not padding."""
    lengths = np.diff(borders)
    if padding_idx is None:
        return np.arange(len(ids)) - np.repeat(borders[:-1].astype(np.int64), lengths)
    real = ids != padding_idx
    seen = np.concatenate([[0], np.cumsum(real)])
    counted: NDArray[np.int64] = (seen[1:] - np.repeat(seen[borders[:-1]], lengths)) * real + padding_idx
    return counted


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """Attention within each text. Query, key, value: (1, heads, tokens, head dim); out: (1, tokens, heads, head dim).

    `sliding_window` counts the token itself; a text whose attention is not causal looks as far to the right.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError("the borders of the texts did not reach the attention: the model does not pass them on")
    unknown = [
        name for name, given in others.items() if name not in UNDERSTOOD and not (given is None or given is False)
    ]
    if attention_mask is not None or dropout or unknown or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise RuntimeError(f"packed attention knows no mask, dropout, cache or {', '.join(unknown) or 'padding'}")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    run = _varlen if kernel_serves(query.device.type, query.dtype, query.shape[-1]) else _plain
    return run(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal, reach).unsqueeze(0), None


def kernel_serves(device: str, dtype: Any, head_dim: int) -> bool:
    """Whether torch's kernel runs; else packed batches are right but slow."""
    import torch

    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and _HAS_KERNEL
    )


_HAS_KERNEL = False
"""Set when the attention is registered."""


def pooling(module: Any) -> Any:
    """A module, or a copy that takes the mean over each text in one order; the original adds with atomics on CUDA."""
    if type(module).__name__ != "Pooling" or module.pooling_mode not in ("mean", ("mean",)):
        return module
    import torch

    def mean(features: dict[str, Any], **others: Any) -> dict[str, Any]:
        if "cu_seq_lens_q" not in features or (features.get("prompt_length") and not module.include_prompt):
            return dict(module(features, **others))
        tokens, borders = features["token_embeddings"].squeeze(0), features["cu_seq_lens_q"]
        features["sentence_embedding"] = torch.segment_reduce(tokens, "mean", offsets=borders, axis=0, unsafe=True)
        return features

    other = copy.copy(module)
    other.forward = mean
    return other


def _varlen(
    query: Any, key: Any, value: Any, borders: Any, longest: int, scaling: float | None, causal: bool, reach: int
) -> Any:
    """(tokens, heads, head dim), by FlashAttention as torch has it."""
    from torch.nn.attention.varlen import varlen_attn

    shared: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}  # from torch 2.12 on
    window = (reach, 0 if causal else reach)
    return varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scaling, window_size=window, **shared
    )


def _plain(
    query: Any, key: Any, value: Any, borders: Any, longest: int, scaling: float | None, causal: bool, reach: int
) -> Any:
    """The same on any device and dtype: neighbours of one length are a batch of scaled_dot_product_attention."""
    import torch

    out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype, device=value.device)
    ends = borders.tolist()
    first = 0
    while first < len(ends) - 1:
        length, last = ends[first + 1] - ends[first], first + 1
        while last < len(ends) - 1 and ends[last + 1] - ends[last] == length:
            last += 1
        tokens, shape = slice(ends[first], ends[last]), (last - first, length)
        first = last
        if not length:
            continue
        windowed = 0 <= reach < length - 1
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        near = (distance <= reach) & ((distance >= 0) if causal else (distance >= -reach))
        out[tokens] = (
            torch.nn.functional.scaled_dot_product_attention(
                *(states[tokens].unflatten(0, shape).transpose(1, 2) for states in (query, key, value)),
                attn_mask=near if windowed else None,
                is_causal=causal and not windowed,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            .transpose(1, 2)
            .flatten(0, 1)
        )
    return out


def register() -> None:
    """Tell transformers of it, without a mask function: it then makes no mask, and the borders are all there is."""
    global _HAS_KERNEL
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return
    has_windows = "window_size" in inspect.signature(varlen_attn).parameters  # from torch 2.11 on
    _HAS_KERNEL = has_windows and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def objection(model: Any) -> str:
    """Why the parts of a model rule packing out, "" where they do not."""
    kinds = [type(module).__name__ for module in model]
    if kinds[:1] != ["Transformer"] or kinds.count("Transformer") != 1:
        return "it does not begin with one transformer"
    if not set(kinds) <= ROW_BY_ROW:
        return f"its module {', '.join(sorted(set(kinds) - ROW_BY_ROW))} may read padded token vectors"
    first = model[0]
    inner = first.model
    if model.training or first.backend != "torch" or first.transformer_task != "feature-extraction":
        return "it is in training, or no plain encoder on torch"
    if first.model_forward_params is not None:
        return f"{type(inner).__name__} takes no further keywords, so the borders of the texts cannot reach it"
    if not type(inner).is_backend_compatible():
        return f"the attention of {type(inner).__name__} cannot be replaced"
    layers = set(getattr(inner.config, "layer_types", None) or ()) - PLAIN_LAYERS
    return f"it has layers of the kind {', '.join(sorted(layers))}" if layers else ""


def enable(model: Any) -> bool:
    """Switch a sentence-transformers model to packed attention. False, with nothing changed, where it cannot be."""
    if objection(model):
        return False
    register()
    inner = model[0].model
    before = inner.config._attn_implementation
    if before != NAME:
        inner.set_attn_implementation(NAME)
        model[0].attention_without_packing = before
    return bool(inner.config._attn_implementation == NAME)


def disable(model: Any) -> None:
    """Back to the attention it had, for padded batches."""
    inner = model[0].model
    if inner.config._attn_implementation == NAME:
        inner.set_attn_implementation(model[0].attention_without_packing)


def position_base(model: Any) -> int | None:
    """The padding index from which a model of RoBERTa's kind counts positions; None where they start at 0."""
    import torch

    for module in model[0].model.modules():
        index = getattr(module, "padding_idx", None)
        if isinstance(index, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return index
    return None


def prove(
    model: Any, max_tokens: int | None = None, prompt_tokens: int = 0, reference: Any = None, seed: int = 0
) -> Verdict:
    """Compare packed with padded batches on made-up texts; packed attention stays on only where they agree.

    Texts reach past a sliding window. Besides the cosine, a text's token vectors must not change by a bit when its
    neighbours become others of the same lengths. `reference`: the same model in float32, of a model at half
    precision. It is proven first, which no rounding hides; then packed batches may be as far from it as padded ones.
    """
    reason = objection(model)
    if reason:
        return Verdict(False, reason)
    ids, offsets = _made_up(model, max_tokens, prompt_tokens, seed)
    exact = None
    if reference is not None:
        verdict = prove(reference, max_tokens, prompt_tokens, None, seed)
        disable(reference)
        if not verdict.allowed:
            return verdict
        exact = _padded_vectors(reference, ids, offsets, prompt_tokens)
    disable(model)
    padded = _padded_vectors(model, ids, offsets, prompt_tokens)
    if not enable(model):
        return Verdict(False, f"{type(model[0].model).__name__} keeps its own attention")
    try:
        verdict = _compared(model, ids, offsets, prompt_tokens, padded, exact)
    except Exception as error:  # whatever a model raises that is not made for it
        verdict = Verdict(False, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    if not verdict.allowed:
        disable(model)
    return verdict


def _compared(
    model: Any, ids: NDArray[np.int32], offsets: NDArray[np.int64], prompt_tokens: int, padded: Any, exact: Any
) -> Verdict:
    import torch

    base = position_base(model)
    vectors, tokens = _packed_vectors(model, features(ids, offsets, (), base, prompt_tokens))
    cosines = _cosines(vectors, padded)
    mean, least = float(cosines.mean()), float(cosines.min())
    reason = _difference(str(model[0].model.dtype).removeprefix("torch."), mean, least)
    if exact is not None:
        lost, usual = (1 - float(_cosines(some, exact).mean()) for some in (vectors, padded))
        fair = lost <= MORE_LOST * usual + ALWAYS_LOST
        reason = "" if fair else f"packed batches lose {lost:.6f} of the cosine to float32, padded ones {usual:.6f}"
    if reason:
        return Verdict(False, reason, mean, least)
    middle = len(offsets) // 2
    keep = slice(offsets[middle], offsets[middle + 1])
    others = np.roll(ids, 1)
    others[keep] = ids[keep]
    _, among_others = _packed_vectors(model, features(others, offsets, (), base, prompt_tokens))
    if not torch.equal(tokens[keep], among_others[keep]):
        return Verdict(False, "a text's vectors change with its neighbours in a packed batch", mean, least)
    return Verdict(True, "", mean, least)


def _cosines(some: Any, others: Any) -> Any:
    import torch

    return torch.nn.functional.cosine_similarity(some.double(), others.double(), dim=-1)


def _difference(precision: str, mean: float, least: float) -> str:
    judged = least if precision == "float32" else mean
    if judged >= LEAST_COSINE.get(precision, LEAST_COSINE["float32"]):
        return ""
    return f"packed and padded batches differ (cosine {judged:.6f} in {precision})"  # NaN too


def _made_up(
    model: Any, max_tokens: int | None, prompt_tokens: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Texts of ordinary token ids, in no order, of mixed lengths from one token behind the prompt up to the limit."""
    config, tokenizer = model[0].model.config.get_text_config(), model[0].tokenizer
    longest = max(100, 2 * (getattr(config, "sliding_window", None) or 0) + 9)
    limit = max_tokens or model[0].max_seq_length or longest
    lengths = np.minimum(np.array([*PROBE_LENGTHS, longest]) + prompt_tokens, limit)
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(config.vocab_size), tokenizer.all_special_ids)
    offsets = np.concatenate([[0], np.cumsum(rng.permutation(lengths))]).astype(np.int64)
    return rng.choice(ordinary, offsets[-1]).astype(np.int32), offsets


def _packed_vectors(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Sentence vectors (texts, dim) and token vectors (tokens, hidden)."""
    out = _forward(model, batch)
    return out["sentence_embedding"], out["token_embeddings"][0]


def _padded_vectors(model: Any, ids: NDArray[np.int32], offsets: NDArray[np.int64], prompt_tokens: int) -> Any:
    import torch

    lengths = np.diff(offsets)
    tokenizer = model[0].tokenizer
    places = np.arange(lengths.max())
    mask = places < lengths[:, None]
    if tokenizer.padding_side == "left":
        mask = mask[:, ::-1].copy()
    filled = np.full(mask.shape, tokenizer.pad_token_id or 0, np.int64)
    filled[mask] = ids
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(filled),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
    if prompt_tokens:
        batch["prompt_length"] = prompt_tokens
    return _forward(model, batch)["sentence_embedding"]


def _forward(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        out: dict[str, Any] = model(
            {name: part.to(model[0].model.device) if hasattr(part, "to") else part for name, part in batch.items()}
        )
    return out
