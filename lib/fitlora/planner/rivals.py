"""Which plan to trace next: the fastest by the speed model, of those that a guess says fit.

There are thousands of plans, a forecast takes microseconds, and a trace takes seconds. So all plans are
ranked, and a guess of each one's bytes sorts out those that cannot fit. The guess is a difference from
the most alike plan that was traced, so it becomes exact where traces were made, and a rival that turned
out not to fit teaches the next guess.

This module imports no torch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
# A plan is worth another trace, or to have more on the host, only where it promises to be this much
# faster: about what the speed model is off by between two plans that are alike.
WORTH = 0.01
_ALIKE = (
    "micro_batch_size", "micro_batches_per_pass", "recompute_keeps", "checkpoints", "embedding", "head"
)  # fmt: skip


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
        """The plan's tokens per second as it is ranked; None where the machine's rates are not known.

        A head or an optimizer on the host, which a forecast knows least of, has to be worth it.
        """
        found = self.forecast(plan)
        moved = (plan.head == "host") + (plan.optimizer_device == "host")
        return None if found is None else found.tokens_per_second * (1 - WORTH) ** moved

    def forecast(self, plan: Plan) -> Forecast | None:
        """The plan's speed; None where the machine's rates are not known."""
        return forecast(plan, self.shape, self.hardware.rates, self.tokens(plan.micro_batch_size))

    def fastest(self, seen: Sequence[Estimate], limit: int, above: float) -> Plan | None:
        """The best by `rate`, beyond `above`, that is not in `seen` and may fit `limit` bytes."""
        found = None
        known = {estimate.plan for estimate in seen}
        for slower_and_slower in self._families():
            for plan in slower_and_slower:
                if (self.rate(plan) or 0.0) <= above:
                    break  # as are all behind it, and what streams is no faster
                for layout in self._layouts(plan, seen, limit):
                    rate = self.rate(layout) or 0.0
                    if rate > above and layout not in known and self._may_fit(layout, seen, limit):
                        found, above = layout, rate
        return None if found is None else Plan.model_validate(found.model_dump())

    def _families(self) -> Iterator[Iterator[Plan]]:
        """Every plan, but for streamed layers, by what else they have in common; unchecked copies.

        In each family ever more layers recompute. All micro-batches share a pass: nothing is faster.
        """
        fixed = len(self.bases[0].recompute_layers)
        counts = range(self.free.layers + 1) if self.free.recompute else (fixed,)
        keeps = _KEEPS if self.free.by_hand else _KEEPS[:1]
        for base, sides, kept in itertools.product(self.bases, self._sides, keeps):
            yield (
                self._recomputing(base.model_copy(update=sides), count, kept)
                for count in counts
                if count or not kept
            )

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

    def _layouts(self, plan: Plan, seen: Sequence[Estimate], limit: int) -> Iterator[Plan]:
        """The plan made to fit, with a pass for each micro-batch, or for more while a link holds up."""
        plan = plan.model_copy(update={"micro_batches_per_pass": 1})
        while (layout := self._fitted(plan, seen, limit)) is not None:
            yield layout
            told, together = self.forecast(layout), plan.micro_batches_per_pass
            waits = told is not None and told.bound in ("link", "disk")
            if not (waits and self.free.by_hand) or together >= plan.accumulation:
                return
            together = min(2 * together, plan.accumulation)
            plan = plan.model_copy(update={"micro_batches_per_pass": together})

    def _fitted(self, plan: Plan, seen: Sequence[Estimate], limit: int) -> Plan | None:
        """The plan with as few streamed layers as make it fit, by the guess; None where none do."""
        over = self._guess(plan, seen) - limit
        if over <= 0:
            return plan
        free, whole = self.free, len(plan.recompute_layers) == self.free.layers
        count = plan.streaming_slots + -(-over // self.shape.layer_bytes)
        if not free.stream or not (whole or free.by_hand) or count > free.most_streamed:
            return None
        return plan.model_copy(update={"streamed_layers": self._spread(count)})

    def _spread(self, count: int) -> tuple[int, ...]:
        from fitlora.offload.residency import spread  # here, as torch comes with it

        return spread(self.free.layers, count)

    def _may_fit(self, plan: Plan, seen: Sequence[Estimate], limit: int) -> bool:
        like = self._like(plan, seen)
        held = like.host_bytes + self._host(plan) - self._host(like.plan)
        if held > self.hardware.host_budget_bytes:
            return False
        return self._guess(plan, seen) <= limit

    def _guess(self, plan: Plan, seen: Sequence[Estimate]) -> int:
        like = self._like(plan, seen)
        # what is set aside for each byte that is allocated
        margin = (like.process_bytes - self.hardware.context_bytes) / like.peak_allocated_bytes
        return like.process_bytes + int(margin * (self._device(plan) - self._device(like.plan)))

    def _like(self, plan: Plan, seen: Sequence[Estimate]) -> Estimate:
        """The estimate of the plan that is most alike."""

        def distance(estimate: Estimate) -> tuple[int, int]:
            other = estimate.plan
            layers = abs(len(other.recompute_layers) - len(plan.recompute_layers))
            layers += abs(len(other.streamed_layers) - len(plan.streamed_layers))
            return sum(getattr(other, name) != getattr(plan, name) for name in _ALIKE), layers

        return min(seen, key=distance)

    def _device(self, plan: Plan) -> int:
        return guess_bytes(plan, self.shape, self.tokens(plan.micro_batch_size))

    def _host(self, plan: Plan) -> int:
        return guess_host_bytes(plan, self.shape, self.tokens(plan.micro_batch_size))
