"""The arithmetic of the offload benchmark, by hand; the rest of it is run on the device."""

from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from benchmarks import offload
from benchmarks.common import SHAPES
from benchmarks.offload import Case, Part, floor_seconds
from fitlora.plan import Plan


def test_the_floor_is_the_longer_of_computing_and_moving_in_each_pass() -> None:
    computed = [Part("forward", 1.0, 0), Part("backward", 3.0, 0), Part("optimizer", 0.5, 0)]
    moved = [Part("forward", 9.0, 20), Part("backward", 9.0, 20), Part("optimizer", 9.0, 7)]
    assert floor_seconds(computed, moved, 1e9) == pytest.approx(4.5)
    assert floor_seconds(computed, moved, 10.0) == pytest.approx(2.0 + 3.0 + 0.5)
    assert floor_seconds(computed, moved, 5.0) == pytest.approx(4.0 + 4.0 + 0.5)


@dataclass(frozen=True)
class FakePlan:
    """A Plan as far as the choice of a layout goes."""

    decisions: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> "FakePlan":
        return replace(self, decisions={**self.decisions, **changes})

    def fits(self, budget: int) -> bool:
        d = self.decisions
        size = 100 - 10 * len(d["streamed_layers"])
        size += 30 * (d["checkpoints"] == "device") + 40 * (d["optimizer_device"] == "device")
        size += 5 * (d["head"] == "device")
        return size <= budget


@pytest.mark.parametrize(
    ("budget", "layout", "streamed"),
    [
        (175, 0, 0),
        (174, 0, 1),
        (115, 0, 6),
        (114, 1, 4),
        (85, 1, 6),
        (84, 2, 6),
        (80, 2, 6),
        (79, 3, 3),
        (45, 3, 6),
        (44, 4, 6),
        (40, 4, 6),
    ],
)
def test_the_cheapest_layout_that_fits_is_taken(budget: int, layout: int, streamed: int) -> None:
    found = offload.choose_plan(cast(Plan, FakePlan()), 6, lambda p: cast(Any, p).fits(budget))
    assert found is not None
    decisions = cast(Any, found).decisions
    assert {k: decisions[k] for k in offload.LAYOUTS[0]} == offload.LAYOUTS[layout]
    assert len(decisions["streamed_layers"]) == streamed


def test_no_layout_may_fit() -> None:
    plan = cast(Plan, FakePlan())
    assert offload.choose_plan(plan, 6, lambda p: cast(Any, p).fits(39)) is None


def test_a_row_says_what_was_asked_and_what_came_out() -> None:
    case = Case("llama-3-8b", 3, 2, 1024, 0.95)
    found = {
        "fits": True, "step_seconds": 2.0, "link_bytes_per_second": 10.0,
        "phases": [{"phase": "forward", "seconds": 9.0, "uploaded_bytes": 10},
                   {"phase": "backward", "seconds": 9.0, "uploaded_bytes": 5}],
    }  # fmt: skip
    resident = {
        "step_seconds": 1.7,
        "phases": [{"phase": "forward", "seconds": 0.5, "uploaded_bytes": 0},
                   {"phase": "backward", "seconds": 0.8, "uploaded_bytes": 0}],
    }  # fmt: skip
    row = offload.make_row(case, found, resident, None)
    assert row["tokens_per_second"] == 1024
    assert row["resident_tokens_per_second"] == pytest.approx(2048 / 1.7)
    assert row["floor_tokens_per_second"] == pytest.approx(2048 / 1.8)
    assert row["share_of_floor"] == pytest.approx(0.9)
    assert row["uploaded_bytes"] == 15
    assert "missed" in offload.line(row)
    without = offload.make_row(case, {"fits": False}, {"error": "out of memory"}, 12.0)
    assert without["tokens_per_second"] is None
    assert without["resident_error"] == "out of memory"
    assert "does not fit" in offload.line(without)
    assert offload.key_of(without) != offload.key_of(row)


def test_the_issues_rows_are_there_once() -> None:
    keys = [(c.model, c.budget_gib, c.micro_batch, c.sequence_length) for c in offload.CASES]
    assert len(set(keys)) == len(keys)
    assert all(case.model in SHAPES for case in offload.CASES)
