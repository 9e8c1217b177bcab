"""The fit stage: what must be learned from the corpus, once, on a seeded sample.

Comes in: `documents`. Goes out: the transform and one codec per prefix, the matrices in `parameters`. Memory is
bounded by a batch and a D x D matrix.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from pipeline import store
from pipeline.ledger import Ledger
from pipeline.spec import JobSpec, Prefix
from pipeline.tables import FORMAT, PARAMETERS, Fits, Parent, TableInfo, parameters_schema, vector_matrix
from pipeline.transform import Moments, Transform, digest, pca
from pipeline.vectors import Codec, Matrix, int8_scale, truncate

log = logging.getLogger(__name__)

BATCH_ROWS = 8_192


def run(spec: JobSpec, parent: Parent, declared: Sequence[int] | None, root: Path) -> Fits:
    """Fit what is missing; `declared` are the dims that the model says it was trained for.

    `transform: auto` is `none` for a model with declared Matryoshka dims, else centred PCA.
    """
    ledger = Ledger(root, "fit")
    kind = spec.transform.kind
    if kind == "auto":
        kind = "none" if declared else "pca"
        log.info(
            "fit transform=%s because=%s",
            kind,
            f"the model declares {list(declared)}" if declared else "no declared dims",
        )
    if kind == "none" and not declared:
        log.warning("fit transform=none: the model declares no Matryoshka dims; plain prefixes may lose much")
    far = [prefix.dim for prefix in spec.prefixes if declared and kind == "none" and prefix.dim not in declared]
    if far:
        log.warning("fit transform=none: the model was trained for %s, not for %s", list(declared or ()), far)
    sample = _Sample(parent, spec.seed, spec.transform.sample_rows)
    with threadpool_limits(1):  # eigh differs in its last bits with the number of threads
        transform, name, explained = _transform(kind, sample, ledger)
        codecs = {prefix.table: _codec(prefix, transform, name, sample, ledger) for prefix in spec.prefixes}
    version = _write_parameters(root, transform, name, parent.info)
    return Fits(transform, name, codecs, explained, version)


class _Sample:
    """Seeded rows of `documents`, read again for each pass."""

    def __init__(self, parent: Parent, seed: int, size: int) -> None:
        self.parent = parent
        self.key = f"{FORMAT} {parent.digest} {seed} {size}"
        self._seed, self._size = seed, size

    def __iter__(self) -> Iterator[Matrix]:
        table = store.open_table(self.parent.uri, self.parent.version)
        if self._size >= self.parent.rows:
            for batch in table.scanner(columns=["vector"], batch_size=BATCH_ROWS).to_batches():
                yield vector_matrix(batch.column("vector"))
            return
        chosen = np.sort(np.random.default_rng(self._seed).choice(self.parent.rows, self._size, replace=False))
        for start in range(0, self._size, BATCH_ROWS):
            part = table.take(pa.array(chosen[start : start + BATCH_ROWS]), columns=["vector"])
            yield vector_matrix(part.column("vector"))


def _transform(kind: str, sample: _Sample, ledger: Ledger) -> tuple[Transform, str | None, list[float]]:
    if kind == "none":
        return Transform(), None, []
    name = f"{kind}-{_key(sample.key, kind)}"
    record = ledger.get(name)
    path = ledger.file(f"{name}.npy")
    if record is None:
        moments = Moments(sample.parent.info.full_dim)
        for vectors in sample:
            moments.add(vectors)
        transform, variances = pca(moments)
        np.save(path, transform.stacked())
        total = float(variances.sum()) or 1.0
        record = ledger.add(
            name,
            {
                "digest": digest(kind, transform.stacked()),
                "sample_rows": moments.count,
                "explained": [round(float(share), 6) for share in np.cumsum(variances) / total],
            },
        )
        log.info("fit transform=%s sample_rows=%d digest=%s", kind, moments.count, record["digest"][:12])
    return Transform.unstacked(kind, np.load(path)), str(record["digest"]), list(record["explained"])


def _codec(prefix: Prefix, transform: Transform, name: str | None, sample: _Sample, ledger: Ledger) -> Codec:
    """The prefix's codec; only int8 has something to learn: the largest value of each dimension."""
    if prefix.precision != "int8":
        return Codec(prefix.precision)
    key = f"{prefix.table}-{_key(sample.key, str(name))}"
    record = ledger.get(key)
    if record is None:
        largest = np.zeros(prefix.dim, np.float32)
        for vectors in sample:
            largest = np.maximum(largest, np.abs(truncate(transform.apply(vectors), prefix.dim)).max(axis=0))
        scale = [float(str(step)) for step in int8_scale(largest)]
        record = ledger.add(key, {"scale": scale})
    return Codec("int8", scale=np.array(record["scale"], np.float32))


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write_parameters(root: Path, transform: Transform, name: str | None, info: TableInfo) -> int:
    """Keep the fitted matrices where every reader finds them; the table's version."""
    uri = store.table_uri(root, PARAMETERS)
    schema = parameters_schema(info)
    wanted = {} if name is None else {name: (transform.kind, transform.stacked())}
    if store.table_exists(uri):
        current = store.open_table(uri)
        if set(current.to_table(columns=["digest"]).column("digest").to_pylist()) == set(wanted):
            return int(current.version)
    artefacts: list[dict[str, Any]] = [
        {"digest": key, "kind": kind, "rows": len(values), "cols": values.shape[1], "values": values.ravel()}
        for key, (kind, values) in wanted.items()
    ]
    table = pa.Table.from_pylist(artefacts, schema)
    return store.commit(uri, schema, store.write_fragments(uri, table, schema))
