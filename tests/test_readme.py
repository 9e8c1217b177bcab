"""Every command and program in the README does what it says."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from pipeline import docstrings, run
from pipeline.spec import JobSpec
from tests.conftest import save_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
TRAIN = [command for command in COMMANDS if command == "make train" or "demo-static" in command]
OURS = [command for command in COMMANDS if command == "make embed" or command.startswith(".venv/bin/matryoshka")]
DEMO = [command for command in OURS if command not in TRAIN]
NEEDED = ("statistics", "smtplib", "posixpath", "datetime", "subprocess", "csv")
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What the commands need of the checkout, with this environment as its .venv.

    Of the demo's corpus a third, of the shortlists to measure the least.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "jobs", "schemas"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    rows = docstrings.stdlib()
    some = [row for number, row in enumerate(rows) if number % 3 == 0 or row["module"] in NEEDED]
    pl.DataFrame(some).write_parquet(folder / "docstrings.parquet")
    demo, source = folder / "jobs" / "demo.yaml", "source: docstrings:stdlib\n"
    assert source in demo.read_text()
    for path in (demo, folder / "jobs" / "demo-static.yaml"):
        path.write_text(
            path.read_text().replace(source, "source: docstrings.parquet\n") + "evaluate: {shortlists: []}\n"
        )
    return folder


def call(command, folder):
    """Run a README command; make takes the environment as it is."""
    if command.startswith("make "):
        command = command.replace("make ", "make -o .venv/.ready ", 1)
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=280)


def ran(commands, folder):
    """What each command says, one after the other; none of them fails."""
    shown = {}
    for command in commands:
        done = call(f"{command} --json" if " plan " in command else command, folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        shown[command] = done.stdout
    return shown


@pytest.mark.timeout(900)  # fourteen commands, some of which embed
def test_the_demo_and_the_commands_after_it(checkout):
    assert len(DEMO) == 14
    shown = ran(["make embed"], checkout)
    # Those that write, and `verify`, in their order; those that only read beside them.
    writes = [one for one in DEMO if one.split()[1] in ("verify", "evaluate", "report", "run")]
    assert len(writes) == 5
    with ThreadPoolExecutor(2) as pool:
        reads = [one for one in DEMO if one not in ("make embed", *writes)]
        for both in [pool.submit(ran, commands, checkout) for commands in (writes, reads)]:
            shown |= both.result()
    demo = shown["make embed"]
    assert "statistics.median" in demo
    assert "smtplib" in demo
    assert "posixpath.split" in demo
    assert "rows in, 0 quarantined" in demo
    assert all(f"prefix_{name}.lance" in demo for name in ("64_binary", "128_int8", "256_float16"))
    assert '"module": "datetime"' in shown[next(one for one in DEMO if "--where" in one)]
    plan = json.loads(shown[next(one for one in DEMO if " plan " in one)])
    planned = {one["name"]: one["value"] for one in plan["figures"]}
    tables = json.loads((checkout / "output" / "demo" / "manifest.json").read_text())["tables"]
    assert planned["rows"] == tables["documents"]["rows"]
    for name in ("documents", "parameters", "prefix_64_binary", "prefix_128_int8", "prefix_256_float16"):
        assert planned[f"bytes.{name}"] == pytest.approx(tables[name]["bytes"], rel=0.25), name
    assert "prefix_32_int8" in shown[next(one for one in DEMO if "prefixes.3=" in one)]


@pytest.mark.timeout(600)  # a real training, a real run
def test_a_model_is_trained_and_searched_with(checkout):
    assert len(TRAIN) == 3
    trained, ran_with, found = ran(TRAIN, checkout).values()
    assert "plain prefixes: trained" in trained
    assert "transform: none" in ran_with
    assert ".split " in found
    again = call("make train", checkout)
    assert (again.returncode, "Nothing left to do" in again.stdout) == (0, True)


def test_the_other_targets(checkout):
    assert set(COMMANDS) - set(DEMO) - set(TRAIN) == {"make test", "make lint", "make schemas", "make clean"}
    before = (checkout / "schemas" / "job.schema.json").read_text()
    assert call("make schemas", checkout).returncode == 0
    assert (checkout / "schemas" / "job.schema.json").read_text() == before
    for target, said in {"test": "-m pytest", "lint": "ruff check .", "clean": "rm -rf .venv"}.items():
        done = call(f"make -n {target}", checkout)  # these would run this test again, or remove the environment
        assert (done.returncode, said in done.stdout) == (0, True)


@pytest.fixture
def demo_like(tmp_path, corpus_file):
    """A root with the demo's tables, from the stand-in model at 256 dimensions."""
    job = {
        "name": "demo",
        "root": "output/demo",
        "corpus": {"source": str(corpus_file), "id": "_id", "text": "text", "filter": ["lang"]},
        "model": {"name": str(save_model(tmp_path / "model-256", dim=256))},
        "prefixes": [{"dim": 64, "precision": "binary"}, {"dim": 256, "precision": "float16"}],
        "workers": {"count": 0},
    }
    run(JobSpec.of(job))


def test_plain_lancedb_and_numpy_are_enough(demo_like):
    without_us = "import sys\nsys.modules['pipeline'] = None\n" + PROGRAMS[1]
    done = subprocess.run([sys.executable, "-I", "-c", without_us], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"'row': (\d+), '_distance': ([-\d.e]+)", done.stdout)
    assert len(found) == 10
    assert found[0][0] == found[5][0] == "0"  # the first document is nearest to itself
    assert abs(float(found[0][1])) < 1e-2
    assert float(found[5][1]) == 0


def test_the_python_example(demo_like):
    program = PROGRAMS[0].replace('run(JobSpec.load("jobs/demo.yaml"))\n', "")
    ours = {"module = 'csv'": "lang = 'de'", "read a csv file": "w001", '"one", "two"': '"w002", "w003"'}
    ours["statistics.median"] = "doc-1"
    for shown, meant in ours.items():
        assert shown in program
        program = program.replace(shown, meant)
    exec(compile(program, "README.md", "exec"), {})
