"""Whether a merged model is the model that was trained, told in figures.

A merge rounds: W + scale * B A goes back into 16 bits, or into 4, and so the merged model is never quite
base and adapter side by side. A right merge is so close that nobody could tell; a wrong one (another
base, a scale, a layer left out) is far off, and often still answers in whole sentences. What is held
against limits is the distance of its next-token distributions from those of the 4-bit base with the
adapter, along held-out rows, and the answers that it no longer gets right.

The default limits are from right and wrong merges of the shipped default (benchmarks/merge_gate.py):
into the dequantized weights a mean of 1e-6 nats a token, into the original ones 5e-3, and from 1.7e-2
to 0.8 where the scale is wrong or a layer left out. One projection left out of 28 stays below them.
"""

import math
from collections.abc import Sequence

from fitlora.artifacts import Fidelity
from fitlora.errors import UserError
from fitlora.evaluation.scores import RowScore
from fitlora.params import MergeParams


class MergeRejected(UserError):
    """The merged model is too far from what was trained."""


def fidelity(scores: Sequence[RowScore]) -> Fidelity:
    """The mean distance over all compared tokens of rows that were scored against a reference."""
    distances = [score.distance for score in scores if score.distance is not None]
    tokens = sum(d.tokens for d in distances)
    return Fidelity(
        tokens=tokens,
        # a divergence is never negative, but for the rounding of two equal distributions
        kl_divergence=max(0.0, sum(d.divergence for d in distances) / tokens),
        top1_agreement=sum(d.agreeing for d in distances) / tokens,
    )


def distance_problems(found: Fidelity, limits: MergeParams) -> list[str]:
    """What is beyond the limits on the distance, in figures; empty where it passes."""
    problems = []
    if not found.kl_divergence <= limits.max_kl_divergence:
        problems.append(
            f"mean KL divergence {found.kl_divergence:.3g} nats a token, above the limit of "
            f"{limits.max_kl_divergence:g} (merge.max_kl_divergence)"
        )
    if not found.top1_agreement >= limits.min_top1_agreement:
        problems.append(
            f"the likeliest next token agrees at {found.top1_agreement:.2%} of the tokens, under the "
            f"limit of {limits.min_top1_agreement:.2%} (merge.min_top1_agreement)"
        )
    return problems


def answer_problems(
    adapter: Sequence[bool], merged: Sequence[bool], limits: MergeParams
) -> list[str]:
    """The same of exact matches, row by row. A share of rows is allowed, rounded up to a whole row."""
    lost = sum(adapter) - sum(merged)
    allowed = math.ceil(limits.max_exact_match_drop * len(adapter) - 1e-9)
    if lost <= allowed:
        return []
    return [
        f"{sum(merged)} of {len(merged)} answers are exact against the adapter's {sum(adapter)}: "
        f"{lost} fewer, above the limit of {allowed} "
        f"({limits.max_exact_match_drop:.2%} of the rows, merge.max_exact_match_drop)"
    ]


def reject(problems: Sequence[str], limits: MergeParams) -> None:
    """Raises MergeRejected that lists the problems, where there are any."""
    if not problems:
        return
    closer = ""
    if limits.bits == 4 and limits.base == "dequantized":
        closer = (
            "; rounded to 4 bits, weights that a small update moved fall back to the codes they came "
            "from: merge.bits: 16 keeps them all, and merge.base: original more of them"
        )
    elif limits.bits == 4:
        closer = "; closer to it: merge.bits: 16 with merge.base: dequantized"
    elif limits.base == "original":
        closer = "; closer to it: merge.base: dequantized"
    raise MergeRejected(
        "\n".join(
            [
                "the merged model is not the model that was trained, so it is not kept:",
                *(f"  {problem}" for problem in problems),
                f"the adapter is as it was, and works on the quantized model as before{closer}",
            ]
        )
    )
