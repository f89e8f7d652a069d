"""Down the ladder: which Plan to go on with when one that should have fitted did not.

The planner's choice is made before training and is right about this process. Others take memory
whenever they like. So a run that overflows goes on with a smaller Plan of the same work: no decision
that changes a result is touched, unless params ask for frozen layers. The rungs, from what costs least
time: a smaller micro-batch, fewer that share a pass, more layers that recompute, less that such layers
keep, smaller chunks of logits and of an MLP; where `train.freeze` freezes, more of that
(`fitlora.planner.freezing`); then more on the host (`fitlora.planner.chain`), for which the step is made
anew. What params say of the layout is where a run begins; the ladder goes beyond it, as the alternative
is to end.

A rung is worth the device's time only where the estimate says that it takes less, and that it fits what
the process could have now. Where nothing does, the smallest is tried: what took the memory may go.

This module imports no torch: it is handed the function that estimates.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fitlora.plan import Plan
from fitlora.planner.chain import Freedom, offloads
from fitlora.planner.freezing import more_frozen

# Optimizer steps without an overflow after which the plan that was left is tried again, once.
CALM_STEPS = 50
LEAST_LOSS_CHUNK = 64
LEAST_MLP_CHUNK = 1024  # each part dequantizes the MLP's weights again


def smaller(
    plan: Plan,
    free: Freedom,
    has_room: Callable[[Plan], bool] = lambda plan: True,
    freezes: Sequence[int] = (),
) -> Iterator[Plan]:
    """Plans of the same training step in less memory, the fastest first.

    free: what the model and the device allow. has_room: whether the host can hold a plan's share of
    it. freezes: all layers in the order in which they freeze; none where they never do. Each step halves
    something, so that the end is near.
    """
    layers = free.layers
    while plan.micro_batch_size > 1:
        plan = plan.replace(micro_batch_size=-(-plan.micro_batch_size // 2))
        yield plan
    while plan.micro_batches_per_pass > 1:
        plan = plan.replace(micro_batches_per_pass=-(-plan.micro_batches_per_pass // 2))
        yield plan
    while len(plan.recompute_layers) < layers:
        kept = [layer for layer in range(layers) if layer not in plan.recompute_layers]
        more = kept[: -(-len(kept) // 2)]
        plan = plan.replace(recompute_layers=tuple(sorted([*plan.recompute_layers, *more])))
        yield plan
    while plan.recompute_keeps:
        plan = plan.replace(recompute_keeps=plan.recompute_keeps[:-1])
        yield plan
    for plan in _smaller_chunks(plan, free):  # noqa: B020  (what follows begins at the last)
        yield plan
    while (frozen := more_frozen(plan.frozen_layers, freezes)) is not None:
        plan = plan.replace(frozen_layers=frozen)
        yield plan
    yield from offloads(plan, free, has_room)


def smaller_evaluation(
    plan: Plan, free: Freedom, has_room: Callable[[Plan], bool] = lambda plan: True
) -> Iterator[Plan]:
    """The same for an evaluation, which keeps no activations."""
    while plan.evaluation_batch_size > 1:
        plan = plan.replace(evaluation_batch_size=-(-plan.evaluation_batch_size // 2))
        yield plan
    for plan in _smaller_chunks(plan, free):  # noqa: B020
        yield plan
    yield from offloads(plan, free, has_room)


def _smaller_chunks(plan: Plan, free: Freedom) -> Iterator[Plan]:
    while plan.loss_chunk_tokens > LEAST_LOSS_CHUNK:
        plan = plan.replace(loss_chunk_tokens=max(LEAST_LOSS_CHUNK, plan.loss_chunk_tokens // 2))
        yield plan
    tokens = plan.micro_batch_size * plan.sequence_length
    while (
        free.by_hand and (chunk := min(tokens, plan.mlp_chunk_tokens or tokens)) > LEAST_MLP_CHUNK
    ):
        plan = plan.replace(mlp_chunk_tokens=max(LEAST_MLP_CHUNK, chunk // 2))
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
    freezes: tuple[int, ...] = Field(
        (), strict=False
    )  # all layers as they freeze; none: they never do


class Ladder:
    """The Plan in use, between the one that a run began with and the smallest.

    free: what the model and the device allow. predict: bytes that a plan is estimated to take, in an
    evaluation or as a whole; None where the host has no room for its share. It is asked once for each.
    room: bytes that the process could have now, counted likewise; None where that is not known.
    """

    def __init__(
        self,
        plan: Plan,
        free: Freedom,
        predict: Callable[[Plan, bool], int | None],
        room: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.free, self.room = free, room
        self.predict = cache(predict)
        self.rung = Rung(top=plan, plan=plan)

    @property
    def plan(self) -> Plan:
        return self.rung.plan

    def down(self, step: int, *, evaluation: bool = False) -> Plan | None:
        """The next smaller plan, now in use, after an overflow at `step`; None where there is none.

        A rung that is not estimated below the plan in use is passed over; so is one that has no room,
        unless there is none that has.
        """
        found = self.rung.proven or self._below(evaluation)
        if found is not None:
            self._go(found, step, climbed=self.rung.climbed)
        return found

    def _below(self, evaluation: bool) -> Plan | None:
        room, now = self.room(), self.predict(self.plan, evaluation)
        least: tuple[int, Plan] | None = None

        def has_room(plan: Plan) -> bool:
            return self.predict(plan, evaluation) is not None

        if evaluation:
            rungs = smaller_evaluation(self.plan, self.free, has_room)
        else:
            rungs = smaller(self.plan, self.free, has_room, self.rung.freezes)
        for plan in rungs:
            size = self.predict(plan, evaluation)
            if size is None or (now is not None and size >= now):
                continue
            if room is None or size <= room:
                return plan
            if least is None or size < least[0]:
                least = size, plan
        return None if least is None else least[1]

    def up(self, step: int) -> Plan | None:
        """The plan that the run began with, in use again; None before its time, or a second time.

        Its time has not come either while there is no room for it.
        """
        rung = self.rung
        if rung.plan == rung.top or rung.climbed or step - rung.calm_since < CALM_STEPS:
            return None
        room, size = self.room(), self.predict(rung.top, False)
        if room is not None and size is not None and size > room:
            return None
        self._go(rung.top, step, climbed=True, proven=rung.plan)
        return rung.top

    def turn(self, **decisions: Any) -> Plan:
        """The plan in use with decisions that are none of the layout's, in which no rung differs."""
        rung = self.rung
        proven = None if rung.proven is None else rung.proven.replace(**decisions)
        self.rung = rung.model_copy(
            update={
                "top": rung.top.replace(**decisions),
                "plan": rung.plan.replace(**decisions),
                "proven": proven,
            }
        )
        return self.plan

    def resume(self, rung: Rung) -> None:
        """Goes on where an earlier part of the run was.

        If it had begun with another layout, it goes on with this one; precision and frozen layers are
        as they were in any case, as results depend on them.
        """
        plan = rung.plan
        self.turn(layer_dtype=plan.layer_dtype, frozen_layers=plan.frozen_layers)
        if rung.top == self.rung.top:
            self.rung = rung
        self.freeze_in_order(rung.freezes)

    def freeze_in_order(self, layers: Sequence[int]) -> None:
        """Sets the order in which layers freeze at the end of the ladder: all of them, or none."""
        self.rung = self.rung.model_copy(update={"freezes": tuple(layers)})

    def _go(self, plan: Plan, step: int, *, climbed: bool, proven: Plan | None = None) -> None:
        self.rung = Rung(
            # what is frozen stays so: the optimizer's state of it is gone
            top=self.rung.top.replace(frozen_layers=plan.frozen_layers),
            plan=plan,
            calm_since=step,
            climbed=climbed,
            proven=proven,
            freezes=self.rung.freezes,
        )
