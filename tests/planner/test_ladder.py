"""The ladder: its rungs, that each is asked of the estimate first, and the way back up."""

from dataclasses import replace

import pytest

from fitlora.plan import Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.ladder import CALM_STEPS, Ladder, Rung, faster, smaller, smaller_evaluation
from fitlora.planner.size import ModelSize
from tests.step import steps

LAYERS = 5
MODEL = ModelSize(LAYERS, steps.VOCABULARY)
FREE = Freedom.most(steps.plan(), MODEL)  # on the CPU, so that nothing is moved


def shape(plan: Plan) -> tuple[int, int, int]:
    return plan.micro_batch_size, len(plan.recompute_layers), plan.loss_chunk_tokens


def predict(plan: Plan, evaluation: bool) -> int:
    if evaluation:
        return 10 * plan.evaluation_batch_size + plan.loss_chunk_tokens
    return 1000 * plan.micro_batch_size - len(plan.recompute_layers) + plan.loss_chunk_tokens // 64


def test_rungs_are_the_same_work_in_less_memory() -> None:
    plan = steps.plan(micro_batch_size=7, loss_chunk_tokens=256)
    found = list(smaller(plan, FREE))
    assert [shape(p) for p in found] == [
        (4, 0, 256), (2, 0, 256), (1, 0, 256),
        (1, 3, 256), (1, 4, 256), (1, 5, 256),
        (1, 5, 128), (1, 5, 64),
    ]  # fmt: skip
    for rung in found:
        assert rung.effective_batch_size == plan.effective_batch_size
        assert rung.evaluation_batch_size == plan.evaluation_batch_size
        assert (rung.optimizer, rung.compute_dtype) == (plan.optimizer, plan.compute_dtype)


def test_fewer_micro_batches_share_a_pass() -> None:
    plan = steps.plan(micro_batch_size=2, micro_batches_per_pass=3, loss_chunk_tokens=64)
    found = [(p.micro_batch_size, p.micro_batches_per_pass) for p in smaller(plan, FREE)]
    assert found[:3] == [(1, 3), (1, 2), (1, 1)]
    assert set(found[3:]) == {(1, 1)}


def test_recomputed_layers_stay_so() -> None:
    plan = steps.plan(micro_batch_size=1, recompute_layers=(3,), loss_chunk_tokens=64)
    assert [p.recompute_layers for p in smaller(plan, FREE)] == [
        (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4),
    ]  # fmt: skip


def test_layers_that_recompute_keep_less_and_less() -> None:
    plan = steps.plan(
        micro_batch_size=1, recompute_layers=(0, 1), recompute_keeps=("qkv", "mlp"),
        loss_chunk_tokens=64,
    )  # fmt: skip
    assert [p.recompute_keeps for p in smaller(plan, replace(FREE, layers=2))] == [("qkv",), ()]


def test_an_mlp_in_smaller_parts() -> None:
    plan = steps.plan(
        micro_batch_size=1, recompute_layers=range(LAYERS), loss_chunk_tokens=64,
        sequence_length=5000,
    )  # fmt: skip
    for start, expected in ((None, [2500, 1250, 1024]), (8192, [2500, 1250, 1024]), (1100, [1024])):
        found = smaller(plan.replace(mlp_chunk_tokens=start), FREE)
        assert [p.mlp_chunk_tokens for p in found] == expected
    assert not list(smaller(plan, replace(FREE, by_hand=False)))


SMALL = {"micro_batch_size": 1, "recompute_layers": tuple(range(LAYERS)), "loss_chunk_tokens": 64}


def test_layers_freeze_only_in_a_run_that_freezes_and_by_its_order() -> None:
    plan = steps.plan(**SMALL)
    assert list(smaller(plan, FREE)) == []
    found = smaller(plan, FREE, freezes=(3, 1, 4, 0, 2))
    assert [p.frozen_layers for p in found] == [(1, 3), (1, 3, 4)]


