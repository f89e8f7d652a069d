"""Down the ladder: which Plan to go on with when one that should have fitted did not.

The planner's choice is made before training and is right about this process. Others take memory
whenever they like. So a run that overflows goes on with a smaller Plan of the same work: no decision
that changes a result is touched. The rungs, from what costs least time: a smaller micro-batch, more
layers that recompute, less that such layers keep, smaller chunks of logits. A rung is worth the
device's time only where the estimate says that it takes less. Further kinds of rungs (what lives in
host memory) belong at the end of `smaller`, as soon as a step can adopt them.

This module imports no torch: it is handed the function that estimates.
"""

from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict

from fitlora.plan import Plan

# Optimizer steps without an overflow after which the plan that was left is tried again, once.
CALM_STEPS = 50
LEAST_LOSS_CHUNK = 64


def smaller(plan: Plan, layers: int) -> Iterator[Plan]:
    """Plans of the same training step in less memory, the fastest first.

    layers: decoder layers of the model. Each step halves something, so that the end is near.
    """
    while plan.micro_batch_size > 1:
        plan = plan.replace(micro_batch_size=-(-plan.micro_batch_size // 2))
        yield plan
    while len(plan.recompute_layers) < layers:
        kept = [layer for layer in range(layers) if layer not in plan.recompute_layers]
        more = kept[: -(-len(kept) // 2)]
        plan = plan.replace(recompute_layers=tuple(sorted([*plan.recompute_layers, *more])))
        yield plan
    while plan.recompute_keeps:
        plan = plan.replace(recompute_keeps=plan.recompute_keeps[:-1])
        yield plan
    yield from _smaller_chunks(plan)


def smaller_evaluation(plan: Plan) -> Iterator[Plan]:
    """The same for an evaluation, which keeps no activations."""
    while plan.evaluation_batch_size > 1:
        plan = plan.replace(evaluation_batch_size=-(-plan.evaluation_batch_size // 2))
        yield plan
    yield from _smaller_chunks(plan)


def _smaller_chunks(plan: Plan) -> Iterator[Plan]:
    while plan.loss_chunk_tokens > LEAST_LOSS_CHUNK:
        plan = plan.replace(loss_chunk_tokens=max(LEAST_LOSS_CHUNK, plan.loss_chunk_tokens // 2))
        yield plan


def faster(plan: Plan) -> dict[str, Plan]:
    """Plans in more memory that might be faster, by what they have, the more promising first."""
    found = {}
    if plan.recompute_layers:
        found["no layer recomputed"] = plan.replace(recompute_layers=())
    if plan.micro_batch_size * 2 <= plan.sequences_per_device:
        found["twice the micro-batch"] = plan.replace(micro_batch_size=plan.micro_batch_size * 2)
    return found


class Rung(BaseModel):
    """Where a run stands on the ladder. A checkpoint keeps it, so that a run goes on as it was."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    top: Plan
    plan: Plan
    calm_since: int = 0  # the step of the last change
    climbed: bool = False
    proven: Plan | None = None  # what a climb left, to which the next overflow goes straight back


class Ladder:
    """The Plan in use, between the one that a run began with and the smallest.

    predict: bytes that a plan is estimated to take, in an evaluation or as a whole. layers: decoder
    layers of the model.
    """

    def __init__(self, plan: Plan, layers: int, predict: Callable[[Plan, bool], int]) -> None:
        self.layers, self.predict = layers, predict
        self.rung = Rung(top=plan, plan=plan)

    @property
    def plan(self) -> Plan:
        return self.rung.plan

    def down(self, step: int, *, evaluation: bool = False) -> Plan | None:
        """The next smaller plan, now in use, after an overflow at `step`; None where there is none.

        A rung that is not estimated below the plan in use is passed over.
        """
        found = self.rung.proven
        if found is None:
            rungs = smaller_evaluation(self.plan) if evaluation else smaller(self.plan, self.layers)
            now = self.predict(self.plan, evaluation)
            found = next((plan for plan in rungs if self.predict(plan, evaluation) < now), None)
        if found is not None:
            self._go(found, step, climbed=self.rung.climbed)
        return found

    def up(self, step: int) -> Plan | None:
        """The plan that the run began with, in use again; None before its time, or a second time."""
        rung = self.rung
        if rung.plan == rung.top or rung.climbed or step - rung.calm_since < CALM_STEPS:
            return None
        self._go(rung.top, step, climbed=True, proven=rung.plan)
        return rung.top

    def resume(self, rung: Rung) -> None:
        """Goes on where an earlier part of the run was, unless it had begun with another Plan."""
        if rung.top == self.rung.top:
            self.rung = rung

    def _go(self, plan: Plan, step: int, *, climbed: bool, proven: Plan | None = None) -> None:
        self.rung = Rung(
            top=self.rung.top, plan=plan, calm_since=step, climbed=climbed, proven=proven
        )
