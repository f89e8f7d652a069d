"""Which plan to trace next: the fastest by the speed model, of those that a guess says fit.

There are thousands of plans, a forecast takes microseconds, and a trace takes seconds. So all plans are
ranked, and a guess of each one's bytes sorts out those that cannot fit. The guess is a difference from
the most alike plan that was traced, so it becomes exact where traces were made, and a rival that turned
out not to fit teaches the next guess.

This module imports no torch.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.plan import Kept, Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.speed import Forecast, Shape, forecast, guess_bytes, guess_host_bytes

# What layers that recompute may keep: nothing, or what takes longest to make for its bytes.
_KEEPS: tuple[tuple[Kept, ...], ...] = (
    (),
    ("attention",),
    ("qkv", "attention"),
    ("qkv", "attention", "middle"),
    ("attention", "middle", "mlp"),
)
# A plan is worth another trace only where it promises to be this much faster, and an optimizer on the
# host only for as much again: less than the speed model is off by between two plans that are alike. So
# that is what a search may leave: up to 1% by its own forecast.
WORTH = 0.005
# How often a number of streamed layers is guessed again from a plan that is more alike.
CORRECTIONS = 1
_layout = attrgetter(
    "micro_batch_size", "micro_batches_per_pass", "recompute_keeps", "checkpoints", "embedding", "head"
)  # fmt: skip


@dataclass(frozen=True)
class Guesses:
    """What plans take, by their difference from the most alike of those in `seen`.

    tokens: tokens of the heaviest micro-batch, by its size.
    """

    shape: Shape
    tokens: Callable[[int], int]
    seen: Sequence[Estimate]
    _alike: dict[tuple[Any, ...], list[Estimate]] = field(default_factory=dict)
    _of_seen: dict[int, int] = field(default_factory=dict)  # of the device, by the estimate's id

    def process_bytes(self, plan: Plan) -> int:
        like = self._like(plan)
        if id(like) not in self._of_seen:
            self._of_seen[id(like)] = self._device(like.plan)
        change = self._device(plan) - self._of_seen[id(like)]
        # what is lost between blocks stays about the same; what is set aside is a share
        if like.peak_reserved_bytes and like.safe_peak_bytes:
            change = change * like.safe_peak_bytes // like.peak_reserved_bytes
        return like.process_bytes + change

    def host_bytes(self, plan: Plan) -> int:
        like = self._like(plan)
        return like.host_bytes + self._host(plan) - self._host(like.plan)

    def _like(self, plan: Plan) -> Estimate:
        """The estimate of the plan that is most alike."""
        layout = _layout(plan)
        if layout not in self._alike:

            def unlike(estimate: Estimate) -> tuple[int, int]:
                other = _layout(estimate.plan)
                differ = sum(a != b for a, b in zip(layout, other, strict=True))
                return differ, abs(estimate.plan.micro_batch_size - plan.micro_batch_size)

            least = min(map(unlike, self.seen))
            self._alike[layout] = [e for e in self.seen if unlike(e) == least]

        def layers(estimate: Estimate) -> int:
            other = estimate.plan
            recomputed = abs(len(other.recompute_layers) - len(plan.recompute_layers))
            return recomputed + abs(len(other.streamed_layers) - len(plan.streamed_layers))

        return min(self._alike[layout], key=layers)

    def _device(self, plan: Plan) -> int:
        return guess_bytes(plan, self.shape, self.tokens(plan.micro_batch_size))

    def _host(self, plan: Plan) -> int:
        return guess_host_bytes(plan, self.shape, self.tokens(plan.micro_batch_size))


@dataclass(frozen=True)
class Rivals:
    """The plans that params allow. bases: one for each micro-batch size, nothing moved that may stay.

    tokens: tokens of the heaviest micro-batch, by its size.
    """

    shape: Shape
    free: Freedom
    hardware: Hardware
    bases: Sequence[Plan]
    tokens: Callable[[int], int]

    def rate(self, plan: Plan) -> float | None:
        """The plan's tokens per second as it is ranked; None where the machine's rates are not known."""
        found = self.forecast(plan)
        return None if found is None else _ranked(plan, found)

    def forecast(self, plan: Plan) -> Forecast | None:
        """The plan's speed; None where the machine's rates are not known."""
        return forecast(plan, self.shape, self.hardware.rates, self.tokens(plan.micro_batch_size))

    def guesses(self, seen: Sequence[Estimate]) -> Guesses:
        return Guesses(self.shape, self.tokens, seen)

    def fastest(self, seen: Sequence[Estimate], limit: int, above: float) -> Plan | None:
        """The best by `rate`, beyond `above`, that is not in `seen` and may fit `limit` bytes."""
        found = None
        guesses = self.guesses(seen)
        known = {estimate.plan for estimate in seen}
        for family in self._families():
            # ever more layers recompute, and what streams is no faster
            slow = bisect_left(family, True, key=lambda plan: (self.rate(plan) or 0.0) <= above)
            for plan in family[:slow]:
                for layout, rate in self._layouts(plan, guesses, limit):
                    room = self.hardware.host_budget_bytes
                    if rate > above and layout not in known and guesses.host_bytes(layout) <= room:
                        found, above = layout, rate
        return None if found is None else Plan.model_validate(found.model_dump())

    def _families(self) -> Iterator[list[Plan]]:
        """Every plan, but for streamed layers, by what else they have in common; unchecked copies.

        In each family ever more layers recompute. All micro-batches share a pass: nothing is faster.
        """
        fixed = len(self.bases[0].recompute_layers)
        counts = range(self.free.layers + 1) if self.free.recompute else (fixed,)
        keeps = _KEEPS if self.free.by_hand else _KEEPS[:1]
        for base, sides, kept in itertools.product(self.bases, self._sides, keeps):
            there = base.model_copy(update=sides)
            yield [self._recomputing(there, count, kept) for count in counts if count or not kept]

    def _recomputing(self, plan: Plan, count: int, kept: tuple[Kept, ...]) -> Plan:
        layout: dict[str, Any] = {
            "recompute_layers": tuple(range(count)),
            "recompute_keeps": kept,
            "micro_batches_per_pass": plan.accumulation if self.free.by_hand else 1,
        }
        if count == 0 and self.free.checkpoints:
            layout["checkpoints"] = "device"  # there are none
        return plan.model_copy(update=layout)

    @cached_property
    def _sides(self) -> list[dict[str, Any]]:
        """What may be on the host beside layers: nothing, and then more and more, the cheapest first."""
        free = self.free
        order: list[dict[str, Any]] = []
        if free.embedding and not free.tied:
            order.append({"embedding": "host"})
        if free.checkpoints:
            order.append({"checkpoints": "host"})
        if free.head:
            order.append({"head": "host", **({"embedding": "host"} if free.tied else {})})
        if free.optimizer:
            order.append({"optimizer_device": "host"})
        found: list[dict[str, Any]] = [{}]
        for more in order:
            found.append({**found[-1], **more})
        return found

    def _layouts(self, plan: Plan, guesses: Guesses, limit: int) -> Iterator[tuple[Plan, float]]:
        """The plan made to fit, with its rate: a pass for each micro-batch, or for more while a link
        holds up.
        """
        plan = plan.model_copy(update={"micro_batches_per_pass": 1})
        while (layout := self._fitted(plan, guesses, limit)) is not None:
            told, together = self.forecast(layout), plan.micro_batches_per_pass
            if told is None:
                return
            yield layout, _ranked(layout, told)
            waits = told.bound in ("link", "disk")
            if not (waits and self.free.by_hand) or together >= plan.accumulation:
                return
            together = min(2 * together, plan.accumulation)
            plan = plan.model_copy(update={"micro_batches_per_pass": together})

    def _fitted(self, plan: Plan, guesses: Guesses, limit: int) -> Plan | None:
        """The plan with as few streamed layers as make it fit, by the guess; None where none do."""
        over = guesses.process_bytes(plan) - limit
        if over <= 0:
            return plan
        free, whole = self.free, len(plan.recompute_layers) == self.free.layers
        if not free.stream or not (whole or free.by_hand):
            return None
        slots = self._streaming(1)["streaming_slots"]
        count, fitted = slots, None
        for _ in range(CORRECTIONS + 1):
            count = max(slots + 1, count + -(-over // self.shape.layer_bytes))
            count = min(count, free.most_streamed)
            plan = plan.model_copy(update=self._streaming(count))
            over = guesses.process_bytes(plan) - limit
            fitted = plan if over <= 0 else fitted
        return fitted

    def _streaming(self, count: int) -> dict[str, Any]:
        from fitlora.offload.residency import streaming  # here, as torch comes with it

        return streaming(self.free.layers, count)


def _ranked(plan: Plan, told: Forecast) -> float:
    """Its tokens per second. An optimizer on the host has to be worth it: its rate varies the most."""
    return told.tokens_per_second * (1 - WORTH * (plan.optimizer_device == "host"))
