"""A fresh process that does calls for this one: what they take, or break, is gone with it.

A CUDA context, an allocator and what libraries keep can be had anew in no other way, and a process
that a driver or the kernel ends need not be this one. It is started as a command: a fork cannot use a
GPU, and `multiprocessing` would run a user's script, if that has no guard, a second time. A call is a
function of some module with its arguments, over a pipe that no other process has; there is one at a
time.

Its messages go where ours do. It ends with this process, however that ends; the kernel, short of memory,
takes it first; and Ctrl-C is left to us.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from fitlora.errors import UserError

Result = TypeVar("Result")

END_SECONDS = 60.0  # pinned memory goes back slowly; what a driver holds fast never ends


class Lost(Exception):
    """A call's process has ended without its result; the text says how, to follow on "it".

    by: the signal that ended it, where one did that was not ours.
    """

    def __init__(self, how: str, by: signal.Signals | None = None) -> None:
        super().__init__(how)
        self.by = by


class Worker:
    """The process; as a context manager it is ended after the block.

    expected: a function whose module it imports while we do something else.
    """

    def __init__(self, expected: Callable[..., Any] | None = None) -> None:
        self._pipe, theirs = Pipe()
        paths = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fitlora.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": paths},
            )
        if expected is not None:
            self._pipe.send(expected)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def call(self, function: Callable[..., Result], *arguments: Any, seconds: float) -> Result:
        """What `function(*arguments)` returns there.

        Raises UserError where it does, and Lost where it raises anything else (its traceback is then
        printed), ends the process, or has no end after so many seconds. There is no calling after that.
        """
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(seconds):
                self.close()
                raise Lost(f"had no end after {seconds:g} s")
            outcome, content = self._pipe.recv()
        except (EOFError, OSError):
            raise self._how_it_ended() from None
        if outcome == "refused":
            raise UserError(content)
        if outcome == "failed":
            self.close()
            raise Lost(content)
        found: Result = content
        return found

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._pipe.close()

    def _how_it_ended(self) -> Lost:
        status = self._process.wait()
        if status >= 0:
            return Lost(f"ended with status {status}; its own error is above")
        by = signal.Signals(-status)
        short = " (the kernel does that for want of host memory)" if by == signal.SIGKILL else ""
        return Lost(f"was ended by {by.name}{short}", by)


def serve(pipe: Connection) -> None:
    """What the process does: a call after the other, to the first that fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):  # where there is no such file, the kernel takes whom it likes
        Path("/proc/self/oom_score_adj").write_text("1000")
    calls: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(pipe, calls), daemon=True).start()
    outcome = ""
    while outcome != "failed":
        try:
            call = ForkingPickler.loads(calls.get())  # as Connection.recv, in the thread that calls
            if callable(call):  # expected: it is imported now
                continue
            function, arguments = call
            outcome, content = "done", function(*arguments)
        except UserError as error:
            outcome, content = "refused", str(error)
        except Exception as error:  # whatever it is, only we can tell
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome, content = "failed", f"ended in {text}"
        pipe.send((outcome, content))


def _listen(pipe: Connection, calls: "SimpleQueue[bytes]") -> None:
    """Hands calls on; where nobody is left to make any, ends the process, whatever it does."""
    with suppress(EOFError, OSError):
        while True:
            calls.put(pipe.recv_bytes())
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
