"""The tokens that go through the model together, laid behind each other without padding.

A micro-batch of sequences is one row of tokens; attention is kept inside each sequence by the list of
lengths, which the host knows, so that nothing waits for the device. No token is padding, and a
micro-batch costs what its tokens cost. A packed sequence is several that count as one: in here they
lie behind each other as any others do, so that they stay apart in attention, positions and dropout.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fitlora.step.ops import row_keys


@dataclass(frozen=True)
class TokenSequence:
    """One sequence: its token ids, which of them are learned, and which row of the data it is.

    Rows of data have an array of int32 and bytes: a tuple of ints takes ten times as much.
    """

    sample: int
    tokens: Sequence[int]
    learned: Sequence[int]  # learned[i]: the loss counts the prediction of tokens[i]

    @property
    def target_tokens(self) -> int:
        """Tokens that count in the loss; the first token is never predicted."""
        return sum(self.learned[1:])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each part that attention is kept inside of."""
        return (len(self.tokens),)

    @property
    def parts(self) -> tuple["TokenSequence", ...]:
        """The rows of the data that it is made of."""
        return (self,)


@dataclass(frozen=True)
class PackedSequence(TokenSequence):
    """Several sequences behind each other that are one of a batch; `sample` is the first one's."""

    samples: tuple[int, ...]
    packed_lengths: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[TokenSequence]) -> "PackedSequence":
        """parts: rows of the data, at least one, none of them packed."""
        return cls(
            sample=parts[0].sample,
            tokens=array("i", [token for part in parts for token in part.tokens]),
            learned=bytes(learned for part in parts for learned in part.learned),
            samples=tuple(part.sample for part in parts),
            packed_lengths=tuple(len(part.tokens) for part in parts),
        )

    @property
    def target_tokens(self) -> int:
        """Tokens that count in the loss; the first token of each part is never predicted."""
        return sum(part.target_tokens for part in self.parts)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.packed_lengths

    @property
    def parts(self) -> tuple[TokenSequence, ...]:
        found, start = [], 0
        for sample, length in zip(self.samples, self.packed_lengths, strict=True):
            part = slice(start, start + length)
            found.append(TokenSequence(sample, self.tokens[part], self.learned[part]))
            start += length
        return tuple(found)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: its tokens on the host, and tensors that are all on the step's device.

    input_ids, position_ids: int64 (1, tokens). targets: int64 (targets,), the ids to predict, and
    target_rows: int64 (targets,), the rows of hidden states that predict them. starts: int32
    (parts + 1,), where each sequence or part of one begins; lengths is the same on the host. row_keys:
    int32 (tokens,), the dropout key of each token. flash_types: types whose attention takes a fused
    kernel, by the Plan, so that tensors on meta take the way of those they stand for.
    """

    tokens: Sequence[int]
    input_ids: Tensor
    position_ids: Tensor
    target_rows: Tensor
    targets: Tensor
    starts: Tensor
    lengths: list[int]
    row_keys: Tensor
    flash_types: Sequence[torch.dtype]

    def moved(self, bring: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same with each tensor as `bring` gives it: on another device."""
        return replace(
            self,
            input_ids=bring(self.input_ids),
            position_ids=bring(self.position_ids),
            target_rows=bring(self.target_rows),
            targets=bring(self.targets),
            starts=bring(self.starts),
            row_keys=bring(self.row_keys),
        )


class StepContext:
    """What layers deep in the model need to know of the micro-batch in flight.

    Recomputation runs layers again in backward, on another thread on CUDA, so this is a plain object
    that the layers hold, and not a context variable.
    """

    lengths: list[int]
    starts: Tensor
    row_keys: Tensor
    flash_types: Sequence[torch.dtype]

    def enter(self, batch: MicroBatch) -> None:
        self.lengths, self.starts, self.row_keys = batch.lengths, batch.starts, batch.row_keys
        self.flash_types = batch.flash_types


def make_micro_batch(
    sequences: Sequence[TokenSequence],
    *,
    seed: int,
    step: int,
    device: torch.device,
    flash_types: Sequence[torch.dtype],
) -> MicroBatch:
    """Lays the sequences, and the parts of packed ones, behind each other.

    step: the optimizer step, for the dropout masks.
    """
    sequences = [part for sequence in sequences for part in sequence.parts]
    lengths = [len(sequence.tokens) for sequence in sequences]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    ids = [token for sequence in sequences for token in sequence.tokens]
    rows, targets = [], []
    for start, sequence in zip(starts, sequences, strict=False):
        for position in range(1, len(sequence.tokens)):
            if sequence.learned[position]:
                rows.append(start + position - 1)
                targets.append(sequence.tokens[position])

    def on_device(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    positions = on_device([position for length in lengths for position in range(length)])
    samples = on_device(
        [s.sample for s, length in zip(sequences, lengths, strict=True) for _ in range(length)]
    )
    return MicroBatch(
        tokens=ids,
        input_ids=on_device(ids)[None],
        position_ids=positions[None],
        target_rows=on_device(rows),
        targets=on_device(targets),
        starts=on_device(starts, torch.int32),
        lengths=lengths,
        row_keys=row_keys(seed, step, samples, positions),
        flash_types=flash_types,
    )
