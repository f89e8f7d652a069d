"""Progress as a user sees it, with a terminal and without."""

import io
import sys

import pytest

from fitlora import progress as module
from fitlora.progress import progress


def test_items_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 12.0, 13.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("base", 8) as advance:
        for _ in range(4):
            advance(2)
    assert capsys.readouterr().out == "base: 4 of 8, 12 s left\n"


def test_items_in_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    with progress("adapter", 8) as advance:
        advance(8)
    said = capsys.readouterr().out
    assert "adapter" in said
    assert "8/8" in said


def test_bytes_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 4.0, 16.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with progress("quantizing", 100 << 20, in_bytes=True) as advance:
        advance(20 << 20)  # after 4 s: too soon for a line
        advance(20 << 20)  # after 16 s
        advance(60 << 20)  # done: the caller has the last word
    assert capsys.readouterr().out == (
        "quantizing: 40.00 MiB of 100.00 MiB, 2.50 MiB/s, 24 s left\n"
    )


def test_bytes_in_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("quantizing", 64 << 20, in_bytes=True) as advance:
        advance(64 << 20)
    assert "quantizing" in terminal.getvalue()
    assert "64.0/64.0 MiB" in terminal.getvalue()
