"""Transports that make a missing wait show: late copies, poisoned slots, and a clock for each queue."""

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import HostTransport, copy

POISON = 0xFF  # NaN in every float
Source = Callable[[], Tensor | None]


class DelayedTransport(HostTransport):
    """Copies are done by a thread for each direction, late by a random time.

    What a copy will overwrite on the device is poisoned when the copy is asked for: the computation
    on the CPU is done with it by then. What it reads is read late, so a source that was overwritten
    too early gives other numbers, and one on the device that was let go too early gives NaN.
    """

    def __init__(self, seed: int = 0, longest_delay_seconds: float = 1e-3) -> None:
        super().__init__(torch.device("cpu"), HostMemory())
        self._draw = random.Random(seed)
        self._longest = longest_delay_seconds
        self._queues: dict[str, queue.SimpleQueue[Any]] = {}
        for name in ("up", "down"):
            self._queues[name] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(self._queues[name],), daemon=True).start()

    @staticmethod
    def _work(jobs: "queue.SimpleQueue[Any]") -> None:
        while True:
            destination, source, after, delay, done = jobs.get()
            for mark in after:
                if mark is not None:
                    mark.wait()
            time.sleep(delay)
            found = source()
            if found is None:
                destination.view(-1).view(torch.uint8).fill_(POISON)
            else:
                copy(destination, found)
            del destination, source, found
            done.set()

    def wait(self, mark: Any) -> None:
        if mark is not None:
            assert mark.wait(10), "a copy that never comes"

    def finish(self, *marks: Any) -> None:
        for mark in marks:
            self.wait(mark)

    def drain(self) -> None:
        nothing = torch.empty(0)
        for jobs in self._queues.values():
            done = threading.Event()
            jobs.put((nothing, lambda: nothing, (), 0.0, done))
            self.wait(done)

    def _enqueue(self, name: str, destination: Tensor, source: Source, after: Any) -> Any:
        done = threading.Event()
        delay = self._draw.random() * self._longest
        self._queues[name].put((destination, source, after, delay, done))
        return done

    def _upload(self, destination: Tensor, source: Tensor, after: Any) -> Any:
        destination.view(-1).view(torch.uint8).fill_(POISON)
        return self._enqueue("up", destination, lambda: source, after)

    def _download(self, destination: Tensor, source: Tensor, after: Any) -> Any:
        # a copy keeps nothing alive on the device
        storage, dtype = weakref.ref(source.untyped_storage()), source.dtype
        place = (source.storage_offset(), source.shape, source.stride())

        def find() -> Tensor | None:
            left = storage()
            return None if left is None else torch.empty(0, dtype=dtype).set_(left, *place)

        return self._enqueue("down", destination, find, after)


Clock = dict[str, int]


class ClockedTransport(HostTransport):
    """Checks the order itself: every queue has a vector clock, every access of memory a time.

    Two accesses of the same bytes, of which one writes, must be ordered by marks and waits. The CPU
    computes at once and so never shows a copy that should have waited for the computation; this does.
    The computation's accesses are told by `computes_on`.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), HostMemory())
        self.clocks: dict[str, Clock] = {name: {} for name in ("compute", "up", "down")}
        self._accesses: list[tuple[int, int, bool, str, int]] = []
        self.events: list[str] = []

    def mark(self) -> Clock:
        return dict(self.clocks["compute"])

    def wait(self, mark: Clock | None) -> None:
        self._join("compute", mark)

    def computes_on(self, *tensors: Tensor, writes: bool = False) -> None:
        for tensor in tensors:
            self._access("compute", tensor, writes)

    def _join(self, name: str, mark: Clock | None) -> None:
        clock = self.clocks[name]
        for other, count in (mark or {}).items():
            clock[other] = max(clock.get(other, 0), count)

    def _access(self, name: str, tensor: Tensor, writes: bool) -> None:
        clock = self.clocks[name]
        clock[name] = clock.get(name, 0) + 1
        first = tensor.data_ptr()
        last = first + tensor.numel() * tensor.element_size()
        for begin, end, wrote, who, when in self._accesses:
            if begin < last and first < end and (writes or wrote):
                assert clock.get(who, 0) >= when, f"{name} does not wait for {who}"
        self._accesses.append((first, last, writes, name, clock[name]))

    def _enqueue(self, name: str, destination: Tensor, source: Tensor, after: Any) -> Clock:
        for mark in after:
            self._join(name, mark)
        self._access(name, source, False)
        self._access(name, destination, True)
        self.events.append(name)
        copy(destination, source)
        return dict(self.clocks[name])

    def _upload(self, destination: Tensor, source: Tensor, after: Any) -> Clock:
        return self._enqueue("up", destination, source, after)

    def _download(self, destination: Tensor, source: Tensor, after: Any) -> Clock:
        return self._enqueue("down", destination, source, after)
