"""Contenders on the same texts in interleaved rounds; their answers are compared before their seconds count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.embed import raw
from tests.bench.embed.drive import PLAIN, Answer, Ask, Bench, Failed, say
from tests.bench.embed.texts import Texts

SAME, CLOSE = 0.9999, 0.95
"""Mean cosine to sentence-transformers' float32 from which answers are the same; from which they are int8's. Below, a
contender's seconds do not count."""
BATCHES = (8, 16, 32, 64, 128, 256)
STATIC_BATCHES = (32, 256, 1024, 4096)
VARIANTS = (("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16"),
            ("openvino", "int8"), ("onnx", "float32"), ("onnx", "O3"), ("onnx", "int8"))  # fmt: skip
NEAR = 0.85
"""Variants within this share of the best rate at batch 32 are tried at every batch size."""
DEFAULT = "st-default"
Run = Callable[[Texts, str | None], Answer]
Variants = Mapping[tuple[str, str], Ask]
"""sentence-transformers on a backend, at a precision."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One way to embed a set: `run` gives seconds, and writes the vectors to a file where it is asked to."""

    name: str
    run: Run
    setting: Mapping[str, Any] = field(default_factory=dict)


def asking(ask: Ask, **fixed: Any) -> Run:
    """A run of a contender's process."""
    return lambda of, out: ask(texts=of.json, max_tokens=of.limit, out=out, **fixed)


def job(bench: Bench, model: str, env: Mapping[str, str] | None = None, **settings: Any) -> Run:
    """A run of this project from file to committed table; `settings` are of the spec's model section."""
    from tests.bench.embed import ours

    root = bench.work / "root"
    return lambda of, out: bench.job(ours.job(of.parquet, model, root, of.limit, **settings), out, env)


def peers(bench: Bench, calibration: Texts) -> dict[tuple[str, str], Ask]:
    """sentence-transformers on each backend, at each precision."""
    made = {}
    for backend, precision in VARIANTS:
        name = called((backend, precision))
        made[backend, precision] = bench.peer(
            name,
            {"kind": "sentence-transformers", "model": str(bench.model), "backend": backend, "precision": precision,
             "exports": str(bench.exports / name), "calibration": calibration.json},
        )  # fmt: skip
    return made


def called(variant: tuple[str, str]) -> str:
    """The name of a variant's process."""
    return "st-" + "-".join(variant)


def sweep(
    bench: Bench, of: Texts, some: tuple[Texts, Texts], variants: Variants, batches: Sequence[int]
) -> tuple[list[Contender], list[Row]]:
    """sentence-transformers at its best on a set: with the same answers, and with int8's; all that was tried.

    Every variant at batch 32 on few texts; those near the best of their class at every batch size on more of them.
    """
    few, more = some
    tried: list[Row] = []

    def attempt(variant: tuple[str, str], batch: int, texts: Texts) -> Row | None:
        name, out = called(variant), bench.work / "sweep.npy"
        if name in bench.left_out:
            return None
        try:
            told = variants[variant](texts=texts.json, max_tokens=texts.limit, batch=batch, out=str(out))
        except Failed as error:
            bench.leave_out(name, str(error))
            return None
        row = {"set": of.name, "variant": variant, "batch": batch, "documents": texts.count,
               "documents_per_second": texts.count / told["seconds"]}  # fmt: skip
        if variant == VARIANTS[0] and batch == 32:
            out.replace(bench.work / f"sweep-{texts.name}.npy")
            row["cosine"] = 1.0
        else:
            row["cosine"] = compared(out, bench.work / f"sweep-{texts.name}.npy")["cosine"]
        tried.append(row)
        return row

    first = [row for variant in variants if (row := attempt(variant, 32, few)) is not None]
    attempt(VARIANTS[0], 32, more)
    best = []
    for label, fits in (("st-best", lambda c: c >= SAME), ("st-best-int8", lambda c: CLOSE <= c < SAME)):
        mine = [row for row in first if fits(row["cosine"])]
        top = max((row["documents_per_second"] for row in mine), default=0.0)
        near = [row["variant"] for row in mine if row["documents_per_second"] >= NEAR * top]
        rows = [row for variant in near for batch in batches if (row := attempt(variant, batch, more)) is not None]
        if rows:
            won = max(rows, key=lambda row: row["documents_per_second"])
            setting = {"backend": won["variant"][0], "precision": won["variant"][1], "batch": won["batch"]}
            best.append(Contender(label, asking(variants[won["variant"]], batch=won["batch"]), setting))
    return best, tried


