"""Contenders' processes: each loads once, answers one request at a time, and ends with the benchmark."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.embed import serve

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[2]
Answer = dict[str, Any]
Ask = Callable[..., Answer]
PLAIN = {"MATRYOSHKA_TOKENIZER": "huggingface"}
"""Environment of this project's processes that keeps the fast tokenizer away."""


class Failed(Exception):
    """A contender could not do what it was asked; the text says why."""


class Apart:
    """A contender in a process of its own, which speaks lines of JSON (see serve.py)."""

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str]) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, **env},
            )  # fmt: skip
        self.loaded = self._answer()

    def __call__(self, **asked: Any) -> Answer:
        """Do one request; Failed where it cannot."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise Failed(f"its process ended with {self._process.wait()}: {last[:300]}")
        told: Answer = json.loads(line)
        if "error" in told:
            raise Failed(told["error"])
        return told

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


class Here:
    """The same contender in this process: for checks, which measure nothing."""

    def __init__(self, make: Callable[[Mapping[str, Any]], serve.Handler], options: Mapping[str, Any]) -> None:
        self.loaded: Answer = {"seconds": 0.0, "versions": serve.versions()}
        try:
            self._handler = make(options)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    def __call__(self, **asked: Any) -> Answer:
        """Do one request."""
        try:
            return self._handler(asked)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Bench:
    """What all parts share: where things lie, who runs, what was left out and why."""

    out: Path
    model: Path
    name: str
    digest: str
    quick: bool = False
    peers: bool = True
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    _open: dict[str, Apart | Here] = field(default_factory=dict)
    _pythons: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Files of this run, removed at its end."""
        return self.out / "work"

    @property
    def exports(self) -> Path:
        """Graphs that peers export, kept by model."""
        return self.out / "peers" / f"exports-{self.digest[:12]}"

    def leave_out(self, name: str, why: str) -> None:
        """Say that a contender has no figures, and keep why."""
        say(f"  {name} is left out: {why}")
        self.left_out[name] = why

    def peer(self, name: str, options: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Ask:
        """A contender of serve.py, in the environment its backend needs; loaded at the first call."""
        backend = options.get("backend", "torch")
        apart = options["kind"] == "sentence-transformers" and backend != "torch"

        def make() -> Apart | Here:
            if self.quick and not apart:
                return Here(serve.make, options)
            python = self.python(backend) if apart else sys.executable
            return self._apart(name, [python, str(HERE / "serve.py"), json.dumps(dict(options))], env)

        return self._asked(name, make, backend if apart else "")

    def own(self, name: str, options: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Ask:
        """An encoder of this project (raw.py)."""
        from tests.bench.embed import raw

        def make() -> Apart | Here:
            if self.quick:
                with environment(env or {}):
                    return Here(raw.Raw, options)
            return self._apart(name, [sys.executable, "-m", raw.__name__, json.dumps(dict(options))], env)

        return self._asked(name, make, "")

    def job(self, job: Mapping[str, Any], out: str | None, env: Mapping[str, str] | None = None) -> Answer:
        """A job in a process of its own, until its table is committed (ours.py)."""
        from tests.bench.embed import ours

        if self.quick:
            with environment(env or {}):
                return ours.run({**job, "workers": {"count": 0}}, out, time.time())
        told = self.work / "job.json"
        told.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            ours.__name__,
            json.dumps(dict(job)),
            str(out or ""),
            str(told),
            str(time.time()),
        ]
        with (self.logs / "ours.log").open("w") as log:
            code = subprocess.run(
                command, cwd=CHECKOUT, stdout=log, stderr=log, env={**os.environ, **(env or {})}, check=False
            ).returncode
        if code:
            last = ((self.logs / "ours.log").read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise Failed(f"its process ended with {code}: {last[:300]}")
        return dict(json.loads(told.read_text()))

    def _asked(self, name: str, make: Callable[[], Apart | Here], group: str) -> Ask:
        def ask(**asked: Any) -> Answer:
            if name not in self._open:
                say(f"  loading {name}")
                self._open[name] = make()
                self.versions[group or "here"] = self._open[name].loaded["versions"]
            return self._open[name](**asked)

        return ask

    @property
    def logs(self) -> Path:
        """What contenders print."""
        folder = self.out / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _apart(self, name: str, command: list[str], env: Mapping[str, str] | None) -> Apart:
        return Apart(command, self.logs / f"{name}.log", env or {})

    def close(self, name: str | None = None) -> None:
        """End one contender, or all of them."""
        for one in [name] if name else list(self._open):
            if one in self._open:
                self._open.pop(one).close()

    def python(self, backend: str) -> str:
        """The interpreter of a backend's environment, made by pip when it is first needed; Failed where pip fails."""
        if not self.peers:
            raise Failed("left out by --no-peers or --quick")
        if backend not in self._pythons:
            self._pythons[backend] = _environment(HERE / f"peers-{backend}.txt", self.out / "peers" / backend)
        if self._pythons[backend].startswith("!"):
            raise Failed(self._pythons[backend][1:])
        return self._pythons[backend]


def _environment(wanted: Path, folder: Path) -> str:
    """The interpreter of an environment with these requirements; behind a `!` why there is none."""
    python, ready = folder / "bin" / "python", folder / "ready"
    stamp = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    if ready.is_file() and ready.read_text() == stamp:
        return str(python)
    say(f"installing {wanted.name} into {folder}")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                done.stderr.strip()[-300:]
            ]
            return f"!cannot be installed: {errors[-1][:300]}"
    ready.write_text(stamp)
    return str(python)


@contextmanager
def environment(changed: Mapping[str, str]) -> Iterator[None]:
    """These variables for a while."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def say(line: str) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)
