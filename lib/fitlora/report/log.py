"""artifacts/training.jsonl, as the report reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fitlora.artifacts import RunFigures
from fitlora.errors import ArtifactError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingLog:
    """The records of a finished run by their event; `plans` are changes of plan on the way."""

    steps: tuple[Entry, ...]
    evaluations: tuple[Entry, ...]
    plans: tuple[Entry, ...]
    end: Entry
    switches: tuple[Entry, ...] = ()  # of precision
    choices: tuple[Entry, ...] = ()  # of layers to freeze

    @classmethod
    def read(cls, path: Path) -> "TrainingLog":
        """Raises ArtifactError for a log that is missing, damaged, or of a run that was cut short."""
        again = "make it again with: dvc repro --force train_adapters"
        try:
            with path.open(encoding="utf-8") as lines:
                entries = [json.loads(line) for line in lines]
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing; make it with: dvc repro train_adapters"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); {again}") from None
        if not all(isinstance(entry, dict) and "event" in entry for entry in entries):
            raise ArtifactError(f"{path} is damaged: a line is no record; {again}")
        if not entries or entries[-1]["event"] != "end":
            raise ArtifactError(f"{path} is of a run that was cut short; {again}")

        def of(event: str) -> tuple[Entry, ...]:
            return tuple(entry for entry in entries if entry["event"] == event)

        return cls(
            of("step"), of("evaluation"), of("plan"), entries[-1], of("precision"), of("freeze")
        )

    @property
    def tokens_per_second(self) -> float:
        """The median step's."""
        return float(median(entry["tokens_per_second"] for entry in self.steps))

    @property
    def forecast_tokens_per_second(self) -> float | None:
        """What the probe reached; None where it did not measure."""
        found: float | None = self.end.get("forecast_tokens_per_second")
        return found

    def figures(self) -> RunFigures:
        """The run in few numbers."""
        return RunFigures(
            steps=self.end["steps"],
            seconds=float(self.end["seconds"]),
            tokens_per_second=self.tokens_per_second,
            forecast_tokens_per_second=self.forecast_tokens_per_second,
            predicted_peak_bytes=self.end["predicted_peak_bytes"],
            measured_peak_bytes=self.end["measured_peak_bytes"],
            measured_reserved_bytes=self.end["measured_reserved_bytes"],
            changes_of_plan=len(self.plans),
        )

    @property
    def phase_bytes(self) -> dict[str, int]:
        """The most that each phase allocated, as far as it was measured."""
        found: dict[str, int] = {}
        for entry in self.steps:
            for phase, count in (entry.get("phase_bytes") or {}).items():
                found[phase] = max(found.get(phase, 0), count)
        return found
