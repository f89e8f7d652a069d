"""Work that is done again when memory runs out: an optimizer step is a transaction.

What overflowed has changed nothing but gradients. They are dropped, memory is given back, a smaller
Plan is adopted (`fitlora.planner.ladder`), and the same samples are done again; dropout masks are a
function of the sample, so they are the same too. At the end of the ladder the run waits a little, as
what took the memory may go, and then ends with everything saved and a message in figures.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils._python_dispatch import _disable_current_modes

from fitlora.artifacts import Hardware
from fitlora.device import give_back_memory, is_overflow, memory_now
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator
from fitlora.plan import Plan
from fitlora.planner.ladder import Ladder
from fitlora.step.training_step import TrainingStep
from fitlora.units import format_bytes

Result = TypeVar("Result")

# Seconds before the smallest plan is tried again.
WAITS = (0.0, 1.0, 5.0, 20.0)


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What came of work that found its memory."""

    result: Result


@dataclass(frozen=True)
class Overflow:
    """Memory ran out; the first line of what was said."""

    cause: str


class NothingSmaller(UserError):
    """The smallest plan does not fit either."""


class HalfUpdated(Exception):
    """Memory ran out inside the update itself: some weights have changed and others not."""


def attempt(work: Callable[[], Result]) -> Done[Result] | Overflow:
    """Does the work; an overflow is returned, with the handler and its traceback left behind."""
    try:
        return Done(work())
    except (RuntimeError, MemoryError) as error:
        if not is_overflow(error):
            raise
        lines = str(error).splitlines()
        return Overflow(lines[0] if lines else type(error).__name__)


class Recovery:
    """Carries work out in the plan in use, or in smaller ones.

    record: takes the event of each change of plan. phase: the last phase of the step that was entered.
    """

    def __init__(
        self,
        step: TrainingStep,
        ladder: Ladder,
        record: Callable[[dict[str, Any]], None],
        *,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.step, self.ladder = step, ladder
        self.phase = ""
        self._record, self.wait = record, wait

    def carry_out(
        self,
        work: Callable[[], Result],
        *,
        step: int,
        evaluation: bool = False,
        attempt: Callable[[Callable[[], Result]], Done[Result] | Overflow] = attempt,
    ) -> Result:
        """The result of `work`, done again in smaller plans until it finds its memory.

        step: the optimizer step that it belongs to, from 1. Raises HalfUpdated where it cannot be
        done again, and NothingSmaller at the end of the ladder.
        """
        waits = iter(WAITS)
        while True:
            found = attempt(work)
            if isinstance(found, Done):
                return found.result
            self.step.abandon()
            give_back_memory()
            if self.step.half_updated:
                raise HalfUpdated(found.cause)
            before = self.ladder.plan
            after = self.ladder.down(step, evaluation=evaluation)
            if after is not None:
                self.step.adopt(after)
                self.tell(step, f"out of memory in {self.phase}: {found.cause}", before)
                continue
            seconds = next(waits, None)
            if seconds is None:
                raise NothingSmaller(self._nothing_smaller(step, evaluation))
            self.wait(seconds)

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
                now = memory_now(self.step.device)
                raise UserError(f"there is no memory for {what} ({found.cause}): {now}")
            self.wait(seconds)

    def climb(self, step: int) -> None:
        """After a calm stretch, goes back to the plan that the run began with, once."""
        before = self.ladder.plan
        after = self.ladder.up(step)
        if after is not None:
            self.step.adopt(after)
            self.tell(step + 1, "a calm stretch", before)

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

    def _nothing_smaller(self, step: int, evaluation: bool) -> str:
        plan = self.ladder.plan
        needs = self.ladder.predict(plan, evaluation)
        now = memory_now(self.step.device)
        return (
            f"out of memory in {self.phase} of step {step}, with the smallest plan there is "
            f"({plan.describe()}), which is predicted to take {format_bytes(needs)}: {now}. "
            f"Make {format_bytes(needs)} free, and the same command goes on from what is saved; or "
            "begin anew with a lower data.max_length, a lower lora.r, or a smaller model"
        )


def predictor(estimator: Estimator, hardware: Hardware) -> Callable[[Plan, bool], int]:
    """What the ladder asks: bytes of a whole process, or of its evaluations."""

    def predict(plan: Plan, evaluation: bool) -> int:
        with _disable_current_modes():  # a tracker counts the run's tensors, and not the estimate's
            found = estimator(plan)
        if not evaluation:
            return found.process_bytes
        return found.phase_peak_bytes.get("evaluation", 0) + hardware.context_bytes

    return predict
