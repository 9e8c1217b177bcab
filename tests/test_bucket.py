"""Roots in an object store: the same job, the same tables, over HTTP, also where the store fails."""

import json
import os
import pickle
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import JobSpec, bucket, cloud, ledger, lock, open_index, run, verify
from pipeline.bucket import Bucket, RefusedError, StoreError, located
from pipeline.errors import LockedError, PipelineError, SpecError
from pipeline.seam import Location
from pipeline.sources import Reader, resolve
from pipeline.storage import Root
from tests.conftest import corpus_frame, making_pages
from tests.faults.s3proxy import FAULTS, Proxy, free_port, wait_for

pytest.importorskip("obstore")
pytest.importorskip("moto")

SHARDS = 8
QUICK = {"AWS_READ_TIMEOUT": "1s", "AWS_CONNECT_TIMEOUT": "2s", "AWS_TIMEOUT": "10s"}
"""A test's patience; a job has more."""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server in a process of its own."""
    port = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """Credentials of nobody, and nothing that the libraries were told before."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("AWS_", "OBJECT_STORE_"))]:
        del os.environ[name]
    os.environ.update({"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", **more})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def new_bucket(port: int, name: str) -> str:
    """Make a bucket, which takes any signature."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
    urllib.request.urlopen(request, timeout=10).close()
    return f"s3://{name}"


@pytest.fixture
def at(server: int, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty bucket of the test's own, and the environment that leads to it."""
    name = f"b{abs(hash(request.node.nodeid)) % 10**12}"
    with environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{server}", **QUICK):
        yield new_bucket(server, name)


@contextmanager
def through(server: int, name: str, **settings: Any) -> Iterator[tuple[str, Proxy]]:
    """The same behind a proxy."""
    with Proxy(server, **settings) as proxy, environment(AWS_ENDPOINT_URL=proxy.url, **QUICK):
        yield new_bucket(server, name), proxy


