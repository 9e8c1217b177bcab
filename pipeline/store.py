"""Storage: files written whole or not at all, the root's lock, and Lance tables.

A file appears by rename after its bytes are on disk; `create` also never replaces one. Lance writes its
own files; `write_fragments` brings them to disk before it returns, and nothing is visible before `commit`.
"""

import hashlib
import io
import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import lance
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from lance.fragment import FragmentMetadata, write_fragments as lance_write_fragments

from pipeline.errors import LockedError, SpecError, StaleError

Table: TypeAlias = lance.LanceDataset
LANCE_FORMAT = "2.2"
"""Newer formats that pylance can write are unreadable in lancedb 0.40."""


def prepare_root(root: Path) -> None:
    """Make the root's folders; SpecError where that is not allowed."""
    if "://" in str(root) or ":/" in str(root):
        raise SpecError(f"root {root}: object stores are not supported yet; name a folder")
    try:
        for folder in (root / "_state", root / "lancedb", root / "generations"):
            folder.mkdir(parents=True, exist_ok=True)
        probe = root / "_state" / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpecError(f"cannot write to root {root}: {error.strerror}; choose a folder that can be written") from None


def write(path: Path, data: bytes) -> None:
    """Write or replace a file in one step, durable when this returns."""
    draft = _draft(path, data)
    draft.replace(path)
    _sync_folder(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Write a file unless one of that name exists; True where this call made it."""
    draft = _draft(path, data)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    _sync_folder(path.parent)
    return True


def _draft(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return draft


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no NaN."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def read_json(path: Path) -> Any | None:
    """A JSON file's value; None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def npy(array: Any) -> bytes:
    """A NumPy array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the root for one job. The kernel frees it when the process ends, however it ends.

    Raises LockedError where another process holds it.
    """
    owner = root / "_state" / "owner.json"
    held = FileLock(root / "_state" / "lock")
    try:
        held.acquire(blocking=False)
    except Timeout:
        other = read_json(owner) or {}
        raise LockedError(
            f"{root} is held by another job (process {other.get('process', '?')} on {other.get('host', '?')}); "
            "wait for it to end, or stop it"
        ) from None
    try:
        write(owner, to_json({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        held.release()


def table_uri(root: Path, name: str) -> str:
    """Where a LanceDB table lies."""
    return str(root / "lancedb" / f"{name}.lance")


def write_fragments(uri: str, data: pa.Table, schema: pa.Schema) -> list[dict[str, Any]]:
    """Write rows that no reader sees until `commit`; their descriptions, as JSON values."""
    if not data.num_rows:
        return []
    fragments = lance_write_fragments(
        data.cast(schema) if data.schema != schema else data,
        uri,
        schema=schema,
        mode="overwrite" if table_exists(uri) else "create",
        max_rows_per_file=2**31,
        data_storage_version=LANCE_FORMAT,
    )
    written = sum(fragment.physical_rows for fragment in fragments)
    if written != data.num_rows:
        raise OSError(f"{uri}: Lance wrote {written} of {data.num_rows} rows")
    for path in _data_files(fragments):
        with (Path(uri) / "data" / path).open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(Path(uri) / "data")
    return [fragment.to_json() for fragment in fragments]


def commit(uri: str, schema: pa.Schema, fragments: Sequence[dict[str, Any]]) -> int:
    """Publish fragments as the table's whole content, in order; the version that holds them.

    Compares data files first: a commit that has already landed is not made again (Lance itself
    neither deduplicates nor checks that files exist).
    """
    parsed = _parsed(fragments)
    wanted = _data_files(parsed)
    missing = lost_files(uri, fragments)
    if missing:
        raise StaleError(f"{uri}: {len(missing)} data files are gone, for example {missing[0]}; delete the root")
    current = open_table(uri) if table_exists(uri) else None
    held = [] if current is None else [fragment.metadata for fragment in current.get_fragments()]
    if current is not None and _data_files(held) == wanted and not any(one.deletion_file for one in held):
        return int(current.version)
    Path(uri).mkdir(parents=True, exist_ok=True)
    return int(lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(schema, parsed)).version)


def lost_files(uri: str, fragments: Sequence[dict[str, Any]]) -> list[str]:
    """Data files that the fragments name and the table's folder lacks."""
    return [path for path in _data_files(_parsed(fragments)) if not (Path(uri) / "data" / path).is_file()]


def _parsed(fragments: Sequence[dict[str, Any]]) -> list[FragmentMetadata]:
    return [FragmentMetadata.from_json(json.dumps(fragment)) for fragment in fragments]


def _data_files(fragments: Sequence[FragmentMetadata]) -> list[str]:
    return [file.path for fragment in fragments for file in fragment.files]


def table_exists(uri: str) -> bool:
    """Whether a version of the table was ever committed."""
    return (Path(uri) / "_versions").is_dir() and any((Path(uri) / "_versions").iterdir())


def open_table(uri: str, version: int | None = None) -> lance.LanceDataset:
    """A table at a version (null: the newest); StaleError where it is gone."""
    try:
        return lance.dataset(uri, version=version)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise StaleError(
            f"{uri}: version {version or 'newest'} cannot be opened ({reason}); run the job again"
        ) from None


def data_bytes(table: lance.LanceDataset) -> int:
    """Bytes of a table's data files, without indexes and old versions."""
    return sum(file.file_size_bytes or 0 for f in table.get_fragments() for file in f.metadata.files)


def nearest(
    table: lance.LanceDataset, query: Any, limit: int, probes: int, where: str | None, columns: Sequence[str] = ("row",)
) -> Any:
    """A Lance scanner over the ANN index: dot for floats, hamming for packed bits (uint8).

    At least `probes` partitions are looked at, more while a filter leaves fewer than `limit` rows.
    """
    metric = "hamming" if str(query.dtype) == "uint8" else "dot"
    target = {"column": "vector", "q": query, "k": limit, "metric": metric, "minimum_nprobes": probes}
    return table.scanner(columns=[*columns, "_distance"], nearest=target, filter=where, prefilter=where is not None)
