"""Signals: the first asks the job to end, the second ends it at once.

After the first, no new work begins; work that cannot be left at any point (`patience`) gets `GRACE` seconds to come to
one, and the process ends within `LIMIT` whatever it is doing, also deep in a library's code (which must let other
threads run, as all long calls of NumPy, torch, Lance and Ray do).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE, LIMIT = 5.0, 9.0
"""Seconds after the first signal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the job to end; the argument is its number."""


class _State:
    """What this process was asked."""

    number: int | None = None
    until = 0.0
    patient = 0


_state = _State()


def asked() -> bool:
    """Whether a signal came."""
    return _state.number is not None


def left() -> float:
    """Seconds that work may still take after the signal."""
    return max(0.0, _state.until - time.monotonic())


@contextmanager
def patience() -> Iterator[None]:
    """Work inside is not interrupted by the first signal; Stopped is raised at its end."""
    _state.patient += 1
    try:
        yield
    finally:
        _state.patient -= 1
    if _state.number is not None and not _state.patient:
        raise Stopped(_state.number)


@contextmanager
def listening(last_words: Callable[[int], None]) -> Iterator[None]:
    """Turn signals into Stopped in the main thread; `last_words` are said before an end that cannot wait."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _state.number, _state.patient = None, 0
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # Python runs handlers between two of its own steps only; this thread sees a signal at once.
    threading.Thread(target=_watch, args=(reader, last_words), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.number is None:
        _state.number, _state.until = number, time.monotonic() + GRACE
    if not _state.patient:
        raise Stopped(number)


def _watch(reader: socket.socket, last_words: Callable[[int], None]) -> None:
    with reader:
        first = _next_signal(reader)
        if first is None:
            return
        reader.settimeout(LIMIT)
        second = _next_signal(reader)
        if second is None:
            return
    last_words(first)
    os._exit(128 + first)


def _next_signal(reader: socket.socket) -> int | None:
    """The next of SIGNALS; None where nobody listens any more; after a time limit the signal 0."""
    while True:
        try:
            received = reader.recv(1)
        except TimeoutError:
            return 0
        if not received:
            return None
        if received[0] in SIGNALS:
            return received[0]
