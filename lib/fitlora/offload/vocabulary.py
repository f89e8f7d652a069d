"""The two ends of a model whose vocabulary tables are on the host.

The embedding: the tokens of a micro-batch are known on the host, so their rows are gathered there and
go up alone, 2,048 rows instead of 128,256.

The head: its table passes through two slots in slices of the vocabulary, once for each loss. That one
pass gives the gradient as well is FlashAttention's idea: the gradient of the cross-entropy for the
hidden states is softmax(hidden W^T) W - W[target], which is attention over the vocabulary with W as
keys and as values. Running maxima and sums make the softmax, and the sum so far is scaled where a new
slice raises the maximum.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fitlora.offload.transport import Mark, Transport, outline


class HostEmbedding:
    """Rows of a table on the host, as tensors on the device.

    table: (vocabulary, hidden), on the host, pinned or not. Two staging buffers of `tokens` rows are
    pinned; a larger micro-batch replaces them.
    """

    PURPOSE = "staging of embeddings"

    def __init__(self, table: Tensor, transport: Transport, *, tokens: int) -> None:
        self.table, self.transport = table, transport
        self._stage(tokens)

    def _stage(self, tokens: int) -> None:
        shape = (tokens, self.table.shape[1])
        like = outline(shape, self.table.dtype)
        self._staging = [self.transport.reserve_like(like, self.PURPOSE) for _ in range(2)]
        self._sent: list[Mark] = [None, None]
        self.transport.pin()

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """The embeddings of `tokens`, (tokens, hidden), for the device's computation from here on."""
        if len(tokens) > len(self._staging[0]):
            self.transport.finish(*self._sent)
            self._stage(len(tokens))
        self._staging.reverse()
        self._sent.reverse()
        self.transport.finish(self._sent[0])  # two micro-batches ago
        out = torch.empty(
            (len(tokens), self.table.shape[1]),
            dtype=self.table.dtype,
            device=self.transport.device,
        )
        with self.transport.hidden():
            rows = self._staging[0][: len(tokens)]
            if self.transport.computes:
                torch.index_select(self.table, 0, torch.tensor(tokens), out=rows)
        self._sent[0] = self.transport.upload(out, rows, self.transport.mark())
        self.transport.wait(self._sent[0])
        return out


class StreamedHead:
    """A head's table on the host, and its slices on the device one after another.

    table: (vocabulary, hidden), on the host and pinned. rows: of the vocabulary in a slice. Two slots
    are made at once; call `fetch` where the computation is about to come to the loss.
    """

    def __init__(self, table: Tensor, transport: Transport, *, rows: int) -> None:
        self.table, self.transport = table, transport
        self._starts = range(0, len(table), rows)
        shape = (min(rows, len(table)), table.shape[1])
        self._slots = [
            torch.empty(shape, dtype=table.dtype, device=transport.device)
            for _ in range(min(2, len(self._starts)))
        ]
        self._read: list[Mark] = [None] * len(self._slots)
        self._filled: list[tuple[Tensor, Mark]] = []

    @property
    def count(self) -> int:
        """Slices of the whole table."""
        return len(self._starts)

    @property
    def slot_tensors(self) -> list[Tensor]:
        """What it has on the device."""
        return list(self._slots)

    def fetch(self) -> None:
        """Begins to bring the first slices, where that has not been done."""
        while len(self._filled) < len(self._slots):
            self._bring(len(self._filled))

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Each slice of the vocabulary: where it begins, and its rows of the table on the device.

        A slice is good until the next is asked for.
        """
        self.fetch()
        for number, start in enumerate(self._starts):
            weight, mark = self._filled[number]
            self.transport.wait(mark)
            yield start, weight
            self._read[number % len(self._slots)] = self.transport.mark()
            del weight
            if number + len(self._slots) < len(self._starts):
                self._bring(number + len(self._slots))
        self._filled = []

    def reset(self) -> None:
        """Forgets slices that were not asked for: after an exception or an interruption."""
        self.transport.drain()
        self._filled = []

    def _bring(self, number: int) -> None:
        start, place = self._starts[number], number % len(self._slots)
        with self.transport.hidden():
            source = self.table[start : start + self._starts.step]
        slot = self._slots[place][: len(source)]
        self._filled.append((slot, self.transport.upload(slot, source, self._read[place])))


Slices = Callable[[], Iterator[tuple[int, Tensor]]]


def sliced_loss(
    hidden: Tensor,
    slices: Slices,
    targets: Tensor,
    *,
    scale: float,
    chunk: int,
    bias: Tensor | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`scale` times the summed cross-entropy of `targets`, and its gradient for `hidden`, in one pass.

    hidden: (rows, hidden); slices: gives (start, (n, hidden)) for the whole vocabulary, in order, each
    once; targets: int64 (rows,). Returns a float32 scalar and, where `gradient`, a tensor like hidden.
    Beside the slice, (chunk, n) logits in fp32 are alive, and the gradient in fp32.
    """
    rows = len(hidden)
    top = hidden.new_full((rows, 1), float("-inf"), dtype=torch.float32)
    norm = hidden.new_zeros((rows, 1), dtype=torch.float32)
    chosen = hidden.new_zeros((rows, 1), dtype=torch.float32)
    grad = wanted = None
    if gradient:
        grad = torch.zeros_like(hidden, dtype=torch.float32)
        wanted = torch.zeros_like(hidden)  # the targets' rows of the head
    for start, weight in slices():
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            logits = torch.mm(hidden[part], weight.t())
            if bias is not None:
                logits.add_(bias[start : start + len(weight)])
            p = logits.to(torch.float32)
            del logits
            place = (targets[part] - start)[:, None]
            here = (place >= 0) & (place < len(weight))
            place = place.clamp_(0, len(weight) - 1)
            chosen[part].add_(p.gather(1, place).mul_(here))
            raised = torch.maximum(top[part], p.amax(1, keepdim=True))
            p.sub_(raised).exp_()
            worth = top[part].sub_(raised).exp_()  # what the sums so far are worth now
            norm[part].mul_(worth).add_(p.sum(1, keepdim=True))
            if grad is not None and wanted is not None:
                grad[part].mul_(worth).add_(torch.mm(p.to(weight.dtype), weight))
                wanted[part].add_(weight.index_select(0, place[:, 0]).mul_(here))
            del p
            top[part] = raised
    loss = norm.log().add_(top).sub_(chosen).sum().mul_(scale)
    if grad is None or wanted is None:
        return loss, None
    return loss, grad.div_(norm).sub_(wanted).mul_(scale).to(hidden.dtype)


def sliced_logits(hidden: Tensor, slices: Slices, *, bias: Tensor | None = None) -> Tensor:
    """The logits of `hidden`, (rows, hidden), under a head that comes in slices: (rows, vocabulary)."""
    logits = torch.cat([torch.mm(hidden, weight.t()) for _, weight in slices()], dim=1)
    return logits if bias is None else logits.add_(bias)
