"""The ladder: its rungs, that each is asked of the estimate first, and the way back up."""

import pytest

from fitlora.plan import Plan
from fitlora.planner.ladder import CALM_STEPS, Ladder, Rung, faster, smaller, smaller_evaluation
from tests.step import steps

LAYERS = 5


def shape(plan: Plan) -> tuple[int, int, int]:
    return plan.micro_batch_size, len(plan.recompute_layers), plan.loss_chunk_tokens


def predict(plan: Plan, evaluation: bool) -> int:
    if evaluation:
        return 10 * plan.evaluation_batch_size + plan.loss_chunk_tokens
    return 1000 * plan.micro_batch_size - len(plan.recompute_layers) + plan.loss_chunk_tokens // 64


def test_rungs_are_the_same_work_in_less_memory() -> None:
    plan = steps.plan(micro_batch_size=7, loss_chunk_tokens=256)
    found = list(smaller(plan, LAYERS))
    assert [shape(p) for p in found] == [
        (4, 0, 256), (2, 0, 256), (1, 0, 256),
        (1, 3, 256), (1, 4, 256), (1, 5, 256),
        (1, 5, 128), (1, 5, 64),
    ]  # fmt: skip
    for rung in found:
        assert rung.effective_batch_size == plan.effective_batch_size
        assert rung.evaluation_batch_size == plan.evaluation_batch_size
        assert (rung.optimizer, rung.compute_dtype) == (plan.optimizer, plan.compute_dtype)


def test_recomputed_layers_stay_so() -> None:
    plan = steps.plan(micro_batch_size=1, recompute_layers=(3,), loss_chunk_tokens=64)
    assert [p.recompute_layers for p in smaller(plan, LAYERS)] == [
        (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4),
    ]  # fmt: skip


def test_layers_that_recompute_keep_less_and_less() -> None:
    plan = steps.plan(
        micro_batch_size=1, recompute_layers=(0, 1), recompute_keeps=("qkv", "mlp"),
        loss_chunk_tokens=64,
    )  # fmt: skip
    assert [p.recompute_keeps for p in smaller(plan, 2)] == [("qkv",), ()]


def test_what_more_memory_would_buy() -> None:
    plan = steps.plan(micro_batch_size=3, recompute_layers=(0, 1))
    assert faster(plan) == {
        "no layer recomputed": steps.plan(micro_batch_size=3),
        "twice the micro-batch": steps.plan(micro_batch_size=6, recompute_layers=(0, 1)),
    }
    assert faster(steps.plan(micro_batch_size=7)) == {}


def test_rungs_of_an_evaluation() -> None:
    plan = steps.plan(evaluation_batch_size=5, loss_chunk_tokens=100)
    found = [(p.evaluation_batch_size, p.loss_chunk_tokens) for p in smaller_evaluation(plan)]
    assert found == [(3, 100), (2, 100), (1, 100), (1, 64)]
    assert {p.micro_batch_size for p in smaller_evaluation(plan)} == {plan.micro_batch_size}


def test_down_to_the_end() -> None:
    ladder = Ladder(steps.plan(micro_batch_size=4, loss_chunk_tokens=64), LAYERS, predict)
    seen = []
    while (plan := ladder.down(3)) is not None:
        seen.append(shape(plan))
        assert ladder.plan == plan
    assert seen == [(2, 0, 64), (1, 0, 64), (1, 3, 64), (1, 4, 64), (1, 5, 64)]


def test_what_the_estimate_does_not_see_smaller_is_passed_over() -> None:
    def flat(plan: Plan, evaluation: bool) -> int:
        return 100 if plan.micro_batch_size > 1 else 90 - len(plan.recompute_layers) // 4

    ladder = Ladder(steps.plan(micro_batch_size=7, loss_chunk_tokens=64), LAYERS, flat)
    found = [ladder.down(0), ladder.down(0), ladder.down(0)]
    assert [p and shape(p)[:2] for p in found] == [(1, 0), (1, 4), None]
    assert shape(ladder.plan)[:2] == (1, 4)


def test_an_evaluation_goes_down_by_itself() -> None:
    ladder = Ladder(steps.plan(micro_batch_size=7, evaluation_batch_size=4), LAYERS, predict)
    plan = ladder.down(2, evaluation=True)
    assert plan is not None
    assert (plan.evaluation_batch_size, plan.micro_batch_size) == (2, 7)


def test_up_once_after_a_calm_stretch() -> None:
    top = steps.plan(micro_batch_size=4)
    ladder = Ladder(top, LAYERS, predict)
    assert ladder.up(1000) is None, "there is nothing above the top"
    ladder.down(10)
    proven = ladder.down(11)
    assert ladder.up(11 + CALM_STEPS - 1) is None
    assert ladder.up(11 + CALM_STEPS) == top == ladder.plan
    assert ladder.down(70) == proven, "straight back to what held"
    assert ladder.up(5000) is None, "once is enough"
    lower = ladder.down(5001)
    assert lower is not None
    assert shape(lower) != shape(top)


def test_a_run_goes_on_from_its_rung() -> None:
    top = steps.plan(micro_batch_size=4)
    ladder = Ladder(top, LAYERS, predict)
    ladder.down(3)
    ladder.up(100)
    rung = Rung.model_validate_json(ladder.rung.model_dump_json())
    assert rung == ladder.rung
    again = Ladder(top, LAYERS, predict)
    again.resume(rung)
    assert again.rung == rung
    assert again.up(1000) is None
    other = Ladder(steps.plan(micro_batch_size=7), LAYERS, predict)
    other.resume(rung)
    assert other.plan.micro_batch_size == 7, "a plan that was made anew is begun with"


@pytest.mark.parametrize("evaluation", [False, True])
def test_rungs_end(evaluation: bool) -> None:
    plan = steps.plan(
        effective_batch_size=1000, micro_batch_size=1000, evaluation_batch_size=1000,
        loss_chunk_tokens=8192,
    )  # fmt: skip
    rungs = list(smaller_evaluation(plan) if evaluation else smaller(plan, 80))
    assert 10 < len(rungs) < 30
