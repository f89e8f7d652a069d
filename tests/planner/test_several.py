"""Several GPUs: when a part of the batch for each is faster than layers spread over them."""

from typing import Any

import pytest

from fitlora.artifacts import NCCL_BYTES, Rates
from fitlora.planner.several import ways, why_in_parallel
from fitlora.units import GIB
from tests.planner.test_rivals import Truth, make
from tests.planner.test_search import hardware
from tests.planner.test_speed import H200, LAYERS, NOT_MEASURED, plan, shape, told

ALL = tuple(range(LAYERS))


def two(**changes: Any) -> Any:
    return plan(devices=2, effective_batch_size=16, **changes)


def test_resident_devices_add_up_but_for_summing_gradients() -> None:
    found = ways(two(), shape(), H200, 4 * 2048)
    assert found is not None
    one = told(effective_batch_size=8).tokens_per_second
    assert found.spread == pytest.approx(one)
    assert 1.9 * one < found.in_parallel < 2 * one


@pytest.mark.parametrize(
    ("gb_per_second", "better"), [(55, "in_parallel"), (12, "in_parallel"), (0.5, "spread")]
)
def test_streaming_loses_only_where_the_link_is_slow(gb_per_second: float, better: str) -> None:
    rate = int(gb_per_second * 10**9)
    rates = H200.model_copy(
        update={"host_to_device_bytes_per_second": rate, "device_to_host_bytes_per_second": rate}
    )
    streamed = two(streamed_layers=ALL, recompute_layers=ALL)
    found = ways(streamed, shape(), rates, 4 * 2048)
    assert found is not None
    assert max(("in_parallel", "spread"), key=lambda name: getattr(found, name)) == better
    words = why_in_parallel(streamed, shape(), rates, 4 * 2048)
    assert f"{found.in_parallel:,.0f}" in words
    assert f"{found.spread:,.0f}" in words
    assert ("FitLoRA does not do" in words) == (better == "spread")


@pytest.mark.parametrize("rates", [NOT_MEASURED, H200])
def test_a_plan_of_several_says_why(rates: Rates) -> None:
    made = make(Truth(), 24, rates=rates, train={"devices": 2})
    choice = next(made.fitting())
    assert choice.plan.devices == 2
    assert "part of the batch" in choice.reasons["devices"]
    alone = next(make(Truth(), 24, rates=rates, train={"devices": 1}).fitting())
    assert "devices" not in alone.reasons


def test_nccl_is_beside_the_allocator_of_a_process_that_shares() -> None:
    here = hardware(8 * GIB)
    assert here.among(1) == here
    assert here.among(2).allocator_bytes == here.allocator_bytes - NCCL_BYTES
    on_cpu = here.model_copy(update={"device": "cpu"})
    assert on_cpu.among(2) == on_cpu


def test_processes_of_a_host_are_as_many_as_its_gpus() -> None:
    here = hardware(GIB)
    here = here.model_copy(update={"gpus": here.gpus[:1] * 4})
    assert [here.processes_here(n) for n in (1, 4, 8)] == [1, 4, 4]
    assert here.model_copy(update={"device": "cpu"}).processes_here(8) == 8
