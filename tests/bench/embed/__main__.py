"""The embedding benchmark: this project from file to table beside sentence-transformers and model2vec.

    python -m tests.bench.embed --data FOLDER --rows 200 --out output/bench-embed
    python -m tests.bench.embed --parts speed --sets questions --contenders ours,roof --rows 5000

Same texts, same cut; answers are compared before seconds count; rounds are interleaved. Writes results.json after each
part, and every table to stdout.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.bench import report as search_report
from tests.bench.embed import models, parts, raw, report, speed, texts
from tests.bench.embed.drive import Ask, Bench, Failed, environment, say
from tests.bench.embed.texts import Counter, Texts

PARTS = ("speed", "static", "fidelity", "memory", "quality")
DEFAULT_PARTS = PARTS[:4]
CALIBRATION_TEXTS = 300
FEW, MORE = 64, 256
"""Texts of a sweep: at batch 32 with every variant, at every batch size."""
STATIC_TIMES = 20
"""Texts of a static set for each row asked for: they take a hundredth of the time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the sets, measure each part, tell."""
    asked = _options().parse_args(arguments)
    wanted = [part for part in asked.parts.split(",") if part]
    if not set(wanted) <= set(PARTS):
        raise SystemExit(f"--parts {asked.parts}: there are {', '.join(PARTS)}")
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    from pipeline.encoders import models as folders

    folder = folders.resolve(asked.model)
    bench = Bench(asked.out, Path(folder.path), folder.name, folder.digest.removeprefix("sha256:"),
                  asked.quick, asked.peers and not asked.quick)  # fmt: skip
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir()
    run = _Run(asked, bench, folder.positions)
    told: dict[str, Any] = {
        "machine": search_report.machine(report.PACKAGES), "model": Path(bench.name).name, "rows": asked.rows,
        "rounds": asked.rounds, "seed": asked.seed, "sets": {}, "ratios": [],
    }  # fmt: skip
    try:
        # Verdicts of probes are kept here: the first run of each job has none, as on a machine that is new.
        with environment({"XDG_CACHE_HOME": str(bench.work / "cache")}):
            for part in wanted:
                getattr(run, f"measure_{part}")(told)
                run.save(told)
    finally:
        bench.close()
    shutil.rmtree(bench.work)
    print(report.text(told))


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="a folder with arxiv-abstracts, squad-dev, xquad")
    options.add_argument("--model", default="all-MiniLM-L6-v2", help="a packaged name or a folder")
    options.add_argument("--rows", type=int, default=200, help="docstrings; of other sets in proportion")
    options.add_argument("--out", type=Path, default=Path("output/bench-embed"))
    options.add_argument("--parts", default=",".join(DEFAULT_PARTS), help=f"of {', '.join(PARTS)}")
    options.add_argument("--sets", default="", help="of docstrings, abstracts, questions, xquad, mixed; all if none")
    options.add_argument("--contenders", default="", help="names of contenders, with commas; all if none")
    options.add_argument("--int8-sets", default="docstrings", help="sets with int8 too; each start makes it anew")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--fidelity-rows", type=int, default=100, help="texts of each set there")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--no-peers", dest="peers", action="store_false", help="no environments for OpenVINO and ONNX")
    options.add_argument("--quick", action="store_true", help="in this process, without peers: a check, no result")
    return options


@dataclass(frozen=True)
class _Run:
    """The parts of one run, and what they share."""

    asked: argparse.Namespace
    bench: Bench
    positions: int | None

    @cached_property
    def found(self) -> dict[str, list[str]]:
        return texts.sources(self.asked.data)

    @cached_property
    def counter(self) -> Counter:
        return Counter.of(self.bench.model)

    @cached_property
    def calibration(self) -> Texts:
        """Texts for int8, of the first set."""
        chosen = texts.sample(self.found["docstrings"], CALIBRATION_TEXTS, self.asked.seed + 1)
        return texts.write(self.bench.work, "calibration", chosen, None, self.counter)

    @cached_property
    def static_model(self) -> Path:
        return models.static(self.bench.model, self.bench.work / "static")

    @cached_property
    def peak(self) -> Ask:
        return self.bench.peer("peak", {"kind": "peak", **({"size": 256, "seconds": 0.01} if self.asked.quick else {})})

    @property
    def names(self) -> list[str]:
        """The sets asked for that can be made."""
        possible = [name for name in texts.SHARE if name in self.found or name == "mixed"]
        chosen = [name for name in self.asked.sets.split(",") if name] or possible
        for name in set(chosen) - set(possible):
            raise SystemExit(f"no set {name!r} here; there are: {', '.join(possible)}")
        return chosen

    def few(self, of: Texts, count: int, counter: Counter) -> Texts:
        """A seeded part of a set."""
        some = texts.sample(json.loads(Path(of.json).read_text()), count, self.asked.seed)
        return texts.write(Path(of.folder), f"{of.name}-{count}", some, of.limit, counter)

    def measure_speed(self, told: dict[str, Any]) -> None:
        """Ours beside sentence-transformers, set by set."""
        bench, counter, asked = self.bench, self.counter, self.asked
        names, positions = self.names, self.positions
        sets = texts.prepare(bench.work / "sets", self.found, names, asked.rows, counter, positions, asked.seed)
        told["sets"] |= {of.name: of.told() for of in sets}
        told["speed"], told["sweep"], told["cold"] = [], [], {}
        shape = raw.shape(bench.model)
        facts, int8 = self._facts(told, sets[0], "ours"), None
        if shape is not None and self._wants("ours-int8"):
            int8 = self._facts(told, sets[0], "ours-int8", min_cosine=speed.CLOSE)
            if int8 is not None and int8["precision"] != "int8":
                bench.leave_out("ours-int8", f"{int8['backend']} {int8['precision']} was chosen")
                int8 = None
        variants = speed.peers(bench, self.calibration)
        best = self._sweep(told, sets, variants)
        for of in sets:
            own = int8 if of.name in asked.int8_sets.split(",") else None
            every = speed.contenders(bench, facts, own, self.calibration, variants[speed.VARIANTS[0]])
            taken = [one for one in [*every, *best[of.name]] if self._wants(one.name)]
            rows = speed.rounds(bench, of, taken, asked.rounds, self.peak, shape)
            told["speed"] += rows
            told["ratios"] += speed.ratios(rows)
            self.save(told)
        bench.close()

    def _sweep(self, told: dict[str, Any], sets: Sequence[Texts], variants: speed.Variants) -> dict[str, Any]:
        """sentence-transformers at its best on each set; what is not among them is closed again."""
        best: dict[str, list[speed.Contender]] = {of.name: [] for of in sets}
        if not self._wants("st-best"):
            return best
        if models.is_static(self.bench.model):
            variants = {speed.VARIANTS[0]: variants[speed.VARIANTS[0]]}
        batches = speed.BATCHES[2:4] if self.asked.quick else speed.BATCHES
        for of in sets:
            some = (self.few(of, FEW, self.counter), self.few(of, MORE, self.counter))
            best[of.name], tried = speed.sweep(self.bench, of, some, variants, batches)
            told["sweep"] += tried
            self.save(told)
        kept = {(one.setting["backend"], one.setting["precision"]) for found in best.values() for one in found}
        for variant in set(variants) - kept - {speed.VARIANTS[0]}:
            self.bench.close(speed.called(variant))
        return best

    def _wants(self, name: str) -> bool:
        """Whether a contender is asked for; what all are compared with always is."""
        names = [name for name in self.asked.contenders.split(",") if name]
        return not names or name in (*names, speed.DEFAULT)

    def save(self, told: dict[str, Any]) -> None:
        """Write what is known so far."""
        told |= {"left_out": self.bench.left_out, "versions": self.bench.versions}
        (self.asked.out / "results.json").write_text(json.dumps(told, indent=1) + "\n")

    def _facts(self, told: dict[str, Any], of: Texts, name: str, **settings: Any) -> dict[str, Any] | None:
        """What a first job chose, whose start-up has no verdict of a probe to read."""
        try:
            first = speed.job(self.bench, self.bench.name, **settings)(of, None)
        except Failed as error:
            self.bench.leave_out(name, str(error))
            return None
        say(f"{name}: {first['facts']}")
        told["cold"][name] = first
        return dict(first["facts"])

    def measure_static(self, told: dict[str, Any]) -> None:
        """The same with a static model, on the sets that have texts enough."""
        bench, rows = self.bench, self.asked.rows * STATIC_TIMES
        names = [name for name in self.names if name in ("abstracts", "questions")] or self.names[:1]
        told["static"] = []
        told.setdefault("sweep", [])
        counter = Counter.of(self.static_model)
        for of in texts.prepare(bench.work / "static-sets", self.found, names, rows, counter, None, self.asked.seed):
            told["sets"][f"{of.name} (static)"] = of.told()
            made, tried = speed.static_contenders(
                bench, self.static_model, of, self.few(of, max(64, of.count // 4), counter)
            )
            told["sweep"] += tried
            found = speed.rounds(
                bench, of, [one for one in made if self._wants(one.name)], self.asked.rounds, None, None
            )
            told["static"] += found
            told["ratios"] += [{**row, "set": f"{row['set']} (static)"} for row in speed.ratios(found)]
        bench.close()

    def measure_fidelity(self, told: dict[str, Any]) -> None:
        """Every backend on every set, with prompts."""
        bench, asked = self.bench, self.asked
        every = parts.everything(asked.data, self.found, asked.fidelity_rows, asked.seed)
        every["mixed"] = texts.mixed(
            self.found.get("abstracts", self.found["docstrings"]), asked.fidelity_rows, asked.seed
        )
        folder = bench.work / "fidelity"
        folder.mkdir()
        sets = [texts.write(folder, name, some, None, self.counter) for name, some in every.items()]
        st = {"kind": "sentence-transformers"}
        told["fidelity"] = []
        if not models.is_static(bench.model):
            reference = bench.peer("st-reference", {**st, "model": str(bench.model)})
            told["fidelity"] += parts.fidelity(bench, bench.name, sets, parts.BACKENDS, self.calibration, reference)
        reference = bench.peer("st-static-reference", {**st, "model": str(self.static_model)})
        told["fidelity"] += parts.fidelity(
            bench, str(self.static_model), sets, parts.STATIC, self.calibration, reference
        )
        bench.close()

    def measure_memory(self, told: dict[str, Any]) -> None:
        """Memory of a worker as the corpus grows."""
        sizes = [size // 1_000 for size in parts.SIZES] if self.asked.quick else parts.SIZES
        words = sorted({word for text in self.found["docstrings"][:500] for word in text.split() if word.isalpha()})
        told["memory"] = parts.memory(self.bench, self.static_model, sizes, words, self.asked.seed)

    def measure_quality(self, told: dict[str, Any]) -> None:
        """What each backend's answers cost in ranking."""
        if self.asked.data is None:
            self.bench.leave_out("quality", "it needs --data with squad-dev")
            return
        told["quality"] = parts.quality(
            self.bench, self.asked.data, 2_000, self.asked.seed, self.counter, self.calibration
        )


if __name__ == "__main__":
    main()
