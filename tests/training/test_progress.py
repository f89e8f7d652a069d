"""How a run is shown: live in a terminal, as plain lines elsewhere."""

import io
import re
import sys
from typing import Any

import pytest

from fitlora.plan import Plan
from fitlora.training import progress as module
from fitlora.training.progress import Expected, TrainingProgress
from fitlora.units import MIB

PLAN = Plan(
    device="cpu",
    effective_batch_size=4,
    micro_batch_size=4,
    evaluation_batch_size=4,
    sequence_length=64,
    compute_dtype="float32",
    optimizer="adamw",
    loss_chunk_tokens=64,
).model_dump(mode="json")
EXPECTED = Expected(budget_bytes=400 * MIB, peak_bytes=210 * MIB, tokens_per_second=2000.0)


def step(number: int, peak: int | None = 200 * MIB, loss: float = 0.5) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "tokens_per_second": 1500.0,
        "allocated_bytes": peak,
    }


CHANGE = {"event": "plan", "step": 3, "cause": "out of [memory]", "before": PLAN, "after": PLAN}
VALIDATION = {"event": "evaluation", "step": 2, "validation_loss": 0.25}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Takes the place of the standard output; within a test, as pytest has its own between them."""
    found = Terminal()
    monkeypatch.setattr(sys, "stdout", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return found


def lines_of(terminal: Terminal) -> list[str]:
    """The last picture on the screen, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return [" ".join(line.split()) for line in text.replace("\r", "\n").splitlines()]


def test_a_terminal_shows_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with TrainingProgress(8, expected=EXPECTED) as shown:
        for record in (step(1), VALIDATION, CHANGE, step(2, peak=None, loss=0.125)):
            shown.show(record)
    lines = lines_of(terminal)
    assert "loss 0.1250, validation 0.2500 at step 2" in lines
    assert "speed 1,500 tokens/s, 75% of the forecast" in lines
    memory = next(line for line in reversed(lines) if line.startswith("memory"))
    assert memory.endswith("peak 200.00 MiB of 400.00 MiB, predicted 210.00 MiB")
    assert "fallbacks 1, the last at step 3: out of [memory]" in lines
    assert any(line.startswith("training") and "2/8" in line for line in lines)
    # what happened stays above the view, as lines
    assert "step 2: validation loss 0.2500" in lines
    assert any(line.startswith("step 3: out of [memory]; going on with") for line in lines)


def test_a_terminal_shows_what_is_known_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with TrainingProgress(8) as shown:
        shown.show(step(1))
    lines = lines_of(terminal)
    assert "speed 1,500 tokens/s" in lines
    assert "memory peak 200.00 MiB" in lines
    assert "fallbacks none" in lines


def test_elsewhere_it_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    with TrainingProgress(10, done=4, expected=EXPECTED) as shown:
        for number in range(5, 11):
            now += 4.0
            shown.show(step(number))
        shown.show(VALIDATION)
        shown.show(CHANGE)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    tail = "loss 0.5000, 1,500 tokens/s, peak 200.00 MiB"
    assert lines[0] == f"step 5/10: {tail}, 20 s left"
    assert lines[1] == f"step 8/10: {tail}, 8 s left"  # not every step
    assert lines[2] == "step 2: validation loss 0.2500"
    assert lines[3].startswith("step 3: out of [memory]; going on with micro-batch 4 x 1")
    assert len(lines) == 4
