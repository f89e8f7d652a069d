"""Host memory that processes have in common: one copy, filled by all, counted once."""

import os
import threading

import pytest
import torch

from fitlora.errors import UserError
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.shared import SharedMemory, new_file
from fitlora.offload.transport import HostTransport
from fitlora.units import MIB

CPU = torch.device("cpu")
SIZES = (3 * MIB, 5000, 1, MIB)

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


def transports(devices: int) -> list[HostTransport]:
    """As in `devices` processes: mappings of one file, each with a descriptor of its own."""
    file, barrier = new_file(), threading.Barrier(devices)
    made = [
        HostTransport(CPU, HostMemory(), SharedMemory(os.dup(file), rank, devices, barrier.wait))
        for rank in range(devices)
    ]
    os.close(file)
    return made


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_every_process_reads_what_one_of_them_wrote(devices: int) -> None:
    made = transports(devices)
    buffers = [[t.reserve(size, "weights", alike=True) for size in SIZES] for t in made]
    own = [t.reserve(100, "staging") for t in made]

    def work(rank: int) -> None:
        for number, buffer in enumerate(buffers[rank]):
            if made[rank].fills(buffer[:1]):
                buffer.fill_(number + 1)
        own[rank].fill_(100 + rank)
        made[rank].pin()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(devices):
        for number, buffer in enumerate(buffers[rank]):
            assert buffer.unique().tolist() == [number + 1]
        assert own[rank].unique().tolist() == [100 + rank]
        assert made[rank].shared_bytes == sum(SIZES)
        assert made[rank].pinned_bytes == sum(SIZES) + 100


def test_each_buffer_is_filled_by_one_and_takes_memory_once() -> None:
    made = transports(2)
    shared = made[0].shared
    assert shared is not None
    file = os.dup(shared.file)
    buffers = [[t.reserve(size, "weights", alike=True) for size in SIZES] for t in made]
    fillers = [
        [rank for rank in range(2) if made[rank].fills(buffers[rank][number])]
        for number in range(len(SIZES))
    ]
    assert fillers == [[0], [1], [0], [1]]
    for number, buffer in enumerate(buffers[0]):
        buffer.fill_(number)
    for number, buffer in enumerate(buffers[1]):
        assert buffer.unique().tolist() == [number]
    pages = sum(-(-size // os.sysconf("SC_PAGE_SIZE")) for size in SIZES)
    assert os.fstat(file).st_blocks * 512 == pages * os.sysconf("SC_PAGE_SIZE")
    os.close(file)
    # each answers for its half
    assert [t.memory.bytes for t in made] == [sum(-(-size // 2) for size in SIZES)] * 2


def test_what_processes_share_counts_in_parts_against_their_budgets() -> None:
    made = transports(2)
    for transport in made:
        memory = transport.memory  # what else the tests have comes and goes by some MiB
        memory.limit_bytes = memory._before + 30 * MIB
        transport.reserve(50 * MIB, "weights", alike=True)
    with pytest.raises(UserError, match="weights needs"):
        made[0].reserve(50 * MIB, "weights")
