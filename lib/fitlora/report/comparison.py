"""Two or more runs side by side: what they were asked, how they were laid out, and how they came out.

A run is a folder with params.yaml and artifacts, or a revision of this repository whose artifacts DVC
has. What a run does not have (one that was not evaluated, say) is left open rather than an error, so
that a run can be compared while another is still at work.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict

from fitlora.artifacts import (
    EVALUATION,
    MEMORY_ESTIMATE,
    PLAN,
    TRAINING_LOG,
    Evaluation,
    MemoryEstimate,
    PlanArtifact,
)
from fitlora.errors import UserError
from fitlora.params import PARAMS_FILE, parse_yaml
from fitlora.report.log import TrainingLog
from fitlora.units import format_bytes

_FILES = (PARAMS_FILE, PLAN, MEMORY_ESTIMATE, TRAINING_LOG, EVALUATION)
_SECTIONS = ("params", "plan", "memory", "speed", "quality")
# Where a value that both share says nothing: what is shown of these is what tells the runs apart.
_ONLY_DIFFERENCES = ("params", "plan")
_WIDTH = 400  # columns, at most
_SHARES = ("exact match", "agreement")

Value = str | int | float | bool | None


class Row(BaseModel):
    """One figure of each run; None where a run does not have it."""

    model_config = ConfigDict(frozen=True)

    section: str
    name: str
    values: tuple[Value, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs are told apart by it."""
        return any(value != self.values[0] for value in self.values)


class Comparison(BaseModel):
    """What `fitlora compare` shows."""

    model_config = ConfigDict(frozen=True)

    runs: tuple[str, ...]
    rows: tuple[Row, ...]


def compare_runs(names: Sequence[str]) -> Comparison:
    """names: folders, or revisions. Raises UserError for one that is no run."""
    with ExitStack() as stack:
        found = [_figures(name, stack.enter_context(_folder_of(name))) for name in names]
    rows = []
    for section in _SECTIONS:
        keys = dict.fromkeys(key for figures in found for key in figures.get(section, {}))
        for key in keys:
            values = tuple(figures.get(section, {}).get(key) for figures in found)
            rows.append(Row(section=section, name=key, values=values))
    return Comparison(runs=tuple(names), rows=tuple(rows))


@contextmanager
def _folder_of(name: str) -> Iterator[Path]:
    """The run's folder; a revision's files are brought into one from DVC's cache."""
    if Path(name).is_dir():
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        _fetch(name, Path(folder))
        yield Path(folder)


def _fetch(revision: str, folder: Path) -> None:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import RevError, resolve_rev

    try:
        with Repo() as repo:
            commit = resolve_rev(repo.scm, revision)
        files = DVCFileSystem(str(Path.cwd()), rev=commit)
        for path in _FILES:
            if files.exists(path.as_posix()):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                files.get_file(path.as_posix(), str(folder / path))
    except (RevError, NotDvcRepoError):
        raise UserError(f"{revision} is neither a folder nor a revision here") from None
    except (DvcException, OSError) as error:
        raise UserError(
            f"{revision}: DVC does not have its artifacts ({error}); get them with dvc pull, or run it"
        ) from None


def _figures(name: str, folder: Path) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    if (folder / PARAMS_FILE).is_file():
        text = (folder / PARAMS_FILE).read_text(encoding="utf-8")
        found["params"] = dict(_flat(parse_yaml(text, f"{name}: {PARAMS_FILE}")))
    if (folder / PLAN).is_file():
        plan = PlanArtifact.read(folder / PLAN).plan
        found["plan"] = {
            **dict(_flat(plan.model_dump(mode="json"))),
            "accumulation": plan.accumulation,
        }
    if (folder / MEMORY_ESTIMATE).is_file():
        estimate = MemoryEstimate.read(folder / MEMORY_ESTIMATE)
        found["memory"] = {"budget_bytes": estimate.budget_bytes}
    if (folder / TRAINING_LOG).is_file():
        figures = TrainingLog.read(folder / TRAINING_LOG).figures().model_dump()
        for name, value in figures.items():
            section = "memory" if name.endswith("_bytes") else "speed"
            found.setdefault(section, {})[name] = value
    if (folder / EVALUATION).is_file():
        found["quality"] = dict(_quality(Evaluation.read(folder / EVALUATION)))
    if not found:
        raise UserError(f"{name} has no params.yaml and no artifacts; it is not a run's folder")
    return found


def _quality(evaluation: Evaluation) -> Iterator[tuple[str, Value]]:
    yield "rows", evaluation.rows
    for key, title in evaluation.titles.items():
        metrics = getattr(evaluation, key)
        for figure in ("exact_match", "loss", "perplexity"):
            yield f"{title}: {figure.replace('_', ' ')}", getattr(metrics, figure)
    merged = evaluation.fidelity["merged"]
    yield "merge: KL divergence", merged.kl_divergence
    yield "merge: top-1 agreement", merged.top1_agreement


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Nested sections as dotted keys; a list as its text."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, str | int | float | bool) or content is None:
        yield prefix, content
    else:
        yield prefix, str(list(content))


def show(comparison: Comparison, file: TextIO | None = None) -> None:
    """Prints the comparison to `file`, or to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # as wide as it comes: a cut name would not tell runs apart
    console = Console(file=file, width=_WIDTH, highlight=False, emoji=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in comparison.runs:
        table.add_column(run, justify="right")
    table.add_column("", justify="right")
    for section in _SECTIONS:
        rows = [row for row in comparison.rows if row.section == section]
        shown = [row for row in rows if row.differs or section not in _ONLY_DIFFERENCES]
        if not rows:
            continue
        table.add_row(section, *[""] * len(comparison.runs), style="bold")
        for row in shown:
            values = [_words(row.name, value) for value in row.values]
            table.add_row(
                f"  {row.name.removesuffix('_bytes').replace('_', ' ')}", *values, _change(row)
            )
        if not shown:
            table.add_row("  (the same)", *[""] * len(comparison.runs))
        table.add_section()
    console.print(table)


def _words(name: str, value: Value) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.1%}" if name.endswith(_SHARES) else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _change(row: Row) -> str:
    """From the first run to the last, where both are numbers: in points for shares, else in percent."""
    first, last = row.values[0], row.values[-1]
    if row.section in _ONLY_DIFFERENCES or not row.differs:
        return ""
    if not isinstance(first, int | float) or not isinstance(last, int | float):
        return ""
    if row.name.endswith(_SHARES):
        return f"{100 * (last - first):+.1f} points"
    if not first:
        return ""
    return f"{last / first - 1:+.1%}"
