"""What a model thinks of the held-out rows, token by token: its loss, and how far it is from another.

One pass over the rows gives both. The loss is that of the answers, as in training. The distance is
between next-token distributions all along the rows, prompts included: where an answer is all but
certain two models that differ a good deal still agree. It is the Kullback-Leibler divergence from a
reference model, and whether both rank the same token first. Only one model is in memory at a time, so
the reference's distributions are kept on the host, as float32 log-probabilities: of every token where
that takes little, and otherwise of as many tokens of each row as there is room for, evenly spread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fitlora.errors import UserError
from fitlora.evaluation.overflow import each_batch
from fitlora.step.batch import MicroBatch, TokenSequence
from fitlora.step.network import PLAIN_HEAD, model_inputs
from fitlora.step.training_step import TrainingStep

REFERENCE_BYTES = 1 << 29  # host memory that a reference may take
# A uniform guess over a million tokens has a loss of 14; beyond this it is no language model's.
_LARGEST_LOSS = 100.0


@dataclass(frozen=True)
class Distance:
    """How far a row's next-token distributions are from the reference's.

    divergence: nats, summed over `tokens`. agreeing: of those tokens, where both rank the same first.
    """

    divergence: float
    agreeing: int
    tokens: int


@dataclass(frozen=True)
class RowScore:
    """One row. loss: nats, summed over the answer's `tokens`. distance: None without a reference."""

    loss: float
    tokens: int
    distance: Distance | None = None


class Reference:
    """The distributions of one model along the rows, on the host, row by row.

    Filled by the `score` of that model, and read by those of the others.
    """

    def __init__(self, limit_bytes: int = REFERENCE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self.rows: list[Tensor] = []  # float32 (kept tokens, vocabulary)

    def share(self, sequences: Sequence[TokenSequence], vocabulary: int) -> int:
        """How many tokens of each row are kept at most, at least one."""
        room = self._limit_bytes // (4 * vocabulary)
        if sum(len(s.tokens) - 1 for s in sequences) <= room:
            return max(len(s.tokens) - 1 for s in sequences)
        return max(1, room // len(sequences))


@torch.no_grad()
def score(
    step: TrainingStep,
    sequences: Sequence[TokenSequence],
    advance: Callable[[int], None],
    *,
    record: Reference | None = None,
    against: Reference | None = None,
) -> list[RowScore]:
    """The rows' losses, by training's validation loss; and their distance from `against`.

    record: is filled with this model's distributions. advance: is called with how many rows were done.
    Raises UserError for a loss that is not finite, and the overflow's own error where a single row is
    too much for the device.
    """
    vocabulary = cast(Any, step.model).config.get_text_config().vocab_size
    share = 0 if record is None else record.share(sequences, vocabulary)
    found: list[RowScore] = []
    if record is not None:
        record.rows.clear()  # of a device that overflowed half-way

    def work(batch: Sequence[tuple[int, TokenSequence]]) -> tuple[list[RowScore], list[Tensor]]:
        rows = [] if against is None else [against.rows[index] for index, _ in batch]
        return _score_batch(step, [sequence for _, sequence in batch], share, rows)

    size = step.plan.evaluation_batch_size if step.network.together else 1
    for batch, (scores, kept) in each_batch(list(enumerate(sequences)), size, work):
        found += scores
        if record is not None:
            record.rows += kept
        advance(len(batch))
    mean = mean_loss(found)
    if not mean < _LARGEST_LOSS:  # NaN as well
        raise UserError(
            f"the loss on the held-out rows is {mean}; the weights may be damaged, or training "
            "went astray: look at train.learning_rate"
        )
    return found


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Cross-entropy in nats, the mean over all tokens of the answers."""
    return sum(s.loss for s in scores) / sum(s.tokens for s in scores)


def _score_batch(
    step: TrainingStep, sequences: Sequence[TokenSequence], share: int, references: Sequence[Tensor]
) -> tuple[list[RowScore], list[Tensor]]:
    """The scores of the rows, and the distributions at `share` tokens of each, on the host."""
    sizes = [len(row) for row in references]
    sizes = sizes or [min(share, len(s.tokens) - 1) for s in sequences]
    rows = [_Wanted.of(sequence, size) for sequence, size in zip(sequences, sizes, strict=True)]
    batch = step.micro_batch([row.sequence for row in rows])
    answer = torch.tensor([flag for row in rows for flag in row.answer])
    kept = torch.tensor([flag for row in rows for flag in row.kept])
    reference = torch.cat(list(references)) if references else None
    losses, distributions, divergences, agreeing = [], [], [], []
    done = 0  # of the reference's tokens
    for start, logs in _log_probabilities(step, batch):
        part = slice(start, start + len(logs))
        loss = -logs.gather(1, batch.targets[part, None])[:, 0].double().cpu()
        losses.append(loss[answer[part]])
        chosen = logs[kept[part].to(logs.device)]
        if share:
            distributions.append(chosen.cpu())
        if reference is not None:
            other = reference[done : done + len(chosen)].to(logs.device)
            done += len(chosen)
            agreeing.append((other.argmax(1) == chosen.argmax(1)).cpu())
            divergences.append((other.exp() * (other - chosen)).sum(1).double().cpu())
    distances: list[Distance | None] = [None] * len(rows)
    if reference is not None:
        by_row = (torch.cat(divergences).split(sizes), torch.cat(agreeing).split(sizes))
        distances = [
            Distance(float(d.sum()), int(a.sum()), len(d)) for d, a in zip(*by_row, strict=True)
        ]
    scores = [
        RowScore(float(row.sum()), len(row), distance)
        for row, distance in zip(
            torch.cat(losses).split([s.target_tokens for s in sequences]), distances, strict=True
        )
    ]
    return scores, list(torch.cat(distributions).split(sizes)) if share else []


@dataclass(frozen=True)
class _Wanted:
    """A row with its tokens that are looked at as targets, and for each of those what it is for."""

    sequence: TokenSequence
    answer: list[bool]
    kept: list[bool]

    @classmethod
    def of(cls, sequence: TokenSequence, size: int) -> "_Wanted":
        """size: how many tokens are for the distance, evenly spread over those that are predicted."""
        count = len(sequence.tokens) - 1
        spread = [(i + 1) * size // count > i * size // count for i in range(count)]
        answers = [bool(learned) for learned in sequence.learned[1:]]
        wanted = [a or k for a, k in zip(answers, spread, strict=True)]
        return cls(
            TokenSequence(sequence.sample, sequence.tokens, bytes([0, *wanted])),
            [a for a, w in zip(answers, wanted, strict=True) if w],
            [k for k, w in zip(spread, wanted, strict=True) if w],
        )


def _log_probabilities(step: TrainingStep, batch: MicroBatch) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk of target tokens begins, and its log-probabilities: float32 (chunk, vocabulary).

    As in the step's loss: the head by itself where the logits are its product and nothing more.
    """
    model = cast(Any, step.model)
    model.fitlora_context.enter(batch)
    inputs = model_inputs(batch, together=step.network.together)
    chunk = max(1, step.plan.loss_chunk_tokens // 4)  # a comparison has several of these at once
    if model.config.model_type in PLAIN_HEAD:
        hidden = model.get_decoder()(**inputs).last_hidden_state[0]
        hidden = hidden.index_select(0, batch.target_rows)
        head = model.get_output_embeddings()
    else:
        hidden = model(**inputs).logits[0].index_select(0, batch.target_rows)
        head = torch.nn.Identity()
    for start in range(0, len(hidden), chunk):
        logits = head(hidden[start : start + chunk]).float()
        yield start, logits - logits.logsumexp(1, keepdim=True)
