"""Host memory is counted before it is taken, and goes back with the last tensor that lies in it."""

import gc
import threading
import time

import pytest
import torch

from fitlora.errors import UserError
from fitlora.offload.host_memory import HostMemory, HostPeak, anonymous_bytes
from fitlora.offload.transport import ALIGNMENT, HostTransport, aligned, view_as
from tests.settled import settled_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_anonymous_memory_is_what_the_kernel_counts() -> None:
    before = settled_bytes()
    kept = torch.ones(64 * MIB, dtype=torch.uint8)
    grown = anonymous_bytes() - before
    assert abs(grown - kept.numel()) <= 8 * MIB  # what else the tests have comes and goes


def test_a_peak_that_is_over_by_the_end_is_seen() -> None:
    """Of memory that was there before, and of what came and went."""
    before = settled_bytes()
    with HostPeak() as peak:
        kept = torch.ones(256 * MIB, dtype=torch.uint8)
        time.sleep(10 * HostPeak.SECONDS)
        del kept
    assert peak.bytes - before > 250 * MIB
    assert anonymous_bytes() - before < 100 * MIB


def test_promised_pages_count_like_touched_ones() -> None:
    memory = HostMemory(settled_bytes() + 64 * MIB)
    transport = HostTransport(CPU, memory)
    buffer = transport.reserve(48 * MIB, "weights")
    for _ in range(2):
        with pytest.raises(UserError) as refusal:
            transport.reserve(32 * MIB, "checkpoints")
        text = str(refusal.value)
        assert "checkpoints needs 32.00 MiB" in text
        assert "taken: weights 48.00 MiB" in text
        assert "hardware.host_memory_budget" in text
        buffer.fill_(1)  # the pages are counted once, before and after


def test_pages_go_back_with_the_last_view() -> None:
    transport = HostTransport(CPU, HostMemory())
    before = settled_bytes()
    buffer = transport.reserve(64 * MIB, "weights")
    transport.pin()
    buffer.fill_(3)
    view = view_as(buffer, 1024, torch.empty(5, 7, device="meta"))
    del buffer
    gc.collect()
    assert transport.memory.bytes == 64 * MIB
    assert view.view(torch.uint8).eq(3).all()
    del view
    gc.collect()
    assert transport.memory.bytes == 0
    assert anonymous_bytes() - before < 8 * MIB


def test_threads_do_not_count_past_the_limit() -> None:
    memory = HostMemory(settled_bytes() + 100 * MIB)
    taken: list[int] = []

    def take() -> None:
        try:
            memory.take(8 * MIB, "a thread's")
        except UserError:
            return
        taken.append(1)

    threads = [threading.Thread(target=take) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(taken) <= 12
    assert memory.bytes == len(taken) * 8 * MIB


def test_alignment() -> None:
    assert [aligned(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [
        0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT,
    ]  # fmt: skip
