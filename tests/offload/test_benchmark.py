"""The arithmetic of the offload benchmark, by hand; the rest of it is run on the device."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import offload
from benchmarks.common import SHAPES
from benchmarks.offload import Case, Part, floor_seconds
from fitlora.offload import residency
from fitlora.offload.residency import streamed_bytes
from fitlora.offload.transport import HostTransport
from fitlora.plan import Plan
from fitlora.units import GIB
from tests.offload.stacks import WIDTH, Run, make_stack, resident, streamed


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
        return bool(size <= budget)


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
    case = Case(
        model="llama-3-8b", budget_gib=3, micro_batch=2, sequence_length=1024,
        share_of_floor_to_reach=0.95,
    )  # fmt: skip
    found = {
        "step_seconds": 2.0, "link_bytes_per_second": 10.0,
        "phases": [{"phase": "forward", "seconds": 9.0, "uploaded_bytes": 10},
                   {"phase": "backward", "seconds": 9.0, "uploaded_bytes": 5}],
    }  # fmt: skip
    resident = {
        "step_seconds": 1.7,
        "phases": [{"phase": "forward", "seconds": 0.5, "uploaded_bytes": 0},
                   {"phase": "backward", "seconds": 0.8, "uploaded_bytes": 0}],
    }  # fmt: skip
    plan = offload.resident_plan(case, "cuda").replace(streamed_layers=(0, 3), head="host")
    planned = {"fits": True, "plan": plan.model_dump(mode="json"), "predicted_process_bytes": 7}
    card = offload.described_card()
    row = offload.make_row(case, planned, found, resident, card)
    assert row["tokens_per_second"] == 1024
    assert row["resident_tokens_per_second"] == pytest.approx(2048 / 1.7)
    assert row["floor_tokens_per_second"] == pytest.approx(2048 / 1.8)
    assert row["share_of_floor"] == pytest.approx(0.9)
    assert row["uploaded_bytes"] == 15
    assert (row["streamed_layers"], row["head"], row["plan"]) == (2, "host", plan.fingerprint())
    assert row["budget_bytes"] == 3 * GIB
    assert not {"warm_steps", "seconds"} & set(row)
    assert row["phases"] == found["phases"]
    assert row["resident_phases"] == resident["phases"]
    assert "missed" in offload.line(row)
    throttled = replace(case, throttle_gb_per_second=12)
    without = offload.make_row(throttled, planned, {}, {"error": "out of memory"}, card)
    assert without["tokens_per_second"] is None
    assert without["resident_error"] == "out of memory"
    nothing = {"fits": False, "predicted_process_bytes": 4 * GIB}
    assert "does not fit" in offload.line(offload.make_row(case, nothing, {}, {}, card))
    assert offload.key_of(without) != offload.key_of(row)


def test_as_few_layers_as_can_be_are_read_from_disk() -> None:
    plan = offload.resident_plan(offload.TINY[0], "cuda").replace(streamed_layers=(0, 1, 2, 3))
    for most, count in ((40, 0), (39, 1), (10, 3), (0, 4)):
        found = offload.read_from_disk(plan, lambda p, most=most: 10 * (4 - p.disk_layers) <= most)
        assert found == plan.replace(disk_layers=count)
    assert offload.read_from_disk(plan, lambda p: False) is None


def test_weights_that_the_kernel_keeps_no_copy_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "DiskRing", offload.Uncached)
    monkeypatch.setattr(offload.Uncached, "read_bytes", 0)
    plain, x = Run(resident(6)), torch.ones(3, WIDTH)
    transport = HostTransport(torch.device("cpu"))
    run = Run(*streamed(6, tuple(range(6)), transport, 2, on_disk=(1, 3, 5), folder=tmp_path))
    for found, wanted in zip(run.train(x), plain.train(x), strict=True):
        assert torch.equal(found, wanted)
    sizes = [streamed_bytes(layer) for layer in make_stack(6)]
    # read ahead at the start, and once more for backward and the next forward
    assert offload.Uncached.read_bytes >= sizes[1] + sizes[3] + sizes[5]


def test_rows_are_there_once_and_named_by_number() -> None:
    keys = [offload.key_of(asdict(case)) for case in offload.CASES]
    assert len(set(keys)) == len(keys)
    assert all(case.model in SHAPES for case in offload.CASES)
    assert offload.chosen(None) == list(offload.CASES)
    assert offload.chosen(["4", "1-2"]) == [offload.CASES[n] for n in (4, 1, 2)]


def test_a_measuring_process_that_fails_is_the_rows_error_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for it ends at the case of 1 GiB, sleeps at that of 2, and answers the others."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import json, sys, time\n"
        "for text in sys.stdin:\n"
        "    asked = json.loads(text)['case']['budget_gib']\n"
        "    if asked == 1: sys.exit('it broke')\n"
        "    if asked == 2: time.sleep(20)\n"
        "    print(json.dumps({'asked': asked}), flush=True)\n"
    )
    monkeypatch.setattr(offload, "WORKER", ("-S", str(stand_in)))
    measuring = offload.Measuring(tmp_path / "log", limit_seconds=20.0)

    def ask(budget: float) -> dict[str, Any]:
        case = Case(model="tiny", budget_gib=budget)
        return measuring.ask(case, offload.resident_plan(case, "cpu"), None)

    assert ask(3) == {"asked": 3}
    assert ask(1) == {"error": "it broke"}
    assert ask(4) == {"asked": 4}
    measuring.limit_seconds = 0.1
    assert ask(2) == {"error": "more than 0.1 s"}
    measuring.limit_seconds = 20.0
    assert ask(5) == {"asked": 5}
    measuring.end()
