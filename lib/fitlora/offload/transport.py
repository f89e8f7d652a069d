"""Moving bytes between the host and the device beside the computation.

One interface and three versions of it. `CudaTransport` has a stream for each direction and orders
everything by events; the host never waits. `HostTransport` does the same on the CPU, where a copy is
done when it is asked for. `TracedTransport` is for estimates: nothing moves, and host buffers are
tensors on meta that are hidden from a memory trace, which counts the device.

Work is ordered by marks. `mark()` is a point in the device's computation, `upload` and `download`
return one of the copy, and a copy begins after the marks that it is given. Who wants the bytes says
`wait(mark)`: the computation that follows begins after the copy. What a copy reads or writes must stay
alive until a wait for it, which is what bounds memory without asking the device anything.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

from fitlora.artifacts import SCRATCH
from fitlora.offload.host_memory import HostMemory, Pages
from fitlora.offload.shared import SharedMemory

ALIGNMENT = 256  # of tensors inside flat buffers, as the CUDA allocator aligns them
PINNING_THREADS = 8

Mark = Any  # a point in some queue of work; None where there is nothing to wait for


def aligned(count: int) -> int:
    """`count` bytes, up to where the next tensor of a flat buffer may begin."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; on meta as well."""
    return tensor.numel() * tensor.element_size()


