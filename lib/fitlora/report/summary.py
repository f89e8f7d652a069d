"""What a run came to, in one screen: four models side by side, memory predicted and measured, places.

Everything is read from the artifacts, so the table can be shown again at any time and says nothing
that a file does not. It is plain text, as readable in a log as in a terminal.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from fitlora.artifacts import (
    ADAPTER,
    EVALUATION,
    MERGED_MODEL,
    PLAN,
    QUANTIZED_MODEL,
    REPORT,
    TRAINING_LOG,
    Evaluation,
    Fidelity,
    Metrics,
    PlanArtifact,
    parse_json,
)
from fitlora.errors import ArtifactError
from fitlora.report.log import TrainingEnd
from fitlora.units import format_bytes


class Summary(BaseModel):
    """What `fitlora summary` shows."""

    model_config = ConfigDict(frozen=True)

    rows: int
    titles: dict[str, str]
    models: dict[str, Metrics]
    merge: Fidelity
    device: str
    plan: str
    steps: int
    seconds: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    places: dict[str, str]

    def error_of_prediction(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return self.predicted_peak_bytes / self.measured_peak_bytes - 1


def summarize(root: Path = Path()) -> Summary:
    """Reads what a run left under `root`; raises ArtifactError that names the stage to run."""
    evaluation = Evaluation.read(root / EVALUATION)
    plan = PlanArtifact.read(root / PLAN).plan
    end = _read_end(root / TRAINING_LOG)
    return Summary(
        rows=evaluation.rows,
        titles=evaluation.titles,
        models={key: getattr(evaluation, key) for key in evaluation.titles},
        merge=evaluation.fidelity["merged"],
        device=plan.device,
        plan=plan.describe(),
        steps=end.steps,
        seconds=end.seconds,
        predicted_peak_bytes=end.predicted_peak_bytes,
        measured_peak_bytes=end.measured_peak_bytes,
        places={
            "report": str(root / REPORT),
            "adapter": str(root / ADAPTER),
            "merged model": str(root / MERGED_MODEL),
            evaluation.titles["quantized_base"]: str(root / QUANTIZED_MODEL),
            "plan": str(root / PLAN),
            "evaluation": str(root / EVALUATION),
            "training log": str(root / TRAINING_LOG),
        },
    )


def _read_end(path: Path) -> TrainingEnd:
    again = "make it again with: dvc repro --force train_adapters"
    try:
        with path.open(encoding="utf-8") as file:
            last = deque(file, maxlen=1)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; make it with: dvc repro train_adapters") from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is damaged ({error}); {again}") from None
    try:
        return TrainingEnd.model_validate(parse_json(last[0]))
    except (IndexError, ValueError):  # pydantic's own errors are ValueErrors
        raise ArtifactError(
            f"{path} does not end with a training run's last line, so the run was cut short; {again}"
        ) from None


def show(summary: Summary, file: TextIO | None = None) -> None:
    """Prints the summary to `file`, or to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False, soft_wrap=True, emoji=False, markup=False)
    models = Table(box=box.SIMPLE_HEAD, title=f"{summary.rows} held-out rows", title_justify="left")
    models.add_column("model")
    for column in ("loss", "perplexity", "exact match", "95% interval"):
        models.add_column(column, justify="right")
    for key, metrics in summary.models.items():
        low, high = metrics.exact_match_interval
        models.add_row(
            summary.titles[key],
            f"{metrics.loss:.4f}",
            f"{metrics.perplexity:.3f}",
            f"{100 * metrics.exact_match:.1f}%",
            f"{100 * low:.1f}% to {100 * high:.1f}%",
        )
    console.print(models)
    for name, value in _lines(summary):
        console.print(f"  {name:<16}{value}")


def _lines(summary: Summary) -> Iterator[tuple[str, str]]:
    what = "allocator" if summary.device == "cuda" else "live tensors"
    yield "training", f"{summary.steps} steps in {summary.seconds:.0f} s"
    yield "plan", summary.plan
    yield (
        "peak memory",
        f"predicted {format_bytes(summary.predicted_peak_bytes)}, "
        f"measured {format_bytes(summary.measured_peak_bytes)} ({what}); "
        f"off by {100 * summary.error_of_prediction():+.1f}%",
    )
    merge = summary.merge
    yield (
        "merge",
        f"KL {merge.kl_divergence:.2g} nats from the adapter, "
        f"top-1 agreement {merge.top1_agreement:.2%}",
    )
    yield from summary.places.items()
