"""How good a model is on rows that it never saw, and how sure that figure is.

The rows are a sample, so each figure comes with an interval: the percentile bootstrap over rows (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), drawn from a fixed seed. The same
draws serve every model, so that what differs between two intervals is the models.

Rows that all came out alike give such a draw nothing to tell: of a share of 0 or 1, the other end is
the exact binomial's, below which n rows in a row would be a surprise (Clopper and Pearson, 1934).
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fitlora.artifacts import Interval, Metrics
from fitlora.evaluation.scores import RowScore, mean_loss

RESAMPLES = 1000
CONFIDENCE = 0.95
_SEED = 0
_AT_ONCE = 50  # resamples


def perplexity(loss: float) -> float:
    """The number of tokens that a guess is as uncertain as; loss: nats a token."""
    return math.exp(loss)


def exact_matches(answers: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Which answers equal the expected one, blanks around them aside."""
    return [a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)]


def metrics_of(scores: Sequence[RowScore], matches: Sequence[bool]) -> Metrics:
    """One model's figures, each with its interval. scores and matches: of the same rows."""
    loss = mean_loss(scores)
    low, high = interval([s.loss for s in scores], [s.tokens for s in scores])
    return Metrics(
        loss=loss,
        perplexity=perplexity(loss),
        exact_match=sum(matches) / len(matches),
        loss_interval=(low, high),
        perplexity_interval=(perplexity(low), perplexity(high)),
        exact_match_interval=share_interval(matches),
    )


def share_interval(matches: Sequence[bool]) -> Interval:
    """The interval of the share of rows that match."""
    surprise = ((1 - CONFIDENCE) / 2) ** (1 / len(matches))
    if all(matches):
        return surprise, 1.0
    if not any(matches):
        return 0.0, 1 - surprise
    return interval(matches, [1] * len(matches))


def interval(parts: Sequence[float], weights: Sequence[float]) -> Interval:
    """Where sum(parts) / sum(weights) lies with CONFIDENCE, were the rows drawn again."""
    values = torch.tensor([parts, weights], dtype=torch.float64).t()  # (rows, 2)
    sums = torch.cat([draws.double() @ values for draws in _draws(len(parts)).split(_AT_ONCE)])
    tail = (1 - CONFIDENCE) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(sums[:, 0] / sums[:, 1], bounds).tolist()
    return low, high


@functools.lru_cache(maxsize=8)
def _draws(rows: int) -> Tensor:
    """How often each row is drawn in each resample: uint8 (RESAMPLES, rows)."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.empty(RESAMPLES, rows, dtype=torch.uint8)
    for counts in drawn:
        indices = torch.randint(rows, (rows,), generator=generator)
        counts.copy_(torch.bincount(indices, minlength=rows))
    return drawn
