"""The log of a worker below the root: without secrets, bounded, written now and then, gone on with by the next one."""

import logging
import sys

import pytest

from pipeline import logs
from pipeline.logs import WorkerLog
from pipeline.storage import Root

SECRET = "s3cr3t-0f-th1s-w0rk3r"


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def event(text, level=logging.INFO):
    return logging.LogRecord("pipeline.test", level, __file__, 1, text, None, None)


def kept(root):
    return (root.read("_state/logs/embed-1.log") or b"").decode()


def test_a_log_is_kept_when_asked_and_gone_on_with(root):
    first = WorkerLog(root, "embed-1")
    first.handle(event("shard 7 done"))
    assert kept(root) == ""
    first.save()  # not yet: the last time was when it began
    assert kept(root) == ""
    first.save(now=True)
    assert kept(root).endswith("INFO shard 7 done\n")
    logs.note(root, "embed-1", "died with shard 8 in hand")
    second = WorkerLog(root, "embed-1")
    second.handle(event("shard 8 done"))
    second.save(now=True)
    told = [line.partition(" INFO ")[2] or line.partition(" ERROR ")[2] for line in kept(root).splitlines()]
    assert told == ["shard 7 done", "died with shard 8 in hand", "shard 8 done"]


def test_it_is_written_once_in_a_while(root, monkeypatch):
    log = WorkerLog(root, "embed-1")
    monkeypatch.setattr(logs, "EVERY_SECONDS", 0)
    log.handle(event("one"))
    log.save()
    assert "one" in kept(root)
    written = []
    monkeypatch.setattr(Root, "write", lambda *given: written.append(given))
    log.save(now=True)
    assert not written  # nothing new


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DATABASE_PASSWORD", "PASSED_BY_NAME"])
def test_secrets_stay_out(root, monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MATRYOSHKA_PASSED", "OTHER,PASSED_BY_NAME")
    log = WorkerLog(root, "embed-1")
    try:
        raise ValueError(f"cannot sign with {SECRET}")
    except ValueError:
        record = event("reading https://host/x?sig=hidden failed")
        record.exc_info = sys.exc_info()
        log.handle(record)
    log.save(now=True)
    logs.note(root, "embed-1", f"died with {SECRET}")
    text = kept(root)
    assert "ValueError: cannot sign with …" in text
    assert "https://host/x?sig=… failed" in text
    assert SECRET not in text
    assert "hidden" not in text


def test_the_oldest_lines_go_first(root):
    log = WorkerLog(root, "embed-1")
    for number in range(6_000):
        log.handle(event(f"{number:06d} " + "x" * 60))
    log.save(now=True)
    lines = kept(root).splitlines()
    assert logs.MAX_BYTES - 200 < len(kept(root)) <= logs.MAX_BYTES
    assert "005999" in lines[-1]
    assert all(line.endswith("x" * 60) and "INFO 00" in line for line in lines)


def test_a_log_that_cannot_be_written_costs_nothing(root):
    (root.path / "_state").mkdir(parents=True)
    (root.path / "_state/logs").write_text("in the way")
    log = WorkerLog(root, "embed-1")
    log.handle(event("one"))
    log.save(now=True)
    logs.note(root, "embed-1", "died")
