"""Activation checkpoints on the host: what a recomputed layer starts from in backward.

A checkpoint goes down while the next layer computes and comes back while the layer above it is
recomputed, through buffers that are pinned once and used again in every step.

Two checkpoints are on the device at any time, and exactly two. The newest is what the layer in work
reads, and goes down only when the next is put: the last of a pass is wanted first and never travels.
The one before it is under way; when another is put, the computation waits for its copy and the tensor
is let go. Waiting on the device's own queue and not on the host's makes the moment of each free, and
so the peak, the same in every step and in an estimate, which `record_stream` would leave to the
allocator. Likewise on the way back.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fitlora.offload.transport import Mark, Transport, outline, tensor_bytes, view_as

PURPOSE = "activation checkpoints"


@dataclass
class _Checkpoint:
    """One put tensor: on the device, on the host, or on its way; `copied` is the copy either way."""

    key: Hashable
    like: Tensor  # on meta: shape and dtype
    tensor: Tensor | None
    made: Mark  # the computation that wrote it
    buffer: Tensor | None = None  # on the host
    copied: Mark = None


class HostCheckpoints:
    """A stack of tensors: `put` in forward, `get` in backward, in reverse.

    Tensors that share a pass differ in size from step to step, so each new buffer is as large as the
    largest so far: a run begins with its longest rows, and pins no more after them.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._stack: list[_Checkpoint] = []
        self._free: list[Tensor] = []
        self._largest = 0  # bytes

    @property
    def buffer_bytes(self) -> list[int]:
        """Sizes of the buffers on the host; between passes, when all are free."""
        return [buffer.numel() for buffer in self._free]

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps `tensor`, contiguous and on the device, which nobody may write to any more."""
        if len(self._stack) > 1:
            self._let_go(self._stack[-2])
        if self._stack:
            self._send_down(self._stack[-1])
        tensor = tensor.detach()
        like = outline(tensor.shape, tensor.dtype)
        self._stack.append(_Checkpoint(key, like, tensor, self.transport.mark()))

    def get(self, key: Hashable) -> Tensor:
        """The tensor that was put last of those left, whose key this is; it is forgotten here."""
        last = self._stack.pop()
        assert last.key == key, f"checkpoint {key} is asked for, and {last.key} was put last"
        if last.tensor is None:
            self._bring_up(last)
        self.transport.wait(last.copied)
        self._give_back(last)
        if self._stack and self._stack[-1].tensor is None:
            self._bring_up(self._stack[-1])
        assert last.tensor is not None
        return last.tensor

    def reset(self) -> None:
        """Forgets every checkpoint: after an exception or an interruption."""
        self.transport.drain()
        while self._stack:
            self._give_back(self._stack.pop())

    def _send_down(self, checkpoint: _Checkpoint) -> None:
        assert checkpoint.tensor is not None
        checkpoint.buffer = self._buffer(tensor_bytes(checkpoint.like))
        checkpoint.copied = self.transport.download(
            self._place(checkpoint), checkpoint.tensor, checkpoint.made
        )

    def _let_go(self, checkpoint: _Checkpoint) -> None:
        self.transport.wait(checkpoint.copied)
        checkpoint.tensor = None

    def _bring_up(self, checkpoint: _Checkpoint) -> None:
        checkpoint.tensor = torch.empty(
            checkpoint.like.shape, dtype=checkpoint.like.dtype, device=self.transport.device
        )
        # The computation up to here may use the same memory; it has waited for the copy down as well.
        checkpoint.copied = self.transport.upload(
            checkpoint.tensor, self._place(checkpoint), self.transport.mark()
        )

    def _place(self, checkpoint: _Checkpoint) -> Tensor:
        assert checkpoint.buffer is not None
        with self.transport.hidden():
            return view_as(checkpoint.buffer, 0, checkpoint.like)

    def _give_back(self, checkpoint: _Checkpoint) -> None:
        if checkpoint.buffer is not None:
            self._free.append(checkpoint.buffer)
            checkpoint.buffer = None

    def _buffer(self, count: int) -> Tensor:
        """A free buffer of at least `count` bytes; one that is too small is replaced."""
        self._free.sort(key=Tensor.numel)
        for index, buffer in enumerate(self._free):
            if buffer.numel() >= count:
                return self._free.pop(index)
        if self._free:  # a copy may still read the one that goes
            self.transport.drain()
            del self._free[0]
        self._largest = max(self._largest, count)
        buffer = self.transport.reserve(self._largest, PURPOSE)
        self.transport.pin()
        return buffer
