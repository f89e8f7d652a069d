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
from typing import Any, cast

import torch
from torch import Tensor

from fitlora.offload.transport import Mark, Transport, outline


class HostEmbedding:
    """Rows of a table on the host, as tensors on the device.

    table: (vocabulary, hidden), on the host, pinned or not. Two staging buffers of `tokens` rows are
    pinned for each micro-batch of a pass, `together` of them; a larger micro-batch replaces them.
    """

    PURPOSE = "staging of embeddings"

    def __init__(
        self, table: Tensor, transport: Transport, *, tokens: int, together: int = 1
    ) -> None:
        self.table, self.transport = table, transport
        self._count = 2 * together
        self._stage(tokens)

    def _stage(self, tokens: int) -> None:
        shape = (tokens, self.table.shape[1])
        like = outline(shape, self.table.dtype)
        count = self._count
        self._staging = [self.transport.reserve_like(like, self.PURPOSE) for _ in range(count)]
        self._sent: list[Mark] = [None] * count
        self.transport.pin()

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """The embeddings of `tokens`, (tokens, hidden), for the device's computation from here on."""
        if len(tokens) > len(self._staging[0]):
            self.transport.finish(*self._sent)
            self._stage(len(tokens))
        self._staging.insert(0, self._staging.pop())
        self._sent.insert(0, self._sent.pop())
        self.transport.finish(self._sent[0])  # of the pass before the last
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

    def rows_at_once(self, whole: int) -> int:
        """Rows whose logits of a slice are as many as those of `whole` rows of all of it."""
        return whole * self.count

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


class _Softmax:
    """The cross-entropy of one micro-batch, as far as the slices so far tell it."""

    def __init__(self, hidden: Tensor, targets: Tensor, *, gradient: bool) -> None:
        self.hidden, self.targets = hidden, targets
        rows = len(hidden)
        self.top = hidden.new_full((rows, 1), float("-inf"), dtype=torch.float32)
        self.norm = hidden.new_zeros((rows, 1), dtype=torch.float32)
        self.chosen = hidden.new_zeros((rows, 1), dtype=torch.float32)
        self.grad = self.wanted = None
        if gradient:
            self.grad = torch.zeros_like(hidden, dtype=torch.float32)
            self.wanted = torch.zeros_like(hidden)  # the targets' rows of the head

    def take_in(self, start: int, weight: Tensor, bias: Tensor | None, part: slice) -> None:
        """Takes in a slice of the vocabulary that begins at `start`, for a part of the rows."""
        logits = torch.mm(self.hidden[part], weight.t())
        if bias is not None:
            logits.add_(bias[start : start + len(weight)])
        p = logits.to(torch.float32)
        del logits
        place = (self.targets[part] - start)[:, None]
        here = (place >= 0) & (place < len(weight))
        place = place.clamp_(0, len(weight) - 1)
        self.chosen[part].add_(p.gather(1, place).mul_(here))
        raised = torch.maximum(self.top[part], p.amax(1, keepdim=True))
        p.sub_(raised).exp_()
        worth = self.top[part].sub_(raised).exp_()  # what the sums so far are worth now
        self.norm[part].mul_(worth).add_(p.sum(1, keepdim=True))
        if self.grad is not None and self.wanted is not None:
            self.grad[part].mul_(worth).add_(torch.mm(p.to(weight.dtype), weight))
            self.wanted[part].add_(weight.index_select(0, place[:, 0]).mul_(here))
        self.top[part] = raised

    def end(self, scale: float) -> tuple[Tensor, Tensor | None]:
        """`scale` times the loss, and its gradient."""
        loss = self.norm.log().add_(self.top).sub_(self.chosen).sum().mul_(scale)
        if self.grad is None or self.wanted is None:
            return loss, None
        grad = self.grad.div_(self.norm).sub_(self.wanted).mul_(scale)
        return loss, grad.to(self.hidden.dtype)


def sliced_losses(
    rows: Sequence[tuple[Tensor, Tensor]],
    slices: Slices,
    *,
    scale: float,
    chunk: int,
    bias: Tensor | None = None,
    gradient: bool = True,
) -> list[tuple[Tensor, Tensor | None]]:
    """`scale` times the summed cross-entropy of each micro-batch, and its gradient, in one pass.

    rows: each one's hidden states, (rows, hidden), and targets, int64 (rows,); slices: gives
    (start, (n, hidden)) for the whole vocabulary, in order, each once. Returns for each a float32 scalar
    and, where `gradient`, a tensor like its hidden states. Beside the slice, (chunk, n) logits in fp32
    are alive, and the gradients in fp32.
    """
    found = [_Softmax(hidden, targets, gradient=gradient) for hidden, targets in rows]
    for start, weight in slices():
        for one in found:
            for first in range(0, len(one.hidden), chunk):
                one.take_in(start, weight, bias, slice(first, first + chunk))
    return [one.end(scale) for one in found]


class _SlicedProduct(torch.autograd.Function):
    """The product with a frozen table that comes in slices, and comes again for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, slices: Slices) -> Tensor:
        ctx.slices = slices
        return torch.cat([torch.mm(hidden, weight.t()) for _, weight in slices()], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total: Tensor | None = None
        for start, weight in ctx.slices():
            part = torch.mm(grads[0][:, start : start + len(weight)], weight).float()
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(grads[0].dtype), None


def sliced_logits(hidden: Tensor, slices: Slices, *, bias: Tensor | None = None) -> Tensor:
    """The logits of `hidden`, (rows, hidden), under a head that comes in slices: (rows, vocabulary)."""
    logits = cast(Tensor, _SlicedProduct.apply(hidden, slices))
    return logits if bias is None else logits.add_(bias)
