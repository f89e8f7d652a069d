"""Ctrl-C at any move of bytes: nothing hangs, the step can be done again, and memory goes back."""

import gc
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fitlora.step.training_step import TrainingStep
from tests.offload.transports import DelayedTransport
from tests.step import steps
from tests.step.test_shared_pass import STREAMED, assert_same, build, run

MOVES = ("_upload", "_download", "mark", "wait")


class Interrupting(DelayedTransport):
    """Ends the `left`-th half of a move that the step's own thread asks for by KeyboardInterrupt."""

    left = 0
    _counts = False

    def watch(self, step: TrainingStep) -> None:
        """Begins to count, but for an update, which cannot be done again."""
        step.phase = self._phase
        for name in MOVES:
            setattr(self, name, self._counted(getattr(self, name)))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._counts = name != "optimizer"
        yield
        self._counts = False

    def _tick(self) -> None:
        if self._counts and threading.current_thread() is threading.main_thread():
            self.left -= 1
            if self.left == 0:
                self._counts = False
                raise KeyboardInterrupt

    def _counted(self, move: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self._tick()
            found = move(*arguments)
            self._tick()
            return found

        return counted


def interrupted(step: TrainingStep, transport: Interrupting, after: int) -> int:
    """Runs a step that ends after so many ticks, if it has as many; returns those that it had."""
    transport.left = after
    try:
        step.run(steps.sequences(7), step=0, learning_rate=1e-2, accept=lambda *_: False)
    except KeyboardInterrupt:
        step.abandon()
    return after - transport.left


@pytest.mark.slow
def test_a_step_may_end_at_any_move_and_be_done_again(tmp_path: Path) -> None:
    transport = Interrupting()
    transport.folder = tmp_path
    layout = {**STREAMED, "head": "host", "optimizer_device": "host", "disk_layers": 1}
    expected = run(build(1, **{**layout, "disk_layers": 0}))
    step = build(3, transport, **layout)
    transport.watch(step)
    whole = interrupted(step, transport, 10**6)
    assert whole > 100
    for after in sorted(random.Random(0).sample(range(1, whole + 1), 16)):
        assert interrupted(step, transport, after) == after
    assert_same(run(step), expected)
    memory = transport.memory
    del step
    end = time.monotonic() + 10  # the host's thread holds the step until its last update is done
    while memory.bytes and time.monotonic() < end:
        time.sleep(0.01)
        gc.collect()
    assert memory.bytes == 0
