"""Work in batches that become smaller when the device overflows.

How many rows go through a model at once is guessed by a quick bound. The guess is the start only: what
overflows is tried again with half as many, so that a wrong guess costs time and never the run.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from fitlora.device import give_back_memory, is_overflow

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_batch(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Each batch of at most `size` items, in order, with what `work` made of it.

    A batch that overflows the device is halved, and so are those after it. Raises the overflow's own
    error where a single item is too much.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        try:
            result = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_overflow(error) or len(batch) == 1:
                raise
            size = -(-len(batch) // 2)
        else:
            start += len(batch)
            yield batch, result
            continue
        # Here and not in the handler, where the traceback still holds the tensors that were too many.
        give_back_memory()
