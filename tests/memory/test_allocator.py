"""The caching allocator's rules, on sequences small enough to follow by hand."""

import random
from itertools import pairwise

import pytest

from fitlora.memory.allocator import MIB, Allocator, Overflow, replay, rounded, segment_size


def test_sizes_are_rounded_to_512_bytes() -> None:
    assert [rounded(size) for size in (0, 1, 512, 513)] == [512, 512, 512, 1024]


@pytest.mark.parametrize(
    ("size", "taken"),
    [(512, 2), (MIB, 2), (MIB + 512, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB + 1, 12)],
)
def test_a_miss_takes_a_segment(size: int, taken: int) -> None:
    assert segment_size(size) == taken * MIB
    assert replay([size], [0], expandable=False).reserved_bytes == taken * MIB


@pytest.mark.parametrize(
    ("size", "taken"), [(512, 2), (MIB, 2), (2 * MIB, 20), (20 * MIB, 20), (21 * MIB, 40)]
)
def test_an_expandable_segment_grows_by_granules(size: int, taken: int) -> None:
    assert replay([size], [0]).reserved_bytes == taken * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_small_and_large_blocks_do_not_share(expandable: bool) -> None:
    found = replay([MIB, 2 * MIB], [0, ~0, 1], expandable=expandable)
    assert found.reserved_bytes == 22 * MIB
    assert found.allocated_bytes == 2 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_a_freed_block_is_used_again_and_its_neighbours_join_it(expandable: bool) -> None:
    sizes = [4 * MIB, 4 * MIB, 4 * MIB, 12 * MIB]
    found = replay(sizes, [0, 1, 2, ~0, ~2, ~1, 3], expandable=expandable)
    assert found.reserved_bytes == 20 * MIB


def test_a_hole_of_the_wrong_size_costs_memory_without_expandable_segments_only() -> None:
    # 30 and 40 go, 50 comes: two segments of the wrong size, or one range that only lacks its end
    sizes = [30 * MIB, 40 * MIB, 50 * MIB]
    events = [0, ~0, 1, ~1, 2]
    assert replay(sizes, events, expandable=False).reserved_bytes == 120 * MIB
    assert replay(sizes, events).reserved_bytes == 60 * MIB


def test_a_hole_below_a_living_block_stays_one() -> None:
    sizes = [40 * MIB, 20 * MIB, 60 * MIB]
    found = replay(sizes, [0, 1, ~0, 2])
    assert found.reserved_bytes == 120 * MIB
    assert found.allocated_bytes == 80 * MIB


def test_best_fit_takes_the_smallest_that_is_enough() -> None:
    allocator = Allocator()
    blocks = [allocator.allocate(size * MIB) for size in (8, 2, 4, 2, 6, 2)]
    for index in (0, 2, 4):
        allocator.free(blocks[index])
    assert allocator.allocate(5 * MIB).address == blocks[4].address
    assert allocator.allocate(4 * MIB).address == blocks[2].address
    assert allocator.allocate(7 * MIB).address == blocks[0].address


def test_what_can_grow_is_taken_last() -> None:
    allocator = Allocator()
    hole, _ = allocator.allocate(12 * MIB), allocator.allocate(2 * MIB)
    allocator.free(
        hole
    )  # 12 MiB; 6 MiB are free at the mapped end, which is the better fit by size
    assert allocator.allocate(5 * MIB).address == hole.address


def test_a_large_block_keeps_a_small_rest_without_expandable_segments() -> None:
    assert replay([19 * MIB + MIB // 2], [0], expandable=False).allocated_bytes == 20 * MIB
    sizes = [20 * MIB, 19 * MIB + MIB // 2]
    assert replay(sizes, [0, ~0, 1], expandable=False).allocated_bytes == 20 * MIB
    assert replay(sizes, [0, ~0, 1]).allocated_bytes == sizes[1]


@pytest.mark.parametrize("expandable", [False, True])
def test_under_a_limit_what_is_cached_goes_back_first(expandable: bool) -> None:
    sizes = [MIB, 40 * MIB]
    found = replay(sizes, [0, ~0, 1], expandable=expandable, limit_bytes=40 * MIB)
    assert (found.retries, found.reserved_bytes) == (1, 40 * MIB)
    with pytest.raises(Overflow, match="beside 2,097,152"):
        replay(sizes, [0, 1], expandable=expandable, limit_bytes=40 * MIB)


def test_granules_in_the_middle_go_back_and_are_mapped_again() -> None:
    allocator = Allocator()
    blocks = [allocator.allocate(20 * MIB) for _ in range(4)]
    allocator.free(blocks[1])
    allocator.free(blocks[2])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.allocate(30 * MIB).address == blocks[1].address
    assert allocator.reserved_bytes == 80 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_whatever_comes_nothing_is_lost(expandable: bool) -> None:
    draw = random.Random(5)
    allocator = Allocator(expandable=expandable)
    alive = []
    for _ in range(3000):
        if alive and draw.random() < 0.5:
            allocator.free(alive.pop(draw.randrange(len(alive))))
        else:
            alive.append(allocator.allocate(draw.choice((700, 300_000, 3 * MIB, 25 * MIB))))
        if draw.random() < 0.01:
            allocator.empty_cache()
        assert allocator.allocated_bytes <= allocator.reserved_bytes
    spans = sorted((b.pool.small, b.address, b.address + b.size) for b in alive)
    for one, other in pairwise(spans):
        assert one[0] != other[0] or one[2] <= other[1]
    assert allocator.allocated_bytes == sum(block.size for block in alive)
    while alive:
        allocator.free(alive.pop())
    allocator.empty_cache()
    assert allocator.reserved_bytes == allocator.allocated_bytes == 0