def plain_values(folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    source = folder / "corpus.parquet"
    corpus_frame(120).write_parquet(source)
    return {
        "name": "test",
        "root": str(folder / "root"),
        "corpus": {"source": str(source), "id": "_id", "text": ["title", "text"], "filter": ["lang"], "shard_rows": 15},
        "model": {"name": str(model)},
        "prefixes": [{"dim": 8, "precision": "binary"}, {"dim": 16, "precision": "int8"}],
        "evaluate": {"shortlists": []},
        "workers": {"count": 0},
        **more,
    }


def digests(generation: dict[str, Any]) -> dict[str, Any]:
    found = {name: (entry["digest"], entry["rows"]) for name, entry in generation["tables"].items()}
    return {**found, "quarantine": generation["files"]["quarantine.parquet"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    """Values of a job that was run in a folder."""
    values = plain_values(tmp_path_factory.mktemp("folder"), model)
    run(JobSpec.of(values))
    return values


@pytest.fixture(scope="module")
def golden(folder: dict[str, Any]) -> dict[str, Any]:
    """The generation that it made."""
    return json.loads((Path(folder["root"]) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def finished(server: int, folder: dict[str, Any]) -> Iterator[JobSpec]:
    """The same job with its root in a bucket, run once; with its page, cached codes and an index."""
    with environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{server}", **QUICK), making_pages():
        spec = JobSpec.of({**folder, "root": f"{new_bucket(server, 'finished')}/a/job", "search": {"cache": True}})
        run(spec)
        yield spec


def test_a_job_in_a_bucket_makes_the_tables_of_one_in_a_folder(finished, golden):
    generation = ledger.newest_generation(located(finished.root))
    assert digests(generation) == digests(golden)
    root = located(finished.root)
    assert json.loads(root.read("manifest.json")) == generation
    names = set(root.disk.names(root.path))
    assert {"_state", "generations", "lancedb", "report.html", "quarantine.parquet"} <= names
    assert not root.names("_state/drafts")
    assert not [name for name in root.names("_state") if name.startswith("probe-")]


def test_a_rerun_does_nothing(finished, server):
    root = located(finished.root)
    before = dict(root.disk.stamps(root.path, ()))
    generation = run(finished)
    assert generation["generation"] == 1
    changed = {name for name, stamp in root.disk.stamps(root.path, ()).items() if before.get(name) != stamp}
    assert {name for name in changed if not name.startswith("_state/locks/")} <= {"_state/stamps.json"}


@pytest.mark.parametrize("engine", ["lance", "resident"])
def test_search_in_a_bucket_answers_as_in_a_folder(finished, folder, engine):
    here, there = (open_index(root, engine=engine) for root in (folder["root"], finished.root))
    for where in (None, "lang = 'de'"):
        wanted = here.search(["w001 w002", "w100"], k=5, where=where)
        assert there.search(["w001 w002", "w100"], k=5, where=where).equals(wanted)
    assert there.similar("doc-7", k=3).equals(here.similar("doc-7", k=3))


def test_verify_names_a_changed_object_and_the_next_run_mends_it(finished, golden):
    root = located(finished.root)
    found = verify.run(root.path)
    assert found.is_whole and not found.unknown and found.checked["tables"] == 4
    (path, *_) = [name for name in root.names("lancedb/prefix_8_binary.lance/data")]
    name = f"lancedb/prefix_8_binary.lance/data/{path}"
    data = bytearray(root.read(name))
    data[20] ^= 1
    root.write(name, bytes(data))
    assert verify.run(root.path).damaged == (name,)
    assert digests(run(finished)) == digests(golden)
    assert verify.run(root.path).is_whole


def test_a_job_stopped_while_it_embeds_goes_on(at, folder, golden, monkeypatch):
    spec, made, add = JobSpec.of({**folder, "root": f"{at}/job"}), [], ledger.Ledger.add

    def stopping(book, slot, record):
        if book.folder.endswith("_state/embed"):
            made.append(slot)
            if len(made) == 3:
                raise KeyboardInterrupt
        return add(book, slot, record)

    monkeypatch.setattr(ledger.Ledger, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(spec)
    monkeypatch.setattr(ledger.Ledger, "add", add)
    done = ledger.Ledger(located(spec.root), "embed").names()
    assert len(done) == 2
    assert digests(run(spec)) == digests(golden)
    assert verify.run(located(spec.root).path).is_whole


def test_the_command_line_takes_a_bucket(finished):
    def call(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(call("status", finished.root, "--json"))["tables"]["documents"] == 120
    hits = [json.loads(line) for line in call("search", finished.root, "w001", "-k", "2", "--json").splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2]
    assert "whole" in call("verify", finished.root, "--json")


def test_a_corpus_is_read_from_the_endpoint_of_the_environment(at, folder):
    root = located(f"{at}/corpus")
    root.write("a.parquet", Path(folder["corpus"]["source"]).read_bytes())
    root.write("b.jsonl", b'{"_id": "x", "text": "w001"}\n')
    files = resolve([f"{at}/corpus/*"])
    assert [(file.path, file.kind) for file in files] == [
        (f"{at}/corpus/a.parquet", "parquet"),
        (f"{at}/corpus/b.jsonl", "jsonl"),
    ]
    assert sum(batch.count for file in files for batch in Reader(["text"]).read(file)) == 121


# The storage itself


def test_a_file_is_made_once_replaced_and_removed(at):
    root = located(f"{at}/x")
    assert root.read("a/b") is None and root.size("a/b") is None and root.names("a") == []
    assert root.create("a/b", b"one") and root.read("a/b") == b"one"
    assert not root.create("a/b", b"two") and root.read("a/b") == b"one"
    root.write("a/b", b"three")
    root.write("a/c/d", b"4")
    assert (root.read("a/b"), root.size("a/b"), root.names("a")) == (b"three", 5, ["b", "c"])
    digest = root.keep(b"bytes")
    assert root.kept(digest) == b"bytes" and root.local(f"_state/kept/{digest}").read_bytes() == b"bytes"
    draft = root.draft_folder() / "large"
    draft.write_bytes(os.urandom(20_000_000))
    whole = draft.read_bytes()
    root.adopt(draft, "large")
    assert root.read("large") == whole and not draft.exists()
    root.set_aside("a/b")
    (aside,) = root.names("_state/damaged")
    assert root.read(f"_state/damaged/{aside}") == b"three" and root.read("a/b") is None
    root.delete("a/c/d")
    root.delete("a/c/d")
    assert root.names("a") == []
    copy = pickle.loads(pickle.dumps(root))
    assert copy.path == root.path and copy.read("large") == whole


def test_a_lost_reply_is_not_taken_for_another_job(server):
    with through(server, "lost-replies", rates={"lost": 1.0}) as (url, proxy):
        proxy.only = ("PUT",)
        for number in range(4):
            proxy.left = {"lost": 1}
            assert located(f"{url}/x").create(f"record-{number}", b"mine")
        proxy.left = {"lost": 0}
        assert not located(f"{url}/x").create("record-0", b"other")
        assert located(f"{url}/x").read("record-0") == b"mine"
        assert proxy.counts["lost"] == 4


def test_six_lost_replies_in_a_row_do_not_end_a_delete(server):
    with through(server, "lost-deletes", rates={"lost": 1.0}) as (url, proxy):
        proxy.only, proxy.left = ("POST", "DELETE"), {"lost": 6}
        root = located(f"{url}/x")
        root.write("file", b"mine")
        root.delete("file")
        assert proxy.counts["lost"] == 6
        assert root.read("file") is None


def test_one_job_at_a_time_holds_a_bucket(at):
    me = lock.Owner.me()
    first = lock.take(located(f"{at}/x"), me)
    with pytest.raises(LockedError):
        lock.take(located(f"{at}/x"), me)
    lock.give_back(first)
    claims = [lock.take(located(f"{at}/{name}"), me) for name in "ab"]
    assert claims[0].read("_state/locks/1.json") != claims[1].read("_state/locks/1.json")
    assert lock.take(located(f"{at}/x"), me).fence == 2


# Refused


def test_an_endpoint_that_ignores_conditions_is_refused(server, folder):
    with through(server, "no-conditions", strip=True) as (url, _):
        with pytest.raises(SpecError, match=r"no-conditions/job: this endpoint does not keep .*If-None-Match") as told:
            run(JobSpec.of({**folder, "root": f"{url}/job"}))
        assert told.value.exit_code == 2
        root = located(f"{url}/job")
        assert not root.disk.stamps(root.path, ())


def test_a_missing_bucket_a_missing_endpoint_and_a_refusal_are_one_sentence(server, folder):
    with through(server, "forbidden", rates={"forbidden": 1.0}) as (url, _):
        with pytest.raises(SpecError, match=r"forbidden/job\S*: the store refuses these credentials") as told:
            run(JobSpec.of({**folder, "root": f"{url}/job"}))
        assert told.value.exit_code == 2
    with through(server, "there-is-one") as (_, _):
        for call in (lambda root: run(JobSpec.of({**folder, "root": root})), open_index):
            with pytest.raises(SpecError, match="there is no bucket none-such"):
                call("s3://none-such/job")
    start = time.monotonic()
    with environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", **QUICK):
        with pytest.raises(PipelineError, match=r"s3://gone/job\S*: the store fails") as told:
            run(JobSpec.of({**folder, "root": "s3://gone/job"}))
        assert told.value.exit_code == 1
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        Path("/x").as_uri(),
        "s3://",
        "ftp://b/x",
        "s3://b/a b",
        "s3://b/../x",
        "s3://b/x%20y",
        "s3://b/ü",
        "s3://KEY:SECRET@b/x",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(SpecError, match="root") as told:
        located(url)
    assert "SECRET" not in str(told.value)


def test_credentials_come_from_the_environment_or_a_profile_only(tmp_path):
    (tmp_path / "credentials").write_text(
        "[work]\naws_access_key_id = KEY\naws_secret_access_key = SECRET\n[sso]\nsso_session = x\n"
    )
    (tmp_path / "config").write_text("[profile work]\nregion = eu-west-1\nendpoint_url = http://127.0.0.1:9\n")
    files = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_CONFIG_FILE": str(tmp_path / "config")}
    with environment(AWS_PROFILE="work", **files):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            del os.environ[name]
        cloud.environment("s3")
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
        assert [os.environ[name] for name in names] == ["KEY", "SECRET", "eu-west-1", "http://127.0.0.1:9", "true"]
    for profile, word in (("sso", "holds no access key"), ("none", "holds no access key"), ("", "needs credentials")):
        with environment(AWS_PROFILE=profile, **files):
            del os.environ["AWS_ACCESS_KEY_ID"]
            with pytest.raises(SpecError, match=word):
                located("s3://b/x").read("y")
    with environment(AWS_ENDPOINT_URL="127.0.0.1:9"), pytest.raises(SpecError, match="begins with https"):
        located("s3://b/x").read("y")


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with environment(), pytest.raises(SpecError, match=r"pip install 'matryoshka-pipeline\[cloud\]'"):
        located("s3://b/x").read("y")


def test_a_location_is_a_url_and_no_file():
    root = located("s3://bucket//a/b/")
    assert str(root.path) == "s3://bucket/a/b" and str(root / "c/d") == "s3://bucket/a/b/c/d"
    assert (root / "c/d").parent == Location("s3://bucket/a/b/c") and pickle.loads(pickle.dumps(root.path)) == root.path
    assert not hasattr(root.path, "open") and isinstance(located("/a").path, Path)
    assert isinstance(located("s3://b"), Root) and isinstance(root.disk, Bucket)


# A store that fails


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_store_that_fails_costs_time_or_is_loud(server, folder, golden, share):
    rates = {kind: share * weight for kind, weight in zip(FAULTS, (0.25, 0.3, 0.02, 0.2, 0.13, 0.1), strict=True)}
    with through(server, f"failing-{int(share * 100)}", rates=rates, seed=3, late=2.0) as (url, proxy):
        spec, start, told = JobSpec.of({**folder, "root": f"{url}/job"}), time.monotonic(), None
        try:
            assert digests(run(spec)) == digests(golden)
        except PipelineError as error:
            told = error
        assert time.monotonic() - start < 200
        assert share > 0.1 or told is None
        assert all(proxy.counts[kind] for kind in ("error500", "error503", "reset"))
        proxy.rates = {}
        assert digests(run(spec)) == digests(golden)
        assert verify.run(located(spec.root).path).is_whole


def test_lost_replies_double_nothing(server, folder, golden):
    with through(server, "lost-puts", rates={"lost": 0.3}, seed=1) as (url, proxy):
        proxy.only = ("PUT", "POST", "DELETE")
        spec = JobSpec.of({**folder, "root": f"{url}/job"})
        generation = run(spec)
        assert proxy.counts["lost"] > 20
        proxy.rates = {}
        root = located(spec.root)
        assert digests(generation) == digests(golden)
        assert generation["generation"] == 1 and root.names("generations") == ["1.json"]
        assert verify.run(root.path).is_whole
        assert not verify.run(root.path).unknown


def test_errors_are_of_both_kinds():
    assert issubclass(StoreError, OSError) and StoreError("x").exit_code == 1 and str(StoreError("x")) == "x"
    assert issubclass(RefusedError, OSError) and RefusedError("x").exit_code == 2
    with pytest.raises(StoreError, match="s3://b/x: LanceError"), bucket.reaching(located("s3://b/x")):
        raise OSError("LanceError(IO): Generic S3 error")
    with pytest.raises(OSError, match="ours"), bucket.reaching(located("s3://b/x")):
        raise OSError("ours")
