"""What is told of a run: tables of what results.json holds."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import report

PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers", "openvino", "nncf", "nanotoken",
            "model2vec", "numpy", "pyarrow", "pylance", "ray")  # fmt: skip
Results = Mapping[str, Any]
Row = Mapping[str, Any]


def text(told: Results) -> str:
    """Everything measured, a table for each part."""
    at = told["machine"]
    lines = [
        f"{told['model']}, {at['cpu']} ({at['cores']} cores), {at['date']}, commit {at['commit']}",
        ", ".join(f"{name} {version}" for name, version in at["packages"].items() if version),
        *(f"{name}: " + ", ".join(f"{one} {version}" for one, version in versions.items())
          for name, versions in told["versions"].items() if name),
    ]  # fmt: skip
    if told["sets"]:
        lines += ["", *_sets(told["sets"])]
    for title, part, shown in (
        ("sweep of sentence-transformers (small samples)", "sweep", _sweep),
        ("file to table beside sentence-transformers; seconds without start-up", "speed", _speed),
        ("static model; seconds without start-up", "static", _speed),
        ("cosine to sentence-transformers' encode: mean (least)", "fidelity", _fidelity),
        ("nDCG@10 on squad-dev, questions in float32", "quality", _quality),
        ("memory of a worker, static model", "memory", _memory),
    ):
        if told.get(part):
            lines += ["", title, "", shown(told[part])]
    if told.get("ratios"):
        lines += ["", "ours, times as fast as", "", _ratios(told["ratios"])]
    lines += ["", *(f"left out: {name}: {why}" for name, why in told["left_out"].items())]
    return "\n".join(lines).rstrip()


def _sets(sets: Mapping[str, Row]) -> list[str]:
    head = ("set", "", "documents", "tokens", "mean", "longest")
    rows = [[name, "", f"{one['documents']:,}", f"{one['tokens']:,}", f"{one['mean_tokens']:.0f}", f"{one['longest']}"]
            for name, one in sets.items()]  # fmt: skip
    return [report.table(rows, head)]


def _sweep(rows: Sequence[Row]) -> str:
    head = ("set", "variant", "batch", "documents", "docs/s", "cosine")
    return report.table(
        [[row["set"], "/".join(row["variant"]), str(row["batch"]), f"{row['documents']:,}",
          f"{row['documents_per_second']:,.1f}", _cosine(row["cosine"])] for row in rows], head,
    )  # fmt: skip


def _speed(rows: Sequence[Row]) -> str:
    head = ("set", "contender", "docs/s", "tokens/s", "x default", "x with start-up", "cosine", "least", "rounds s",
            "MFU", "forward MFU", "start-up s", "padding", "waiting", "setting")  # fmt: skip
    return report.table([_speed_cells(row) for row in rows], head)


def _speed_cells(row: Row) -> list[str]:
    told = row["details"]
    padding = told["padded_tokens"] / told["tokens"] - 1 if told.get("padded_tokens") and told.get("tokens") else None
    waiting = told.get("waiting_seconds")
    return [
        row["set"],
        row["contender"],
        f"{row['documents_per_second']:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        _times(row["times_default"]),
        _times(row.get("times_default_with_startup")),
        _cosine(row.get("cosine")),
        _cosine(row.get("least_cosine")),
        f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f}",
        _share(row.get("mfu")),
        _share(row.get("forward_mfu")),
        f"{told['startup_seconds']:.1f}" if "startup_seconds" in told else "",
        _share(padding),
        _share(None if waiting is None else waiting / row["median_seconds"]),
        " ".join(str(row["setting"][name]) for name in ("backend", "precision", "batch", "batch_tokens", "tokenizer")
                 if row["setting"].get(name) is not None),
    ]  # fmt: skip


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _ratios(rows: Sequence[Row]) -> str:
    return report.table([[row["set"], f"{row['ours']} / {row['other']}", f"{row['times']:.3f}"] for row in rows],
                        ("set", "", "times"))  # fmt: skip


def _fidelity(rows: Sequence[Row]) -> str:
    """A line for each set and prompt, a column for each backend: mean cosine, and the least."""
    backends = list(dict.fromkeys((row["backend"], row["precision"]) for row in rows))
    cells = {(row["set"], row["prompt"], row["backend"], row["precision"]): row for row in rows}
    lines = []
    for name, prompt in dict.fromkeys((row["set"], row["prompt"]) for row in rows):
        line = [name, repr(prompt) if prompt else ""]
        for backend in backends:
            row = cells.get((name, prompt, *backend))
            line.append("" if row is None else f"{_cosine(row['cosine'])} ({_cosine(row['least_cosine'])})")
        lines.append(line)
    return report.table(lines, ("set", "prompt", *(" ".join(backend) for backend in backends)))


def _quality(rows: Sequence[Row]) -> str:
    head = ("backend", "precision", "documents", "questions", "nDCG@10", "share of float32")
    return report.table(
        [[row["backend"], row["precision"], f"{row['documents']:,}", f"{row['questions']:,}", f"{row['ndcg']:.4f}",
          f"{row['share']:.2%}"] for row in rows], head,
    )  # fmt: skip


def _memory(rows: Sequence[Row]) -> str:
    head = ("documents", "shards", "peak MB", "docs/s", "start-up s")
    return report.table(
        [[f"{row['documents']:,}", str(row["shards"]), f"{row['peak_memory_bytes'] / 1e6:,.0f}",
          f"{row['documents_per_second']:,.0f}", f"{row['startup_seconds']:.1f}"] for row in rows], head,
    )  # fmt: skip


def main() -> None:
    """Tell a finished run again: `python -m tests.bench.embed.report results.json`."""
    print(text(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
