"""Packing: rows put together into sequences of up to a given length, so that short ones train fast.

The step lays sequences behind each other and pads nothing, so packing spares no tokens here. What it
evens out is their number in a sequence: micro-batches of packed sequences are alike, and the GPU is as
busy with the last as with the first. The price is that a batch size counts sequences, and so means
more rows than without.

First-fit-decreasing: the longest row first, each into the first sequence that has room. No sequence
is longer than the limit, and there are at most 11/9 of the fewest possible, and one (Johnson, 1973).
"""

import random
from collections.abc import Sequence

from fitlora.step.batch import PackedSequence, TokenSequence


def pack(sequences: Sequence[TokenSequence], max_length: int) -> list[PackedSequence]:
    """The rows in packed sequences of up to `max_length` tokens; no row is longer.

    The same rows in the same order give the same; parts lie in the order of the rows.
    """
    groups = first_fit([len(s.tokens) for s in sequences], max_length)
    return [PackedSequence.of([sequences[index] for index in sorted(g)]) for g in groups]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in `lengths`, grouped first-fit-decreasing into bins of `capacity`.

    A tree over the bins knows the most room in each half, so that the first with enough room is found
    in log2(bins) looks.
    """
    assert all(length <= capacity for length in lengths)
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < lengths[index]:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def padding_share(lengths: Sequence[int], batch: int) -> float:
    """The share of tokens that would be padding, were each `batch` padded to its longest.

    lengths: of the sequences, which are drawn in a random order. Rounded to four digits.
    """
    order = list(lengths)
    random.Random(0).shuffle(order)
    padded = sum(
        max(part) * len(part)
        for part in (order[start : start + batch] for start in range(0, len(order), batch))
    )
    return round(1 - sum(order) / padded, 4)
