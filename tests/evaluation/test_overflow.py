"""Batches that overflow are halved, once the memory of the failed try is given back."""

import weakref
from collections.abc import Sequence

import pytest
import torch

from fitlora.evaluation import overflow
from fitlora.evaluation.overflow import each_batch, give_back_memory


def holding(largest: int, tried: list[int]) -> object:
    """Work on a device that holds `largest` items."""

    def work(batch: Sequence[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > largest:
            raise torch.OutOfMemoryError("too much")
        return [item * 2 for item in batch]

    return work


@pytest.mark.parametrize(
    ("size", "largest", "tried"),
    [
        (4, 4, [4, 4, 3]),
        (64, 99, [11]),
        (8, 3, [8, 4, 2, 2, 2, 2, 2, 1]),
        (5, 3, [5, 3, 3, 3, 2]),
        (3, 1, [3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_every_item_is_worked_on_once_and_in_order(
    size: int, largest: int, tried: list[int]
) -> None:
    items = list(range(11))
    seen: list[int] = []
    found = list(each_batch(items, size, holding(largest, seen)))  # type: ignore[arg-type]
    assert [item for batch, _ in found for item in batch] == items
    assert [item for _, result in found for item in result] == [2 * item for item in items]
    assert seen == tried


def test_single_item_that_overflows_is_an_error() -> None:
    tried: list[int] = []
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        list(each_batch([1, 2], 2, holding(0, tried)))  # type: ignore[arg-type]
    assert tried == [2, 1]


def test_failed_try_holds_nothing_when_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[object] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def work(batch: Sequence[int]) -> None:
        activation = torch.zeros(3)
        held.append(weakref.ref(activation))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("too much")

    def give_back() -> None:
        left.extend(reference() for reference in held)
        give_back_memory()

    monkeypatch.setattr(overflow, "give_back_memory", give_back)
    assert len(list(each_batch([1, 2], 2, work))) == 2
    assert left == [None]


def test_memory_is_given_back_even_from_a_cycle() -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    reference = weakref.ref(node)
    del node
    assert reference() is not None
    give_back_memory()
    assert reference() is None