def outline(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A shape and a dtype as a tensor on meta, which no memory trace sees."""
    with untraced():
        return torch.empty(tuple(shape), dtype=dtype, device="meta")


def view_as(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """The bytes of `flat`, uint8, from `offset` on as a tensor of the shape and dtype of `like`."""
    return flat[offset : offset + tensor_bytes(like)].view(like.dtype).view(like.shape)


@contextmanager
def untraced() -> Iterator[None]:
    """Hides what is done to host buffers from a memory trace, which counts the device."""
    with _disable_current_modes():
        yield


class Transport(ABC):
    """Host buffers, and copies from and to them.

    device: the computation's. memory: what host buffers are counted against. uploaded_bytes and
    downloaded_bytes: what went over the link so far; pinned_bytes: host buffers that are pinned, of
    which shared_bytes hold what all processes of the host have alike. shared: where those are one copy;
    without it there is one process. folder: where what the host's memory has no room for is on disk.
    """

    folder = SCRATCH

    def __init__(
        self,
        device: torch.device,
        memory: HostMemory | None = None,
        shared: SharedMemory | None = None,
    ) -> None:
        self.device = device
        self.memory = memory or HostMemory()
        self.shared, self.shared_bytes = shared, 0
        self._others: set[int] = set()  # addresses of buffers that other processes fill
        self._to_come = False  # whether others have buffers to fill
        self.uploaded_bytes = self.downloaded_bytes = self.pinned_bytes = 0
        self._counting = threading.Lock()
        self._unpinned: list[tuple[Tensor, Pages | None]] = []

    def reserve(self, count: int, purpose: str, *, alike: bool = False) -> Tensor:
        """A host buffer, uint8 (count,), that `pin` will pin; fill it before, which is faster.

        alike: all processes of the host put the same into it, so that one copy is enough; it is theirs
        to fill that `fills` names. Raises UserError where the host's budget has not that much left.
        """
        if alike:
            self.shared_bytes += count
        if alike and self.shared is not None:
            buffer, pages = self._shared_buffer(count, purpose, self.shared)
        else:
            buffer, pages = self._host_buffer(count, purpose)
        self._unpinned.append((buffer, pages))
        return buffer

    def reserve_like(self, like: Tensor, purpose: str, *, alike: bool = False) -> Tensor:
        """The same in the shape and dtype of `like`."""
        buffer = self.reserve(tensor_bytes(like), purpose, alike=alike)
        with self.hidden():
            return view_as(buffer, 0, like)

    def fills(self, place: Tensor) -> bool:
        """Whether it is for this process to fill the buffer that `place` is a part of."""
        return place.untyped_storage().data_ptr() not in self._others

    def pin(self) -> None:
        """Pins every buffer that was reserved and is not pinned yet, several at a time.

        Where processes share some, they wait here until all have filled theirs.
        """
        if self._to_come and self.shared is not None:
            self.shared.wait()
            self._to_come = False
        buffers, self._unpinned = self._unpinned, []
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            for _ in pool.map(lambda reserved: self._pin(*reserved), buffers):
                pass
        self.pinned_bytes += sum(tensor_bytes(buffer) for buffer, _ in buffers)

    def upload(self, destination: Tensor, source: Tensor, *after: Mark) -> Mark:
        """Copies from the host to the device after all marks; returns the copy's own."""
        with self._counting:  # a reader of disks uploads from a thread of its own
            self.uploaded_bytes += tensor_bytes(source)
        return self._upload(destination, source, after)

    def download(self, destination: Tensor, source: Tensor, *after: Mark) -> Mark:
        """Copies from the device to the host after all marks; returns the copy's own."""
        self.downloaded_bytes += tensor_bytes(source)
        return self._download(destination, source, after)

    computes = True  # whether there are numbers, or shapes alone

    def hidden(self) -> AbstractContextManager[None]:
        """What is done to host buffers inside is not seen by a memory trace."""
        return untraced()

    def _shared_buffer(
        self, count: int, purpose: str, shared: SharedMemory
    ) -> tuple[Tensor, Pages | None]:
        share = -(-count // shared.devices)  # each process answers for its part
        self.memory.take(share, purpose)
        pages, mine = shared.pages(count, partial(self.memory.give, share, purpose))
        self._to_come = True
        with untraced():
            buffer = torch.frombuffer(pages, dtype=torch.uint8, count=count)
        if not mine:
            self._others.add(buffer.untyped_storage().data_ptr())
        return buffer, pages

    @abstractmethod
    def mark(self) -> Mark:
        """The device's computation up to here."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """The device's later computation begins after `mark`."""

    @abstractmethod
    def finish(self, *marks: Mark) -> None:
        """The host waits for the marks."""

    @abstractmethod
    def drain(self) -> None:
        """The host waits for every copy that is under way."""

    @abstractmethod
    def _host_buffer(self, count: int, purpose: str) -> tuple[Tensor, Pages | None]: ...

    @abstractmethod
    def _pin(self, buffer: Tensor, pages: Pages | None) -> None: ...

    @abstractmethod
    def _upload(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark: ...

    @abstractmethod
    def _download(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark: ...


class _PagedTransport(Transport):
    """Host buffers in pages of our own."""

    def _host_buffer(self, count: int, purpose: str) -> tuple[Tensor, Pages | None]:
        self.memory.take(count, purpose)
        pages = Pages(count, partial(self.memory.give, count, purpose))
        with untraced():
            return torch.frombuffer(pages, dtype=torch.uint8, count=count), pages


class CudaTransport(_PagedTransport):
    """Copies by the GPU's copy engines, a stream for each direction."""

    def __init__(
        self,
        device: torch.device,
        memory: HostMemory | None = None,
        shared: SharedMemory | None = None,
    ) -> None:
        super().__init__(device, memory, shared)
        self._up, self._down = _copy_streams(device)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, *marks: Mark) -> None:
        for mark in marks:
            if mark is not None:
                mark.synchronize()

    def drain(self) -> None:
        self._up.synchronize()
        self._down.synchronize()

    def _upload(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        return self._enqueue(self._up, destination, source, after)

    def _download(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        return self._enqueue(self._down, destination, source, after)

    def _enqueue(
        self,
        stream: torch.cuda.Stream,
        destination: Tensor,
        source: Tensor,
        after: tuple[Mark, ...],
    ) -> Mark:
        with torch.cuda.stream(stream), torch.no_grad():
            for mark in after:
                if mark is not None:
                    stream.wait_event(mark)
            self._copy(destination, source)
            return stream.record_event()

    def _copy(self, destination: Tensor, source: Tensor) -> None:
        """The copy itself, on the current stream; a test or a benchmark may put work before it."""
        destination.copy_(source, non_blocking=True)

    def _pin(self, buffer: Tensor, pages: Pages | None) -> None:
        assert pages is not None
        address, count = buffer.data_ptr(), buffer.numel()
        with torch.cuda.device(self.device):
            runtime = torch.cuda.cudart()
            error = runtime.cudaHostRegister(address, count, 0)
        if int(error) != 0:
            raise RuntimeError(f"{count} bytes of host memory could not be pinned: {error}")
        pages.before_free = partial(_unregister, address)


@cache
def _copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """One for each direction, the same for all transports of a process.

    A GPU has few queues for streams. With a pair for each step that is built, one comes to share the
    computation's queue after a while, and copies no longer run beside kernels.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class HostTransport(_PagedTransport):
    """The same on the CPU: every copy is done at once, after whatever came before."""

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        return

    def finish(self, *marks: Mark) -> None:
        return

    def drain(self) -> None:
        return

    def _pin(self, buffer: Tensor, pages: Pages | None) -> None:
        return

    def _upload(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        copy(destination, source)

    def _download(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        copy(destination, source)


class TracedTransport(Transport):
    """Shapes alone: host buffers on meta, and copies that do nothing."""

    computes = False

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        return

    def finish(self, *marks: Mark) -> None:
        return

    def drain(self) -> None:
        return

    def _host_buffer(self, count: int, purpose: str) -> tuple[Tensor, Pages | None]:
        self.memory.take(count, purpose)
        return outline((count,), torch.uint8), None

    def _pin(self, buffer: Tensor, pages: Pages | None) -> None:
        return

    def _upload(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        return None

    def _download(self, destination: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        return None


def copy(destination: Tensor, source: Tensor) -> None:
    """A copy between tensors of the CPU that no trace sees."""
    with untraced(), torch.no_grad():
        destination.copy_(source)


def make_transport(
    device: torch.device, memory: HostMemory | None = None, shared: SharedMemory | None = None
) -> Transport:
    """The one for `device`, or for tensors without content: fake ones, or those on meta."""
    if device.type == "meta" or detect_fake_mode() is not None:
        return TracedTransport(device, memory)
    if device.type == "cuda":
        return CudaTransport(device, memory, shared)
    return HostTransport(device, memory, shared)
