"""What workers log, kept below the root: `_state/logs/<worker>.log`, without secrets, the newest part of it.

Storage cannot append, so a file is written whole, now and then and when something failed. A log that cannot be
written costs nobody anything.
"""

import contextlib
import logging
import time

from pipeline.sentences import redacted
from pipeline.storage import STATE, Root

LOGS = f"{STATE}/logs"
FORMAT = "%(asctime)s %(levelname)s %(message)s"
MAX_BYTES = 256 * 2**10
"""Of one file; the oldest lines go first."""
EVERY_SECONDS = 30.0


class WorkerLog(logging.Handler):
    """Collects what this process logs, and keeps it in one file of the root."""

    def __init__(self, root: Root, worker: str) -> None:
        super().__init__(logging.INFO)
        formatter = logging.Formatter(FORMAT)
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._root, self._name = root, f"{LOGS}/{worker}.log"
        self._text = _read(root, self._name)
        self._is_new, self._saved = False, time.monotonic()

    def attach(self) -> None:
        """Take what this package logs, and the warnings of others."""
        logging.getLogger().addHandler(self)
        logging.getLogger("pipeline").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Add an event."""
        with contextlib.suppress(Exception):  # what cannot be formatted
            self._text = _newest(f"{self._text}{redacted(self.format(record))}\n")
            self._is_new = True

    def save(self, now: bool = False) -> None:
        """Write what is new; unless `now`, not more often than every 30 s."""
        with self.lock or contextlib.nullcontext():
            if not self._is_new or not (now or time.monotonic() - self._saved > EVERY_SECONDS):
                return
            self._is_new, self._saved, text = False, time.monotonic(), self._text
        _write(self._root, self._name, text)


def note(root: Root, worker: str, sentence: str) -> None:
    """Add a line to the log of a worker that cannot write any more."""
    name = f"{LOGS}/{worker}.log"
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    _write(root, name, _newest(f"{_read(root, name)}{stamp} ERROR {redacted(sentence)}\n"))


def _read(root: Root, name: str) -> str:
    with contextlib.suppress(Exception):
        return _newest((root.read(name) or b"").decode(errors="replace"))
    return ""


def _write(root: Root, name: str, text: str) -> None:
    with contextlib.suppress(Exception):
        root.write(name, text.encode(errors="replace"))


def _newest(text: str) -> str:
    if len(text) <= MAX_BYTES:
        return text
    return text[-MAX_BYTES:].partition("\n")[2]
