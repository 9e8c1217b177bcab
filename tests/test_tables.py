"""What is written, read by plain clients: Lance, LanceDB, polars; nothing of ours."""

import json
from pathlib import Path

import lance
import lancedb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import run, store
from pipeline.tables import METADATA_KEY
from tests.conftest import DIM, corpus_frame


@pytest.fixture
def written(spec, monkeypatch):
    """A finished root with Parquet, a kept and a filter column; two shards of three are merged."""
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 100)
    job = spec(corpus__keep=["title"], corpus__filter=["lang"], embed__parquet=True, corpus__shard_rows=50)
    return Path(job.root), run(job)


def metadata(root, name):
    return json.loads(lance.dataset(str(root / "lancedb" / f"{name}.lance")).schema.metadata[METADATA_KEY])


def held_vectors(table):
    return np.stack(table.to_table(columns=["vector"])["vector"].to_numpy(zero_copy_only=False))


def test_schemas(written):
    root, _ = written
    database = lancedb.connect(str(root / "lancedb"))
    shown = {
        name: [str(field.type) for field in database.open_table(name).schema] for name in database.list_tables().tables
    }
    assert database.open_table("documents").schema.names == [
        "row",
        "id",
        "text",
        "title",
        "lang",
        "text_digest",
        "vector",
    ]
    assert shown["documents"][-2:] == ["fixed_size_binary[16]", f"fixed_size_list<item: halffloat>[{DIM}]"]
    assert database.open_table("prefix_8_binary").schema.names == ["row", "lang", "vector"]
    assert shown["prefix_8_binary"][-1] == "fixed_size_list<item: uint8>[1]"
    assert shown["prefix_16_int8"][-1] == "fixed_size_list<item: int8>[16]"
    assert shown["prefix_16_float16"][-1] == "fixed_size_list<item: halffloat>[16]"
    assert shown["parameters"] == ["string", "string", "int64", "int64", "list<item: float>"]


def test_rows_ascend_and_are_the_same_in_every_table(written):
    root, generation = written
    for name in generation["tables"].keys() - {"parameters"}:
        rows = lance.dataset(str(root / "lancedb" / f"{name}.lance")).to_table(columns=["row"])["row"].to_pylist()
        assert rows == list(range(120))


def test_documents_have_indexes_on_row_and_id(written):
    root, _ = written
    table = lancedb.connect(str(root / "lancedb")).open_table("documents")
    assert {tuple(index.columns) for index in table.list_indices()} == {("row",), ("id",)}


def test_metadata(written):
    root, generation = written
    documents, prefix = metadata(root, "documents"), metadata(root, "prefix_16_int8")
    assert documents["transform"] == {"kind": "none"}
    assert (documents["parent"], documents["dim"], documents["metric"]) == (None, DIM, "dot")
    assert prefix["transform"]["kind"] == "pca"
    assert prefix["codec"]["kind"] == "int8"
    assert len(prefix["codec"]["scale"]) == 16
    assert metadata(root, "prefix_8_binary")["metric"] == "hamming"
    rotation = metadata(root, "prefix_8_binary")["codec"]["rotation"]
    assert prefix["parent"] == "documents"
    stored = lance.dataset(str(root / "lancedb" / "parameters.lance")).to_table().to_pylist()
    shapes = {row["digest"]: (row["kind"], row["rows"], row["cols"]) for row in stored}
    assert shapes == {prefix["transform"]["parameters"]: ("pca", DIM + 1, DIM), rotation: ("rotation", 8, 8)}


def test_prefixes_follow_from_documents_by_the_documented_formula(written):
    root, _ = written
    tables = {path.stem: lance.dataset(str(path)) for path in (root / "lancedb").glob("*.lance")}
    full = held_vectors(tables["documents"]).astype(np.float32)
    assert np.abs(np.linalg.norm(full, axis=1) - 1).max() < 1e-3
    fitted = {
        row["digest"]: np.array(row["values"], np.float32).reshape(row["rows"], row["cols"])
        for row in tables["parameters"].to_table().to_pylist()
    }
    values = fitted[metadata(root, "prefix_16_int8")["transform"]["parameters"]]
    prefix = ((full - values[0]) @ values[1:])[:, :16]
    prefix /= np.linalg.norm(prefix, axis=1, keepdims=True)
    scale = np.array(metadata(root, "prefix_16_int8")["codec"]["scale"], np.float32)
    rotation = fitted[metadata(root, "prefix_8_binary")["codec"]["rotation"]]
    wanted = {
        "prefix_16_float16": prefix.astype(np.float16),
        "prefix_16_int8": np.clip(np.rint(prefix / scale), -127, 127),
        "prefix_8_binary": np.packbits(prefix[:, :8] @ rotation > 0, axis=-1),
    }
    for name, codes in wanted.items():
        assert np.mean(held_vectors(tables[name]) == codes) > 0.99, name  # NumPy and BLAS may round a last bit apart


def test_polars_reads_everything_as_fixed_size_arrays(written):
    root, _ = written
    documents = pl.scan_lance(str(root / "lancedb" / "documents.lance"))
    assert documents.collect_schema()["vector"] == pl.Array(pl.Float16, DIM)
    assert documents.filter(pl.col("row") < 3).select("id").collect()["id"].to_list() == ["doc-0", "doc-1", "doc-2"]
    parquet = pl.scan_parquet(root / "parquet" / "documents" / "*.parquet")
    assert parquet.collect_schema()["vector"] == pl.Array(pl.Float16, DIM)
    assert parquet.collect().equals(documents.collect())
    bits = pl.scan_lance(str(root / "lancedb" / "prefix_8_binary.lance")).collect()
    assert bits["vector"].dtype == pl.Array(pl.UInt8, 1)
    assert bits["vector"].to_numpy().shape == (120, 1)


def test_parquet_files_are_byte_split_zstd_without_dictionary(written):
    root, generation = written
    files = sorted((root / "parquet" / "documents").iterdir())
    assert [file.name for file in files] == [f"part-000000{number}.parquet" for number in range(2)]
    column = pq.ParquetFile(files[0]).metadata.row_group(0)
    vector = next(c for c in map(column.column, range(column.num_columns)) if c.path_in_schema.startswith("vector"))
    assert vector.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in vector.encodings
    assert not vector.has_dictionary_page
    assert {f"parquet/documents/{file.name}" for file in files} <= set(generation["files"])


def test_the_manifest_is_the_generation(written):
    root, generation = written
    assert json.loads((root / "manifest.json").read_text()) == generation
    assert json.loads((root / "generations" / "1.json").read_text()) == generation
    for name, entry in generation["tables"].items():
        table = lance.dataset(str(root / "lancedb" / f"{name}.lance"), version=entry["version"])
        assert table.count_rows() == entry["rows"]


def test_kept_columns_keep_their_values(written):
    root, _ = written
    frame = pl.scan_lance(str(root / "lancedb" / "documents.lance")).collect()
    given = corpus_frame()
    assert frame["title"].to_list() == given["title"].to_list()
    assert frame["text"].to_list() == [f"{title}\n{text}" for title, text in given.select("title", "text").iter_rows()]
