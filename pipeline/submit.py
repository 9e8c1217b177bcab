"""Sends a run to a Ray cluster by Ray's job API: code and spec are packed, logs followed, the exit code returned.

On the cluster the same command runs: `python -m pipeline run`, with the cluster as its workers. Nothing else is sent;
corpus, root and model are looked for there.
"""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import PipelineError, SpecError
from pipeline.sentences import PASSED, masked, without
from pipeline.spec import JobSpec
from pipeline.teams import SUBMITTED

log = logging.getLogger(__name__)

ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKENS, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path("~/.ray/auth_token")
"""Where Ray looks for the token of a cluster."""
CONNECT_SECONDS, ANSWER_SECONDS = 10, 120
"""Limits of one request to the cluster."""
POLL_SECONDS = 1.0
LOST_SECONDS = 60.0
"""A cluster that does not answer for so long is lost."""
NOT_YET = "No available agent"
"""What a head answers that has no node yet to run a job on."""
CODES = range(8)
"""Exit codes of the command line that are no signal's."""

Tell = Callable[[str], None]


def check(spec: JobSpec) -> list[str]:
    """What a cluster cannot see of this machine, as warnings; SpecError where it surely cannot."""
    if spec.workers.count == 0:
        raise SpecError("workers.count: 0 is one process without Ray; submit with --set workers.count=auto")
    named = {
        "root": [spec.root],
        "corpus.source": spec.corpus.source,
        "evaluate.queries": [spec.evaluate.queries],
        "evaluate.qrels": [spec.evaluate.qrels],
    }
    found = [(field, path) for field, paths in named.items() for path in paths if path and _is_path(path)]
    for field, path in found:
        if not Path(path).is_absolute():
            raise SpecError(
                f"{field}: {path} is relative to a folder of this machine, which a cluster has not; "
                "name a bucket, or a folder that all its nodes see"
            )
    if Path(spec.model.name).is_dir() and not Path(spec.model.name).is_absolute():
        raise SpecError(f"model.name: {spec.model.name} is a folder of this machine; name one that all nodes have")
    if not found:
        return []
    told = ", ".join(f"{field} {path}" for field, path in found)
    return [f"every node of the cluster must see under the same path: {told}"]


def _is_path(text: str) -> bool:
    return "://" not in text and not text.startswith("docstrings:")


def environment(names: Sequence[str]) -> dict[str, str]:
    """Values of the named environment variables; SpecError for one that is not set, or that is given with its value."""
    for name in names:
        if "=" in name:
            raise SpecError(f"--env {name.partition('=')[0]}: give the name alone; the value is taken from here")
        if name not in os.environ:
            raise SpecError(f"--env {name}: no such variable is set here")
    return {name: os.environ[name] for name in names} | ({PASSED: ",".join(names)} if names else {})


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster; `secrets` are never told."""

    id: str
    address: str
    client: Any
    secrets: tuple[str, ...] = ()

    @property
    def hint(self) -> str:
        """How to go on without this command."""
        at = f"--address {self.address} {self.id}"
        return f"follow it with: ray job logs --follow {at}; end it with: ray job stop {at}"

    def follow(self, tell: Tell) -> int:
        """Tell the job's output as it comes; its exit code. PipelineError where it had none, or the cluster is lost."""
        asyncio.run(self._tail(tell))
        info = self.client.get_job_info(self.id)
        code, status = info.driver_exit_code, str(getattr(info.status, "value", info.status))
        if status == "SUCCEEDED":
            return 0
        if status == "STOPPED":
            log.warning("job %s was stopped; submit it again to go on from the last finished shard", self.id)
            return 143
        if code is None:
            reason = self._masked(str(info.message or "").strip()).splitlines() or ["no reason given"]
            raise PipelineError(f"job {self.id} did not run: {reason[-1]}")
        ended_by = -code if code < 0 else code - 128
        if ended_by in (signal.SIGINT, signal.SIGTERM):
            return 128 + int(ended_by)
        if code not in CODES:
            how = f"was killed by signal {ended_by}" if ended_by > 0 else f"ended with exit code {code}"
            raise PipelineError(f"job {self.id} {how}; finished shards are kept, submit it again to go on")
        return int(code)

    async def _tail(self, tell: Tell) -> None:
        """Tell all output to the end of the job; where the connection breaks, go on from what was told."""
        from aiohttp import ClientError

        told, silent_since = 0, time.monotonic()
        while True:
            seen = 0
            try:
                async for text in self.client.tail_job_logs(self.id):
                    seen += len(text)
                    if seen > told:
                        tell(self._masked(text[max(0, len(text) - (seen - told)) :]))
                        told = seen
                    silent_since = time.monotonic()
                if self.client.get_job_info(self.id).status.is_terminal():
                    return
                silent_since = time.monotonic()
            except (ClientError, OSError, RuntimeError) as error:  # by websocket, by requests, by Ray
                if time.monotonic() - silent_since > LOST_SECONDS:
                    raise PipelineError(
                        f"the cluster at {masked(self.address)} does not answer any more ({_first_line(error)}); "
                        "finished shards are kept, submit the job again to go on"
                    ) from None
            await asyncio.sleep(POLL_SECONDS)

    def _masked(self, text: str) -> str:
        return masked(without(text, self.secrets))


