"""Is it still the same corpus: what changed since the root was begun, and since the scan."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import docstrings, sources, store
from pipeline.errors import DataError
from pipeline.ledger import Ledger
from pipeline.sources import SourceFile
from pipeline.storage import Root


def check(root: Root, scan: str, files: Sequence[SourceFile]) -> None:
    """DataError where a file's bytes are not those that were scanned, whatever its size and time say."""
    record = Ledger(root, "corpus").slot(scan).done
    for file, then in zip(files, record["files"], strict=True):
        if content_digest(file) != then["sha256"]:
            raise DataError(f"{file.path} changed while it was embedded; delete {root.path} and run again")


def changes(root: Root, begun: Mapping[str, Any], scan: str) -> str:
    """What is different from the corpus that the root was begun with, in words."""
    before = Ledger(root, "corpus").get(begun["scan"])
    now = Ledger(root, "corpus").get(scan)
    if before is None or now is None:
        return "its files are not known any more"
    then, today = ({file["path"]: file for file in record["files"]} for record in (before, now))
    gone, new = then.keys() - today.keys(), today.keys() - then.keys()
    contents = {then[path]["sha256"]: path for path in gone}
    renamed = {path: contents[today[path]["sha256"]] for path in new if today[path]["sha256"] in contents}
    told = {
        "changed": [
            f"{path} ({then[path]['rows']} -> {today[path]['rows']} rows)"
            for path in sorted(then.keys() & today.keys())
            if then[path]["sha256"] != today[path]["sha256"]
        ],
        "added": sorted(new - renamed.keys()),
        "removed": sorted(gone - set(renamed.values())),
        "renamed": [f"{old} -> {path}" for path, old in sorted(renamed.items())],
    }
    parts = [
        f"{len(paths)} {what}: {', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}"
        for what, paths in told.items()
        if paths
    ]
    return "; ".join(parts) or "the same files in another order"


def content_digest(file: SourceFile) -> str:
    """Changes with what the file says."""
    if file.kind == "docstrings":
        return digest_of(*(f"{row['id']}\n{row['text']}" for row in docstrings.stdlib()))
    if file.kind == "lance":
        names = [
            f"{data.path} {data.file_size_bytes}"
            for part in store.open_table(file.path).get_fragments()
            for data in part.metadata.files
        ]
        return digest_of(file.stamp, *names)
    return sources.content_digest(file)


def digest_of(*parts: str) -> str:
    """A short digest of strings in order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
