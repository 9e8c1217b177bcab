"""Killed, interrupted, repeated, contested: the same tables come out, and nothing is done twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
import polars as pl
import pytest

from pipeline import run, store
from pipeline.embedder import LOOKAHEAD
from pipeline.errors import DataError, LockedError, PipelineError, StaleError
from pipeline.lock import lock
from pipeline.storage import Root
from tests.conftest import corpus_frame

SHARD_ROWS = 16
ROWS = 1_600


@pytest.fixture
def big(tmp_path, job_file):
    """A spec file of 100 small shards for real processes, and its root; most of a run's time is embedding."""
    path, queries = tmp_path / "big.parquet", tmp_path / "queries.parquet"
    corpus_frame(ROWS).write_parquet(path)
    corpus_frame(3, seed=1).select("_id", "text").write_parquet(queries)
    settings = {"corpus__source": str(path), "corpus__shard_rows": SHARD_ROWS, "evaluate__queries": str(queries)}
    job = job_file(**settings, transform={"kind": "pca"}, workers={"count": 1})
    return job, tmp_path / "root"


def start(job, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job), "--until", "evaluate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(root):
    return {path.stem for path in (root / "_state" / "embed").glob("[0-9]*.json")}


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def documents(root):
    return pl.from_arrow(lance.dataset(str(Path(root) / "lancedb" / "documents.lance")).to_table())


def written_files(root):
    return set((Path(root) / "lancedb" / "documents.lance" / "data").glob("*.lance"))


def descendants(process):
    """Ids of all processes below one, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, grown = {process}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found - {process}


def holds_an_actor(title):
    """Whether a process of that title is a worker of Ray with an actor: it bears what it does."""
    return title.startswith(b"ray::") and not title.startswith(
        (b"ray::IDLE", b"ray::DashboardAgent", b"ray::RuntimeEnv")
    )


def actors(process):
    """The job's own Ray workers that hold an actor."""
    found = []
    for child in descendants(process):
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if holds_an_actor(title):
            found.append(child)
    return found


def undisturbed(job, root):
    """The same job in this process, elsewhere."""
    from pipeline import JobSpec

    golden = root.parent / "golden"
    run(JobSpec.load(job, [f"root={golden}", "workers.count=0"]))
    return golden


def assert_same(root, golden):
    assert documents(root).equals(documents(golden))
    digests = [json.loads((Path(one) / "manifest.json").read_text())["tables"] for one in (root, golden)]
    assert digests[0].keys() == digests[1].keys()
    assert all(digests[0][name]["digest"] == digests[1][name]["digest"] for name in digests[0])


def test_a_killed_worker_is_replaced_and_a_killed_driver_resumes_at_the_next_shard(big):
    job, root = big
    process = start(job)
    wait_for(lambda: len(records(root)) >= 20 and actors(process.pid))
    os.kill(actors(process.pid)[0], signal.SIGKILL)
    at_kill = len(records(root))
    wait_for(lambda: len(records(root)) >= at_kill + 20)
    process.send_signal(signal.SIGKILL)
    _, first = process.communicate(timeout=60)
    before = records(root)
    assert "worker died" in first
    assert 40 <= len(before) < ROWS // SHARD_ROWS
    assert not (root / "manifest.json").exists()
    assert 0 <= len(before) - first.count("embed shard=") <= LOOKAHEAD  # each once, the last ones perhaps not told
    code, _, second = finish(start(job))
    assert code == 0, second
    left = ROWS // SHARD_ROWS - len(before)
    assert (
        left - LOOKAHEAD <= second.count("embed shard=") <= left
    )  # a worker outlives its driver by what it has in hand
    assert len(records(root)) == ROWS // SHARD_ROWS
    assert_same(root, undisturbed(job, root))
    assert len(written_files(root)) == 1  # all shards in one fragment, and nothing is left of them


def test_a_signal_ends_the_run_with_its_code_and_a_way_on(big):
    job, root = big
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    roots = {number: root.with_name(number.name) for number in codes}
    processes = {number: start(job, "--set", f"root={roots[number]}") for number in codes}
    for number, process in processes.items():
        wait_for(lambda number=number: len(records(roots[number])) >= 5)
        asked = time.monotonic()
        process.send_signal(number)
        returned, _, err = finish(process)
        assert returned == codes[number], (number, err)
        assert time.monotonic() - asked < 10, number
        assert err.splitlines()[-1].startswith("error: interrupted; run the same command"), (number, err)
        assert "Traceback" not in err, number


