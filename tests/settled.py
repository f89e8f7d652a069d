"""This process's memory, without what other tests left to be given back at any time."""

import ctypes
import gc

from fitlora.offload.host_memory import anonymous_bytes


def settled_bytes() -> int:
    """Anonymous memory once garbage is collected, and what malloc keeps of it is back at the kernel.

    Else a test that happens to give back a neighbour's seems to take less than it does.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes()
