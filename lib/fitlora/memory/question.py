"""Will it fit, how much of it would, and what else would: the questions that people have of a Plan.

Every answer is an estimate of a Plan that was traced. What a micro-batch takes depends on its tokens
alone (there is no padding, and attention keeps no scores), and nearly as the largest of straight lines,
a convex curve: what the allocator reserves beside it is a small share. So the longest sequence that fits
is closed in on with a handful of traces, from below by chords and from above by extending them, and no
length is told that was not found to fit itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fitlora.artifacts import Card, Estimate, Hardware
from fitlora.memory.estimate import Estimator, Load
from fitlora.offload.residency import spread
from fitlora.plan import Plan
from fitlora.step.settings import StepSettings
from fitlora.units import GIB

CARDS_GIB = (8, 12, 16, 24, 40, 48, 80)  # of memory that GPUs are sold with
LENGTH_STEP = 64  # tokens; a sequence's length is given in multiples
LONGEST = 2**20  # tokens of a sequence beyond which nobody looks
CLOSE_ENOUGH = 0.01  # of the budget left unused
MOST_TRIALS = 5


@dataclass
class Question:
    """A model with its settings, a Plan and a machine. Sequences are full and learned throughout."""

    config: Any
    settings: StepSettings
    plan: Plan
    hardware: Hardware
    by_hand: bool = True  # whether FitLoRA does the model's layers by hand
    _known: dict[Plan, Estimate] = field(default_factory=dict)

    @cached_property
    def _estimator(self) -> Estimator:
        return Estimator(self.config, self.settings, Load.uniform(1, 2), self.hardware)

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def estimate(self, plan: Plan | None = None) -> Estimate:
        """Of `plan`, or of the one that is asked about."""
        plan = plan or self.plan
        if plan not in self._known:
            count = max(plan.micro_batch_size, plan.evaluation_batch_size)
            load = Load.uniform(count, plan.sequence_length)
            self._known[plan] = self._estimator.for_load(load)(plan)
        return self._known[plan]

    def of_length(self, tokens: int) -> Plan:
        return self.plan.replace(sequence_length=tokens)

    def longest(self) -> Estimate | None:
        """The plan with the longest sequences that fit, to `CLOSE_ENOUGH`; None where none does."""
        budget = self.hardware.budget_bytes
        here = self.estimate()
        fitting, beyond = (here, None) if here.fits else (None, here)
        for _ in range(MOST_TRIALS):
            if fitting is None:
                assert beyond is not None
                at = beyond.plan.sequence_length // 4
            elif beyond is None:
                at = self._extended(fitting, budget)
            else:
                at = _chord(fitting, beyond, budget)
            at = min(at, LONGEST) // LENGTH_STEP * LENGTH_STEP
            if at < LENGTH_STEP or (fitting and at <= fitting.plan.sequence_length):
                break
            found = self.estimate(self.of_length(at))
            if found.fits:
                fitting = found
                if found.process_bytes > (1 - CLOSE_ENOUGH) * budget or at == LONGEST:
                    break
            else:
                beyond = found
        return fitting

    def _extended(self, fitting: Estimate, budget: int) -> int:
        """Where the line through the two longest known plans reaches the budget; at first, twice."""
        known = sorted(
            (e.plan.sequence_length, e.process_bytes)
            for e in self._known.values()
            if e.plan == self.of_length(e.plan.sequence_length)
        )
        length, count = fitting.plan.sequence_length, fitting.process_bytes
        shorter = [k for k in known if k[0] < length and k[1] < count]
        if not shorter:
            return 2 * length
        slope = (count - shorter[-1][1]) / (length - shorter[-1][0])
        return length + max(LENGTH_STEP, int((budget - count) / slope))

    def largest_micro_batch(self, longest: Estimate) -> int:
        """Sequences of the asked length that have no more tokens than the longest micro-batch."""
        tokens = longest.plan.sequence_length * longest.plan.micro_batch_size
        return tokens // self.plan.sequence_length

    def ways_out(self) -> Iterator[tuple[str, Plan]]:
        """Plans that take less than the one that is asked about (`ways_out`)."""
        return ways_out(self.plan, self.config, by_hand=self.by_hand)

    def way_out(self) -> tuple[list[str], Estimate]:
        """The first of `ways_out` that fits, with all its changes by name.

        Where none does, no changes, and the smallest layout of all.
        """
        names, known = [], [self.estimate()]
        for name, plan in self.ways_out():
            names.append(name)
            known.append(self.estimate(plan))
            if known[-1].fits:
                return names, known[-1]
        return [], min(known, key=lambda estimate: estimate.process_bytes)


def ways_out(plan: Plan, config: Any, *, by_hand: bool) -> Iterator[tuple[str, Plan]]:
    """Plans that take less, each with the changes of those before it, the cheapest in time first.

    What the user decides (the optimizer, for one) stays as it is. by_hand: whether FitLoRA does the
    model's layers by hand.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("every layer recomputed", {"recompute_layers": tuple(range(layers))}),
        ("nothing kept of recomputed layers", {"recompute_keeps": ()}),
        ("a micro-batch of 1", {"micro_batch_size": 1, "evaluation_batch_size": 1}),
        ("everything but the layers on the host", _all_on_host(plan, config, by_hand=by_hand)),
        ("half of the layers streamed", {"streamed_layers": spread(layers, layers // 2)}),
        ("every layer streamed", {"streamed_layers": spread(layers, layers)}),
    ]
    for name, changes in steps:
        smaller = plan.replace(**changes)
        if smaller != plan:
            yield name, smaller
        plan = smaller


def _all_on_host(plan: Plan, config: Any, *, by_hand: bool) -> dict[str, Any]:
    found = {}
    if by_hand:  # where autograd does them, they stay
        found["checkpoints"] = "host"
        if not getattr(
            config, "final_logit_softcapping", None
        ):  # as does a capped head, and its tie
            found |= {"embedding": "host", "head": "host"}
    if plan.optimizer == "adamw":
        found["optimizer_device"] = "host"
    return found


def fit_cards(estimates: Iterable[Estimate]) -> tuple[Card, ...]:
    """For each of `CARDS_GIB` the first of the estimates, in order of preference, that it holds.

    What is cached need not be given back on a card that it says fits. The host is asked nothing: what is
    pinned on it is in the plan's line.
    """
    known = list(estimates)

    def card(size: int) -> Card:
        found = next((e for e in known if e.process_bytes <= size * GIB), None)
        return Card(
            gib=size,
            fits=found is not None,
            plan=None if found is None else found.plan.describe(),
            process_bytes=None if found is None else found.process_bytes,
            host_pinned_bytes=None if found is None else found.host_pinned_bytes,
        )

    return tuple(card(size) for size in CARDS_GIB)


def _chord(fitting: Estimate, beyond: Estimate, budget: int) -> int:
    """The length at which the chord between the two reaches the budget; what is there fits."""
    low, high = fitting.plan.sequence_length, beyond.plan.sequence_length
    rise = max(1, beyond.process_bytes - fitting.process_bytes)
    return low + int((high - low) * max(0, budget - fitting.process_bytes) / rise)
