"""The tracker on the CPU: its lines, its phases, and that it measures what the trace counts."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.memory.advice import Edge
from fitlora.memory.estimate import Load, rehearse, trace_step
from fitlora.memory.trace import MemoryTrace
from fitlora.memory.tracker import COUNTED_EVERY, COUNTED_FIRST, MemoryTracker
from fitlora.step.weights import RandomWeights
from tests.step import steps

MB = 1 << 20
KEYS = [
    "step",
    "seconds",
    "allocated_bytes",
    "peak_allocated_bytes",
    "reserved_bytes",
    "process_bytes",
    "host_bytes",
    "phases",
    "components",
]


def mb(count: int) -> torch.Tensor:
    return torch.empty(count * MB, dtype=torch.uint8)


def lines(tracker: MemoryTracker) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tracker.path.read_text().splitlines()]


def test_update_without_watch(tmp_path: Path) -> None:
    tracker = MemoryTracker(log_dir=str(tmp_path / "new" / "memory_logs"), device="cpu")
    with tracker.phase("forward"):
        kept = mb(1)
    line = tracker.update(step=7)
    assert list(line) == KEYS
    assert line["step"] == 7
    for key in ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "process_bytes"):
        assert line[key] is None, "the CPU has none, or it was not watched"
    assert line["host_bytes"] > 10 * MB
    assert line["phases"] == line["components"] == {}
    assert lines(tracker) == [line]
    assert tracker.peak_reserved_bytes is None
    assert len(kept) == MB


def test_a_line_for_each_update(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    for step in (1, 2, None):
        tracker.update(step=step)
    found = lines(tracker)
    assert [line["step"] for line in found] == [1, 2, None]
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds)
    MemoryTracker(tmp_path, "cpu").update(step=3)
    assert [line["step"] for line in lines(tracker)] == [1, 2, None, 3]


def test_phases_and_peaks_of_each_update(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    model = torch.nn.Linear(512, 512, bias=False)  # 1 MiB
    with tracker.watch(model.parameters()):
        with tracker.phase("forward"):
            a = mb(4)
            del a
        with tracker.phase("backward"):
            a = mb(2)
        with tracker.phase("forward"):
            b = mb(1)
        first = tracker.update(step=1)
        with tracker.phase("backward"):
            c = mb(1)
            del a, b, c
        second = tracker.update(step=2)
        third = tracker.update(step=3)
    assert first["phases"] == {"forward": 5 * MB, "backward": 3 * MB}
    assert (first["allocated_bytes"], first["peak_allocated_bytes"]) == (4 * MB, 5 * MB)
    # as on a GPU, each line has the peak since the one before
    assert second["phases"] == {"backward": 5 * MB}
    assert (second["allocated_bytes"], second["peak_allocated_bytes"]) == (MB, 5 * MB)
    assert third["phases"] == {}
    assert (third["allocated_bytes"], third["peak_allocated_bytes"]) == (MB, MB)
    assert tracker.peak_allocated_bytes == 5 * MB
    assert lines(tracker) == [first, second, third]


def test_the_peak_of_a_run_is_kept_after_it(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    model = torch.nn.Linear(512, 512, bias=False)
    with tracker.watch(model.parameters()):
        a = mb(3)
        tracker.update(step=1)
        del a
        b = mb(1)  # the last one, before no update
    assert tracker.peak_allocated_bytes == 4 * MB
    assert tracker.update()["allocated_bytes"] == 2 * MB, "as it was at the end of the watch"
    assert tracker.update()["allocated_bytes"] is None, "and that once"
    with tracker.watch(model.parameters()):
        c = mb(7)
    assert tracker.peak_allocated_bytes == 8 * MB
    assert len(c) > len(b)


def test_an_error_inside_ends_the_watch(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")

    def fails() -> None:
        with tracker.watch([]), tracker.phase("forward"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert tracker.update()["allocated_bytes"] == 0
    assert tracker.update()["allocated_bytes"] is None


def test_it_measures_what_the_trace_counts(tmp_path: Path) -> None:
    """A step that is watched takes what the same step is estimated to take."""
    load = Load.uniform(7, 40)
    plan, settings = steps.plan(micro_batch_size=3), steps.settings()
    predicted = trace_step(steps.config(), plan, settings, load)
    with MemoryTrace():  # what was allocated before does not count
        step = steps.step(plan, settings)
    tracker = MemoryTracker(tmp_path, "cpu")
    with tracker.measuring("step", step.parts):
        step.phase = tracker.phase
        rehearse(step, load)
        line = tracker.update(step=1)
    assert tracker.peak_allocated_bytes == predicted.peak_bytes
    assert line["peak_allocated_bytes"] == predicted.peak_bytes
    for phase in ("forward", "backward", "optimizer", "evaluation"):
        assert line["phases"][phase] == predicted.phase_peak_bytes[phase]
    # what is held is told to the byte; a forward leaves some that its backward's peak has no more
    found, expected = line["components"], predicted.components
    assert list(found) == list(expected)
    assert min(found.values()) > 0
    for part in ("weights", "adapters", "gradients", "optimizer_states"):
        assert found[part] == expected[part]
    assert found["activations"] >= expected["activations"]
    assert sum(found.values()) == predicted.peak_bytes


def test_a_peak_in_a_forward_or_an_evaluation_is_told_apart_too(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    weight, kept = mb(5), []

    def parts() -> dict[str, list[torch.Tensor]]:
        return {"weights": [weight, weight[:MB], torch.empty(MB, device="meta")]}

    with tracker.measuring("step", parts):
        with tracker.phase("forward"):
            kept.append(mb(3))
            mb(4)
        with tracker.phase("backward"):
            mb(1)
    line = tracker.update(step=1)
    expected = {"weights": 5 * MB, "activations": 3 * MB, "temporary_buffers": 4 * MB}
    assert line["components"] == expected
    with tracker.measuring("evaluation", parts), tracker.phase("evaluation"):
        mb(2)
    line = tracker.update(step=2)
    assert line["components"] == {"weights": 5 * MB, "activations": 0, "temporary_buffers": 2 * MB}
    assert tracker.update(step=3)["components"] == {}, "of what was not measured nothing is told"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_measured_can_go_meanwhile(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that overflows is put away for one with more on the host, and wants no memory then."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    tracker = MemoryTracker(tmp_path, device)
    held = [torch.zeros(8)]
    gone = weakref.ref(held[0])
    with tracker.measuring("step", lambda: {"weights": list(held)}):
        held.clear()
        assert gone() is None


def test_the_peaks_of_an_earlier_run_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun.append)
    tracker = MemoryTracker(tmp_path, "cuda")
    assert begun == [tracker.device]


def test_the_device_is_the_one_that_is_here(tmp_path: Path) -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert MemoryTracker(tmp_path).device.type == expected
    assert RandomWeights(torch.device("cpu")).device.type == "cpu"


def test_of_many_times_some_are_counted(tmp_path: Path) -> None:
    """The first ones, and one now and then, for each kind of work by itself."""
    tracker = MemoryTracker(tmp_path, "cpu", clock=lambda: 0.0)
    counted: dict[str, list[int]] = {"step": [], "evaluation": []}
    for kind, times in (("step", 2 * COUNTED_EVERY + 1), ("evaluation", 4)):
        for time in range(times):
            with tracker.measuring(kind, dict), tracker.phase("forward"):
                mb(time + 1)
            if tracker.update(step=time)["phases"]:
                counted[kind].append(time)
    assert counted == {"step": [0, 1, COUNTED_EVERY, 2 * COUNTED_EVERY], "evaluation": [0, 1]}
    assert tracker.phase_peaks == {"forward": (2 * COUNTED_EVERY + 1) * MB}
    assert COUNTED_FIRST == 2


@pytest.mark.parametrize(("more", "every"), [(0.02, COUNTED_EVERY), (0.4, 80)])
def test_what_is_dear_to_count_is_counted_less(more: float, every: int, tmp_path: Path) -> None:
    now = [0]
    tracker = MemoryTracker(tmp_path, "cpu", clock=lambda: now[0])
    counted = []
    for time in range(200):
        with tracker.measuring("step", dict), tracker.phase("forward"):
            mb(1)
            is_counted = tracker._trace is not None
            now[0] += 1000 + round(1000 * more) * is_counted
        if is_counted:
            counted.append(time)
    first = [0, 1, COUNTED_EVERY]
    assert counted[:3] == first
    assert counted[3:] == list(range(COUNTED_EVERY + every, 200, every))
    slower = more * len(counted[3:]) / (200 - COUNTED_EVERY)
    assert slower <= 0.005


def test_warnings_are_said_kept_and_in_the_lines(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = MemoryTracker(tmp_path, "cpu", edge=Edge(predicted_bytes=MB), warn=said.append)
    for step in (1, 2):
        with tracker.watch([]), tracker.phase("forward"):
            mb(3)
        tracker.update(step=step)
    (warning,) = tracker.warnings
    assert warning.startswith("step 1: 3.00 MiB were allocated, 2.00 MiB more than predicted")
    assert said == [f"memory: {warning}"]
    assert [line.get("warnings") for line in lines(tracker)] == [[warning], None]


def test_its_own_time_is_known_and_small(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    for step in range(20):
        tracker.update(step=step)
    assert 0 < tracker.own_seconds < 1


def test_the_peaks_of_earlier_parts_are_taken_in(tmp_path: Path) -> None:
    tracker = MemoryTracker(tmp_path, "cpu")
    tracker.take_over(
        [
            {"event": "step", "allocated_bytes": 9, "reserved_bytes": None,
             "phase_bytes": {"forward": 9, "backward": 8}},
            {"event": "step", "allocated_bytes": None, "phase_bytes": {}},
            {"event": "evaluation", "validation_loss": 1.0},
        ]
    )  # fmt: skip
    assert tracker.phase_peaks == {"forward": 9, "backward": 8}
    assert tracker.peak_allocated_bytes == 9
    assert tracker.peak_reserved_bytes is None
