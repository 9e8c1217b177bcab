"""What comes out: no secret in any output or file, nothing raw on a terminal, no traceback for a reader that left."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import lance
import polars as pl
import pytest
from hypothesis import given, strategies as st
from rich.console import Console
from rich.text import Text

from pipeline import cli
from pipeline.sentences import secret
from pipeline.terminal import configure_logging, json_text, plain, print_hits, shown

CANARY = "c4n4ry7f3e9b21d0"
URLS = [
    f"https://user:{CANARY}@host/x.parquet",
    f"https://{CANARY}@host/x.parquet",
    f"s3://KEY:{CANARY}@bucket/x.parquet",
    f"s3://KEY:{CANARY[:8]}/{CANARY}@bucket/x.parquet",
    f"https://host/x.parquet?sig={CANARY}",
    f"https://host/x.parquet?X-Amz-Date=1&X-Amz-Signature={CANARY}",
    f"s3://bucket/x.parquet?region=eu&secret_key={CANARY}",
]
CONTROLS = "\x00\x07\x1b[31m\x9b31m\x85\r\n\t\u202e\u2066\u200f\u2028\ud800"


@pytest.fixture
def matryoshka(monkeypatch, capfd):
    """Run the command; (exit code, stdout and stderr of this process, C++ included)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["matryoshka", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        logging.getLogger().handlers.clear()
        shown = capfd.readouterr()
        return ended.value.code, shown.out + shown.err

    return call


def holders(folder: Path, word: str) -> list[Path]:
    """Files below a folder that hold a word: in their bytes, or in the rows and metadata of a table."""
    found = [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
    for path in folder.rglob("*.parquet"):
        table = pl.read_parquet(path, glob=False)
        found += [path] if word in str(table.to_dicts()) + str(pl.read_parquet_metadata(path)) else []
    for path in (path for path in folder.rglob("*.lance") if path.is_dir()):
        data = lance.dataset(path)
        found += [path] if word in str(data.to_table().to_pylist()) + str(data.schema) else []
    return found


def test_secrets_of_the_environment_stay_there(matryoshka, job_file, tmp_path, monkeypatch, pages):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "MATRYOSHKA_MADE_UP"):
        monkeypatch.setenv(name, CANARY)
    job, outputs = job_file(corpus__filter=["lang"]), []
    asked = tmp_path / "asked.csv"
    asked.write_text("_id,text\n1,w001 w002\n")
    for call in (["validate", job], ["plan", job], ["run", job], ["status", job], ["search", job, "w001"],
                 ["search", job, "w001", "--where", "nope = 1"], ["evaluate", job, "--queries", asked],
                 ["run", job, "--set", "model.name=no/such"], ["search", tmp_path / "none", "w001"]):  # fmt: skip
        code, output = matryoshka(*call)
        outputs.append(output)
        assert (code, call[0]) in [(0, call[0]), (2, "search"), (2, "run")]
    root = Path(json.loads(job.read_text())["root"])
    assert (root / "report.html").is_file()
    assert CANARY not in "".join(outputs)
    assert holders(tmp_path, CANARY) == []
    assert holders(root, "doc-17")  # it would be found


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "field",
    [
        "corpus.source", "corpus.source.0", "root", "model.name", "workers.address", "evaluate.queries",
        "evaluate.qrels", "prefixes", "nope", "corpus.nope",
    ],
)  # fmt: skip
def test_a_url_with_a_secret_is_refused_and_not_shown(matryoshka, job_file, tmp_path, field, url):
    job = job_file()
    spec = json.loads(job.read_text())
    spec["corpus"]["source"] = [spec["corpus"]["source"]]
    job.write_text(json.dumps(spec))
    for command in (["validate", job], ["run", job], ["plan", job], ["status", job], ["search", job, "w001"]):
        code, output = matryoshka(*command, "--set", f"{field}={url}")
        assert code == 2
        assert CANARY not in output
        assert "Traceback" not in output
    target = spec
    *parents, last = [int(name) if name.isdigit() else name for name in field.split(".")]
    for name in parents:
        target = target[name]
    target[last] = url
    job.write_text(json.dumps(spec))
    code, output = matryoshka("validate", job)
    assert (code, CANARY in output) == (2, False)
    assert "keep credentials out of the spec" in output
    job.unlink()
    assert holders(tmp_path, CANARY) == []


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_a_secret_as_an_argument_is_not_shown(matryoshka, job_file, url):
    job = job_file()
    calls = [
        [url], ["run", url], ["validate", url], ["plan", url], ["status", url], ["search", url, "w001"],
        ["report", url], ["evaluate", job, "--queries", url], ["run", job, url],
        ["run", job, "--from", url], ["run", job, f"-k{url}"],
        *(["run", job, "--set", override] for override in (url, f"root.x={url}", f"corpus.source=[{url}")),
    ]  # fmt: skip
    for call in calls:
        code, output = matryoshka(*call)
        assert code in (2, 4)
        assert CANARY not in output
        assert "Traceback" not in output