def contenders(bench: Bench, facts: Mapping[str, Any] | None, int8: Mapping[str, Any] | None, calibration: Texts,
               default: Ask) -> list[Contender]:  # fmt: skip
    """Ours from file to table, the roof of what it chose, and sentence-transformers as it comes."""
    name = bench.name
    made = [Contender(DEFAULT, asking(default, batch=32), {"backend": "torch", "precision": "float32", "batch": 32})]
    for suffix, found, settings in (("", facts, {}), ("-int8", int8, {"min_cosine": CLOSE})):
        if found is None:
            continue
        made.append(Contender(f"ours{suffix}", job(bench, name, **settings), found))
        options = {**found, "model": name, "calibration": calibration.json}
        made.append(Contender(f"roof{suffix}", asking(bench.own(f"roof{suffix}", options), mode="tokens"), found))
    return made


def static_contenders(bench: Bench, folder: Path, of: Texts, few: Texts) -> tuple[list[Contender], list[Row]]:
    """Static models: sentence-transformers and model2vec by default and at their best, ours with both tokenizers."""
    st = bench.peer("st-static", {"kind": "sentence-transformers", "model": str(folder)})
    made = [Contender(DEFAULT, asking(st, batch=32), {"batch": 32})]
    tried: list[Row] = []
    m2v = bench.peer("model2vec", {"kind": "model2vec", "model": str(folder)})
    for name, ask, usual in (("st", st, None), ("model2vec", m2v, 1024)):
        try:
            rates = {batch: few.count / ask(texts=few.json, batch=batch)["seconds"] for batch in STATIC_BATCHES}
        except Failed as error:
            bench.leave_out(name, str(error))
            continue
        tried += [{"set": of.name, "variant": (name, "static"), "batch": batch, "documents": few.count,
                   "documents_per_second": rate, "cosine": None} for batch, rate in rates.items()]  # fmt: skip
        if usual is not None:
            made.append(Contender(f"{name}-default", asking(ask, batch=usual), {"batch": usual}))
        best = max(rates, key=lambda batch: rates[batch])
        made.append(Contender(f"{name}-best", asking(ask, batch=best), {"batch": best}))
    for suffix, env in (("", {}), ("-plain", PLAIN)):
        options = {"model": str(folder), "backend": "static", "precision": "float32"}
        encoder = bench.own(f"encoder-static{suffix}", options, env)
        made.append(
            Contender(f"encoder{suffix}", asking(encoder, mode="texts"), {"tokenizer": suffix.strip("-") or "auto"})
        )
        made.append(
            Contender(f"ours{suffix}", job(bench, str(folder), env), {"tokenizer": suffix.strip("-") or "auto"})
        )
    return made, tried


def rounds(
    bench: Bench, of: Texts, taken: Sequence[Contender], count: int, peak: Ask | None, shape: Mapping[str, int] | None
) -> list[Row]:
    """Every contender once a round, in alternating order; the first round's answers decide whose seconds count."""
    runs: dict[str, list[Answer]] = {one.name: [] for one in taken}
    answers: dict[str, Mapping[str, float]] = {}
    files = {one.name: bench.work / f"answer-{one.name}.npy" for one in taken}
    before = _peak(peak)
    for turn in range(count):
        for one in _open(taken if turn % 2 == 0 else taken[::-1], runs):
            say(f"{of.name}, round {turn + 1} of {count}: {one.name}")
            try:
                told = one.run(of, str(files[one.name]) if turn == 0 else None)
            except Failed as error:
                bench.leave_out(f"{one.name} on {of.name}", str(error))
                runs.pop(one.name)
                continue
            after = _peak(peak)
            runs[one.name].append({**told, "peak": max(before, after)})
            before = after
        if turn == 0 and DEFAULT in runs:
            for name in list(runs):
                answers[name] = compared(files[name], files[DEFAULT])
                if answers[name]["cosine"] < CLOSE:
                    why = f"its answers differ: mean cosine {answers[name]['cosine']:.4f}; its seconds do not count"
                    bench.leave_out(f"{name} on {of.name}", why)
                    runs.pop(name)
    work = raw.flops(shape, of.tokens)
    return [_row(of, one, runs[one.name], answers.get(one.name, {}), runs.get(DEFAULT), work)
            for one in taken if runs.get(one.name)]  # fmt: skip


