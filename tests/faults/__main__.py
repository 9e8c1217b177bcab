"""Every fault suite in turn, within so many minutes, added to a scoreboard: `make faults SEED=0 MINUTES=60`.

    python -m tests.faults --seed 0 --minutes 60 --scoreboard output/faults.json

Each suite is a process of its own and prints one line of JSON. Counts add up over runs with other seeds; a failure is
repeated by its suite's command with the same seed. Exit code 1 where anything failed.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
SUITES: dict[str, tuple[float, list[str]]] = {
    "crash_states": (0.01, []),
    "races": (0.01, ["--count", "1000"]),
    "filters": (0.02, ["--seed", "{seed}", "--count", "10000"]),
    "flips": (0.02, ["--seed", "{seed}", "--count", "2000"]),
    "mutants": (0.06, ["--seed", "{seed}", "--count", "10000"]),
    "kills": (0.22, ["--seed", "{seed}", "--count", "1000"]),
    "kills --random": (0.1, ["--seed", "{seed}", "--count", "200"]),
    "random_kills": (0.1, ["--seed", "{seed}", "--count", "20", "--minutes", "{minutes}"]),
    "errors": (0.2, []),
    "machine": (0.06, ["--seed", "{seed}", "--minutes", "{minutes}"]),
    "schedules": (0.2, ["--seed", "{first}", "--count", "1000000", "--minutes", "{minutes}"]),
}
"""Suite -> its share of the time (those without a limit of their own take what they need), and its arguments."""
COUNTED = ("count", "identical", "single_winners", "found", "faults", "takeovers", "examples", "steps")


def run(name: str, seed: int, minutes: float) -> dict[str, Any]:
    """The figures of one suite."""
    share, arguments = SUITES[name]
    values = {"seed": seed, "first": seed * 10_000_000, "minutes": round(share * minutes, 2)}
    module, *flags = name.split()
    command = [sys.executable, "-m", f"tests.faults.{module}", *flags, *(one.format(**values) for one in arguments)]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    try:
        figures = dict(json.loads(ended.stdout[ended.stdout.index("{") :]))
    except ValueError:
        figures = {"crashed": ended.stderr[-500:]}
    return {**figures, "passed": ended.returncode == 0, "command": " ".join(command[1:])}


def add(board: dict[str, Any], name: str, figures: dict[str, Any], seed: int) -> None:
    """Counts add up over seeds; a seed that ran before replaces its own."""
    entry = board.setdefault(name, {"runs": {}})
    entry["runs"][str(seed)] = {**figures, "date": date.today().isoformat()}
    runs = entry["runs"].values()
    entry["passed"] = all(one["passed"] for one in runs)
    entry["total"] = {key: sum(one.get(key, 0) for one in runs) for key in COUNTED if any(key in one for one in runs)}


def main() -> None:
    """Run everything; a line for each suite."""
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--only", nargs="*", choices=SUITES, default=list(SUITES))
    options.add_argument("--scoreboard", type=Path, default=CHECKOUT / "output" / "faults.json")
    asked = options.parse_args()
    board = json.loads(asked.scoreboard.read_text()) if asked.scoreboard.is_file() else {}
    start = time.monotonic()
    passed = True
    for name in asked.only:
        figures = run(name, asked.seed, asked.minutes)
        passed = passed and figures["passed"]
        add(board, name, figures, asked.seed)
        asked.scoreboard.parent.mkdir(parents=True, exist_ok=True)
        asked.scoreboard.write_text(json.dumps(board, indent=2) + "\n")
        said = ", ".join(f"{key} {figures[key]:,}" for key in COUNTED if key in figures)
        print(
            f"{name}: {'passed' if figures['passed'] else 'FAILED, see ' + str(asked.scoreboard)}; {said}", flush=True
        )
    print(f"seed {asked.seed}, {(time.monotonic() - start) / 60:.1f} minutes, scoreboard {asked.scoreboard}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
