"""Losses and distances against what stock models say of the same tokens, in any batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.evaluation import scores as module
from fitlora.evaluation.gate import fidelity
from fitlora.evaluation.models import Place, load
from fitlora.evaluation.scores import Reference, mean_loss, score
from fitlora.step.batch import TokenSequence
from fitlora.step.training_step import TrainingStep
from tests.evaluation.forms import CPU, Tiny
from tests.evaluation.stock import stock_adapter, stock_base
from tests.rows import tokenized

HERE = Place(CPU, "float32", 8)


def sequences_of(tiny: Tiny, train_on: str) -> Sequence[TokenSequence]:
    tokenizer = load_tokenizer(tiny.original)
    return tokenized(
        tiny.rows, tokenizer, max_length=50, train_on=train_on, vocabulary=288
    ).sequences


@torch.no_grad()
def stock_logs(stock: Any, sequence: TokenSequence) -> Tensor:
    """Log-probabilities of every token of a row but the first: (tokens - 1, vocabulary)."""
    logits = stock(input_ids=torch.tensor([list(sequence.tokens)])).logits[0, :-1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("train_on", ["answers", "all"])
@pytest.mark.parametrize("name", ["base", "adapter"])
def test_loss_is_that_of_a_plain_forward_pass(tiny: Tiny, name: str, train_on: str) -> None:
    stock = stock_base(tiny.original) if name == "base" else stock_adapter(tiny)
    sequences = sequences_of(tiny, train_on)
    assert max(len(s.tokens) for s in sequences) == 50  # one is cut
    done: list[int] = []
    step = load(tiny.models()[name], tiny.plan, HERE)
    found = score(step, sequences, done.append)
    for sequence, row in zip(sequences, found, strict=True):
        learned = torch.tensor([bool(learned) for learned in sequence.learned[1:]])
        losses = -stock_logs(stock, sequence).gather(1, torch.tensor(sequence.tokens[1:])[:, None])
        assert row.loss == pytest.approx(float(losses[learned].sum()), rel=1e-5)
        assert row.tokens == int(learned.sum()) == sequence.target_tokens
        assert row.distance is None
    assert done == [3, 3, 2]  # the Plan's evaluation batch
    loss, tokens = step.evaluate(sequences)  # the validation loss of training
    assert mean_loss(found) == pytest.approx(float(loss) / tokens, rel=1e-6)


def test_distance_is_the_divergence_from_the_reference(tiny: Tiny) -> None:
    sequences = sequences_of(tiny, "answers")
    reference = Reference()
    score(load(tiny.models()["adapter"], tiny.plan, HERE), sequences, ignore, record=reference)
    assert [len(rows) for rows in reference.rows] == [len(s.tokens) - 1 for s in sequences]
    base = load(tiny.models()["base"], tiny.plan, HERE)
    found = score(base, sequences, ignore, against=reference)
    adapter, plain = stock_adapter(tiny), stock_base(tiny.original)
    agreeing = 0
    for sequence, row in zip(sequences, found, strict=True):
        p, q = stock_logs(adapter, sequence), stock_logs(plain, sequence)
        assert row.distance is not None
        assert row.distance.divergence == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert row.distance.agreeing == int((p.argmax(1) == q.argmax(1)).sum())
        assert row.distance.tokens == len(p)
        agreeing += row.distance.agreeing
    plainly = score(base, sequences, ignore)
    assert [row.loss for row in found] == pytest.approx([row.loss for row in plainly], rel=1e-6)
    whole = fidelity(found)
    assert 0 < whole.top1_agreement == agreeing / whole.tokens < 1
    assert whole.kl_divergence > 0.01


def test_a_model_is_no_way_from_itself(tiny: Tiny) -> None:
    sequences = sequences_of(tiny, "all")
    step = load(tiny.models()["adapter"], tiny.plan, HERE)
    reference = Reference()
    score(step, sequences, ignore, record=reference)
    found = fidelity(score(step, sequences, ignore, against=reference))
    assert found.kl_divergence < 1e-9
    assert found.top1_agreement == 1


def test_batches_and_chunks_change_nothing(tiny: Tiny) -> None:
    sequences = sequences_of(tiny, "all")

    def distances(rows: int, chunk: int) -> list[float]:
        plan = tiny.plan.replace(evaluation_batch_size=rows, loss_chunk_tokens=chunk)
        reference = Reference()
        score(load(tiny.models()["adapter"], plan, HERE), sequences, ignore, record=reference)
        found = score(load(tiny.models()["base"], plan, HERE), sequences, ignore, against=reference)
        return [d.divergence for row in found if (d := row.distance) is not None]

    assert distances(8, 4000) == pytest.approx(distances(1, 8), rel=1e-4)


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_reference_keeps_tokens_all_along_the_rows_where_room_is_little(
    tiny: Tiny, train_on: str
) -> None:
    sequences = sequences_of(tiny, train_on)
    step = load(tiny.models()["adapter"], tiny.plan, HERE)
    lengths = [len(s.tokens) - 1 for s in sequences]
    small, everything = Reference(limit_bytes=4 * 288 * (sum(lengths) // 2)), Reference()
    score(step, sequences, ignore, record=small)
    score(step, sequences, ignore, record=everything)
    share = (sum(lengths) // 2) // len(sequences)
    for few, every, length in zip(small.rows, everything.rows, lengths, strict=True):
        size = min(share, length)
        where = [i for i in range(length) if (i + 1) * size // length > i * size // length]
        assert where[-1] == length - 1
        torch.testing.assert_close(few, every[where])
    base = load(tiny.models()["base"], tiny.plan, HERE)
    found = score(base, sequences, ignore, against=small)
    assert [row.tokens for row in found] == [s.target_tokens for s in sequences]  # the loss has all
    assert fidelity(found).tokens == sum(len(rows) for rows in small.rows) < sum(lengths)
    every_loss = [row.loss for row in score(base, sequences, ignore)]
    assert [row.loss for row in found] == pytest.approx(every_loss, rel=1e-6)
    tiniest = Reference(limit_bytes=1)
    score(step, sequences, ignore, record=tiniest)
    assert {len(rows) for rows in tiniest.rows} == {1}


def test_a_run_that_overflowed_leaves_nothing_in_the_reference(tiny: Tiny) -> None:
    sequences = sequences_of(tiny, "answers")
    reference = Reference()
    reference.rows.append(torch.zeros(1, 288))
    score(load(tiny.models()["adapter"], tiny.plan, HERE), sequences, ignore, record=reference)
    assert len(reference.rows) == len(sequences)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    plain = module._score_batch

    def spoiled(step: TrainingStep, rows: Any, *rest: Any) -> Any:
        found, kept = plain(step, rows, *rest)
        return [dataclasses.replace(row, loss=value) for row in found], kept

    monkeypatch.setattr(module, "_score_batch", spoiled)
    step = load(tiny.models()["base"], tiny.plan, HERE)
    with pytest.raises(UserError, match=f"is {value}; the weights may be damaged"):
        score(step, sequences_of(tiny, "answers"), ignore)


def ignore(_: int) -> None:
    return None