def test_a_rerun_does_nothing_and_says_so(spec, job_file, capsys, monkeypatch):
    from pipeline import cli

    first = run(spec())
    files = [path for path in Path(first["spec"]["root"]).rglob("*") if path.is_file() and "_state" not in path.parts]
    times = [path.stat().st_mtime_ns for path in files]
    monkeypatch.setattr(sys, "argv", ["matryoshka", "run", str(job_file())])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Nothing left to do: generation 1" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in files] == times


def test_another_prefix_embeds_nothing_and_touches_no_other_table(spec, values):
    first = run(spec())
    embedded = records(Path(first["spec"]["root"]))
    second = run(spec(prefixes=[*values()["prefixes"], {"dim": 8, "precision": "float32"}]))
    assert second["generation"] == 2
    assert records(Path(second["spec"]["root"])) == embedded
    assert set(second["tables"]) - set(first["tables"]) == {"prefix_8_float32"}
    assert all(second["tables"][name] == first["tables"][name] for name in first["tables"])


def test_another_transform_is_a_new_generation_and_the_old_one_stays(spec):
    from pipeline.search import Index

    first = run(spec())
    plain = run(spec(transform={"kind": "none"}))
    again = run(spec())
    assert [one["transform"]["kind"] for one in (first, plain, again)] == ["pca", "none", "pca"]
    digests = [one["tables"]["prefix_16_float16"]["digest"] for one in (first, plain, again)]
    assert digests[0] == digests[2] != digests[1]
    for generation in (first, plain, again):
        index = Index(Root(Path(generation["spec"]["root"])), generation)
        assert index.search("w001 w002", k=120, cascade=[("prefix_16_float16", 120)])["rank"].to_list()[-1] == 120


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_documents_changed_by_someone_else_are_published_again(spec, change):
    first = run(spec())
    path = str(Path(first["spec"]["root"]) / "lancedb" / "documents.lance")
    if change == "delete":
        lance.dataset(path).delete("row < 5")
    else:
        lance.write_dataset(lance.dataset(path).to_table().slice(0, 7), path, mode="overwrite")
    again = run(spec())
    assert again["tables"]["documents"]["digest"] == first["tables"]["documents"]["digest"]
    assert documents(first["spec"]["root"])["row"].to_list() == list(range(120))


@pytest.mark.parametrize("name", ["quarantine.parquet", "evaluation.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1")])
def test_a_lost_or_damaged_file_is_made_again(spec, name, damage):
    first = run(spec())
    path = Path(first["spec"]["root"]) / name
    before = path.read_bytes()
    damage(path)
    again = run(spec())
    assert again["tables"] == first["tables"]
    assert len(path.read_bytes()) > 1_000
    if name != "evaluation.parquet":  # that one holds milliseconds
        assert path.read_bytes() == before


def test_a_lost_prefix_table_is_derived_again(spec):
    first = run(spec())
    shutil.rmtree(Path(first["spec"]["root"]) / "lancedb" / "prefix_16_int8.lance")
    again = run(spec())
    digests = [one["tables"]["prefix_16_int8"]["digest"] for one in (first, again)]
    assert digests[0] == digests[1]
    assert again["tables"]["documents"] == first["tables"]["documents"]


def test_a_lost_data_file_costs_its_shard_only(spec, monkeypatch):
    monkeypatch.setattr(store, "FRAGMENT_ROWS", 50)
    first = run(spec(corpus__shard_rows=50))
    root = Path(first["spec"]["root"])
    lost = sorted(written_files(root))[0]
    before = written_files(root)
    lost.unlink()
    again = run(spec(corpus__shard_rows=50))
    assert len(written_files(root) - before) == 1
    assert [one["tables"]["documents"]["digest"] for one in (first, again)] == [
        again["tables"]["documents"]["digest"]
    ] * 2


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("corpus.text", {"corpus__text": ["text"]}),
        ("corpus.keep", {"corpus__keep": ["lang"]}),
        ("corpus.shard_rows", {"corpus__shard_rows": 7}),
        ("corpus.keep_text", {"corpus__keep_text": False}),
        ("embed.vectors", {"embed__vectors": "float32"}),
        ("model.prompts.document", {"model__prompts": {"document": "passage: "}}),
        ("model.batch_tokens", {"model__batch_tokens": 77}),
        ("corpus.id", {"corpus__id": None}),
    ],
)
def test_other_settings_are_refused_by_name(spec, field, overrides):
    run(spec())
    with pytest.raises(StaleError, match=f"another {field}"):
        run(spec(**overrides))