def _open(taken: Sequence[Contender], runs: Mapping[str, Any]) -> Iterator[Contender]:
    return (one for one in taken if one.name in runs)


def _peak(peak: Ask | None) -> float:
    return float(peak()["flops_per_second"]) if peak else float("nan")


def compared(file: Path, with_: Path) -> dict[str, float]:
    """Mean and least cosine of two files of vectors, row by row."""
    left, right = (np.load(one).astype(np.float64) for one in (file, with_))
    if left.shape != right.shape:
        return {"cosine": 0.0, "least_cosine": 0.0}
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = (np.linalg.norm(left, axis=1) == 0) & (np.linalg.norm(right, axis=1) == 0)
    cosines = np.where(both_zero, 1.0, np.einsum("ij,ij->i", left, right) / np.where(norms == 0, 1, norms))
    return {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}


def _row(of: Texts, one: Contender, runs: Sequence[Answer], answers: Mapping[str, float],
         default: Sequence[Answer] | None, work: float | None) -> Row:  # fmt: skip
    """Medians over rounds; ratios are medians of the rounds' own ratios."""
    seconds = [run["seconds"] for run in runs]
    middle = float(np.median(seconds))
    row: Row = {
        "set": of.name, "contender": one.name, "setting": dict(one.setting), **answers, "seconds": seconds,
        "median_seconds": middle, "documents_per_second": of.count / middle,
        "tokens_per_second": float(of.tokens.sum()) / middle,
        "times_default": _ratio(default, runs, "seconds"), "details": _details(runs),
    }  # fmt: skip
    if work:
        row["mfu"] = float(np.median([work / run["seconds"] / run["peak"] for run in runs]))
        row["peak_flops"] = float(np.median([run["peak"] for run in runs]))
        if all(run.get("forward_seconds") for run in runs):
            row["forward_mfu"] = float(np.median([work / run["forward_seconds"] / run["peak"] for run in runs]))
    if "total_seconds" in runs[0]:
        row["times_default_with_startup"] = _ratio(default, runs, "total_seconds")
    return row


def _ratio(default: Sequence[Answer] | None, runs: Sequence[Answer], name: str) -> float | None:
    if not default:
        return None
    return float(np.median([base["seconds"] / run[name] for base, run in zip(default, runs, strict=True)]))


def _details(runs: Sequence[Answer]) -> Row:
    """Medians of every number that runs tell, and the other things that the first one does."""
    told: Row = {}
    for name, value in runs[0].items():
        if isinstance(value, int | float) and name not in ("seconds", "peak"):
            told[name] = float(np.median([run[name] for run in runs if name in run]))
            if name == "startup_seconds":
                told["first_startup_seconds"] = value
        elif name not in ("seconds", "peak"):
            told[name] = value
    return told


def ratios(rows: Sequence[Row]) -> list[Row]:
    """What each of ours is beside the others of its set: medians of the rounds' ratios of their seconds."""
    found = []
    for row in rows:
        if not row["contender"].startswith(("ours", "encoder")):
            continue
        for other in rows:
            if other["set"] == row["set"] and other["contender"].startswith(("st", "roof", "model2vec")):
                times = np.median(np.array(other["seconds"]) / np.array(row["seconds"]))
                found.append({"set": row["set"], "ours": row["contender"], "other": other["contender"],
                              "times": float(times)})  # fmt: skip
    return found
