"""artifacts/training.jsonl as it grows, and the curves that DVC plots, written at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fitlora.artifacts import dump_line

# What DVC plots; every point has every one, as its plots need.
_CURVES = ("loss", "validation_loss", "learning_rate", "tokens_per_second", "allocated_bytes")


class RunLog:
    """The records of a run, in a file as soon as they are written.

    path: None keeps the lines and writes nothing, for the ranks beside the first.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: list[str] = []
        self._points: dict[int, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        self._open()

    def _open(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # It may be a link into a cache, which is never to be written.
            self.path.unlink(missing_ok=True)
            self._file = self.path.open("w", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line, at once."""
        self._append(dump_line(record))

    def restore(self, lines: Sequence[str]) -> None:
        """Begins again with these lines and no others."""
        self.close()
        self.lines, self._points = [], {}
        self._open()
        for line in lines:
            self._append(line)

    def _append(self, line: str) -> None:
        self.lines.append(line)
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        record = json.loads(line)
        if record["event"] in ("step", "evaluation"):
            empty = {"step": record["step"], **dict.fromkeys(_CURVES)}
            point = self._points.setdefault(record["step"], empty)
            point.update({key: record[key] for key in _CURVES if record.get(key) is not None})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that was written."""
        return [json.loads(line) for line in self.lines]

    @property
    def curves(self) -> list[dict[str, Any]]:
        """One point for each step, for plots."""
        return [self._points[step] for step in sorted(self._points)]
