"""A real job whose storage fails once: ENOSPC, EIO or EACCES at every write site, and a limit on file sizes.

    python -m tests.faults.errors

A site is a call of the storage seam on one kind of file, or a write, commit or index build of Lance; each is struck
where it comes first and last. The job must end with a sentence, nothing half-made may be visible to a reader, and a
second run must give what an undisturbed one gives. Lance's own files fail through RLIMIT_FSIZE.
"""

import argparse
import errno
import json
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import ledger, run, verify
from pipeline.errors import PipelineError, StaleError
from pipeline.storage import Root
from tests.faults import kills

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
LIMITS = (200, 1_000, 2_500, 5_000, 12_000)
"""Bytes that a file may have, for a run of its own each."""


def site(moment: str) -> str:
    """A step without what differs from run to run."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", moment.removeprefix("before ").removeprefix("after "))


def fail_at(spec: Any, number: int, error: int) -> None:
    """Run the job with one failing step."""
    kills.install()
    seen = [0]

    def at(step: str, when: str) -> None:
        seen[0] += 1
        if seen[0] == number:
            raise OSError(error, "simulated", step)

    kills.AT[0] = at
    kills.quiet()
    _ended_well(spec)


def limited(spec: Any, size: int) -> None:
    """Run the job with a limit on the size of files."""
    kills.install()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kills.quiet()
    _ended_well(spec)


def _ended_well(spec: Any) -> None:
    try:
        run(spec)
    except (OSError, PipelineError) as error:
        assert str(error)
        return


def whole_or_nothing(root: Path) -> None:
    """A reader sees no generation, or a whole one."""
    try:
        newest = ledger.newest_generation(Root(root))
    except StaleError:
        newest = None
    if newest is not None:
        ledger.settle(Root(root, fence=newest["fence"]))
        problems = verify.run(root).problems
        assert not problems, problems[:2]


def strike(folder: Path, golden: Path, what: str, disturbed: Any) -> str | None:
    """One disturbed run, a look, another run, a comparison; what went wrong."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    spec = kills.job(folder, root)
    kills.child(lambda: disturbed(spec))
    if kills.child(lambda: whole_or_nothing(root)):
        return f"{what}: something half-made is visible"
    if kills.child(lambda: kills.go(spec)):
        return f"{what}: the next run failed"
    if kills.child(lambda: kills.check(root, golden)):
        return f"{what}: the result differs"
    return None


def errors(folder: Path, most: int) -> dict[str, Any]:
    """Figures over every site, at most so many strikes."""
    start = time.monotonic()
    kills.prepare_elsewhere(folder)
    golden = folder / "golden"
    assert kills.child(lambda: kills.go(kills.job(folder, golden), steps=folder / "steps.json")) == 0
    places: dict[str, list[int]] = {}
    for number, moment in enumerate(json.loads((folder / "steps.json").read_text()), 1):
        places.setdefault(f"{moment.split()[0]} {site(moment)}", []).append(number)
    strikes = [
        (f"{name} at {where} ({number})", number, code)
        for where, numbers in places.items()
        for number in sorted({numbers[0], numbers[-1]})
        for name, code in ERRORS.items()
    ]
    strikes = strikes[:: max(1, -(-len(strikes) // most))]
    failed = [
        strike(folder, golden, what, lambda spec, number=number, code=code: fail_at(spec, number, code))
        for what, number, code in strikes
    ]
    failed += [
        strike(folder, golden, f"files of {size} bytes", lambda spec, size=size: limited(spec, size)) for size in LIMITS
    ]
    return {
        "suite": "errors",
        "sites": len(places),
        "count": len(failed),
        "limits": len(LIMITS),
        "failed": [one for one in failed if one],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--most", type=int, default=10_000)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = errors(Path(folder), asked.most)
    print(json.dumps(result))
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