def submit(path: str, spec: JobSpec, sets: Sequence[str], address: str | None, passed: Mapping[str, str]) -> Submitted:
    """Send a checked job; `passed` are environment variables for it. PipelineError where no cluster answers."""
    client, told = _client(address)
    name = f"{spec.name}.yaml"
    overrides = [f"--set {shlex.quote(one)}" for one in (*sets, "workers.address=auto")]
    try:
        with TemporaryDirectory() as folder:
            pack(Path(folder), path, name)
            identity = _sent(
                client,
                entrypoint=f"python -m pipeline run {name} {' '.join(overrides)}",
                submission_id=f"{spec.name}-{uuid.uuid4().hex[:8]}",
                runtime_env={"working_dir": folder, "env_vars": {SUBMITTED: "1", **passed}},
                metadata={"job": spec.name, "root": masked(spec.root)},
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = without(_first_line(error), passed.values())
        raise PipelineError(f"the cluster at {told} took no job: {reason}") from None
    return Submitted(identity, told, client, tuple(value for name, value in passed.items() if name != PASSED))


def _sent(client: Any, **job: Any) -> str:
    """The id of a job that was taken; a head that has just begun gets a while."""
    until = time.monotonic() + LOST_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if NOT_YET not in str(error) or time.monotonic() > until:
                raise
        time.sleep(POLL_SECONDS)


def pack(folder: Path, path: str, name: str) -> None:
    """What a job needs, as it stands here: this package's code, and the spec under that name."""
    shutil.copytree(Path(__file__).parent, folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(path, folder / name)


def _client(address: str | None) -> tuple[Any, str]:
    """A client of Ray's job API, and the address it speaks to."""
    given = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), ADDRESS)
    told = masked(given)
    if any(os.environ.get(name) for name in TOKENS) or TOKEN_FILE.expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as for a head that is started where there is a token
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise _missing(error) from None

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's, whose requests wait for ever where nobody answers."""

        def _do_request(self, *values: Any, **options: Any) -> Any:
            return super()._do_request(*values, **{"timeout": (CONNECT_SECONDS, ANSWER_SECONDS), **options})

    logging.getLogger("ray").setLevel(logging.WARNING)
    for module in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        with _only(given):
            return Client(given), told
    except RuntimeError as error:
        if "ray[default]" in str(error):
            raise _missing(error) from None
        reason: Exception = error
    except AuthenticationError as error:
        raise PipelineError(
            f"the cluster at {told} wants another token ({error.message.splitlines()[0]}); put its own into "
            "RAY_AUTH_TOKEN, or its file's path into RAY_AUTH_TOKEN_PATH"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        reason = error
    raise PipelineError(
        f"no Ray cluster takes jobs at {told}: {_first_line(reason)}; name its head with --address http://HEAD:8265, "
        "which must run a dashboard (ray[default])"
    )


@contextmanager
def _only(address: str) -> Iterator[None]:
    """The address for Ray's client, which prefers these variables to what it is given."""
    before = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    os.environ[ADDRESS_VARIABLES[0]] = address
    try:
        yield
    finally:
        del os.environ[ADDRESS_VARIABLES[0]]
        os.environ.update(before)


def _missing(error: Exception) -> SpecError:
    return SpecError(
        f"submit needs Ray's job client: pip install 'matryoshka-pipeline[cluster]' ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return masked(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))[:300]
