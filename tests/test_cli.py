"""The command line, in this process: what goes to stdout, and that it is true."""

import json
import logging
import sys
from pathlib import Path
from typing import get_args

import polars as pl
import pytest

from pipeline import cli, run, stopping, terminal
from pipeline.run import Stage
from pipeline.workers import Progress


@pytest.fixture
def matryoshka(monkeypatch, capsys):
    """Run the command; (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["matryoshka", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        logging.getLogger().handlers.clear()  # they hold this call's stderr
        return ended.value.code, shown.out, shown.err

    return call


def test_a_run_tells_what_was_written_found_and_what_is_next(matryoshka, job_file, pages):
    job = job_file(search={"examples": ["w001 w002"]})
    code, out, err = matryoshka("run", job)
    assert code == 0
    assert "120 rows in, 0 quarantined" in out
    assert "lancedb/prefix_16_int8.lance" in out
    assert "recall_exact @10" in out
    assert "plain prefixes: unsure, 120 rows are too few to tell" in out
    assert "transform: pca; 60 rows are too few to train an adaptor" in out
    assert f"The page of this run: {spec_root(job)}/report.html" in out
    assert "w001 w002\n   1  0." in out
    assert f"search {job}" in out
    assert "embed shard=0000000 rows=120 " in err
    assert all(f"{stage} done seconds=" in err for stage in get_args(Stage))


def spec_root(job):
    return json.loads(job.read_text())["root"]


def test_a_report_is_made_by_a_run_and_again_when_asked(matryoshka, job_file, pages):
    job = job_file()
    assert matryoshka("run", job)[0] == 0
    page = Path(spec_root(job)) / "report.html"
    before = page.read_bytes()
    page.write_text("old")
    assert matryoshka("run", job)[0] == 0
    assert page.read_text() == "old"  # this generation has its page already
    code, out, _ = matryoshka("report", spec_root(job), "--json")
    assert (code, json.loads(out)) == (0, {"report": str(page)})
    assert page.read_bytes() == before


def test_a_plan_spends_nothing(matryoshka, job_file):
    job = job_file()
    code, out, _ = matryoshka("plan", job, "--price", "2", "--json")
    assert code == 0
    figures = {figure["name"]: figure for figure in json.loads(out)["figures"]}
    assert figures["rows"]["value"] == 120
    assert figures["bytes.prefix_16_int8"]["origin"] == "estimated"
    assert figures["cost"]["unit"] == "money"
    assert not Path(spec_root(job)).exists()
    code, out, _ = matryoshka("plan", job)
    assert code == 0
    assert "advice:" in out
    code, _, err = matryoshka("plan", job, "--price", "-1")
    assert (code, "price: -1.0 per machine-hour" in err) == (2, True)


def test_a_query_log_grows_by_dated_rows(matryoshka, job_file, tmp_path):
    job = job_file()
    asked = tmp_path / "asked.csv"
    asked.write_text("_id,text\n1,w001 w002\n2,w003\n")
    code, _, err = matryoshka("evaluate", job, "--queries", asked)
    assert (code, "holds no finished generation" in err) == (4, True)
    assert matryoshka("run", job)[0] == 0
    before = (Path(spec_root(job)) / "manifest.json").read_bytes()
    code, out, _ = matryoshka("evaluate", job, "--queries", asked, "--json")
    first = json.loads(out)
    assert (code, first["queries"], first["generation"], first["cascade"]) == (0, 2, 1, "prefix_8_binary 200")
    assert first["recall_exact_low"] <= first["recall_exact"] <= first["recall_exact_high"] <= 1
    code, out, _ = matryoshka("evaluate", job, "--queries", asked)
    assert len(out.splitlines()) == 3  # a heading and two rows
    log = pl.read_parquet(Path(spec_root(job)) / "query_log.parquet")
    assert log["measured_at"].is_sorted()
    assert len(log) == 2
    assert (Path(spec_root(job)) / "manifest.json").read_bytes() == before
    code, _, err = matryoshka("evaluate", job, "--queries", tmp_path / "none.csv")
    assert (code, "--queries: there is no file" in err) == (2, True)


def test_json_results_are_json(matryoshka, job_file):
    job = job_file(corpus__filter=["lang"])
    code, out, _ = matryoshka("run", job, "--json")
    assert (code, json.loads(out)["generation"]) == (0, 1)
    code, out, _ = matryoshka("search", job, "w001 w002", "-k", "3", "--where", "lang = 'en'", "--json")
    hits = [json.loads(line) for line in out.splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert {hit["lang"] for hit in hits} == {"en"}
    code, out, _ = matryoshka("search", job, "w001", "--explain", "--json")
    assert [json.loads(line)["table"] for line in out.splitlines()] == ["prefix_8_binary", "documents"]
    code, out, _ = matryoshka("status", job, "--json")
    assert json.loads(out)["shards"] == {"done": 1, "left": 0}
    code, out, _ = matryoshka("evaluate", job, "--json")
    assert json.loads(out.splitlines()[-1])["choice"] == "exact"
    code, out, _ = matryoshka("schema")
    assert json.loads(out)["title"] == "JobSpec"


def test_a_finished_root_is_enough_to_search(matryoshka, spec, job_file):
    run(spec())
    by_root = matryoshka("search", spec().root, "w001 w002", "--json")
    assert by_root[:2] == matryoshka("search", job_file(), "w001 w002", "--json")[:2]
    assert by_root[0] == 0
    code, out, _ = matryoshka("search", spec().root, "w001 w002", "--exact")
    assert code == 0
    assert len(out.splitlines()) == 10


def test_search_takes_the_cascade_of_the_spec_it_is_given(matryoshka, job_file):
    assert matryoshka("run", job_file())[0] == 0
    cascade = "search.cascade=[{table: prefix_16_int8, shortlist: 50}]"
    _, out, _ = matryoshka("search", job_file(), "w001", "--explain", "--json", "--set", cascade)
    assert [json.loads(line)["table"] for line in out.splitlines()] == ["prefix_16_int8", "documents"]


def test_a_run_can_stop_and_go_on(matryoshka, job_file):
    job = job_file()
    code, out, _ = matryoshka("run", job, "--until", "embed")
    assert code == 0
    assert out.startswith("Stopped after embed, as asked. To go on: ")
    assert out.endswith(f"matryoshka run {job}\n")
    code, out, _ = matryoshka("status", job)
    assert "embed        done" in out
    assert "generation   None" in out
    code, _, err = matryoshka("run", job, "--from", "index")
    assert code == 4
    assert "stage derive is not finished; run without --from index" in err
    assert matryoshka("run", job, "--from", "fit")[0] == 0
    assert "Nothing left" in matryoshka("run", job, "--from", "index", "--set", "workers.count=0")[1]
    assert matryoshka("run", job_file(root="elsewhere"), "--from", "fit")[0] == 4


def test_status_needs_the_root_alone_and_leaves_it_as_it_is(matryoshka, spec, job_file, tmp_path, corpus_file):
    run(spec())
    moved = (tmp_path / "root").rename(tmp_path / "on another machine")
    corpus_file.unlink()
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*")}
    job = job_file(root=str(moved), model={"name": "/no/such/model"}, workers={"count": 1, "address": "10.0.0.1:6379"})
    by_spec, by_root = matryoshka("status", job, "--json"), matryoshka("status", moved, "--json")
    assert by_spec == by_root
    facts = json.loads(by_root[1])
    assert (by_root[0], facts["shards"], facts["generation"]) == (0, {"done": 1, "left": 0}, 1)
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("*")} == before


def test_validate_starts_nothing_and_writes_nothing(matryoshka, job_file, tmp_path):
    code, out, _ = matryoshka("validate", job_file())
    assert code == 0
    assert "1 corpus file(s), 120 rows" in out
    assert not (tmp_path / "root").exists()


def test_validate_warns_of_int8_first_on_a_large_corpus(matryoshka, job_file, monkeypatch):
    monkeypatch.setattr(cli, "WARN_SCAN_ROWS", 100)
    job = job_file(search={"cascade": [{"table": "prefix_16_int8", "shortlist": 200}]})
    code, _, err = matryoshka("validate", job)
    assert code == 0
    assert "LanceDB cannot index int8" in err
    assert "warning" not in matryoshka("validate", job_file())[2]


@pytest.mark.parametrize("chained", ["cause", "context"])
def test_a_signal_that_ray_wrapped_is_still_a_signal(matryoshka, job_file, monkeypatch, chained):
    def wait(*arguments):
        error = SystemError("CoreWorker.wait returned a result with an exception set")
        setattr(error, f"__{chained}__", stopping.Stopped(15))
        raise error

    monkeypatch.setattr(cli, "run_job", wait)
    code, _, err = matryoshka("run", job_file())
    assert code == 143
    assert err.startswith("error: interrupted; run the same command")


def test_set_reaches_the_spec(matryoshka, job_file, tmp_path):
    assert matryoshka("run", job_file(), "--set", f"root={tmp_path}/set", "--until", "corpus")[0] == 0
    assert (tmp_path / "set" / "_state").is_dir()


def test_text_from_outside_cannot_draw_on_the_terminal(matryoshka, spec, corpus_file):
    from tests.conftest import corpus_frame

    frame = corpus_frame()
    frame[0, "text"] = "w001 \x1b[31m[bold]red[/]\nnext"
    frame[0, "_id"] = "a\x07b"
    frame.write_parquet(corpus_file)
    run(spec(corpus__text="text"))
    _, out, _ = matryoshka("search", spec().root, "w001", "--exact")
    assert "\x1b" not in out
    assert "a\\x07b  w001 \\x1b[31m[bold]red[/] next" in out


def test_plain_progress_lines_have_rate_and_time_left(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    watch = terminal.Watch(None)
    watch("embed", 100, Progress())
    now[0] = 20.0
    watch("embed", 100, Progress(rows=40, tokens=800))
    assert caplog.messages == ["embed 40 of 100 rows  2 rows/s  40 tokens/s  30 s left"]


def test_verify_says_what_was_checked_and_names_what_is_damaged(matryoshka, job_file, spec):
    root = Path(run(spec())["spec"]["root"])
    for target in (job_file(), root):
        code, out, _ = matryoshka("verify", target)
        assert code == 0
        assert "generation 1 is whole" in out
        assert "120 rows, 360 codes computed again" in out
    (root / "note.txt").write_text("mine")
    (root / "quarantine.parquet").write_bytes(b"PAR1")
    code, out, err = matryoshka("verify", root)
    assert code == 7
    assert "problem: quarantine.parquet is not what was written: its sha256 differs" in out
    assert "unknown: no record names note.txt" in out
    assert "1 damaged file(s), the first is quarantine.parquet; run the job again" in err
    code, out, _ = matryoshka("verify", root, "--json")
    told = json.loads(out)
    assert (code, told["whole"], told["damaged"], told["unknown"]) == (7, False, ["quarantine.parquet"], ["note.txt"])


def test_verify_of_a_folder_without_a_generation_is_refused(matryoshka, tmp_path):
    code, _, err = matryoshka("verify", tmp_path)
    assert code == 4
    assert "holds no finished generation" in err


def test_hybrid_hits_are_printed_like_others(matryoshka, job_file):
    job = job_file(index={"text": True})
    assert matryoshka("run", job)[0] == 0
    code, out, _ = matryoshka("search", job, "w001 w002", "-k", 3, "--hybrid")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2", "3"]
    hits = [json.loads(line) for line in matryoshka("search", job, "w001", "--hybrid", "--json")[1].splitlines()]
    assert [hit["fused"] for hit in hits] == sorted((hit["fused"] for hit in hits), reverse=True)
    assert "fts" in matryoshka("search", job, "w001", "--hybrid", "--explain")[1]
    assert "fused" not in matryoshka("search", job, "w001", "--json")[1]
    on = ("--set", "search.hybrid=true")
    assert "fused" in matryoshka("search", job, "w001", "--json", *on)[1]
    assert "fused" not in matryoshka("search", job, "w001", "--json", "--no-hybrid", *on)[1]
    assert "fused" not in matryoshka("search", job, "w001", "--json", "--exact", *on)[1]


def test_exact_and_hybrid_exclude_each_other(matryoshka, job_file):
    code, _, err = matryoshka("search", job_file(), "w001", "--exact", "--hybrid")
    assert code == 2
    assert "exclude each other" in err
