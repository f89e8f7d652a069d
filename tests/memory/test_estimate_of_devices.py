"""Estimates of layers that are spread over devices: what each of them takes."""

from typing import Any

import pytest
import torch

from fitlora.memory.estimate import Estimator, trace_run, trace_step
from fitlora.memory.timeline import Block, Segment, Timeline, levels
from fitlora.step.weights import RandomWeights
from tests.memory.test_estimate import LOAD, SETTINGS, hardware
from tests.step import steps

PLANS: list[dict[str, Any]] = [
    {"layers_per_device": (6, 3), "recompute_layers": tuple(range(4)), "micro_batch_size": 3},
    {"layers_per_device": (4, 5), "frozen_layers": tuple(range(5))},
]


def test_a_timeline_of_one_device() -> None:
    first, second = Segment(0, 0, "forward", ""), Segment(0, 0, "backward", "")
    both = Timeline()
    both.enter(first)
    both.allocate(Block(5, first, "", "", device=0))
    both.allocate(Block(7, first, "", "", device=1))
    both.enter(second)
    both.allocate(Block(2, second, "", "", device=0))
    both.free(2)
    both.enter(first)
    alone = [both.on(number) for number in (0, 1)]
    assert [part.events for part in alone] == [[0, 1, 3, 4, 5], [0, 2, 3, ~2, 5]]
    assert [levels(part, {}, rest="all")[second].bytes for part in alone] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_few_layers_of_each_device_tell_the_peak_of_many(changes: dict[str, Any]) -> None:
    config, plan = steps.config(num_hidden_layers=9), steps.plan(**changes)
    estimator = Estimator(config, SETTINGS, LOAD, hardware())
    short, full = estimator.trace(plan), trace_run(config, plan, SETTINGS, LOAD)
    assert len(full.levels) == len(plan.layers_per_device)
    for few, all_of_them in zip(short.levels, full.levels, strict=True):
        assert {segment: level.components for segment, level in few.items()} == {
            segment: level.components for segment, level in all_of_them.items()
        }


@pytest.mark.parametrize("changes", [{}, {"recompute_layers": (0, 1, 2), "micro_batch_size": 3}])
def test_each_device_takes_what_it_is_said_to(changes: dict[str, Any]) -> None:
    """The same step on shapes, and on real tensors of the CPU, which stands for two devices."""
    config = steps.config(num_hidden_layers=3)
    plan = steps.plan(layers_per_device=(2, 1), **changes)
    told, taken = (
        trace_run(config, plan, SETTINGS, LOAD, weights)
        for weights in (None, RandomWeights(torch.device("cpu")))
    )
    for number in range(2):
        here, there = told.levels[number], taken.levels[number]
        assert here.keys() == there.keys()
        for segment, level in here.items():
            if segment.phase == "load":
                continue  # buffers are on the CPU already
            found = dict(there[segment].components)
            # and of the scales' code book, which each device has one of
            found["weights"] += number * 1024
            assert level.components == found, segment


@pytest.mark.slow
def test_the_heaviest_device_decides() -> None:
    config, here = steps.config(num_hidden_layers=8), hardware(context_bytes=1000)
    estimator = Estimator(config, SETTINGS, LOAD, here)
    alone = estimator(steps.plan())
    assert alone.device_peak_bytes == ()
    even, top_heavy = (
        estimator(steps.plan(layers_per_device=counts)) for counts in ((4, 4), (2, 6))
    )
    for found in (even, top_heavy):
        assert found.peak_allocated_bytes == max(found.device_peak_bytes)
        assert found.peak_allocated_bytes == found.device_peak_bytes[found.heaviest_device]
        assert found.components.total == found.peak_allocated_bytes < alone.peak_allocated_bytes
        # weights, adapters and their states are shared out; only a few things are there twice
        assert sum(found.device_peak_bytes) < 1.2 * alone.peak_allocated_bytes
    assert top_heavy.device_peak_bytes[1] > even.device_peak_bytes[1]
    assert top_heavy.device_peak_bytes[0] < even.device_peak_bytes[0]
    assert trace_step(config, even.plan, SETTINGS, LOAD).peak_bytes == even.peak_allocated_bytes
