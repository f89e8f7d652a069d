"""artifacts/training.jsonl, as the report reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fitlora.artifacts import RunFigures, parse_json
from fitlora.errors import ArtifactError

Entry = Mapping[str, Any]


class _Line(BaseModel):
    """What is read of a line; further keys are the log's own business."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Step(_Line):
    event: Literal["step"]
    step: int
    loss: float
    tokens_per_second: float
    allocated_bytes: int | None
    reserved_bytes: int | None
    phase_bytes: dict[str, int] = {}
    component_bytes: dict[str, int] = {}


class _Evaluation(_Line):
    event: Literal["evaluation"]
    step: int
    validation_loss: float


class _Change(_Line):
    event: Literal["plan"]
    step: int
    cause: str
    before: dict[str, Any]
    after: dict[str, Any]


class _Switch(_Line):
    event: Literal["precision"]
    step: int
    cause: str
    before: str
    after: str
    loss_scale: float


class _Choice(_Line):
    event: Literal["freeze"]
    step: int
    cause: str
    frozen_layers: list[int]


class TrainingEnd(_Line):
    """The last line of a run that came to its end."""

    event: Literal["end"]
    steps: int
    seconds: float
    predicted_peak_bytes: int
    measured_peak_bytes: int = Field(gt=0)
    measured_reserved_bytes: int | None
    forecast_tokens_per_second: float | None = None
    warnings: list[str] = []
    recommendations: list[str] = []


_LINES: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        _Step | _Evaluation | _Change | _Switch | _Choice | TrainingEnd,
        Field(discriminator="event"),
    ]
)


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
                entries = [parse_json(line) for line in lines]
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing; make it with: dvc repro train_adapters"
            ) from None
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); {again}") from None
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged ({error}); {again}") from None
        for number, entry in enumerate(entries, start=1):
            try:
                _LINES.validate_python(entry)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise ArtifactError(
                    f"{path} is damaged in line {number}: {said}; {again}"
                ) from None
        if not entries or entries[-1]["event"] != "end":
            raise ArtifactError(f"{path} is of a run that was cut short; {again}")

        def of(event: str) -> tuple[Entry, ...]:
            return tuple(entry for entry in entries if entry["event"] == event)

        if not of("step"):
            raise ArtifactError(f"{path} is damaged: it has no steps; {again}")
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

    def layers_left(self, dtype: str) -> bool:
        """Whether decoder layers computed in another precision than `dtype` at the run's end."""
        return bool(self.switches) and self.switches[-1]["after"] != dtype

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
