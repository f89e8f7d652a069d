"""What benchmarks/pressure.py does beside taking a GPU's memory: its plans, its runs, its verdict."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pressure
from tests.planner.test_ladder import gpu
from tests.training.test_run import HARDWARE

ROOM = HARDWARE.model_copy(update={"host_budget_bytes": 2**40})


def arguments(work: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model="tiny", work=work, tokens=64, micro_batch=4, steps=4, runs=1, seed=0
    )


def test_what_is_left_is_too_little_for_one_plan_and_enough_for_another(tmp_path: Path) -> None:
    needs = pressure.Needs.of(arguments(tmp_path), ROOM)
    assert needs.least < needs.least_on_gpu < needs.top
    for host, fits, fails in (
        (False, needs.least_on_gpu, needs.top), (True, needs.least, needs.least_on_gpu),
    ):  # fmt: skip
        low, high = needs.left(host=host)
        assert fits < low
        assert high < fails


def record(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"event": "step", "step": step, "tokens": 5, "loss": loss}


def change(**changes: Any) -> dict[str, Any]:
    after = gpu(**changes).model_dump(mode="json")
    return {"event": "plan", "step": 2, "cause": "out of memory in forward: x", "after": after}


def test_the_verdict() -> None:
    expected = [record(1), record(2)]
    moved = pressure.compare(expected, [record(1), change(head="host"), record(2, 1.001)])
    assert moved == {
        "same": True, "worst_loss_difference": pytest.approx(0.001), "overflows": 1, "host": True,
    }  # fmt: skip
    smaller = pressure.compare(expected, [record(1), change(), record(2)])
    assert not smaller["host"]
    for wrong in ([record(1)], [record(1), record(1)], [record(1), record(2, 1.1)]):
        assert not pressure.compare(expected, wrong)["same"]
    for found, host, survived in ((moved, True, 1), (smaller, True, 0), (smaller, False, 1)):
        row = pressure.row_of(
            arguments(Path()), pressure.Needs(3, 2, 1), [found | {"left_bytes": 2}], host=host
        )
        assert (row["injected"], row["survived"], row["result_differs"]) == (1, survived, 0)


@pytest.mark.slow
def test_its_runs_on_the_cpu(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    pressure.prepare(args, torch.device("cpu"))
    first, again = pressure.once(args, ROOM), pressure.once(args, ROOM)
    found = pressure.compare(first, again)
    assert found == {"same": True, "worst_loss_difference": 0.0, "overflows": 0, "host": False}
    assert [r["step"] for r in first if r["event"] == "step"] == [1, 2, 3, 4]