def test_urls_without_a_secret_and_values_that_hold_themselves_pass():
    values = {"a": ["s3://bucket/x?region=eu-1", "s3://b/part-?.parquet", "what is https://a.b/?q=1 about", "a@b.c"]}
    values["itself"] = values
    assert secret(values) is None
    assert secret(values | {"b": {"https://u:p@h": 1}}) == "https://…@h"


@given(st.text(st.sampled_from("\\\\[[]]/b:a1#@ \x1b\u202e\n"), max_size=12))
def test_plain_text_shows_as_it_is_and_has_no_style(text):
    rendered = Text.from_markup(f"[cyan]{plain(text)} [/]{plain(text)}")
    assert rendered.plain == f"{shown(text)} {shown(text)}"
    assert [(span.start, span.end) for span in rendered.spans] == [(0, len(shown(text)) + 1)]


def test_hits_and_names_cannot_draw_on_the_terminal(capsys):
    hits = pl.DataFrame(
        {"rank": [1], "score": [0.5], "id": [CONTROLS[:-1] + "\\"], "text": [r"\[/] :bomb: \[link=x]y"]}
    )
    print_hits(hits)
    out = capsys.readouterr().out
    assert out.removesuffix("\n").isprintable()
    assert out.endswith(r"\u2028\  \[/] :bomb: \[link=x]y" + "\n")


def test_json_is_readable_exact_and_printable():
    value = {"id": CONTROLS, "text": "Zürich 日本 😀 \u00ad"}
    for indent in (None, 2):
        text = json_text(value, indent)
        assert text.replace("\n", "").isprintable()
        assert "Zürich 日本 😀" in text
        assert json.loads(text) == value


@pytest.mark.parametrize("console", [None, Console(stderr=True, width=400)])
def test_a_log_event_is_one_line_whatever_it_names(capsys, console):
    configure_logging(console)
    if console is not None:
        console.file = sys.stderr
    logging.getLogger("pipeline.test").info("shard name=%s", CONTROLS)
    logging.getLogger().handlers.clear()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].rstrip().isprintable()
    assert r"name=\x00\x07\x1b[31m\x9b31m" in lines[0]


@pytest.mark.parametrize("write", ["cli.out.print('x')", "sys.stdout.write('x\\n')"])
def test_a_reader_that_left_gets_no_traceback(write):
    code = f"""
import sys
from pipeline import cli
@cli.app.command("talk")
def talk():
    for _ in range(100_000):
        {write}
sys.argv = ["matryoshka", "talk"]
cli.main()
"""
    command = [sys.executable, "-c", code]
    talking = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert talking.stdout.readline() == b"x\n"
    talking.stdout.close()
    assert talking.stderr.read() == b""
    assert talking.wait(60) == 1