@pytest.mark.parametrize("field", ["document", "query"])
def test_going_back_to_the_models_own_prompt_is_a_change(spec, field):
    run(spec(model__prompts={field: "w001 "}))
    with pytest.raises(StaleError, match=f"another model.prompts.{field}: 'w001 ' then, None now"):
        run(spec())
    run(spec(model__prompts={field: "w001 "}))


def test_auto_takes_what_was_resolved_and_another_value_is_refused(spec):
    run(spec(model__precision="float32"))
    run(spec())
    with pytest.raises(StaleError, match="another model.precision: 'float32' then, 'bfloat16' now"):
        run(spec(model__precision="bfloat16"))


def test_another_model_is_refused(spec, other_model):
    run(spec())
    with pytest.raises(StaleError, match=r"another model\.digest"):
        run(spec(model={"name": str(other_model)}))


def test_a_changed_corpus_is_refused(spec, corpus_file):
    run(spec())
    corpus_frame(121).write_parquet(corpus_file)
    told = r"corpus\.rows: 120 then, 121 now \(also corpus\.digest\): 1 changed: .*corpus.parquet \(120 -> 121 rows\);"
    with pytest.raises(StaleError, match=told):
        run(spec())


@pytest.mark.parametrize(
    "overrides",
    [
        {"corpus__max_quarantined": 0.5},
        {"evaluate": {"k": 3}},
        {"search": {"cascade": [{"table": "prefix_16_int8", "shortlist": 20}]}},
        {"name": "other"},
    ],
)
def test_settings_that_change_no_vector_are_accepted(spec, overrides):
    first = run(spec())
    second = run(spec(**overrides))
    assert second["tables"] == first["tables"]


def test_a_second_job_on_a_root_is_refused(spec, job_file, tmp_path):
    run(spec())
    with lock(Root(tmp_path / "root")):
        code, _, err = finish(start(job_file()))
    assert code == 5
    assert f"held by another job (process {os.getpid()} " in err.replace("\n", " ")
    with lock(Root(tmp_path / "root")), pytest.raises(LockedError), lock(Root(tmp_path / "root")):
        pass


def test_a_job_that_cannot_fit_is_refused_before_a_model_is_loaded(spec, monkeypatch):
    from pipeline import storage

    monkeypatch.setattr(storage.Disk, "free", lambda disk, folder: 120 * 2 * 32)
    with pytest.raises(
        PipelineError, match="0.000 GB left, the job needs at least 0.000 GB for the vectors of 120 rows"
    ):
        run(spec())
    assert not records(Path(spec().root))
    monkeypatch.setattr(storage.Disk, "free", lambda disk, folder: 120 * (2 * 32 + 1 + 16 + 32))
    first = run(spec())
    monkeypatch.setattr(storage.Disk, "free", lambda disk, folder: 0)
    assert run(spec())["generation"] == first["generation"]


def test_shards_that_are_to_be_merged_need_room_for_a_second_copy(spec, monkeypatch):
    from pipeline import storage

    monkeypatch.setattr(store, "FRAGMENT_ROWS", 100)
    job = spec(corpus__shard_rows=50)
    needed = 120 * (2 * 32 + 1 + 16 + 32) + 100 * 2 * 32
    monkeypatch.setattr(storage.Disk, "free", lambda disk, folder: needed - 1)
    with pytest.raises(PipelineError, match="0.000 GB of it while fragments are merged"):
        run(job)
    monkeypatch.setattr(storage.Disk, "free", lambda disk, folder: needed)
    run(job)


def test_a_file_that_changes_under_the_job_is_refused_though_size_and_time_are_the_same(spec, tmp_path):
    file = tmp_path / "c.jsonl"
    corpus_frame().write_ndjson(file)
    stat = file.stat()
    run(spec(corpus__source=str(file)), last="corpus")
    file.write_bytes(file.read_bytes().replace(b"w00", b"w01", 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="c.jsonl changed while it was embedded"):
        run(spec(corpus__source=str(file)))
    assert not list((Path(spec().root) / "generations").iterdir())


def test_status_counts_a_damaged_record_as_work_that_is_left(spec, job_file, capsys, monkeypatch):
    from pipeline import cli

    root = Path(run(spec(corpus__shard_rows=50))["spec"]["root"])
    (root / "_state" / "embed" / "0000001.json").write_bytes(b"{}")
    monkeypatch.setattr(sys, "argv", ["matryoshka", "status", str(root), "--json"])

    def told():
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    assert told()["shards"] == {"done": 3, "left": 0}  # sealed: the record is not needed any more
    (seal,) = (root / "_state" / "embed").glob("sealed-*")
    seal.unlink()
    assert told()["shards"] == {"done": 2, "left": 1} and told()["embed"] == "unfinished"
