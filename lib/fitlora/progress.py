"""How far long work is: a bar on a terminal, and elsewhere a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fitlora.console import say
from fitlora.units import format_bytes

LINE_SECONDS = 10.0  # between two lines where there is no terminal


@contextmanager
def progress(title: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` is done and the time left; gives what to call with what was done.

    in_bytes: counts are bytes, and their rate is shown. Any thread may report.
    """
    if sys.stdout.isatty():
        with _bar(title, total, in_bytes) as advance:
            yield advance
        return
    start = spoken = time.monotonic()
    done = 0
    lock = threading.Lock()

    def speak(count: int) -> None:
        nonlocal done, spoken
        with lock:
            done += count
            now = time.monotonic()
            if now - spoken < LINE_SECONDS or done >= total:
                return
            spoken = now
            rate = done / (now - start)
            left = f"{(total - done) / max(rate, 1e-9):.0f} s left"
            if in_bytes:
                so_far = f"{format_bytes(done)} of {format_bytes(total)}"
                say(f"{title}: {so_far}, {format_bytes(int(rate))}/s, {left}")
            else:
                say(f"{title}: {done} of {total}, {left}")

    yield speak


@contextmanager
def _bar(title: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn())
        if in_bytes
        else (MofNCompleteColumn(), TimeElapsedColumn())
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    # transient: the line with the result takes the bar's place
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
