"""A step as a row of moments."""

from fitlora.memory.moments import moments
from fitlora.memory.timeline import Level, Segment


def level(size: int) -> Level:
    parts = dict.fromkeys(
        ("adapters", "gradients", "optimizer_states", "activations", "temporary_buffers"), 0
    )
    return Level({"weights": size, **parts}, "somewhere")


def test_the_last_step_and_its_evaluation_in_order() -> None:
    segments = {
        Segment(0, 0, "load", ""): 1,
        Segment(0, 1, "forward", ""): 2,
        Segment(0, 1, "optimizer", ""): 3,
        Segment(1, 0, "build", ""): 4,
        Segment(1, 1, "forward", "kept layers"): 5,
        Segment(1, 1, "backward", "kept layers"): 6,
        Segment(1, 1, "optimizer", ""): 7,
        Segment(2, 0, "evaluation", ""): 8,
    }
    found = moments({segment: level(size) for segment, size in segments.items()}, 100)
    assert [(m.name, m.components.weights) for m in found] == [
        ("start", 4),
        ("forward of kept layers", 5),
        ("backward of kept layers", 6),
        ("optimizer", 7),
        ("evaluation", 8),
    ]
    assert {m.components.library_workspaces for m in found} == {100}
    assert found[0].components.total == 104


def test_passes_are_told_apart_where_there_are_several() -> None:
    phases = ("forward", "build", "backward")
    segments = [Segment(0, n, phase, "") for n in (1, 2) for phase in phases]
    segments.append(Segment(0, 2, "optimizer", ""))
    names = [m.name for m in moments({s: level(1) for s in segments}, 0)]
    assert names == [
        "pass 1: forward",
        "pass 1: between phases",
        "pass 1: backward",
        "pass 2: forward",
        "pass 2: between phases",
        "pass 2: backward",
        "optimizer",
    ]
