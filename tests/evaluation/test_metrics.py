"""Loss against a plain forward pass, and what counts as the same answer."""

import math

import pytest
import torch
from torch.nn import functional

from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.evaluation.metrics import exact_match, mean_loss, perplexity
from fitlora.evaluation.models import Place, load
from fitlora.step.training_step import TrainingStep
from tests.evaluation.forms import CPU, Tiny
from tests.evaluation.stock import stock_adapter, stock_base
from tests.rows import tokenized

HERE = Place(CPU, "float32", 8)


@pytest.mark.parametrize("train_on", ["answers", "all"])
@pytest.mark.parametrize("name", ["base", "adapter"])
def test_loss_is_that_of_a_plain_forward_pass(tiny: Tiny, name: str, train_on: str) -> None:
    stock = stock_base(tiny.original) if name == "base" else stock_adapter(tiny)
    tokenizer = load_tokenizer(tiny.original)
    sequences = tokenized(
        tiny.rows, tokenizer, max_length=50, train_on=train_on, vocabulary=288
    ).sequences
    assert max(len(s.tokens) for s in sequences) == 50  # one is cut
    total, count = 0.0, 0
    for sequence in sequences:
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([sequence.tokens])).logits[0, :-1]
        learned = torch.tensor([bool(learned) for learned in sequence.learned[1:]])
        targets = torch.tensor(sequence.tokens[1:])
        total += float(functional.cross_entropy(logits[learned], targets[learned], reduction="sum"))
        count += int(learned.sum())

    done: list[int] = []
    found = mean_loss(load(tiny.models()[name], tiny.plan, HERE), sequences, done.append)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert done == [3, 3, 2]  # the Plan's evaluation batch


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    sequences = tokenized(
        tiny.rows, load_tokenizer(tiny.original), max_length=60, train_on="all", vocabulary=288
    ).sequences
    monkeypatch.setattr(TrainingStep, "evaluate", lambda self, part: (torch.tensor(value), 1))
    with pytest.raises(UserError, match=f"is {value}; the weights may be damaged"):
        mean_loss(step, sequences, lambda count: None)


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    assert perplexity(math.log(288)) == pytest.approx(288)


def test_exact_match_is_exact_but_for_blanks_around() -> None:
    assert exact_match(["a b", " a b\n", "a  b", "A b", "a b."], ["a b"] * 5) == 2 / 5
    assert exact_match(["a", "b"], ["b", "a"]) == 0
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])
