"""Which layers freeze: as many as asked, the least first, and never all."""

from fitlora.params import TrainParams
from fitlora.planner.freezing import MOST_FROZEN, least_first, more_frozen, planned


def train(**changes: object) -> TrainParams:
    return TrainParams.model_validate(changes)


def test_a_plan_freezes_the_share_that_was_asked_for() -> None:
    assert planned(train(), 8) == ()
    assert planned(train(freeze="speed", freeze_share=0.5), 8) == (0, 1, 2, 3)
    assert planned(train(freeze="speed", freeze_share=0.99), 4) == (0, 1, 2)


def test_before_the_layers_are_chosen_it_counts_what_costs_most() -> None:
    assert planned(train(freeze="memory", freeze_share=0.5), 8) == (1, 2, 3, 4)
    assert planned(train(freeze="memory", freeze_share=0.99), 4) == (1, 2, 3)


def test_the_least_gradients_freeze_first() -> None:
    assert least_first([3.0, 1.0, 2.0, 1.0]) == (1, 3, 2, 0)


def test_more_freeze_until_it_is_enough() -> None:
    order = (5, 3, 1, 0, 2, 4, 6, 7)
    steps = [()]
    while (found := more_frozen(steps[-1], order)) is not None:
        steps.append(found)
    assert steps[1:] == [(0, 1, 3, 5), (0, 1, 2, 3, 4, 5)]
    assert len(steps[-1]) == MOST_FROZEN * 8
    assert more_frozen((7,), order) == (1, 3, 5, 7), "what is frozen stays so"
    assert more_frozen((), ()) is None, "where nothing may freeze"
