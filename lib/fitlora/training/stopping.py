"""Stopping in an orderly way: SIGINT (Ctrl-C) and SIGTERM ask a run to save itself and to end.

The signal is only noted; the run looks at it between micro-batches, where nothing is half done. The
second one acts as it would without a run.
"""

import signal
import threading
from types import FrameType
from typing import Any


class StopAsked(Exception):
    """The run is to end here; raised between micro-batches."""


class Stop:
    """Notes that a signal came; a context manager around a run. Outside the main thread it is deaf."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        signal.signal(number, self._before[number])

    def check(self) -> None:
        """Raises StopAsked once a signal has come."""
        if self.asked is not None:
            raise StopAsked

    @property
    def reason(self) -> str:
        """Who asked: a signal, by its name, or another of the run's processes."""
        return "another process" if self.asked is None else self.asked.name

    def ending(self) -> BaseException:
        """How the program ends then: status 130 after Ctrl-C, and 143 otherwise."""
        if self.asked == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)
