"""What passes the gate, what does not, and what is said of it."""

import pytest

from fitlora.artifacts import Fidelity
from fitlora.evaluation.gate import (
    MergeRejected,
    answer_problems,
    distance_problems,
    fidelity,
    reject,
)
from fitlora.evaluation.scores import Distance, RowScore
from fitlora.params import MergeParams

LIMITS = MergeParams()


def test_fidelity_is_a_mean_over_tokens() -> None:
    rows = [RowScore(1.0, 3, Distance(0.3, 2, 3)), RowScore(1.0, 9, Distance(0.7, 2, 2))]
    found = fidelity(rows)
    assert found == Fidelity(tokens=5, kl_divergence=0.2, top1_agreement=0.8)
    assert fidelity([RowScore(1.0, 3, Distance(-1e-9, 3, 3))]).kl_divergence == 0


@pytest.mark.parametrize(
    ("divergence", "agreement", "named"),
    [
        (0.01, 0.9, []),
        (0.0101, 1.0, ["max_kl_divergence"]),
        (0.0, 0.899, ["min_top1_agreement"]),
        (float("nan"), float("nan"), ["max_kl_divergence", "min_top1_agreement"]),
        (0.5, 0.5, ["max_kl_divergence", "min_top1_agreement"]),
    ],
)
def test_distance_is_held_against_its_limits(
    divergence: float, agreement: float, named: list[str]
) -> None:
    found = Fidelity.model_construct(tokens=9, kl_divergence=divergence, top1_agreement=agreement)
    problems = distance_problems(found, LIMITS)
    assert len(problems) == len(named)
    for problem, name in zip(problems, named, strict=True):
        assert f"(merge.{name})" in problem


@pytest.mark.parametrize(
    ("rows", "limit", "lost", "passes"),
    [
        (200, 0.01, 2, True),
        (200, 0.01, 3, False),
        (100, 0.01, 1, True),
        (30, 0.01, 1, True),  # a share is rounded up to a row
        (30, 0.01, 2, False),
        (30, 0.0, 1, False),
        (30, 1.0, 30, True),
    ],
)
def test_answers_lost_are_held_against_a_share_of_the_rows(
    rows: int, limit: float, lost: int, passes: bool
) -> None:
    limits = LIMITS.model_copy(update={"max_exact_match_drop": limit})
    merged = [False] * lost + [True] * (rows - lost)
    problems = answer_problems([True] * rows, merged, limits)
    assert (problems == []) == passes
    if not passes:
        assert (
            f"{rows - lost} of {rows} answers are exact against the adapter's {rows}" in problems[0]
        )


def test_answers_won_make_up_for_answers_lost() -> None:
    assert answer_problems([True, False] * 50, [False, True] * 50, LIMITS) == []


@pytest.mark.parametrize(
    ("base", "bits", "way"),
    [
        ("dequantized", 16, "as before"),
        ("original", 16, "merge.base: dequantized"),
        ("dequantized", 4, "merge.base: original more of them"),
        ("original", 4, "merge.bits: 16 with merge.base: dequantized"),
    ],
)
def test_a_rejection_lists_the_figures_and_a_way_out(base: str, bits: int, way: str) -> None:
    limits = MergeParams.model_validate({"base": base, "bits": bits})
    reject([], limits)
    with pytest.raises(MergeRejected) as caught:
        reject(["too far", "too wrong"], limits)
    first, *problems, last = str(caught.value).splitlines()
    assert "not kept" in first
    assert problems == ["  too far", "  too wrong"]
    assert "the adapter is as it was" in last
    assert last.endswith(way)
