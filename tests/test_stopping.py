"""Signals, in small processes of their own: the first asks, the second or the time limit ends."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline import stopping

# The file alone: the package would take most of the seconds.
PREAMBLE = f"""
import ctypes, importlib.util, os, signal, sys, threading, time
found = importlib.util.spec_from_file_location("stopping", {stopping.__file__!r})
stopping = importlib.util.module_from_spec(found)
found.loader.exec_module(stopping)
stopping.GRACE, stopping.LIMIT = 0.5, 0.5

def say(what):
    os.write(1, f"{{what}}\\n".encode())

def hang():
    # In a library's code, which goes on waiting after a signal: for a mutex that its own thread holds.
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    say("hangs")
    library.pthread_mutex_lock(mutex)
"""
ENDING = """
try:
    with stopping.listening(lambda number: say(f"last words {number}")):
        say("ready")
        work()
except stopping.Stopped as stop:
    say(f"stopped {stop.args[0]} in {threading.current_thread().name}")
    sys.exit(128 + stop.args[0])
"""


def start(work):
    """A process that runs `work` and is ready for signals."""
    body = "def work():\n" + textwrap.indent(textwrap.dedent(work).strip(), "    ")
    script = f"{PREAMBLE}\n{body}\n{ENDING}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def hanging(work):
    """A process whose `work` waits in a library for ever."""
    process = start(work)
    assert process.stdout.readline() == "hangs\n"
    while (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
        time.sleep(0.01)
    return process


def ended(process):
    """What it said, its exit code, and the seconds it still took."""
    start = time.monotonic()
    try:
        said = process.communicate(timeout=10)[0].splitlines()
    finally:
        process.kill()
    return said, process.returncode, time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_the_main_thread(number):
    process = start("time.sleep(60)")
    process.send_signal(number)
    said, code, seconds = ended(process)
    assert (said, code) == ([f"stopped {int(number)} in MainThread"], 128 + number)
    assert seconds < 5


def test_other_signals_end_nothing():
    process = start("signal.signal(signal.SIGUSR1, lambda *_: say('heard'))\nsay('set')\ntime.sleep(0.8)\nsay('done')")
    assert process.stdout.readline() == "set\n"
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "heard\n"
    assert ended(process)[:2] == (["done"], 0)


def test_a_block_that_must_not_be_left_is_finished_first():
    process = start(
        """
        with stopping.patience():
            with stopping.patience():
                say("in")
                while not stopping.asked():
                    time.sleep(0.01)
            assert 0 < stopping.left() <= 0.5
            say("finished")
        say("never")
        """
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process)[:2] == (["finished", "stopped 15 in MainThread"], 143)


def test_nothing_is_left_after_the_grace():
    process = start(
        """
        with stopping.patience():
            say("in")
            while not stopping.asked():
                time.sleep(0.01)
            stopping._state.until -= 1
            say(stopping.left())
        """
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process)[:2] == (["0.0", "stopped 15 in MainThread"], 143)


@pytest.mark.parametrize("work", ["hang()", "with stopping.patience():\n    hang()"])
def test_what_hangs_in_a_library_is_ended_within_the_limit(work):
    process = hanging(work)
    process.send_signal(signal.SIGTERM)
    said, code, seconds = ended(process)
    assert (said, code) == (["last words 15"], 143)
    assert 0.3 < seconds < 5


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once_with_last_words_once(second):
    process = hanging("stopping.LIMIT = 30\nwith stopping.patience():\n    hang()")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(second)
    said, code, seconds = ended(process)
    assert (said, code) == (["last words 15"], 143)
    assert seconds < 5


def test_handlers_are_as_they_were_afterwards():
    def handlers():
        return [signal.getsignal(number) for number in stopping.SIGNALS]

    before = handlers()
    for _ in range(2):
        with stopping.listening(lambda number: pytest.fail("nothing to say")):
            assert handlers() != before
            assert not stopping.asked()
        assert handlers() == before
        old = signal.set_wakeup_fd(-1)
        assert old == -1


def test_an_earlier_signal_is_forgotten():
    with (
        pytest.raises(stopping.Stopped) as stopped,
        stopping.listening(lambda number: None),
        stopping.patience(),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.args == (signal.SIGTERM,) and stopping.asked()
    with stopping.listening(lambda number: None), stopping.patience():
        assert not stopping.asked()
