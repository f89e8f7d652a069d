"""What a run computed in and which layers it froze, over time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitlora.plan import Plan
from fitlora.report.html import Content, Html, table, tag
from fitlora.report.log import TrainingLog


def adaptation(log: TrainingLog, plan: Plan) -> list[Html]:
    """A table of switches and frozen layers from the first step on; nothing where there were none.

    plan: the one that the run began with.
    """
    rows = sorted(_rows(log), key=lambda row: int(str(row[0]).replace(",", "")))
    if not rows and not plan.frozen_layers:
        return []
    frozen = _layers(plan.frozen_layers) if plan.frozen_layers else "no layers frozen"
    planned = f"{plan.compute_dtype}, {frozen}"
    return [
        tag("h3", "Precision and frozen layers"),
        table(("step", "from then on", "cause"), [("1", planned, "the plan"), *rows], numbers=(0,)),
    ]


def _rows(log: TrainingLog) -> Iterator[tuple[Content, ...]]:
    for choice in log.choices:
        yield _row(choice, _layers(choice["frozen_layers"]))
    for switch in log.switches:
        scale = switch["loss_scale"]
        scaled = "" if scale == 1.0 else f", losses scaled by {scale:,.0f}"
        yield _row(switch, f"{switch['after']} after {switch['before']}{scaled}")
    for change in log.plans:
        frozen = change["after"].get("frozen_layers", [])
        if frozen != change["before"].get("frozen_layers", []):
            yield _row(change, _layers(frozen))


def _row(record: Mapping[str, Any], what: str) -> tuple[Content, ...]:
    return f"{record['step']:,}", what, str(record["cause"])


def _layers(numbers: Sequence[int]) -> str:
    return f"layers {', '.join(map(str, numbers))} frozen"
