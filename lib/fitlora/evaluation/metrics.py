"""How good a model is on rows that it never saw: its loss on their answers, and what it answers."""

import math
from collections.abc import Callable, Sequence

from fitlora.errors import UserError
from fitlora.evaluation.overflow import each_batch
from fitlora.step.batch import TokenSequence
from fitlora.step.training_step import TrainingStep

# A uniform guess over a million tokens has a loss of 14; beyond this it is no language model's.
_LARGEST_LOSS = 100.0


def mean_loss(
    step: TrainingStep, sequences: Sequence[TokenSequence], advance: Callable[[int], None]
) -> float:
    """Cross-entropy in nats, the mean over all learned tokens: training's validation loss.

    advance: is called with how many sequences were done. Raises UserError for a loss that is not
    finite, and torch.OutOfMemoryError where a single sequence is too much for the device.
    """
    total, count = 0.0, 0

    def summed(batch: Sequence[TokenSequence]) -> tuple[float, int]:
        loss, tokens = step.evaluate(batch)
        return float(loss), tokens

    for batch, (loss, tokens) in each_batch(sequences, step.plan.evaluation_batch_size, summed):
        total, count = total + loss, count + tokens
        advance(len(batch))
    mean = total / count
    if not mean < _LARGEST_LOSS:  # NaN as well
        raise UserError(
            f"the loss on the held-out rows is {mean}; the weights may be damaged, or training "
            "went astray: look at train.learning_rate"
        )
    return mean


def perplexity(loss: float) -> float:
    """The number of tokens that a guess is as uncertain as; loss: nats a token."""
    return math.exp(loss)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected one, blanks around them aside."""
    pairs = zip(answers, expected, strict=True)
    return sum(answer.strip() == right.strip() for answer, right in pairs) / len(expected)
