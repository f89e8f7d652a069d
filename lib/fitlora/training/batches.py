"""Which sequences make up which optimizer step: a function of the seed and the step alone.

The first step of a run is made of the longest sequences that the data has, so that a run that would
run out of memory does so at once and not in its last hour. The rest of the first pass, and every
later pass, is in random order. A run that is continued elsewhere, on another number of devices, goes
on with the same sequences.
"""

import math
import random
from collections.abc import Sequence
from fractions import Fraction

from fitlora.errors import UserError
from fitlora.step.batch import TokenSequence
from fitlora.training.data import longest_positions


class Batches:
    """The effective batches of a run.

    sequences: all of the training data, at least one batch (UserError otherwise). A pass that does not
    fill its last batch is continued by the next pass, so every batch is whole.
    """

    def __init__(self, sequences: Sequence[TokenSequence], effective_batch_size: int, seed: int):
        if len(sequences) < effective_batch_size:
            packed = any(len(s.lengths) > 1 for s in sequences)
            what = "packed sequences (data.packing)" if packed else "rows"
            raise UserError(
                f"data.train has {len(sequences)} {what}, fewer than train.effective_batch_size "
                f"{effective_batch_size}; lower it, or add rows"
            )
        self.sequences = sequences
        self.size = effective_batch_size
        self.seed = seed
        self._first = longest_positions(sequences, self.size)
        self._orders: dict[int, list[int]] = {}

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps that see every sequence `epochs` times, rounded up."""
        # 1.1 is meant as written: in floats 1.1 * 10 is more than 11, and would take one step more
        return math.ceil(Fraction(str(epochs)) * len(self.sequences) / self.size)

    def order(self, epoch: int) -> list[int]:
        """Positions of all sequences in the order of pass `epoch` (from 0)."""
        if epoch not in self._orders:
            shuffled = list(range(len(self.sequences)))
            random.Random(f"{self.seed}:{epoch}").shuffle(shuffled)
            if epoch == 0:
                first = set(self._first)
                shuffled = self._first + [p for p in shuffled if p not in first]
            # a batch touches two passes at most; older orders are not needed again
            self._orders = {k: v for k, v in self._orders.items() if k >= epoch - 1}
            self._orders[epoch] = shuffled
        return self._orders[epoch]

    def batch(self, step: int) -> list[TokenSequence]:
        """The sequences of optimizer step `step` (from 0)."""
        start = step * self.size
        count = len(self.sequences)
        chosen: list[int] = []
        while len(chosen) < self.size:
            epoch, offset = divmod(start + len(chosen), count)
            chosen += self.order(epoch)[offset : offset + self.size - len(chosen)]
        return [self.sequences[position] for position in chosen]


def share_of(batch: Sequence[TokenSequence], rank: int, devices: int) -> list[TokenSequence]:
    """The part of an effective batch that device `rank` of `devices` works on.

    Every `devices`-th sequence, so that the long ones of the first step are spread over all.
    """
    return list(batch[rank::devices])