def test_what_froze_stays_so_on_the_way_up_and_from_a_checkpoint() -> None:
    plan = steps.plan(**SMALL)

    def size(plan: Plan, evaluation: bool) -> int:
        return 1000 - 100 * len(plan.frozen_layers) + plan.loss_chunk_tokens

    ladder = Ladder(plan.replace(loss_chunk_tokens=128), FREE, size)
    ladder.freeze_in_order(range(LAYERS))
    assert ladder.down(1) == plan
    assert ladder.down(2) == plan.replace(frozen_layers=(0, 1))
    saved = ladder.rung
    top = plan.replace(frozen_layers=(0, 1), loss_chunk_tokens=128)
    assert ladder.up(2 + CALM_STEPS) == top

    again = Ladder(plan.replace(loss_chunk_tokens=128), FREE, size)
    again.resume(saved)
    assert again.rung == saved
    anew = Ladder(plan.replace(loss_chunk_tokens=256), FREE, size)  # planned anew
    anew.resume(saved)
    assert anew.plan == top.replace(loss_chunk_tokens=256)
    assert anew.rung.freezes == saved.freezes


def test_precision_turns_on_every_rung() -> None:
    ladder = Ladder(steps.plan(micro_batch_size=4), FREE, predict)
    below = ladder.down(1)
    assert below is not None
    assert ladder.turn(layer_dtype="float32") == below.replace(layer_dtype="float32")
    top = ladder.up(1 + CALM_STEPS)
    assert top == steps.plan(micro_batch_size=4, layer_dtype="float32")


def test_what_more_memory_would_buy() -> None:
    plan = steps.plan(micro_batch_size=3, recompute_layers=(0, 1))
    assert faster(plan) == {
        "no layer recomputed": steps.plan(micro_batch_size=3),
        "twice the micro-batch": steps.plan(micro_batch_size=6, recompute_layers=(0, 1)),
    }
    assert faster(steps.plan(micro_batch_size=7)) == {}


def test_rungs_of_an_evaluation() -> None:
    plan = steps.plan(evaluation_batch_size=5, loss_chunk_tokens=100)
    found = [(p.evaluation_batch_size, p.loss_chunk_tokens) for p in smaller_evaluation(plan, FREE)]
    assert found == [(3, 100), (2, 100), (1, 100), (1, 64)]
    assert {p.micro_batch_size for p in smaller_evaluation(plan, FREE)} == {plan.micro_batch_size}


def test_down_to_the_end() -> None:
    ladder = Ladder(steps.plan(micro_batch_size=4, loss_chunk_tokens=64), FREE, predict)
    seen = []
    while (plan := ladder.down(3)) is not None:
        seen.append(shape(plan))
        assert ladder.plan == plan
    assert seen == [(2, 0, 64), (1, 0, 64), (1, 3, 64), (1, 4, 64), (1, 5, 64)]


def test_what_the_estimate_does_not_see_smaller_is_passed_over() -> None:
    def flat(plan: Plan, evaluation: bool) -> int:
        return 100 if plan.micro_batch_size > 1 else 90 - len(plan.recompute_layers) // 4

    ladder = Ladder(steps.plan(micro_batch_size=7, loss_chunk_tokens=64), FREE, flat)
    found = [ladder.down(0), ladder.down(0), ladder.down(0)]
    assert [p and shape(p)[:2] for p in found] == [(1, 0), (1, 4), None]
    assert shape(ladder.plan)[:2] == (1, 4)


def test_an_evaluation_goes_down_by_itself() -> None:
    ladder = Ladder(steps.plan(micro_batch_size=7, evaluation_batch_size=4), FREE, predict)
    plan = ladder.down(2, evaluation=True)
    assert plan is not None
    assert (plan.evaluation_batch_size, plan.micro_batch_size) == (2, 7)


def hosted(plan: Plan) -> tuple[str, ...]:
    sides = ("embedding", "checkpoints", "head", "optimizer_device")
    layers = (f"{len(plan.streamed_layers)} layers",) if plan.streamed_layers else ()
    return *(name for name in sides if getattr(plan, name) == "host"), *layers


def gpu(**changes: object) -> Plan:
    """A plan that has nothing left but the host."""
    last = {"recompute_layers": range(LAYERS), "loss_chunk_tokens": 64, "micro_batch_size": 1}
    return steps.plan().replace(device="cuda", **{**last, **changes})


def weigh(plan: Plan, evaluation: bool) -> int:
    return predict(plan, evaluation) - len(hosted(plan)) - len(plan.streamed_layers)


