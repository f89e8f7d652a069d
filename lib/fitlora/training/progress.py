"""How a run looks while it runs: a live view in a terminal, a line now and then elsewhere.

Both are made of the records that go to the run's log, so what is on the screen is what is kept.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table

from fitlora.console import say
from fitlora.plan import Plan
from fitlora.units import format_bytes

_SECONDS_BETWEEN_LINES = 10.0
_NEAR = 0.95  # of the budget: shown in another colour


@dataclass(frozen=True)
class Expected:
    """What a run is held against while it runs; what is not known is None, and not shown."""

    budget_bytes: int | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None


class TrainingProgress:
    """Shows a run's records; use as a context manager around it."""

    def __init__(self, total_steps: int, done: int = 0, expected: Expected | None = None) -> None:
        """done: steps of an earlier part of the run."""
        self.total_steps, self._first = total_steps, done
        self._expected = expected or Expected()
        self._step: Mapping[str, Any] = {}
        self._validation: Mapping[str, Any] = {}
        self._peak_bytes: int | None = None
        self._changes: list[str] = []
        self._live: Live | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=done)
            # transient: the lines with the result take its place
            self._live = Live(get_renderable=self._view, refresh_per_second=4, transient=True)
        self._start = time.perf_counter()
        self._last_line = 0.0

    def __enter__(self) -> "TrainingProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Takes in one record of the run's log."""
        done = record["step"]
        if record["event"] == "evaluation":
            self._validation = record
            say(f"step {done}: validation loss {record['validation_loss']:.4f}")
        elif record["event"] == "plan":
            after = Plan.model_validate(record["after"])
            self._changes.append(f"step {done}: {record['cause']}")
            say(f"step {done}: {record['cause']}; going on with {after.describe()}")
        elif record["event"] == "precision":
            scale = record["loss_scale"]
            scaled = "" if scale == 1.0 else f", losses scaled by {scale:,.0f}"
            self._changes.append(f"step {done}: {record['cause']}")
            say(f"step {done}: {record['cause']}; going on in {record['after']}{scaled}")
        elif record["event"] == "freeze":
            frozen = ", ".join(map(str, record["frozen_layers"]))
            say(f"not trained are the adapters of layers {frozen}: {record['cause']}")
        else:
            self._step = record
            if record["allocated_bytes"] is not None:
                self._peak_bytes = max(self._peak_bytes or 0, record["allocated_bytes"])
            if self._live is not None:
                self._bar.update(self._task, completed=done)
            else:
                self._speak(done)

    def _speak(self, done: int) -> None:
        """A line, if it is time for one."""
        now = time.perf_counter()
        if done > self._first + 1 and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        here = max(1, done - self._first)
        left = (now - self._start) / here * (self.total_steps - done)
        memory = "" if self._peak_bytes is None else f", peak {format_bytes(self._peak_bytes)}"
        say(
            f"step {done}/{self.total_steps}: loss {self._step['loss']:.4f}, "
            f"{self._step['tokens_per_second']:,.0f} tokens/s{memory}, {left:.0f} s left"
        )

    # --- the live view --------------------------------------------------------------------------------

    def _view(self) -> RenderableType:
        facts = Table.grid(padding=(0, 2))
        if self._step:
            facts.add_row("loss", self._loss())
            facts.add_row("speed", self._speed())
        if self._peak_bytes is not None:
            facts.add_row("memory", self._memory())
        if self._changes:
            count = len(self._changes)
            facts.add_row(
                "fallbacks", f"[yellow]{count}[/], the last at {_plain(self._changes[-1])}"
            )
        elif self._step:
            facts.add_row("fallbacks", "none")
        return Group(self._bar, facts)

    def _loss(self) -> str:
        text = f"{self._step['loss']:.4f}"
        if self._validation:
            text += (
                f", validation {self._validation['validation_loss']:.4f} "
                f"at step {self._validation['step']}"
            )
        return text

    def _speed(self) -> str:
        speed, forecast = self._step["tokens_per_second"], self._expected.tokens_per_second
        text = f"{speed:,.0f} tokens/s"
        return text if forecast is None else f"{text}, {speed / forecast:.0%} of the forecast"

    def _memory(self) -> RenderableType:
        assert self._peak_bytes is not None
        budget, predicted = self._expected.budget_bytes, self._expected.peak_bytes
        text = f"peak {format_bytes(self._peak_bytes)}"
        if budget is not None:
            text += f" of {format_bytes(budget)}"
        if predicted is not None:
            text += f", predicted {format_bytes(predicted)}"
        if budget is None:
            return text
        style = "red" if self._peak_bytes > _NEAR * budget else "green"
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(budget, self._peak_bytes, width=16, complete_style=style), text)
        return line


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", r"\[")
