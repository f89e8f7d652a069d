"""Rows packed into sequences: nothing is lost, and nothing of it can be told from the gradients."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fitlora.artifacts import SequenceSize
from fitlora.data.packing import first_fit, pack, padding_share
from fitlora.errors import UserError
from fitlora.memory.estimate import sequences_of
from fitlora.params import DataParams
from fitlora.step.batch import PackedSequence, TokenSequence
from fitlora.training.batches import Batches
from fitlora.training.data import load_splits, longest, padding_of, sizes
from tests.step import steps
from tests.tiny_models import VOCABULARY, make_tokenizer


def first_fit_plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for group in bins:
            if sum(lengths[i] for i in group) + lengths[index] <= capacity:
                group.append(index)
                break
        else:
            bins.append([index])
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_is_that_of_the_book(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.randint(10, 60)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 70))]
    assert first_fit(lengths, capacity) == first_fit_plainly(lengths, capacity)


def test_first_fit_fills_up() -> None:
    assert first_fit([4, 6, 4, 6, 10], 10) == [[4], [1, 0], [3, 2]]
    assert first_fit([], 10) == []


def test_packing_keeps_every_row_within_the_limit() -> None:
    rows = steps.sequences(50)
    packed = pack(rows, 40)
    assert len(packed) < 30
    assert all(len(s.tokens) == sum(s.lengths) <= 40 for s in packed)
    parts = {part.sample: part for s in packed for part in s.parts}
    assert len(parts) == sum(len(s.parts) for s in packed) == 50
    for row in rows:
        assert tuple(parts[row.sample].tokens) == row.tokens
        assert tuple(map(bool, parts[row.sample].learned)) == row.learned
        assert parts[row.sample].target_tokens == row.target_tokens
    for s in packed:
        assert s.target_tokens == sum(part.target_tokens for part in s.parts)
        assert list(s.samples) == sorted(s.samples)
    assert pack(rows, 40) == packed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_rows_apart(dropout: float) -> None:
    """Attention, positions and dropout: each would show here if a part knew of the one before."""
    rows = steps.sequences(12)
    packed = pack(rows, 40)
    assert max(len(s.parts) for s in packed) > 2
    settings = steps.settings(dropout=dropout)
    apart = steps.gradients(
        steps.step(steps.plan(effective_batch_size=12, micro_batch_size=1), settings), rows
    )
    plan = steps.plan(effective_batch_size=len(packed), micro_batch_size=2, sequence_length=40)
    together = steps.gradients(steps.step(plan, settings), list(packed))
    assert steps.distance(together, apart) < 2e-5
    # what they would be if a packed sequence were one long one
    merged = [TokenSequence(s.sample, s.tokens, s.learned) for s in packed]
    assert steps.distance(steps.gradients(steps.step(plan, settings), merged), apart) > 1e-2


def test_loss_is_that_of_the_rows_apart() -> None:
    rows = steps.sequences(12)
    made = steps.step()
    apart, count = made.evaluate(rows)
    together, packed_count = made.evaluate(pack(rows, 40))
    assert packed_count == count
    assert float(together) == pytest.approx(float(apart), rel=1e-6)


# --- what planning sees ----------------------------------------------------------------------------


def test_sizes_say_the_parts_and_sequences_have_them() -> None:
    packed = pack(steps.sequences(12), 40)
    heaviest = longest(packed, 4)
    found = sizes(heaviest)
    for sequence, size, made in zip(heaviest, found, sequences_of(found), strict=True):
        assert size.tokens == len(sequence.tokens) == len(made.tokens)
        assert made.lengths == sequence.lengths
        assert made.target_tokens == sequence.target_tokens
    assert sizes(steps.sequences(1))[0].parts == ()
    (alone,) = sequences_of([SequenceSize(tokens=5, target_tokens=2)])
    assert not isinstance(alone, PackedSequence)


def test_the_longest_part_weighs_more_than_learned_tokens() -> None:
    """Attention's scores grow with the square of a part."""
    halves = PackedSequence.of([TokenSequence(i, (0,) * 10, (True,) * 10) for i in (0, 1)])
    whole = PackedSequence.of([TokenSequence(2, (0,) * 20, (False,) * 19 + (True,))])
    assert longest([halves, whole], 2) == [whole, halves]


def test_batches_count_packed_sequences() -> None:
    packed = pack(steps.sequences(20), 40)
    batches = Batches(packed, 3, seed=0)
    assert [len(batches.batch(step)) for step in range(9)] == [3] * 9
    first_pass = [s for step in range(-(-len(packed) // 3)) for s in batches.batch(step)]
    seen = [sample for s in first_pass[: len(packed)] for sample in s.samples]  # type: ignore[attr-defined]
    assert sorted(seen) == list(range(20))
    with pytest.raises(
        UserError, match=rf"{len(packed)} packed sequences \(data\.packing\), fewer"
    ):
        Batches(packed, 20, seed=0)


def test_padding_shares() -> None:
    assert padding_share([10] * 7, 3) == 0
    assert padding_share([10, 5], 2) == 0.25
    assert padding_share([10, 5], 1) == 0
    rows = steps.sequences(60)
    before, after = padding_of(rows, 4), padding_of(pack(rows, 40), 4)
    assert before.packed_share is None
    assert before.rows_share == after.rows_share > 0.1
    assert after.packed_share is not None
    assert after.packed_share < before.rows_share / 2
    assert after.sequences < before.sequences == 60


@pytest.mark.parametrize("packing", [True, False])
def test_the_key_packs_rows_to_train_on_alone(packing: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    files: dict[str, Any] = {}
    for name, count in (("train", 40), ("validation", 10)):
        rows = [{"prompt": "q" * (i % 9), "completion": "a"} for i in range(count)]
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(map(json.dumps, rows)))
    data = DataParams(**files, packing=packing, max_length=64)
    train, validation = load_splits(data, tmp_path / "model", VOCABULARY)
    assert (train.facts.rows, validation.facts.rows) == (40, 10)
    assert len(validation.sequences) == 10
    assert (len(train.sequences) < 15) == packing
    assert train.facts.length.maximum < 20  # of rows, packed or not
