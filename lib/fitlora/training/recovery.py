"""Work that is done again when memory runs out: an optimizer step is a transaction.

What overflowed has changed nothing but gradients. They are dropped, memory is given back, a smaller
Plan is adopted (`fitlora.planner.ladder`), and the same samples are done again; dropout masks are a
function of the sample, so they are the same too. A Plan with more on the host is not adopted in place:
what the step has learned is copied to the host, the step is put away with all that it has on the
device, and another one is made that learns on from there. At the end of the ladder the run waits a
little, as what took the memory may go, and then ends with everything saved and a message in figures.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fitlora.artifacts import Hardware
from fitlora.device import available_bytes, give_back_memory, memory_now
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator
from fitlora.offload.host_memory import HostMemoryShort
from fitlora.plan import Plan
from fitlora.planner.ladder import Ladder
from fitlora.step.training_step import TrainingStep
from fitlora.training.agreement import Agreement, Done, attempt
from fitlora.training.parallel import Ranks
from fitlora.units import format_bytes

Result = TypeVar("Result")

# Seconds before the smallest plan is tried again.
WAITS = (0.0, 1.0, 5.0, 20.0)


class NothingSmaller(UserError):
    """The smallest plan does not fit either."""


class HalfUpdated(Exception):
    """Memory ran out inside the update itself: some weights have changed and others not."""


@dataclass(frozen=True)
class Learned:
    """What a step has learned so far, on the CPU, whatever its Plan."""

    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, step: TrainingStep) -> "Learned":
        """Copies of what `step` has between two updates."""
        return cls(step.adapter_state(), *step.optimizer_state())

    def put_into(self, step: TrainingStep) -> None:
        """Makes `step` go on from here; raises ValueError where its optimizer is of another kind."""
        step.load_adapter_state(self.adapter)
        step.load_optimizer_state(self.optimizer, self.numbers)


class Recovery:
    """Has the step, and carries work out with it in the plan in use, or in smaller ones.

    build: makes a step for a plan, as it is before it has learned anything. record: takes the event of
    each change of plan. agreement: of the processes that go down together. suggest: told a plan that
    does not fit, says in figures what would.

    `begin` makes the first step. Nobody else may keep a step, as another may take its place and wants
    its memory; `made` is called with each. phase: the last phase of the step that was entered.
    """

    def __init__(
        self,
        build: Callable[[Plan], TrainingStep],
        ladder: Ladder,
        record: Callable[[dict[str, Any]], None],
        devices: Sequence[torch.device],
        *,
        agreement: Agreement | None = None,
        suggest: Callable[[Plan], str] = lambda plan: "",
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.ladder, self.devices, self.phase = ladder, devices, ""
        self.made: Callable[[TrainingStep], None] = lambda step: None
        self._build, self._record, self._suggest, self.wait = build, record, suggest, wait
        self.agreement = agreement or Agreement(Ranks())
        self._step: TrainingStep | None = None
        self._learned: Learned | None = None  # of a step that was put away

    @property
    def step(self) -> TrainingStep:
        """The step in use."""
        assert self._step is not None, "begin makes it"
        return self._step

    def learned(self) -> Learned:
        """Copies of what was learned so far; raises UserError where the host has no memory for them."""
        if self._learned is not None:
            return self._learned
        return self.insist(lambda: Learned.of(self.step), "a copy of the adapter on the host")

    def begin(self, learned: Learned | None = None, *, step: int = 1) -> None:
        """Makes the step as the plan in use says, or a smaller one; one that is there is put away.

        learned: what it goes on from; None for a new adapter. Raises NothingSmaller.
        """
        if self._step is not None:
            self._step.abandon()  # copies may be under way, from and to memory that goes now
            self._step = None
            give_back_memory()
        self._learned = learned
        self.phase = "loading"
        self._step = self.carry_out(self._make, step=step)
        self._learned = None
        self.made(self._step)

    def go_on_from(self, learned: Learned, *, step: int) -> None:
        """Has the step go on from another place, in the plan in use; makes one where there is none."""
        if self._step is None or not self._step.can_adopt(self.ladder.plan):
            self.begin(learned, step=step)
            return
        self._step.adopt(self.ladder.plan)
        learned.put_into(self._step)

    def _make(self) -> TrainingStep:
        try:
            made = self._build(self.ladder.plan)
        except HostMemoryShort as error:
            if self._learned is None:
                raise  # the plan was made for this host, so that the user should know
            raise MemoryError(str(error)) from None
        if self._learned is not None:
            self._learned.put_into(made)
        return made

    def carry_out(
        self,
        work: Callable[[], Result],
        *,
        step: int,
        evaluation: bool = False,
    ) -> Result:
        """The result of `work`, done again in smaller plans until it finds its memory.

        step: the optimizer step that it belongs to, from 1. Raises HalfUpdated where it cannot be
        done again, and NothingSmaller at the end of the ladder.
        """
        waits = iter(WAITS)
        while True:
            found = self.agreement.attempt(work)
            if isinstance(found, Done):
                return found.result
            if self._step is not None:
                self._step.abandon()
            give_back_memory()
            if found.too_late or (self._step is not None and self._step.half_updated):
                raise HalfUpdated(found.cause)
            before = self.ladder.plan
            if self.ladder.down(step, evaluation=evaluation) is not None:
                self.tell(step, f"out of memory in {self.phase}: {found.cause}", before)
                self._follow(step)
                continue
            seconds = next(waits, None)
            if seconds is None:
                raise NothingSmaller(self._nothing_smaller(step, evaluation, found.cause))
            self.wait(seconds)

    def _follow(self, step: int) -> None:
        """Brings the step to the plan in use."""
        if self._step is None:
            return  # it is being made
        if self._step.can_adopt(self.ladder.plan):
            self._step.adopt(self.ladder.plan)
        else:
            self.begin(self.learned(), step=step)

    def insist(self, work: Callable[[], Result], what: str) -> Result:
        """The result of work that no plan makes smaller; raises UserError where it finds no memory."""
        waits = iter(WAITS)
        while True:
            found = attempt(work)
            if isinstance(found, Done):
                return found.result
            give_back_memory()
            seconds = next(waits, None)
            if seconds is None:
                now = memory_now(*self.devices)
                raise UserError(f"there is no memory for {what} ({found.cause}): {now}")
            self.wait(seconds)

    def climb(self, step: int) -> None:
        """After a calm stretch, goes back to the plan that the run began with, once."""
        before = self.ladder.plan
        if self.ladder.up(step) is not None:
            self.tell(step + 1, "a calm stretch", before)
            self._follow(step + 1)

    def turn(self, **decisions: Any) -> None:
        """Goes on with other decisions that are none of the layout's, on whichever rung."""
        self.step.adopt(self.ladder.turn(**decisions))

    def tell(self, step: int, cause: str, before: Plan) -> None:
        """Records that the plan in use has taken the place of another one."""
        self._record(
            {
                "event": "plan",
                "step": step,
                "cause": cause,
                "before": before.model_dump(mode="json"),
                "after": self.ladder.plan.model_dump(mode="json"),
            }
        )

    def _nothing_smaller(self, step: int, evaluation: bool, cause: str) -> str:
        plan = self.ladder.plan
        needs = self.ladder.predict(plan, evaluation)
        free = "more memory" if needs is None else format_bytes(needs)
        predicted = "" if needs is None else f", which is predicted to take {format_bytes(needs)}"
        suggested = self._suggest(plan)
        return (
            f"out of memory in {self.phase} of step {step} ({cause}), with the smallest plan there is "
            f"({plan.describe()}){predicted}: {memory_now(*self.devices)}. "
            f"Make {free} free, and the same command goes on from what is saved; or begin anew with a "
            f"lower data.max_length{suggested}, a lower lora.r, or a smaller model"
        )


