"""The finished folder: a sentence-transformers model that says what it was trained for, and how well it does.

It is made beside its place and moved there in one step, so that a folder of that name is always whole.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from pipeline.encoders.models import ModelFolder
from pipeline.training.spec import TrainSpec

RECORD = "training.json"
EVALUATION = "evaluation"
CURVE = "curve.parquet"
CONFIGS = ("config_sentence_transformers.json", "config.json")
"""Where libraries look for trained dims: sentence-transformers and this project, vLLM."""
DIMS = ("matryoshka_dims", "matryoshka_dimensions")
"""What they look for; what a base says of its own prefixes is not true any more."""
PACKAGES = ("matryoshka-pipeline", "sentence-transformers", "transformers", "torch", "accelerate", "datasets")


def write(
    model: Any, spec: TrainSpec, base: ModelFolder, evaluation: pl.DataFrame, curve: pl.DataFrame,
    record: Mapping[str, Any], draft: Path,
) -> None:  # fmt: skip
    """Make the whole folder anew as `draft`, on disk when this returns."""
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(str(draft), create_model_card=False)
    _declare(draft, sorted(spec.dims, reverse=True))
    evaluation.write_parquet(draft / f"{EVALUATION}.parquet")
    (draft / f"{EVALUATION}.json").write_text(json.dumps(evaluation.to_dicts(), indent=2) + "\n")
    curve.write_parquet(draft / CURVE)
    (draft / RECORD).write_text(json.dumps({**record, "versions": versions()}, indent=2, sort_keys=True) + "\n")
    (draft / "README.md").write_text(card(spec, base, evaluation, record))
    readable = (draft / "README.md").stat().st_mode  # safetensors makes files for their owner alone
    for path in sorted([*draft.rglob("*"), draft]):
        if path.is_file():
            path.chmod(readable)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(draft: Path, output: Path) -> None:
    """Move the finished draft to its place, which is free or empty."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(output)
    handle = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(output: Path) -> dict[str, Any] | None:
    """The record of a finished training with its place and evaluation; None where the folder is none."""
    try:
        value = json.loads((output / RECORD).read_bytes())
        return {**value, "fingerprint": value["fingerprint"], "output": str(output), "evaluation": _rows(output)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rows(output: Path) -> list[dict[str, Any]]:
    return list(json.loads((output / f"{EVALUATION}.json").read_bytes()))


def versions() -> dict[str, str]:
    """Of the packages that trained."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _declare(draft: Path, dims: Sequence[int]) -> None:
    for name in CONFIGS:
        path = draft / name
        if path.is_file():
            values = {name: value for name, value in json.loads(path.read_text()).items() if name not in DIMS}
            values |= {"matryoshka_dimensions": list(dims)} if dims else {}
            path.write_text(json.dumps(values, indent=2, sort_keys=True))


def card(spec: TrainSpec, base: ModelFolder, evaluation: pl.DataFrame, record: Mapping[str, Any]) -> str:
    """The model card: what it is, how it is used, what it was trained on, what was measured."""
    data, probed = record["fingerprint"]["content"], record["probe"]
    dims = ", ".join(map(str, spec.dims)) or "none"
    name = Path(base.name).name
    measured = [
        f"| {row['dim']} | {row['ndcg']:.4f} ({row['ndcg_low']:.4f} to {row['ndcg_high']:.4f}) | "
        f"{row['kept']:.1%} | {_ndcg(evaluation, 'before', row['dim'])} | {_ndcg(evaluation, 'pca', row['dim'])} |"
        for row in evaluation.filter(pl.col("when") == "after").iter_rows(named=True)
    ]
    cut = min(spec.dims, default=record["full_dim"])
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        f"tags: [sentence-transformers, sentence-similarity, feature-extraction{', matryoshka' if spec.dims else ''}]",
        f"matryoshka_dimensions: {list(spec.dims)}",
        "---",
        "",
        f"# {spec.name}",
        "",
        f"A {record['kind']} embedding model of {record['full_dim']} dimensions, trained from {name} "
        f"({base.digest[:19]}…) by matryoshka-pipeline. Trained prefixes: {dims}.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("path/to/this/folder", truncate_dim={cut})',
        'model.encode(["a text"], normalize_embeddings=True)',
        "```",
        "",
        f"Is it Matryoshka, by measurement: **{probed['says']}**; {probed['because']}.",
        "",
        f"nDCG@{spec.measure.k} on {data['measured_queries']:,} held-out queries over "
        f"{data['measured_documents']:,} documents (95 % bootstrap intervals):",
        "",
        "| dimensions | nDCG | of its full nDCG | before training | before, turned by PCA of the documents |",
        "|---|---|---|---|---|",
        *measured,
        "",
        f"Trained on {data['pairs']:,} pairs (sha256 {data['digest']}) in {record['steps']:,} steps:",
        "",
        "```yaml",
        *yaml.safe_dump(_settings(spec), default_flow_style=None, sort_keys=False).splitlines(),
        "```",
        "",
        f"The whole spec and the versions are in `{RECORD}`, every figure in `{EVALUATION}.json`, losses and watched "
        f"nDCG over the steps in `{CURVE}`.",
        "",
    ]
    return "\n".join(lines)


def _settings(spec: TrainSpec) -> dict[str, Any]:
    """What made the weights, where it is not as it comes; of models their names alone, not where they lie."""
    others = {"name", "output", "data", "held_out", "measure", "workers"}
    values = spec.model_dump(mode="json", exclude=others, exclude_defaults=True)
    for one in (values["base"], values.get("objective", {}).get("teacher")):
        if one:
            one["model"] = Path(one["model"]).name
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _ndcg(evaluation: pl.DataFrame, when: str, dim: int) -> str:
    found = evaluation.filter((pl.col("when") == when) & (pl.col("dim") == dim))["ndcg"]
    return f"{found[0]:.4f}" if len(found) else "-"
