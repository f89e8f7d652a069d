"""Switches of precision and frozen layers, as the report has them."""

from typing import Any

from fitlora.report.adaptation import adaptation
from fitlora.report.log import TrainingLog
from tests.step import steps

CHANGE = {"step": 7, "cause": "out of memory", "before": {"frozen_layers": []}}
SWITCH = {
    "step": 1200, "cause": "the loss is nan", "before": "bfloat16", "after": "float32",
    "loss_scale": 1.0,
}  # fmt: skip


def shown(plan: Any = None, **events: Any) -> str:
    log = TrainingLog((), (), events.pop("plans", ()), {}, **events)
    return "".join(str(part) for part in adaptation(log, plan or steps.plan()))


def test_nothing_is_shown_where_nothing_was_switched_or_frozen() -> None:
    assert shown() == ""
    moved = {**CHANGE, "after": {"frozen_layers": [], "micro_batch_size": 1}}
    assert shown(plans=(moved,)) == ""


def test_the_steps_are_in_order_with_their_causes() -> None:
    text = shown(
        plans=({**CHANGE, "after": {"frozen_layers": [0, 1]}},),
        switches=(SWITCH, {**SWITCH, "step": 30, "after": "float16", "loss_scale": 32768.0}),
        choices=({"step": 1, "cause": "the least gradients", "frozen_layers": [2]},),
    )
    found = [
        text.index(words)
        for words in (
            "float32, no layers frozen", "layers 2 frozen", "the least gradients",
            "layers 0, 1 frozen", "out of memory", "float16 after bfloat16, losses scaled by 32,768",
            "1,200", "float32 after bfloat16",
        )
    ]  # fmt: skip
    assert found == sorted(found)


def test_what_the_plan_freezes_is_shown_from_the_first_step() -> None:
    assert "layers 0 frozen" in shown(steps.plan(frozen_layers=(0,)))
