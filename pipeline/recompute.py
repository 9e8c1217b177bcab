"""Every row of a generation looked at: its place, its id, its length, and each of its codes computed again.

Comes in: open tables, fitted artefacts. Goes out: problems that name table and row. Shares no code with what writes,
on purpose: the formulas are those of the README, here in float64.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import reread
from pipeline.reread import BATCH_ROWS, DOCUMENTS, PARAMETERS, Notes, Reader, Table, Values

QUARANTINE = "quarantine.parquet"
REASONS = {"null_text", "blank_text", "undecodable", "duplicate_text", "non_finite", "zero_norm", "model_error"}
MAX_NORM_ERROR = 1e-3
MIN_NORM = 1e-12
"""A shorter row is not brought to length 1."""
UNIT, SPREAD = 2.0**-24, 32.0
"""A dot product in float32 is taken to err by at most SPREAD * UNIT = 2e-6 of the two lengths multiplied, a number of
a row brought to length 1 by as much of itself (measured up to D = 1,024: 4.3 UNIT and 2 UNIT). Errors of different
numbers add up as independent ones."""

NAME = re.compile("[a-z0-9_]+")

Artefacts = Mapping[str, tuple[str, Values]]


def run(root: PurePath, generation: Mapping[str, Any], damaged: Collection[str], quarantine: Any, notes: Notes) -> None:
    """Check every table of a generation; those with a file among `damaged` are left out, as is what rests on them.

    `quarantine` is the path of that file, or the file itself, open.
    """
    tables: dict[str, Table] = {}
    with notes.reading("the list of tables"):
        prefixes = {reread.table_of(one): one for one in generation["spec"]["prefixes"]}
        wanted, listed = {DOCUMENTS, PARAMETERS, *prefixes}, set(generation["tables"])
        for name in sorted(wanted ^ listed):
            notes.say(f"lancedb/{name}.lance: the spec and the tables of the generation do not both name it")
        for name in sorted(name for name in wanted & listed if NAME.fullmatch(name)):
            folder = f"lancedb/{name}.lance"
            if not any(file.startswith(folder + "/") for file in damaged):
                with notes.reading(folder):
                    tables[name] = reread.opened(root, name, generation, prefixes.get(name), notes)
    artefacts: Artefacts = {}
    if PARAMETERS in tables:
        with notes.reading(tables[PARAMETERS].folder):
            artefacts = reread.artefacts(tables[PARAMETERS], notes)
    for table in tables.values():
        with notes.reading(table.folder):
            reread.check_digests(table, notes)
    documents = tables.pop(DOCUMENTS, None)
    if documents is None:
        return
    with notes.reading("the rows of the tables"):
        is_fitted = tables.pop(PARAMETERS, None) is not None
        codes = [one for one in map(_Codes, tables.values()) if one.find(artefacts, notes)] if is_fitted else []
        rows = _Pass(documents, codes, generation, notes).run()
        if QUARANTINE not in damaged:
            _check_quarantine(quarantine, generation["corpus"], rows, notes)


class _Codes:
    """One prefix table: its rows, and what its codes have to be."""

    def __init__(self, table: Table) -> None:
        info = table.info
        self.table, self.dim, self.kind = table, int(info["dim"]), str(info["precision"])
        self.fitted = info["transform"].get("parameters")
        self.scale = np.array(info["codec"].get("scale", []), np.float32).astype(np.float64)
        self.mean: Values | None = None
        self.matrix: Values | None = None
        self.rotation: Values | None = None

    def find(self, artefacts: Artefacts, notes: Notes) -> bool:
        """Look up what the metadata names; False, and a problem, where it is not there or of another shape."""
        info, full_dim = self.table.info, int(self.table.info["full_dim"])
        named = {"transform": (self.fitted, info["transform"]["kind"], (full_dim + 1, full_dim))}
        named["rotation"] = (info["codec"].get("rotation"), "rotation", (self.dim, self.dim))
        found = {}
        for what, (digest, kind, shape) in named.items():
            if digest is not None:
                found[what] = artefacts.get(digest, ("", np.zeros(0)))
                if (found[what][0], found[what][1].shape) != (kind, shape):
                    notes.say(f"{self.table.folder}: its {what} {digest} is not in parameters as {kind} of {shape}")
                    return False
        if (self.fitted is None) != (info["transform"]["kind"] == "none") or info["codec"]["kind"] != self.kind:
            notes.say(f"{self.table.folder}: its metadata names a transform or codec that it does not hold")
            return False
        if self.kind == "int8" and not (self.scale.shape == (self.dim,) and (self.scale > 0).all()):
            notes.say(f"{self.table.folder}: its metadata does not hold {self.dim} positive scales")
            return False
        if "transform" in found:
            self.mean, self.matrix = found["transform"][1][0], found["transform"][1][1:]
        self.rotation = found["rotation"][1] if "rotation" in found else None
        return True

    def check(self, turned: Values, error: Values, stored: pa.Table) -> tuple[Values, Values]:
        """Masks [n] and [n, dim]: rows with a wrong code, and numbers that only rounding in float32 accounts for.

        `turned` are transformed rows [n, D], `error` how far float32 may be from each. A code must lie between the
        codes of the value less and plus its bound; every codec rises with its value.
        """
        value, bound = self._values(turned[:, : self.dim], error[:, : self.dim])
        codes = np.hstack([matrix_of(stored[name]) for name in self.table.vectors])
        codes = np.unpackbits(codes, axis=1) if self.kind == "binary" else codes
        with np.errstate(over="ignore"):
            low, exact, high = (self._encoded(one) for one in (value - bound, value, value + bound))
        fits = np.asarray((codes >= low) & (codes <= high))
        return np.asarray(~fits.all(axis=1)), fits & (codes != exact)

    def _values(self, turned: Values, error: Values) -> tuple[Values, Values]:
        """What the codec encodes, and its bound."""
        lengths = np.linalg.norm(turned, axis=1, keepdims=True)
        divisor = np.where(lengths < MIN_NORM, 1.0, lengths)
        value, error = turned / divisor, error / divisor
        common = np.linalg.norm(error * value, axis=1, keepdims=True) + SPREAD * UNIT  # of the length divided by
        bound = error + common * np.abs(value)
        bound[np.abs(lengths[:, 0] / MIN_NORM - 1) < 0.01] = 1.0  # float32 may divide such a row, or not
        if self.kind == "int8":
            return value / self.scale, bound / self.scale + 2 * UNIT * np.abs(value / self.scale)
        if self.rotation is not None:
            rotated = value @ self.rotation
            columns = SPREAD * UNIT * np.linalg.norm(self.rotation, axis=0)
            lengths = np.linalg.norm(value, axis=1, keepdims=True)
            carried = np.sqrt(error**2 @ self.rotation**2)
            return rotated, carried + common * np.abs(rotated) + lengths * columns
        return value, bound

    def _encoded(self, value: Values) -> Values:
        if self.kind == "int8":
            return np.clip(np.rint(value), -127, 127)
        return value > 0 if self.kind == "binary" else value.astype(self.kind)


@dataclass
class _Pass:
    """One pass over the rows of `documents` and, beside them, of every prefix table."""

    documents: Table
    codes: list[_Codes]
    generation: Mapping[str, Any]
    notes: Notes

    def run(self) -> Values:
        """All row numbers, int64, as they stand."""
        spec = self.generation["spec"]["corpus"]
        self.filters = list(spec["filter"])
        has_text = "text" in self.documents.data.schema.names
        names = ["row", "id", *(["text"] if has_text else []), "text_digest", *self.filters, "vector"]
        reader = Reader(self.documents, list(dict.fromkeys(names)))
        beside = [(one, Reader(one.table, ["row", *self.filters, *one.table.vectors])) for one in self.codes]
        rows, hashes, last = [np.zeros(0, np.int64)], [], -1
        while (batch := reader.take(BATCH_ROWS)).num_rows:
            numbers = batch["row"].to_numpy()
            steps = np.diff(numbers, prepend=last)
            self.notes.rows(self.documents.folder, numbers, steps <= 0, "does not come after the row before it")
            hashes.append(self._check_ids(batch, numbers, spec["id"] is None))
            self._check_codes(batch, numbers, beside)
            rows.append(numbers)
            last = int(numbers[-1])
        joined = np.concatenate(rows)
        self._check_unique(joined, b"".join(hashes))
        for one, other in beside:
            if other.take(1).num_rows:
                self.notes.say(f"{one.table.folder}: has rows after the last one of documents")
        self.notes.checked["rows"] += len(joined)
        return joined

    def _check_ids(self, batch: pa.Table, numbers: Values, is_digest: bool) -> bytes:
        """Compare ids and texts with their digests; 16 bytes for each id."""
        where, ids = self.documents.folder, batch["id"].to_pylist()
        digests = batch["text_digest"].to_pylist()
        self.notes.rows(where, numbers, np.array([one is None for one in ids]), "has no id")
        if is_digest:
            same = [digest is not None and one == digest.hex() for one, digest in zip(ids, digests, strict=True)]
            self.notes.rows(where, numbers, ~np.array(same), "has an id that is not the digest of its text")
        if "text" in batch.column_names:
            pairs = zip(batch["text"].to_pylist(), digests, strict=True)
            same = [text is not None and _hash(text) == digest for text, digest in pairs]
            self.notes.rows(where, numbers, ~np.array(same), "has a text_digest that is not that of its text")
        return b"".join(_hash(one or "") for one in ids)

    def _check_unique(self, rows: Values, hashes: bytes) -> None:
        halves = np.frombuffer(hashes, "<u8").reshape(-1, 2)
        order = np.lexsort(halves.T)
        same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        self.notes.rows(self.documents.folder, rows[order[1:]], same, "has an id that an earlier row has")

    def _check_codes(self, batch: pa.Table, numbers: Values, beside: list[tuple[_Codes, Reader]]) -> None:
        others = [reader.take(len(numbers)) for _, reader in beside]
        if batch["vector"].null_count:
            self.notes.rows(self.documents.folder, numbers, batch["vector"].is_null().to_numpy(), "has no vector")
            return
        vectors = matrix_of(batch["vector"]).astype(np.float64)
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        self.notes.rows(self.documents.folder, numbers, ~finite, "has a vector that is not finite")
        vectors = np.where(finite[:, None], vectors, 0.0)
        far = np.asarray(np.abs(np.linalg.norm(vectors, axis=1) - 1) > MAX_NORM_ERROR)
        self.notes.rows(self.documents.folder, numbers, finite & far, "has a vector that is not of length 1")
        self.notes.checked["vectors"] += len(vectors)
        turned: dict[str | None, tuple[Values, Values]] = {}
        for (one, _), other in zip(beside, others, strict=True):
            where = one.table.folder
            if other.num_rows < len(numbers) or not np.array_equal(other["row"].to_numpy(), numbers):
                self.notes.rows(where, *_other_rows(numbers, other["row"].to_numpy()), "is not there as in documents")
                continue
            for name in self.filters:
                differs = _differs(batch[name], other[name])
                self.notes.rows(where, numbers, differs, f"has another {name} than in documents")
            if any(other[name].null_count for name in one.table.vectors):
                missing = np.any([other[name].is_null().to_numpy() for name in one.table.vectors], axis=0)
                self.notes.rows(where, numbers, missing, "has no code")
                continue
            if one.fitted not in turned:
                turned[one.fitted] = _turned(vectors, one)
            wrong, rounded = one.check(*turned[one.fitted], other)
            self.notes.rows(where, numbers, wrong & finite, "has another code than follows from its full vector")
            self.notes.checked["codes"] += len(numbers)
            if one.kind != "float32":
                self.notes.checked["rounded"] += int(rounded.sum())


def matrix_of(column: pa.ChunkedArray) -> Values:
    """A column of fixed-size lists as [n, width]; rows that are null are left out."""
    array = column.combine_chunks()
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(-1, array.type.list_size)


def _turned(vectors: Values, one: _Codes) -> tuple[Values, Values]:
    """(v - mean) @ matrix, and how far float32 may be from it."""
    if one.mean is None or one.matrix is None:
        return vectors, np.zeros_like(vectors)
    centred = vectors - one.mean
    lengths = np.linalg.norm(centred, axis=1, keepdims=True) * np.linalg.norm(one.matrix, axis=0)
    return centred @ one.matrix, SPREAD * UNIT * lengths


def _other_rows(numbers: Values, others: Values) -> tuple[Values, Values]:
    """Row numbers of documents that stand elsewhere in another table, as `Notes.rows` takes them."""
    padded = np.full(len(numbers), -1)
    padded[: len(others)] = others
    return numbers, padded != numbers


def _differs(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Values:
    """Rows whose values differ; nulls equal nulls and NaN equals NaN."""
    left, right = (one.cast(pa.float32()) if one.type == pa.float16() else one for one in (left, right))
    nothing = pc.and_(pc.is_null(left, nan_is_null=True), pc.is_null(right, nan_is_null=True))
    alike = pc.and_(nothing, pc.equal(pc.is_valid(left), pc.is_valid(right)))
    return np.asarray(~pc.or_(pc.fill_null(pc.equal(left, right), False), alike).to_numpy())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _check_quarantine(quarantine: Any, corpus: Mapping[str, Any], rows: Values, notes: Notes) -> None:
    """Every row of the corpus is in `documents` or here, never both, and the reasons are those counted."""
    aside = pq.read_table(quarantine, columns=["row", "reason"])
    numbers, reasons = aside["row"].to_numpy(), Counter(aside["reason"].to_pylist())
    for reason in sorted(set(reasons) - REASONS, key=str):
        notes.say(f"{QUARANTINE}: {reason!r} is no reason")
    if dict(reasons) != dict(corpus["reasons"]) or len(numbers) != corpus["quarantined"]:
        notes.say(f"{QUARANTINE}: its reasons {dict(reasons)} are not those of the generation, {corpus['reasons']}")
    where, total = f"{DOCUMENTS} and {QUARANTINE}", int(corpus["rows"])
    every = np.sort(np.concatenate([rows, numbers]))
    outside = (every < 0) | (every >= total)
    notes.rows(where, every, outside, f"is none of the corpus' {total} rows")
    every = every[~outside]
    steps = np.diff(every, prepend=-1, append=total)
    notes.rows(where, every, steps[:-1] == 0, "is there more than once")
    if (steps > 1).any():
        first = int(np.append(-1, every)[steps > 1][0]) + 1
        notes.say(f"{where}: row {first} is in neither of them ({int((steps[steps > 1] - 1).sum())} rows are missing)")
    notes.checked["quarantined"] += len(numbers)
