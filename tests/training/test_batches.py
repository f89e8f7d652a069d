"""Which sequences make up which step: a function of the seed and the step."""

from collections import Counter

import pytest

from fitlora.errors import UserError
from fitlora.step.batch import TokenSequence
from fitlora.training.batches import Batches, share_of


def sequences(lengths: list[int]) -> list[TokenSequence]:
    return [
        TokenSequence(sample, (0,) * length, (True,) * length)
        for sample, length in enumerate(lengths)
    ]


DATA = sequences([3, 9, 4, 7, 5, 8, 6, 2, 9, 3])


def samples(batches: Batches, step: int) -> list[int]:
    return [s.sample for s in batches.batch(step)]


def test_a_batch_follows_from_seed_and_step() -> None:
    forward = [samples(Batches(DATA, 4, seed=1), step) for step in range(40)]
    one = Batches(DATA, 4, seed=1)
    backward = [samples(one, step) for step in reversed(range(40))][::-1]
    assert forward == backward
    assert forward != [samples(Batches(DATA, 4, seed=2), step) for step in range(40)]


def test_the_first_step_has_the_longest_longest_first() -> None:
    for seed in range(5):
        batch = Batches(DATA, 4, seed).batch(0)
        assert [len(s.tokens) for s in batch] == [9, 9, 8, 7]
        assert [s.sample for s in batch] == [1, 8, 5, 3]


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_every_pass_has_every_sequence_once(size: int) -> None:
    batches = Batches(DATA, size, seed=3)
    passes = 6
    order = [s for step in range(passes * len(DATA) // size) for s in samples(batches, step)]
    whole = len(order) // len(DATA)
    assert whole >= passes - 1
    for epoch in range(whole):
        part = order[epoch * len(DATA) : (epoch + 1) * len(DATA)]
        assert sorted(part) == list(range(len(DATA)))
        assert part == batches.order(epoch)
    assert batches.order(0) != batches.order(1) != batches.order(2)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10])
def test_every_batch_is_whole(size: int) -> None:
    batches = Batches(DATA, size, seed=0)
    assert all(len(batches.batch(step)) == size for step in range(50))


def test_later_passes_are_random_from_the_first_batch_on() -> None:
    batches = Batches(sequences(list(range(1, 101))), 10, seed=0)
    for epoch in (1, 2):
        lengths = [len(s.tokens) for s in batches.batch(10 * epoch)]
        assert lengths != sorted(lengths, reverse=True)
        assert min(lengths) < 60


def test_rows_are_enough_for_a_batch() -> None:
    assert len(Batches(DATA, 10, seed=0).batch(7)) == 10
    with pytest.raises(UserError, match=r"has 10 rows, fewer than .*effective_batch_size 11"):
        Batches(DATA, 11, seed=0)


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_shares_are_a_partition(size: int, devices: int) -> None:
    batch = sequences(list(range(20, 20 - size, -1)))
    shares = [share_of(batch, rank, devices) for rank in range(devices)]
    assert Counter(s.sample for share in shares for s in share) == Counter(range(size))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == -(-size // devices)  # Plan.sequences_per_device


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "steps"),
    [
        (10, 4, 1.0, 3),
        (10, 5, 1.0, 2),
        (10, 5, 2.0, 4),
        (10, 4, 0.5, 2),
        (5, 2, 0.5, 2),  # two and a half sequences are more than one batch
        (10, 1, 0.05, 1),  # and half a sequence more than none
        (10, 10, 1.1, 2),
        (10, 1, 1.1, 11),  # 1.1 * 10 is 11.000000000000002 in floats
        (100, 7, 0.07, 1),  # 0.07 * 100 is 7.000000000000001
        (100, 29, 0.29, 1),  # 0.29 * 100 is 28.999999999999996
        (10, 10, 1e-5, 1),
        (10, 3, 3, 10),
    ],
)
def test_steps_of_epochs(rows: int, size: int, epochs: float, steps: int) -> None:
    assert Batches(sequences([3] * rows), size, seed=0).steps_of(epochs) == steps


def test_steps_of_whole_epochs_see_everything() -> None:
    for size in range(1, 11):
        batches = Batches(DATA, size, seed=0)
        for epochs in (1, 2, 3):
            steps = batches.steps_of(epochs)
            seen = Counter(s for step in range(steps) for s in samples(batches, step))
            assert min(seen.values()) >= epochs
            assert (steps - 1) * size < epochs * len(DATA)
