"""Several GPUs: when a part of the batch for each is faster than layers spread over them."""

from dataclasses import replace
from typing import Any

import pytest

from fitlora.artifacts import NCCL_BYTES, Rates
from fitlora.errors import UserError
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.find import _either_way
from fitlora.planner.search import Search, default_plan
from fitlora.planner.several import (
    can_spread,
    spread_forecast,
    spread_layers,
    ways,
    why_in_parallel,
)
from fitlora.planner.size import ModelSize
from fitlora.units import GIB
from tests.planner.test_rivals import TOKENS, Truth, make
from tests.planner.test_search import hardware
from tests.planner.test_speed import H200, LAYERS, NOT_MEASURED, plan, shape, told

ALL = tuple(range(LAYERS))


def linked(gb_per_second: float) -> Rates:
    rate = int(gb_per_second * 10**9)
    return H200.model_copy(
        update={"host_to_device_bytes_per_second": rate, "device_to_host_bytes_per_second": rate}
    )


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
    rates = linked(gb_per_second)
    streamed = two(streamed_layers=ALL, recompute_layers=ALL)
    found = ways(streamed, shape(), rates, 4 * 2048)
    assert found is not None
    assert max(("in_parallel", "spread"), key=lambda name: getattr(found, name)) == better
    words = why_in_parallel(streamed, shape(), rates, 4 * 2048)
    assert f"{found.in_parallel:,.0f}" in words
    assert f"{found.spread:,.0f}" in words


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


def on_two_gpus(gib: float, rates: Rates, **options: Any) -> Search:
    """The search of a part of the batch for each, where a GPU of two has its layers' share of a plan."""

    def truth(plan: Plan) -> int:
        share = max(plan.layers_per_device, default=LAYERS) / LAYERS
        return int(share * Truth()(plan))

    made = make(truth, gib, rates=rates, train={"devices": "auto"}, **options)
    here = made.hardware.model_copy(update={"gpus": made.hardware.gpus * 2})
    start = default_plan(made.params, here, made.model, made.tokens, sequence_length=TOKENS)
    assert can_spread(made.params, here, made.model)
    return replace(made, hardware=here, start=start)


def test_a_fast_link_shares_the_batch_and_looks_at_nothing_else() -> None:
    search = on_two_gpus(5, H200)
    choice = next(_either_way(search))
    assert choice.plan.devices == 2
    assert choice.plan.streamed_layers
    assert "layers spread over them at most" in choice.reasons["devices"]
    assert not any(estimate.plan.layers_per_device for estimate in search.seen)


def test_a_slow_link_spreads_the_layers() -> None:
    search = on_two_gpus(5, linked(0.5))
    shared = next(on_two_gpus(5, linked(0.5)).fitting())
    choice = next(_either_way(search))
    assert choice.plan.layers_per_device == (16, 16)
    assert (choice.plan.devices, choice.plan.streamed_layers) == (1, ())
    assert choice.plan.effective_batch_size == shared.plan.effective_batch_size
    assert choice.estimate.process_bytes <= 5 * GIB
    tokens = search.tokens(shared.plan.micro_batch_size)
    found = ways(shared.plan, shape(), search.hardware.rates, tokens)
    assert found is not None
    assert choice.forecast is not None
    assert found.in_parallel < choice.forecast.tokens_per_second <= found.spread
    why = choice.reasons["layers_per_device"]
    assert f"{found.in_parallel:,.0f}" in why
    assert f"{choice.forecast.tokens_per_second:,.0f}" in why


def test_layers_that_fit_no_gpu_leave_the_batch_shared() -> None:
    choice = next(_either_way(on_two_gpus(2, linked(0.5))))
    assert choice.plan.devices == 2
    assert "a range of the layers for each GPU does not fit" in choice.reasons["devices"]


@pytest.mark.parametrize("rates", [NOT_MEASURED, H200])
def test_a_host_without_room_spreads_the_layers(rates: Rates) -> None:
    choice = next(_either_way(on_two_gpus(5, rates, host=GIB // 8)))
    assert choice.plan.layers_per_device == (16, 16)
    why = choice.reasons["layers_per_device"]
    assert why.endswith("; a part of the batch for each GPU does not fit")
    assert ("tokens/s" in why) == (rates is H200)
    with pytest.raises(UserError, match=r"nothing fits 1\.00 GiB"):
        next(_either_way(on_two_gpus(1, rates, host=GIB // 8)))


def test_handing_on_takes_its_time() -> None:
    alone = told(effective_batch_size=8)
    halves = spread_forecast(
        plan(effective_batch_size=8, layers_per_device=(16, 16)), shape(), H200, 4 * 2048
    )
    assert halves is not None
    handed_on = 2 * 2 * (8 * 2048) * 4096  # there and back, in 16 bits
    assert halves.step_seconds - alone.step_seconds == pytest.approx(handed_on / 55e9)
    assert spread_forecast(plan(layers_per_device=(16, 16)), shape(), NOT_MEASURED, 2048) is None


@pytest.mark.parametrize("devices", [2, 3, 4, 8, 32])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_spread_by_what_they_take(devices: int, tied: bool) -> None:
    found = spread_layers(shape(), devices, tied=tied)
    assert sum(found) == LAYERS
    assert len(found) == devices
    assert min(found) >= 1
    layer = shape().layer_bytes + 16 * shape().adapters / LAYERS
    taken = [count * layer for count in found]
    taken[-1] += shape().table_bytes
    taken[0] += 0 if tied else shape().table_bytes
    if devices <= 3:  # with more, one table is as much as the share of a device
        assert max(taken) - min(taken) < 1.5 * layer


@pytest.mark.parametrize(
    ("changes", "model", "gpus"),
    [
        ({"train": {"devices": 2}}, {}, 2),
        ({"train": {"optimizer": "adamw_8bit"}}, {}, 2),
        ({"plan": {"stream_layers": 3}}, {}, 2),
        ({"plan": {"embedding": "host"}}, {}, 2),
        ({}, {"by_hand": False}, 2),
        ({}, {}, 1),
        ({}, {}, LAYERS + 1),
    ],
)
def test_what_asks_for_something_else_spreads_nothing(
    changes: dict[str, Any], model: dict[str, Any], gpus: int
) -> None:
    here = hardware(GIB)
    here = here.model_copy(update={"gpus": here.gpus * gpus})
    size = replace(ModelSize(LAYERS, 128_256), **model)
    assert not can_spread(check_params(changes), here, size)
    plain = here.model_copy(update={"gpus": here.gpus[:1] * 2})
    assert can_spread(check_params({}), plain, ModelSize(LAYERS, 128_256))
