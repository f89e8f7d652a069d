"""Where nothing fits: what would, each with its bytes, on estimates by a formula and on true ones."""

import re
from typing import Any

import pytest

from benchmarks.common import shape_config
from fitlora.artifacts import Estimate
from fitlora.errors import UserError
from fitlora.memory.estimate import Load
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.find import find_plan
from fitlora.planner.refusal import WayOut, ways_out
from fitlora.planner.search import NothingFits
from fitlora.planner.size import ModelSize
from fitlora.planner.task import Task
from fitlora.units import GIB, MIB
from tests.planner.test_search import estimate, hardware
from tests.step import steps

CONFIG = shape_config("llama-3-8b")
LENGTH = 2048


def formula(task: Task, plan: Plan) -> int:
    """A megabyte for 16 tokens, 32 for a rank, what is trained whole, and the model's width."""
    lora, width = task.params.lora, task.config.hidden_size * MIB // 4
    whole = len(lora.modules_to_save) * GIB // 2
    bits = task.params.quantization.bits * MIB
    assert lora.r != "auto"
    per_layer = 0 if plan.recompute_layers else GIB
    return (
        width
        + plan.micro_batch_size * plan.sequence_length * MIB // 16
        + (32 * lora.r * MIB + whole + bits + per_layer)
    )


@pytest.fixture(autouse=True)
def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimator(task: Task) -> Any:
        def of(plan: Plan) -> Estimate:
            found = estimate(plan, formula(task, plan), task.hardware.budget_bytes)
            pinned = (len(plan.streamed_layers) - plan.disk_layers) * GIB // 8
            fits = found.fits and pinned <= task.hardware.host_budget_bytes
            return found.model_copy(update={"host_pinned_bytes": pinned, "fits": fits})

        return of

    def size(task: Task) -> ModelSize:
        return ModelSize.of(task.config)

    monkeypatch.setattr(Task, "estimator", property(estimator))
    monkeypatch.setattr(Task, "size", property(size))


def task(gib: float, *, host: float = 64, **sections: dict[str, Any]) -> Task:
    params = check_params({"lora": {"r": 16}, "train": {"effective_batch_size": 2}, **sections})
    here = hardware(int(gib * GIB), host_budget_bytes=int(host * GIB), target="a card")
    return Task(CONFIG, params, Load.uniform(2, LENGTH), here)


def ways(asked: Task) -> dict[str, WayOut]:
    """By what is to be changed, without its value."""
    with pytest.raises(NothingFits) as caught:
        next(asked.search().fitting())
    found = list(ways_out(asked, caught.value.least))
    return {re.sub(r" [\d.]+(GiB)?$", "", way.change): way for way in found}


LEAST = formula(
    task(1), steps.plan(recompute_layers=(0,), sequence_length=LENGTH, micro_batch_size=1)
)


def test_each_way_out_has_its_bytes_and_says_whether_it_is_enough() -> None:
    for short in (32 * MIB, 100 * MIB, 300 * MIB, GIB):
        budget = LEAST - short
        for way in ways(task(budget / GIB)).values():
            named = way.change.startswith("a budget of")
            assert way.enough == (way.found.process_bytes <= budget or named)
            assert way.found.process_bytes == LEAST if named else way.found.process_bytes < LEAST


def test_the_budget_that_is_named_is_enough() -> None:
    named = ways(task(1))["a budget of"].change.removeprefix("a budget of ")
    assert next(task(float(named.removesuffix("GiB"))).search().fitting())
    with pytest.raises(NothingFits):
        next(task(float(named.removesuffix("GiB")) - 0.25).search().fitting())


def test_the_nearest_length_rank_and_model_that_fit_are_told() -> None:
    """16 MiB are 256 tokens; a rank of 16 is 512 MiB; a 3B is a quarter narrower."""
    found = ways(task((LEAST - 20 * MIB) / GIB))
    assert found["data.max_length"].change == "data.max_length 1664"
    assert found["lora.r"].change == "lora.r 8"
    assert found["a smaller model, like llama-3.2-3b"].enough
    found = ways(task((LEAST - 300 * MIB) / GIB))
    assert found["lora.r"].change == "lora.r 4"
    assert not found["data.max_length"].enough
    assert found["data.max_length"].change == "data.max_length 128", "the most that it can do"


def test_what_was_fixed_or_trained_whole_or_kept_in_16_bits_is_named() -> None:
    plain = ways(task(1))
    fixed = ways(
        task(1, plan={"micro_batch_size": 2, "recompute": "none", "compute_dtype": "float16"})
    )
    assert {*fixed} - {*plain} == {"auto for plan.micro_batch_size, plan.recompute"}
    more = ways(task(1, lora={"modules_to_save": ["embed_tokens"]}, quantization={"bits": 16}))
    assert {*more} - {*plain} == {"lora.modules_to_save []", "quantization.bits"}
    start = ways(task(1, train={"from_adapter": "an/adapter"}))
    assert "lora.r" not in start


def test_more_host_memory_where_that_is_what_lacks() -> None:
    """32 layers pin 4 GiB where params keep them off the disk."""
    asked = task(8, host=1, plan={"stream_layers": 32})
    found = ways(asked)
    assert found["hardware.host_memory_budget"].change == "hardware.host_memory_budget 4.00GiB"
    assert found["hardware.host_memory_budget"].found.host_pinned_bytes == 4 * GIB
    assert found["auto for plan.stream_layers"].enough
    both = task(1, host=1, plan={"stream_layers": 32})
    assert any(
        " and hardware.host_memory_budget 4.00GiB" in way.change for way in ways(both).values()
    )


def test_the_smallest_plan_reads_what_the_host_has_no_room_for() -> None:
    assert task(8, host=8).smallest(host=True).plan.disk_layers == 0
    assert task(8, host=1).smallest(host=True).plan.disk_layers == 32


def test_what_is_plainly_too_much_for_the_host_is_not_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Plan] = []
    of = Task.estimator.fget  # type: ignore[attr-defined]

    def recorded(task: Task) -> Any:
        return lambda plan: asked.append(plan) or of(task)(plan)

    monkeypatch.setattr(Task, "estimator", property(recorded))
    shape = task(8).shape
    assert shape is not None
    weights = 32 * shape.layer_bytes / GIB
    task(8, host=weights / 1.2).smallest(host=True)
    assert {plan.disk_layers for plan in asked} == {32}
    asked.clear()
    task(8, host=weights / 1.05).smallest(host=True)
    assert {plan.disk_layers for plan in asked} == {0, 32}  # by a little: the formula's are larger


def test_the_message_lists_them_by_what_they_need() -> None:
    asked = task(1)
    with pytest.raises(UserError) as caught:
        find_plan(asked)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("nothing fits 1.00 GiB")
    assert f"needs {LEAST / GIB:.2f} GiB and 4.00 GiB of the host's memory" in first
    sizes = [float(line.split(" GiB")[0].split()[-1]) for line in lines]
    assert len(lines) >= 4
    assert sizes == sorted(sizes)
    assert all(line.endswith("still too much") for line in lines if "budget" not in line)
