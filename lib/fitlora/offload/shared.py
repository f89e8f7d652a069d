"""One copy of the frozen weights on a host, for all processes that train there.

The pages are a memfd's: the kernel's own, in no file system (a container's /dev/shm may be tiny), and
they go back with the last process that has them, however that one ends. Every process maps them and
pins its mapping; each fills some of the buffers, so that a checkpoint is read once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from fitlora.offload.host_memory import Pages
from fitlora.units import MIB

_ALIGN = 2 * MIB  # where buffers begin, so that the kernel may give huge pages


def new_file() -> int:
    """A file descriptor of empty memory, of which only what is written to takes any."""
    file = os.memfd_create("fitlora")
    os.ftruncate(file, psutil.virtual_memory().total)
    return file


@dataclass
class SharedMemory:
    """Memory that `devices` processes of a host have in common, of which this is number `rank`.

    file: made by `new_file`, in one of them. wait: returns when all have called it. Every process takes
    the same buffers in the same order.
    """

    file: int
    rank: int
    devices: int
    wait: Callable[[], object]
    _end: int = 0
    _buffers: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.devices

    def __del__(self) -> None:
        os.close(self.file)  # mappings stay

    def pages(self, count: int, on_free: Callable[[], None]) -> tuple[Pages, bool]:
        """The next buffer, of `count` bytes, and whether it is this process that fills it."""
        pages = Pages(count, on_free, file=self.file, offset=self._end)
        mine = self._buffers % self.devices == self.rank
        self._end += -(-max(count, 1) // _ALIGN) * _ALIGN
        self._buffers += 1
        return pages, mine
