"""What the planner is asked: a model to train as params say, a load to carry, a machine to do it on.

What follows from these is made when it is first wanted, and once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.memory.estimate import Estimator, Load
from fitlora.params import Params
from fitlora.plan import Plan, Side
from fitlora.planner.model import model_size
from fitlora.planner.search import Search, default_plan, least_of, smallest_plans
from fitlora.planner.size import ModelSize
from fitlora.planner.speed import Shape, Way
from fitlora.step.settings import StepSettings

LOWEST_RANK = 4  # that is worth proposing
PLAINLY = 1.1  # times a budget: more than a count of weights is off by


@dataclass(frozen=True)
class Task:
    """config: a transformers config. params: with numbers where they may say auto (`with_found`)."""

    config: Any
    params: Params
    load: Load
    hardware: Hardware

    @cached_property
    def settings(self) -> StepSettings:
        return StepSettings.of(self.params)

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.config, self.settings, self.estimator.kinds)

    @cached_property
    def shape(self) -> Shape | None:
        """What the model's speed depends on; None where that is not known: of experts, for one."""
        lora = self.params.lora
        assert lora.r != "auto", "with_found has the number"
        by_autograd: Way = "dora" if lora.dora else "autograd"
        found = Shape.of(
            self.config,
            bits=self.params.quantization.bits,
            rank=lora.r,
            dropout=lora.dropout > 0,
            whole=self.size.trained_whole,
            way="hand" if self.size.by_hand else by_autograd,
        )
        there = self.size.layer_weights
        return found if found and there in (None, {found.weights}) else None

    @cached_property
    def start(self) -> Plan:
        """The plan that a search begins with."""
        return default_plan(
            self.params,
            self.hardware,
            self.size,
            self.load.tokens,
            sequence_length=self.load.train[0].tokens,
        )

    @cached_property
    def estimator(self) -> Estimator:
        return Estimator(self.config, self.settings, self.load, self.hardware)

    @cached_property
    def estimate(self) -> Callable[[Plan], Estimate]:
        """Each plan is estimated once."""
        return cache(self.estimator)

    def search(self, known: Sequence[Estimate] = ()) -> Search:
        """known: estimates that were made already, of any plans."""
        return Search(
            params=self.params,
            hardware=self.hardware,
            model=self.size,
            start=self.start,
            estimator=self.estimate,
            tokens=self.load.tokens,
            seen=[estimate for estimate in known if self._may_be_chosen(estimate.plan)],
            shape=self.shape,
        )

    def _may_be_chosen(self, plan: Plan) -> bool:
        """Whether a plan is of the precision and the frozen layers that params ask for."""
        return plan.layer_dtype is None and plan.frozen_layers == self.start.frozen_layers

    def smallest(self, *, host: bool, head: Side | None = None) -> Estimate:
        """What the smallest layout that params leave takes.

        host: whether it may use the host, and the disk for layers that the host has no room for. head:
        where its head is, where that is known to be smaller.
        """
        plans = smallest_plans(self.params, self.size, self.start, host=host)
        plans = [plan for plan in plans if plan.head == head] or plans
        if not host or self.params.plan.stream_layers != "auto":
            return least_of(map(self.estimate, plans))
        room, layer_bytes = self.hardware.host_budget_bytes, self.shape and self.shape.layer_bytes
        # what is plainly too much for the host needs no trace that says so
        if layer_bytes and len(plans[0].streamed_layers) * layer_bytes > PLAINLY * room:
            return least_of(self.estimate(_read_from_disk(plan)) for plan in plans)
        found = least_of(map(self.estimate, plans))
        if found.host_bytes > room:
            found = self.estimate(_read_from_disk(found.plan))
        return found


def _read_from_disk(plan: Plan) -> Plan:
    return plan.replace(disk_layers=len(plan.streamed_layers))
