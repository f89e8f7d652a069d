"""How a run looks while it runs: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fitlora.console import say
from fitlora.plan import Plan

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows a run's records; use as a context manager around it."""

    def __init__(self, total_steps: int, done: int = 0) -> None:
        """done: steps of an earlier part of the run."""
        self.total_steps, self._first = total_steps, done
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done)
        self._start = time.perf_counter()
        self._last_line = 0.0

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Takes in one record of the run's log."""
        done = record["step"]
        if record["event"] == "evaluation":
            self._say(f"step {done}: validation loss {record['validation_loss']:.4f}")
            return
        if record["event"] == "plan":
            after = Plan.model_validate(record["after"])
            self._say(f"step {done}: {record['cause']}; going on with {after.describe()}")
            return
        speed = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=speed)
            return
        now = time.perf_counter()
        if done > self._first + 1 and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        here = max(1, done - self._first)
        left = (now - self._start) / here * (self.total_steps - done)
        self._say(f"step {done}/{self.total_steps}: {speed}, {left:.0f} s left")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            say(text)