def predictor(estimator: Estimator, hardware: Hardware) -> Callable[[Plan, bool], int | None]:
    """What the ladder asks: bytes of a whole process, or of its evaluations.

    None where the host's share is more than its budget.
    """

    def predict(plan: Plan, evaluation: bool) -> int | None:
        with _disable_current_modes():  # a tracker counts the run's tensors, and not the estimate's
            found = estimator(plan)
        if found.host_bytes > hardware.host_budget_bytes:
            return None
        if not evaluation:
            return found.process_bytes
        return found.phase_peak_bytes.get("evaluation", 0) + hardware.context_bytes

    return predict


def shorter_rows(estimator: Estimator) -> Callable[[Plan], str]:
    """What the recovery suggests at the end: half the length, and what the plan would take then."""

    def suggest(plan: Plan) -> str:
        half = max(2, plan.sequence_length // 2)
        with _disable_current_modes():
            shorter = estimator.for_load(estimator.load.cut_to(half))
            needs = shorter(plan.replace(sequence_length=half)).process_bytes
        return f" ({half:,} would take {format_bytes(needs)})"

    return suggest


def room_on(devices: Sequence[torch.device], hardware: Hardware) -> Callable[[], int | None]:
    """What the ladder asks: bytes that this process could have now, its context included.

    Of several devices it is the one with the least room, as each may be the one that wants most.
    """

    def room() -> int | None:
        found = [count for count in map(available_bytes, devices) if count is not None]
        if not found:
            return None
        return min(min(found) + hardware.context_bytes, hardware.budget_bytes)

    return room
