"""What goes down comes back, whenever the copies are made, and no more is on the device than is said."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.memory.trace import MemoryTrace, rounded
from fitlora.offload.checkpoints import HostCheckpoints
from fitlora.offload.transport import HostTransport, TracedTransport, Transport
from tests.offload.transports import ClockedTransport, DelayedTransport

LAYERS = 6


def layer(x: Tensor) -> Tensor:
    return torch.sin(x) + 1.0


def passes(checkpoints: HostCheckpoints, rows: int, computes_on: object = None) -> list[Tensor]:
    """The input of each layer, as forward has it and as backward gets it, top down."""
    before, after = [], []
    x = torch.arange(rows * 4, dtype=torch.float32).view(rows, 4)
    for index in range(LAYERS):
        before.append(x.clone())
        checkpoints.put(index, x)
        out = layer(x)
        if callable(computes_on):
            computes_on(x)
            computes_on(out, writes=True)
        x = out
    del x, out
    for index in reversed(range(LAYERS)):
        if callable(computes_on):  # on memory that is free again when the checkpoint comes
            computes_on(torch.empty(rows, 4), writes=True)
        x = checkpoints.get(index)
        if callable(computes_on):
            computes_on(x)
        after.append(x.clone())
        del x
    for a, b in zip(before, reversed(after), strict=True):
        assert torch.equal(a, b)
    return after


@pytest.mark.parametrize("seed", range(4))
def test_they_come_back_under_delays(seed: int) -> None:
    checkpoints = HostCheckpoints(DelayedTransport(seed))
    for rows in (7, 3, 9, 1, 9):
        passes(checkpoints, rows)


def test_every_access_is_ordered() -> None:
    transport = ClockedTransport()
    checkpoints = HostCheckpoints(transport)
    for rows in (5, 9, 5):
        passes(checkpoints, rows, transport.computes_on)


def test_the_last_one_stays_and_one_copy_is_made_of_the_others() -> None:
    transport = ClockedTransport()
    passes(HostCheckpoints(transport), 5)
    assert transport.events == ["down"] * (LAYERS - 1) + ["up"] * (LAYERS - 2)


def test_buffers_are_pinned_once() -> None:
    transport = HostTransport(torch.device("cpu"))
    checkpoints = HostCheckpoints(transport)
    for rows in (9, 2, 9):
        passes(checkpoints, rows)
        pinned = transport.pinned_bytes
        assert pinned == (LAYERS - 1) * 9 * 16
    passes(checkpoints, 10)
    more = transport.pinned_bytes
    assert more == pinned + (LAYERS - 1) * 10 * 16
    passes(checkpoints, 10)
    assert transport.pinned_bytes == more


def test_uneven_ones_pin_no_more_whatever_their_order() -> None:
    """As micro-batches that share a pass; the last of them comes first."""
    transport = HostTransport(torch.device("cpu"))
    checkpoints = HostCheckpoints(transport)
    pinned = []
    for rows in ([2, 4, 9], [9, 9, 9], [9, 4, 2], [3, 8, 7]):
        for _ in range(LAYERS):
            for count in rows:
                checkpoints.put("any", torch.ones(count, 4))
        for _ in range(LAYERS * len(rows)):
            checkpoints.get("any")
        pinned.append(transport.pinned_bytes)
    small = 9 - 2 + 9 - 4  # rows that the first two buffers lacked, and were replaced for
    assert pinned[0] == 16 * (9 * (LAYERS * 3 - 1) - small)
    assert pinned[1:] == [pinned[0] + 16 * 9 * 2] * 3


def peak(transport: Transport, rows: int) -> tuple[int, int]:
    """The most bytes alive in each of two rounds of put and get alone."""
    found = []
    checkpoints = HostCheckpoints(transport)
    for _ in range(2):
        with MemoryTrace() as trace:
            for index in range(LAYERS):
                checkpoints.put(index, torch.ones(rows, 4))
            for index in reversed(range(LAYERS)):
                checkpoints.get(index)
            assert trace.live_bytes == 0
            found.append(trace.peak.bytes)
    return found[0], found[1]


def test_the_peak_is_the_same_in_every_step_and_in_an_estimate() -> None:
    cpu = torch.device("cpu")
    rows = 1000
    # the new one, the one before it that goes down, and the one before that until the new one is put
    expected = 3 * rounded(rows * 16)
    assert peak(HostTransport(cpu), rows) == (expected, expected)
    assert peak(DelayedTransport(), rows) == (expected, expected)
    with FakeTensorMode():
        traced = TracedTransport(cpu)
        assert peak(traced, rows) == (expected, expected)
    assert traced.pinned_bytes == (LAYERS - 1) * rows * 16


@pytest.mark.parametrize("done", [0, 1, 3, LAYERS])
def test_after_a_broken_pass_reset_makes_all_good(done: int) -> None:
    checkpoints = HostCheckpoints(DelayedTransport())
    passes(checkpoints, 4)
    pinned = checkpoints.transport.pinned_bytes
    for index in range(LAYERS):
        checkpoints.put(index, torch.randn(4, 4))
    for index in list(reversed(range(LAYERS)))[:done]:
        checkpoints.get(index)
    checkpoints.reset()
    passes(checkpoints, 4)
    assert checkpoints.transport.pinned_bytes == pinned


def test_another_order_is_refused() -> None:
    checkpoints = HostCheckpoints(HostTransport(torch.device("cpu")))
    for index in range(3):
        checkpoints.put(index, torch.ones(2))
    with pytest.raises(AssertionError, match="2 was put last"):
        checkpoints.get(1)
