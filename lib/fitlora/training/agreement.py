"""Work that may run out of memory, attempted by all processes of a run: all of them do it, or none.

Where one runs out of memory the others must neither go on nor wait for it. So each process that fails
says so once, and those that have not failed hear it the next time they meet: where they sum or share
something, and when they are done. One process alone agrees with itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fitlora.device import is_overflow
from fitlora.training.parallel import Ranks

Result = TypeVar("Result")

_ELSEWHERE = "another process ran out of memory"


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What came of work that found its memory."""

    result: Result


@dataclass(frozen=True)
class Overflow:
    """Memory ran out; the first line of what was said. too_late: some process had committed itself."""

    cause: str
    too_late: bool = False


class _Elsewhere(torch.OutOfMemoryError):
    """Another process ran out of memory, so that this attempt is not to be."""


def attempt(work: Callable[[], Result]) -> Done[Result] | Overflow:
    """Does the work; an overflow is returned, with the handler and its traceback left behind."""
    try:
        return Done(work())
    except (RuntimeError, MemoryError) as error:
        if not is_overflow(error):
            raise
        lines = str(error).splitlines()
        return Overflow(lines[0] if lines else type(error).__name__)


class Agreement:
    """Of the processes of a run. committed: whether an attempt is under way that cannot be undone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.committed = False

    def meet(self) -> None:
        """Inside an attempt: waits until all have come so far; an overflow where one has not."""
        if self.ranks.any(False):
            raise _Elsewhere(_ELSEWHERE)

    def commit(self) -> None:
        """The same, and from here on an overflow of any of them is too late to do the work again."""
        self.meet()
        self.committed = True

    def attempt(self, work: Callable[[], Result]) -> Done[Result] | Overflow:
        """What came of the work, which meets at the same points in every process."""
        told = self.committed = False

        def told_of() -> Result:
            nonlocal told
            try:
                return work()
            except _Elsewhere:
                told = True
                raise

        found = attempt(told_of)
        if told:
            return found
        failed = self.ranks.any(isinstance(found, Overflow))
        too_late, self.committed = failed and self.committed, False
        if not failed:
            return found
        return Overflow(found.cause if isinstance(found, Overflow) else _ELSEWHERE, too_late)

    def least(self, count: int | None) -> int | None:
        """The lowest that one of them has; None where none has any."""
        return min((c for c in self.ranks.gather(count) if c is not None), default=None)
