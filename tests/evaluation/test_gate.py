"""What passes the gate, what does not, and what is said of it."""

from typing import Any

import pytest

from fitlora.artifacts import Fidelity, Gate
from fitlora.evaluation.gate import (
    MergeRejected,
    answer_problems,
    distance_problems,
    fidelity,
    gate_of,
    reject,
)
from fitlora.evaluation.scores import Distance, RowScore
from fitlora.params import MergeParams

LIMITS = Gate(
    base="dequantized",
    bits=16,
    against="adapter",
    max_kl_divergence=0.01,
    min_top1_agreement=0.9,
    max_exact_match_drop=0.01,
)


@pytest.mark.parametrize(
    ("params", "divergence", "agreement"),
    [
        ({}, 0.003, 0.95),
        ({"bits": 4}, 0.1, 0.85),
        ({"max_kl_divergence": 0.0}, 0.0, 0.95),
        ({"bits": 4, "min_top1_agreement": 0.0}, 0.1, 0.0),
    ],
)
def test_limits_go_by_the_bits_where_none_is_given(
    params: dict[str, Any], divergence: float, agreement: float
) -> None:
    gate = gate_of(MergeParams.model_validate(params), "adapter")
    assert (gate.max_kl_divergence, gate.min_top1_agreement) == (divergence, agreement)
    assert (gate.bits, gate.against) == (params.get("bits", 16), "adapter")


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
    ("base", "bits", "ways"),
    [
        ("dequantized", 16, []),
        ("original", 16, ["merge.base: dequantized"]),
        ("dequantized", 4, ["merge.bits: 16", "merge.base: original"]),
        ("original", 4, ["merge.bits: 16", "merge.base: dequantized"]),
    ],
)
def test_a_rejection_lists_the_figures_and_ways_out(base: str, bits: int, ways: list[str]) -> None:
    limits = gate_of(MergeParams.model_validate({"base": base, "bits": bits}), "adapter")
    reject([], limits)
    with pytest.raises(MergeRejected) as caught:
        reject(["too far", "too wrong"], limits)
    first, *problems, kept = str(caught.value).splitlines()[:4]
    assert "not kept" in first
    assert problems == ["  too far", "  too wrong"]
    assert "the adapter is as it was" in kept
    *closer, last = str(caught.value).splitlines()[4:]
    assert [words.startswith(f"  {way}") for words, way in zip(closer, ways, strict=True)] == [
        True
    ] * len(ways)
    assert "limit" in last