def test_at_the_end_things_go_to_the_host() -> None:
    plan = gpu(micro_batch_size=2)
    found = [hosted(rung) for rung in smaller(plan, Freedom.most(plan, MODEL))]
    all_layers = ("embedding", "checkpoints", "5 layers")
    assert found == [
        (), ("embedding",), ("embedding", "checkpoints"), ("embedding", "checkpoints", "3 layers"),
        ("embedding", "checkpoints", "4 layers"), all_layers,
        ("embedding", "checkpoints", "head", "5 layers"),
        ("embedding", "checkpoints", "head", "optimizer_device", "5 layers"),
    ]  # fmt: skip
    held_out = smaller_evaluation(gpu(evaluation_batch_size=1), Freedom.most(plan, MODEL))
    assert [hosted(rung) for rung in held_out] == found[1:]


def test_what_is_on_the_host_stays_there() -> None:
    plan = gpu(streamed_layers=(0, 2, 4), head="host", embedding="host")
    found = [hosted(rung) for rung in smaller(plan, Freedom.most(plan, MODEL))]
    assert found[0] == ("embedding", "checkpoints", "head", "3 layers")
    assert [len(r.streamed_layers) for r in smaller(plan, Freedom.most(plan, MODEL))][1:3] == [4, 5]


def test_what_the_host_has_no_room_for_stays_on_the_device() -> None:
    def short(plan: Plan, evaluation: bool) -> int | None:
        return None if len(plan.streamed_layers) > 3 else weigh(plan, evaluation)

    ladder = Ladder(gpu(), Freedom.most(gpu(), MODEL), short)
    while ladder.down(1) is not None:
        pass
    assert hosted(ladder.plan) == (
        "embedding", "checkpoints", "head", "optimizer_device", "3 layers",
    )  # fmt: skip


def test_the_optimizer_stays_where_several_devices_sum_gradients() -> None:
    several = gpu(devices=2)
    last = list(smaller(several, Freedom.most(several, MODEL)))[-1]
    assert hosted(last) == ("embedding", "checkpoints", "head", "5 layers")


def test_a_rung_that_has_no_room_is_passed_over() -> None:
    room = [1001]
    top = gpu(micro_batch_size=4, recompute_layers=())
    ladder = Ladder(top, Freedom.most(top, MODEL), weigh, lambda: room[0])
    first = ladder.down(1)
    assert first is not None
    assert shape(first)[0] == 1
    assert weigh(first, False) <= 1001, "all between were not worth the device's time"
    room[0] = 0
    last = ladder.down(2)
    assert last is not None
    assert len(hosted(last)) == 5, "the smallest, as what took the memory may go"
    assert ladder.down(3) is None


def test_up_not_before_there_is_room() -> None:
    room = [1000]
    top = steps.plan(micro_batch_size=4)
    ladder = Ladder(top, FREE, predict, lambda: room[0])
    ladder.down(10)
    assert ladder.up(1000) is None
    assert ladder.up(2000) is None
    room[0] = 10_000
    assert ladder.up(2001) == top, "waiting has not used it up"


def test_each_plan_is_estimated_once() -> None:
    seen: list[Plan] = []

    def count(plan: Plan, evaluation: bool) -> int:
        seen.append(plan)
        return predict(plan, evaluation)

    ladder = Ladder(steps.plan(micro_batch_size=4), FREE, count, lambda: 0)
    ladder.down(10)
    for step in range(100, 120):
        ladder.up(step)
    assert len(seen) == len(set(seen))


def test_up_once_after_a_calm_stretch() -> None:
    top = steps.plan(micro_batch_size=4)
    ladder = Ladder(top, FREE, predict)
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
    ladder = Ladder(top, FREE, predict)
    ladder.down(3)
    ladder.up(100)
    rung = Rung.model_validate_json(ladder.rung.model_dump_json())
    assert rung == ladder.rung
    again = Ladder(top, FREE, predict)
    again.resume(rung)
    assert again.rung == rung
    assert again.up(1000) is None
    other = Ladder(steps.plan(micro_batch_size=7), FREE, predict)
    other.resume(rung)
    assert other.plan.micro_batch_size == 7, "a plan that was made anew is begun with"


@pytest.mark.parametrize("evaluation", [False, True])
def test_rungs_end(evaluation: bool) -> None:
    plan = steps.plan(
        effective_batch_size=1000, micro_batch_size=1000, evaluation_batch_size=1000,
        loss_chunk_tokens=8192,
    )  # fmt: skip
    rungs = list(
        smaller_evaluation(plan, FREE) if evaluation else smaller(plan, replace(FREE, layers=80))
    )
    assert 10 < len(rungs) < 30
