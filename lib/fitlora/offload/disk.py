"""Layers that the host's memory has no room for: on disk, and read ahead through a few pinned buffers.

The layers' flat images lie behind each other in one file, so that a layer is one sequential read. The
file is written while weights are loaded, through a mapping (in the page cache, which is not counted
and goes to disk by itself), and has no name: nothing of it is left, however the process ends.

Threads read what is wanted next; another hands what has been read to the transport, so that the
computation's own thread never waits for the disk before it needs the bytes. A buffer is read into
again when the copy out of it is done.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fitlora.errors import ArtifactError, UserError
from fitlora.offload.transport import Mark, Transport, outline
from fitlora.units import format_bytes

PURPOSE = "buffers for weights on disk"
BUFFERS = 3  # one is read into while one goes to the device, and one more as neither is even


class _Buffer:
    """A pinned buffer: which layer it has or will have, and what it waits for."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.holds: int | None = None
        self.filled: Future[None] | None = None
        self.sent: Future[Mark] | None = None  # out of it, to the device


class DiskRing:
    """Flat images of layers on disk, and the buffers that they come through.

    sizes: bytes of each image, by the layer's number. folder: where the file is made. buffers: how many
    layers are on the host at one time; two or more let reading go on beside the copy to the device.
    Raises UserError where the disk or the host's budget has too little room.
    """

    def __init__(
        self, sizes: dict[int, int], transport: Transport, folder: Path, *, buffers: int = BUFFERS
    ) -> None:
        self.transport = transport
        self._sizes = sizes
        self._starts: dict[int, int] = {}
        end = 0
        for number, size in sizes.items():
            self._starts[number] = end
            end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._buffers = [
            _Buffer(transport.reserve(max(sizes.values()), PURPOSE))
            for _ in range(min(buffers, len(sizes)))
        ]
        self._readers = ThreadPoolExecutor(len(self._buffers), "read weights")
        self._sender = ThreadPoolExecutor(1, "send weights")
        if transport.computes:
            self._file = self._make_file(folder, end)
            weakref.finalize(self, os.close, self._file)

    @staticmethod
    def _make_file(folder: Path, size: int) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        left = shutil.disk_usage(folder).free
        if left < size:
            raise UserError(
                f"weights that the host's memory has no room for need {format_bytes(size)} of disk "
                f"below {folder}, where {format_bytes(left)} are free; free some, or raise "
                "hardware.host_memory_budget"
            )
        with tempfile.TemporaryFile(dir=folder) as file:
            os.ftruncate(file.fileno(), size)
            return os.dup(file.fileno())

    def image(self, number: int) -> Tensor:
        """Where a layer's bytes are to be written before the first read: a mapping of the file."""
        if not self.transport.computes:
            return outline((self._sizes[number],), torch.uint8)
        size = self._sizes[number]
        pages = mmap.mmap(self._file, size, offset=self._starts[number])
        with self.transport.hidden():
            return torch.frombuffer(pages, dtype=torch.uint8, count=size)

    def __contains__(self, number: int) -> bool:
        return number in self._sizes

    def expect(self, numbers: Sequence[int]) -> None:
        """Reads ahead. numbers: of layers that will be asked for, soonest first."""
        if not self.transport.computes:
            return
        soon = [n for n in numbers if n in self._sizes][: len(self._buffers)]
        for number in soon:
            if self._find(number) is None:
                self._read(self._spare(soon), number)

    def upload(self, number: int, destination: Tensor, *after: Mark) -> "Future[Mark]":
        """Copies a layer to the device when it has been read; the copy's mark comes then."""
        if not self.transport.computes:
            nothing: Future[Mark] = Future()
            nothing.set_result(None)
            return nothing
        buffer = self._find(number)
        if buffer is None:
            buffer = self._spare([])
            self._read(buffer, number)
        filled = buffer.filled
        assert filled is not None
        with self.transport.hidden():
            source = buffer.flat[: self._sizes[number]]

        def send() -> Mark:
            filled.result()
            return self.transport.upload(destination, source, *after)

        buffer.holds = None  # it may be read into again, after the copy
        buffer.sent = self._sender.submit(send)
        return buffer.sent

    def reset(self) -> None:
        """Waits for what is being read and sent."""
        for buffer in self._buffers:
            for future in (buffer.filled, buffer.sent):
                if future is not None:
                    future.exception()

    def _find(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.holds == number), None)

    def _spare(self, soon: Sequence[int]) -> _Buffer:
        """A buffer for another layer: one that has none, or the one whose layer is wanted last."""
        rank = {number: place for place, number in enumerate(soon)}

        def lateness(buffer: _Buffer) -> int:
            if buffer.holds is None:
                return len(rank) + 1
            return rank.get(buffer.holds, len(rank))

        return max(self._buffers, key=lateness)

    def _read(self, buffer: _Buffer, number: int) -> None:
        before, sent = buffer.filled, buffer.sent
        buffer.holds = number

        def read() -> None:
            if before is not None:
                before.exception()
            if sent is not None and sent.exception() is None:
                self.transport.finish(sent.result())
            self._fill(buffer.flat, number)

        buffer.filled = self._readers.submit(read)

    def _fill(self, flat: Tensor, number: int) -> None:
        view = memoryview(flat.numpy().data)[: self._sizes[number]]
        position = self._starts[number]
        while view:
            count = os.preadv(self._file, [view], position)
            if count == 0:
                raise ArtifactError("the file of weights on disk ends early; start again")
            view, position = view[count:], position + count
