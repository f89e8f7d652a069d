"""Calls in a fresh process, and what becomes of those that have no result. None of them loads torch."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fitlora.errors import UserError
from fitlora.units import parse_bytes
from fitlora.worker import Lost, Worker

SECONDS = 30.0


def test_calls_are_done_by_one_other_process() -> None:
    with Worker() as worker:
        first, second = (worker.call(os.getpid, seconds=SECONDS) for _ in range(2))
        assert worker.call(math.hypot, 3.0, 4.0, seconds=SECONDS) == 5.0
    assert first == second != os.getpid()
    assert not Path(f"/proc/{first}").exists()


def test_it_has_our_modules_and_imports_what_is_expected() -> None:
    with Worker(expected=parse_bytes) as worker:
        found = "__import__('sys').modules['fitlora.units'].__file__"
        assert worker.call(eval, found, seconds=SECONDS) == sys.modules["fitlora.units"].__file__
        found = "'torch' in __import__('sys').modules"
        assert worker.call(eval, found, seconds=SECONDS) is False


def test_the_kernel_takes_it_before_us() -> None:
    with Worker() as worker:
        file = Path("/proc/self/oom_score_adj")
        assert worker.call(Path.read_text, file, seconds=SECONDS) == "1000\n"
        assert file.read_text() != "1000\n"


def test_a_users_mistake_is_told_as_one_and_the_process_goes_on() -> None:
    with Worker() as worker:
        with pytest.raises(UserError, match="many"):
            worker.call(parse_bytes, "many", seconds=SECONDS)
        assert worker.call(abs, -1, seconds=SECONDS) == 1


def test_another_error_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    with Worker() as worker:
        with pytest.raises(Lost, match=r"^ended in ValueError: math domain error$"):
            worker.call(math.sqrt, -1.0, seconds=SECONDS)
        with pytest.raises(Lost):
            worker.call(abs, -1, seconds=SECONDS)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGSEGV, "was ended by SIGSEGV"),
        (signal.SIGKILL, "was ended by SIGKILL (the kernel does that for want of host memory)"),
    ],
)
def test_a_death_is_told(number: signal.Signals, told: str) -> None:
    with Worker() as worker, pytest.raises(Lost) as lost:
        worker.call(signal.raise_signal, number, seconds=SECONDS)
    assert str(lost.value) == told


def test_a_status_is_told() -> None:
    with Worker() as worker, pytest.raises(Lost, match="ended with status 3"):
        worker.call(os._exit, 3, seconds=SECONDS)


def test_what_hangs_is_ended() -> None:
    with Worker() as worker:
        other = worker.call(os.getpid, seconds=SECONDS)
        with pytest.raises(Lost, match=r"had no end after 0\.05 s"):
            worker.call(time.sleep, 1000, seconds=0.05)
        assert not Path(f"/proc/{other}").exists()


def test_an_interrupt_is_ours_and_ends_it() -> None:
    """As from a terminal, where both are told."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Worker() as worker:
            other = worker.call(os.getpid, seconds=SECONDS)
            os.kill(other, signal.SIGINT)
            assert worker.call(os.getpid, seconds=SECONDS) == other
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                worker.call(time.sleep, 1000, seconds=SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path(f"/proc/{other}").exists()


def test_it_ends_with_us_even_in_the_middle_of_a_call() -> None:
    """And a script without a guard is not run a second time."""
    script = (
        "import os, threading, time; from fitlora.worker import Worker\n"
        "worker = Worker(); print('begun', flush=True)\n"
        "worker.call(abs, 1, seconds=30); threading.Timer(0.05, os._exit, (7,)).start()\n"
        "worker.call(time.sleep, 1000, seconds=1000)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # it has our output too, and only the end of both closes that
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (7, "begun\n")
