"""The host's memory as a budget: counted before it is taken, and refused with figures.

What counts is what the kernel cannot take back: anonymous pages of this process, touched or promised,
and pinned ones, with those that Python and libraries have, as an estimate counts them
(`Estimate.host_bytes`). The page cache, which a memory-mapped checkpoint fills, is apart.

`Pages` are mapped by ourselves, and pinned by registering them. PyTorch's own pinned allocator rounds
a buffer up to a power of two, which costs a 70B model some 8 GB, and zeroes it page by page in one
thread; here threads fill the pages from the checkpoint first, in huge pages where the kernel gives
them, and registering what is there is all that is left.
"""

import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fitlora.errors import UserError
from fitlora.units import KIB, format_bytes


def resident_bytes() -> dict[str, int]:
    """What this process has in memory by kind, under the kernel's names; empty where it does not tell.

    RssAnon, RssShmem and RssFile are what it has now, VmHWM the most that they were together.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    lines = (line.split() for line in status.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * KIB for words in lines if words[-1] == "kB"}


def anonymous_bytes() -> int:
    """Anonymous memory that this process has now; 0 where the system does not tell."""
    return resident_bytes().get("RssAnon", 0)


class HostPeak:
    """The most that this process has of the host while inside, files aside: pinned pages are in it.

    Looked at every few milliseconds, as the only peak that the kernel keeps has the files in it.
    """

    SECONDS = 0.01

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "HostPeak":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        now = resident_bytes()
        self.bytes = max(self.bytes, now.get("RssAnon", 0) + now.get("RssShmem", 0))

    def _watch(self) -> None:
        while not self._end.wait(self.SECONDS):
            self._look()


class HostMemoryShort(UserError):
    """The host's memory budget is too small."""


class HostMemory:
    """What is taken of the host's memory, by purpose.

    limit_bytes: the most that this process may have, with what it had before; None for no limit.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.taken: dict[str, int] = {}
        self._before = anonymous_bytes()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """All that is taken, whether its pages were touched yet or not."""
        return sum(self.taken.values())

    def take(self, count: int, purpose: str) -> None:
        """Counts `count` bytes; raises HostMemoryShort where they are more than is left."""
        with self._lock:
            used = max(anonymous_bytes(), self._before + self.bytes)
            if self.limit_bytes is not None and used + count > self.limit_bytes:
                raise HostMemoryShort(
                    f"{purpose} needs {format_bytes(count)} of host memory, and of the "
                    f"{format_bytes(self.limit_bytes)} that may be used "
                    f"{format_bytes(max(0, self.limit_bytes - used))} are left"
                    f"{self._listed()}; raise hardware.host_memory_budget, or keep more on the GPU "
                    "by raising hardware.memory_budget"
                )
            self.taken[purpose] = self.taken.get(purpose, 0) + count

    def give(self, count: int, purpose: str) -> None:
        """Counts `count` bytes as free again."""
        with self._lock:
            self.taken[purpose] -= count

    def _listed(self) -> str:
        parts = [f"{name} {format_bytes(size)}" for name, size in self.taken.items() if size]
        return f" (taken: {', '.join(parts)})" if parts else ""


class Pages(mmap.mmap):
    """Pages of our own. They go back when the last tensor that lies in them dies.

    file: anonymous pages by default; a memfd's (`fitlora.offload.shared`) from `offset` on, which other
    processes have too.
    """

    def __new__(
        cls, count: int, on_free: Callable[[], None], *, file: int = -1, offset: int = 0
    ) -> "Pages":
        # Python's default is shared memory, which a container may have little of
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if file < 0 else mmap.MAP_SHARED
        pages = super().__new__(cls, file, max(count, 1), flags=flags, offset=offset)
        pages._on_free = on_free
        pages.before_free = None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages serves small ones
                return pages
        return pages

    _on_free: Callable[[], None]
    before_free: Callable[[], None] | None  # unregisters pinned pages

    def __del__(self) -> None:
        # at the end of the process the driver may be gone, and takes its pages back by itself
        if self.before_free is not None and not sys.is_finalizing():
            self.before_free()
        self._on_free()
