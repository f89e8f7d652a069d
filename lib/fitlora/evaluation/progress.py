"""How far an evaluation is: a bar on a terminal, and elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fitlora.console import say

LINE_SECONDS = 10.0  # between two lines where there is no terminal


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` is done and the time left; gives what to call with what was done."""
    if sys.stdout.isatty():
        with _bar(title, total) as advance:
            yield advance
        return
    start = spoken = time.monotonic()
    done = 0

    def speak(count: int) -> None:
        nonlocal done, spoken
        done += count
        now = time.monotonic()
        if now - spoken >= LINE_SECONDS and done < total:
            spoken = now
            left = (now - start) / done * (total - done)
            say(f"{title}: {done} of {total}, {left:.0f} s left")

    yield speak


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # transient: the line with the result takes the bar's place
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
