"""What is said of a plan on a card: how much of it fits, and what else would."""

from functools import cache

import pytest
from transformers import Olmo2Config

from fitlora.artifacts import Estimate
from fitlora.memory.question import Question, fit_cards
from fitlora.plan import Plan
from fitlora.units import GIB
from tests.memory.test_estimate import hardware
from tests.step import steps

PLAN = steps.plan(
    effective_batch_size=2, micro_batch_size=2, evaluation_batch_size=2, sequence_length=128,
    recompute_layers=(),
)  # fmt: skip


def question(plan: Plan = PLAN, **limits: int) -> Question:
    return Question(
        steps.config(), steps.settings(), plan, hardware(host_budget_bytes=GIB, **limits)
    )


@cache
def taken(tokens: int) -> int:
    return question().estimate(PLAN.replace(sequence_length=tokens)).process_bytes


@pytest.mark.parametrize("known", [128, 1024])
def test_the_longest_context_is_the_last_that_fits(known: int) -> None:
    budget = taken(512) + 1000
    asked = question(PLAN.replace(sequence_length=known), budget_bytes=budget)
    found = asked.longest()
    assert found is not None
    assert found.fits
    assert 448 <= found.plan.sequence_length <= 512
    tokens = found.plan.sequence_length
    assert asked.largest_micro_batch(found) == 2 * tokens // known


def test_no_context_fits_where_the_weights_do_not() -> None:
    assert question(budget_bytes=1000).longest() is None


def test_a_way_out_is_the_first_that_fits_with_all_its_changes() -> None:
    ways = list(question().ways_out())
    sizes = [question().estimate(plan).process_bytes for _, plan in ways]
    # on so small a model what waits for its copies outweighs what leaves, so the first ones are asked
    asked = question(budget_bytes=sizes[1])
    names, estimate = asked.way_out()
    fitting = next(i for i, size in enumerate(sizes) if size <= sizes[1])
    assert names == [name for name, _ in ways[: fitting + 1]]
    assert estimate.plan == ways[fitting][1]
    names, estimate = question(budget_bytes=1000).way_out()
    assert (names, estimate.process_bytes) == ([], min(sizes))


def test_ways_out_leave_what_the_user_decided() -> None:
    for optimizer in ("adamw", "adamw_8bit"):
        plan = PLAN.replace(optimizer=optimizer)
        last = list(question(plan).ways_out())[-1][1]
        assert last.optimizer == optimizer
        assert (last.optimizer_device == "host") == (optimizer == "adamw")
        assert last.effective_batch_size == plan.effective_batch_size
        assert last.streamed_layers == (0, 1)


def test_ways_out_of_a_model_that_autograd_does_can_be_estimated() -> None:
    config = Olmo2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=128,
    )  # fmt: skip
    here = hardware(host_budget_bytes=GIB)
    asked = Question(config, steps.settings(), PLAN, here, by_hand=False)
    *_, (name, last) = asked.ways_out()
    assert (name, last.checkpoints, last.embedding) == ("every layer streamed", "device", "device")
    assert asked.estimate(last).host_pinned_bytes > 0


def estimate(process_bytes: int, micro: int) -> Estimate:
    found = question().estimate()
    plan = PLAN.replace(micro_batch_size=micro)
    return found.model_copy(update={"process_bytes": process_bytes, "plan": plan})


def test_a_card_gets_the_first_plan_that_it_holds() -> None:
    cards = fit_cards([estimate(20 * GIB, 2), estimate(9 * GIB, 1)])
    assert {card.gib: card.process_bytes for card in cards} == {
        8: None, 12: 9 * GIB, 16: 9 * GIB, 24: 20 * GIB, 40: 20 * GIB, 48: 20 * GIB, 80: 20 * GIB,
    }  # fmt: skip
    assert [card.fits for card in cards] == [False] + 6 * [True]
    assert cards[1].plan is not None
    assert cards[1].plan.startswith("micro-batch 1 ")
