"""Whether a merged model is the model that was trained, told in figures.

A merge rounds: W + scale * B A goes back into 16 bits, or into 4, and so the merged model is never quite
base and adapter side by side. A right merge is so close that nobody could tell; a wrong one (a scale, a
layer left out) is far off, and often still answers in whole sentences. So the distance of its next-token
distributions from those of the adapter beside its base, along held-out rows, is held against limits.
That base is the one that was merged into: to ask for the original weights is to ask for what they
change, which is measured and shown but no error of the merge. What it may not change is how many answers
are right, which are held against those of the adapter on the weights that it was trained on.

Rounding to 4 bits is far coarser than to 16, so limits go by the bits. They tell what is too far to be
the same model, not whether every tensor was merged: what is left out and changes next tokens less than
rounding may passes, in 4 bits a whole layer of the shipped model's adapter. benchmarks/merge_gate.py has
its right and wrong merges by these figures.
"""

import math
from collections.abc import Sequence

from fitlora.artifacts import Fidelity, Gate
from fitlora.errors import UserError
from fitlora.evaluation.scores import RowScore
from fitlora.params import AUTO_LIMITS, MergeParams


class MergeRejected(UserError):
    """The merged model is too far from what was trained."""


def gate_of(params: MergeParams, against: str) -> Gate:
    """The limits in figures. against: the name of the model that the merged one is held against."""
    auto = AUTO_LIMITS[params.bits]
    asked = params.model_dump()
    near = {
        key: limit if asked[key] == "auto" else asked[key] for key, limit in auto._asdict().items()
    }
    return Gate(**{**asked, **near}, against=against)


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


def distance_problems(found: Fidelity, limits: Gate) -> list[str]:
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


def answer_problems(adapter: Sequence[bool], merged: Sequence[bool], limits: Gate) -> list[str]:
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


def reject(problems: Sequence[str], limits: Gate) -> None:
    """Raises MergeRejected that lists the problems, where there are any."""
    if not problems:
        return
    closer = []
    if limits.bits == 4:
        closer.append("merge.bits: 16 keeps what rounding to 4 bits loses")
    if limits.base == "original":
        closer.append("merge.base: dequantized merges into the weights that it was trained on")
    elif limits.bits == 4:
        closer.append(
            "merge.base: original loses less: dequantized weights that a small update moved fall back "
            "to the codes that they came from"
        )
    closer.append("a limit named above can be raised, where that is near enough for you")
    raise MergeRejected(
        "\n".join(
            [
                "the merged model is not the model that was trained, so it is not kept:",
                *(f"  {problem}" for problem in problems),
                "the adapter is as it was, and works on the quantized model as before. What may help:",
                *(f"  {words}" for words in closer),
            ]
        )
    )
