"""One step as a row of moments: the highest level of each of its stretches, by what the bytes are for.

The first step of a trace lacks the optimizer's states, which it makes; so it is the last one that is
shown, and the evaluation behind it.

This module imports no torch.
"""

from collections.abc import Mapping

from fitlora.artifacts import Components, Moment
from fitlora.memory.timeline import Level, Segment


def moments(levels: Mapping[Segment, Level], workspace_bytes: int) -> tuple[Moment, ...]:
    """The last optimizer step of a trace and its evaluation, in order.

    levels: each segment's highest level, in the order of the run. workspace_bytes: what libraries keep
    on the device all along.
    """
    last = max((s.step for s in levels if s.phase == "optimizer"), default=0)
    shown = [s for s in levels if s.step == last or s.phase == "evaluation"]
    several = len({s.micro_batch for s in shown if s.phase == "forward"}) > 1
    return tuple(
        Moment(
            name=f"pass {s.micro_batch}: {_name(s)}" if several and _in_pass(s) else _name(s),
            components=Components(**levels[s].components, library_workspaces=workspace_bytes),
        )
        for s in shown
    )


def _name(segment: Segment) -> str:
    """In words; what is outside of the phases is built before a forward, or on the way between two."""
    if segment.phase != "build":
        return str(segment)
    return "between phases" if segment.micro_batch else "start"


def _in_pass(segment: Segment) -> bool:
    return segment.micro_batch > 0 and segment.phase != "optimizer"
