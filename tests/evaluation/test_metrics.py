"""Figures and their intervals, and what counts as the same answer."""

import math

import pytest
import torch

from fitlora.evaluation.metrics import exact_matches, interval, metrics_of, perplexity
from fitlora.evaluation.scores import RowScore


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    assert perplexity(math.log(288)) == pytest.approx(288)


def test_exact_match_is_exact_but_for_blanks_around() -> None:
    found = exact_matches(["a b", " a b\n", "a  b", "A b", "a b."], ["a b"] * 5)
    assert found == [True, True, False, False, False]
    with pytest.raises(ValueError, match="zip"):
        exact_matches(["a"], ["a", "b"])


def test_figures_are_means_over_tokens_and_over_rows() -> None:
    found = metrics_of([RowScore(6.0, 2), RowScore(1.0, 1), RowScore(2.0, 6)], [True, False, True])
    assert found.loss == 1.0  # not the mean of the rows' means
    assert found.perplexity == math.e
    assert found.exact_match == 2 / 3
    assert found.loss_interval[0] < 1.0 < found.loss_interval[1] <= 3.0
    assert found.perplexity_interval == tuple(math.exp(bound) for bound in found.loss_interval)


def test_interval_is_that_of_the_normal_law_for_many_rows() -> None:
    rows = 2000
    values = torch.randn(rows, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    low, high = interval(values.tolist(), [1] * rows)
    error = 1.96 * float(values.std()) / math.sqrt(rows)
    assert low == pytest.approx(float(values.mean()) - error, abs=0.1 * error)
    assert high == pytest.approx(float(values.mean()) + error, abs=0.1 * error)


def test_interval_of_rows_that_are_alike_is_a_point() -> None:
    assert interval([0.5] * 9, [1] * 9) == (0.5, 0.5)
    assert interval([3.0], [2]) == (1.5, 1.5)


def test_interval_is_drawn_from_a_fixed_seed() -> None:
    parts = [float(i % 7) for i in range(50)]
    assert interval(parts, [1] * 50) == interval(parts, [1] * 50)
