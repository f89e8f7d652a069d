"""A head in slices gives cross-entropy, and an embedding on the host the rows of a resident one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.memory.trace import MemoryTrace, rounded
from fitlora.offload.transport import HostTransport, TracedTransport, Transport
from fitlora.offload.vocabulary import (
    HostEmbedding,
    Slices,
    StreamedHead,
    sliced_logits,
    sliced_losses,
)
from fitlora.step.loss import head_loss
from tests.offload.stacks import resident_slices
from tests.offload.transports import ClockedTransport, DelayedTransport
from tests.step.test_loss import exact

ROWS, HIDDEN, VOCABULARY = 37, 16, 101
CPU = torch.device("cpu")


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=make).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=make).to(dtype)
    bias = torch.randn(VOCABULARY, generator=make).to(dtype)
    return hidden, weight, bias, torch.randint(VOCABULARY, (ROWS,), generator=make)


def on_host(table: Tensor, transport: Transport) -> Tensor:
    place = transport.reserve_like(table, "table")
    place.copy_(table)
    transport.pin()
    return place


def sliced_loss(hidden: Tensor, slices: Slices, targets: Tensor, **options: Any) -> Any:
    """Of one micro-batch."""
    (found,) = sliced_losses([(hidden, targets)], slices, **options)
    return found


def both(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """A loss and its gradient, which is there."""
    loss, gradient = found
    assert gradient is not None
    return loss, gradient


@pytest.mark.parametrize("rows", [1, 7, 100, 101, 500])
@pytest.mark.parametrize("chunk", [1, 10, 37, 500])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_cross_entropy(rows: int, chunk: int, with_bias: bool) -> None:
    hidden, weight, b, targets = inputs()
    bias = b if with_bias else None
    value, wanted = exact(hidden, weight, bias, targets)
    slices = resident_slices(weight, rows)
    loss, gradient = both(sliced_loss(hidden, slices, targets, scale=0.25, chunk=chunk, bias=bias))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), 0.25 * value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), 0.25 * wanted, rtol=1e-4, atol=1e-6)


def test_in_bf16_it_is_as_near_as_the_loss_of_chunks() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    value, wanted = exact(hidden, weight, bias, targets)

    def error(loss: Tensor, gradient: Tensor) -> tuple[float, float]:
        return (
            abs(float(loss) / float(value) - 1),
            float((gradient.double() - wanted).norm() / wanted.norm()),
        )

    slices = resident_slices(weight, 16)
    mine = error(*both(sliced_loss(hidden, slices, targets, scale=1.0, chunk=8, bias=bias)))
    whole = error(*both(head_loss(hidden, weight, targets, scale=1.0, chunk=8, bias=bias)))
    assert mine[0] < 5e-3
    assert mine[1] < max(0.01, 1.5 * whole[1])


def test_several_micro_batches_take_the_slices_once() -> None:
    """Each has the loss and the gradient that it has alone, to the bit."""
    hidden, weight, bias, targets = inputs()
    rows = [(hidden[part], targets[part]) for part in (slice(5), slice(5, 6), slice(6, None))]
    options = {"scale": 0.5, "chunk": 4, "bias": bias}
    passes = []

    def slices() -> Any:
        passes.append(1)
        yield from resident_slices(weight, 20)()

    found = [both(one) for one in sliced_losses(rows, slices, **options)]
    assert len(passes) == 1
    for (loss, gradient), (part, its_targets) in zip(found, rows, strict=True):
        alone = both(sliced_loss(part, slices, its_targets, **options))
        assert torch.equal(loss, alone[0])
        assert torch.equal(gradient, alone[1])


def test_without_gradients_none_are_made() -> None:
    hidden, weight, bias, targets = inputs()
    slices = resident_slices(weight, 30)
    loss, _ = sliced_loss(hidden, slices, targets, scale=0.5, chunk=20, bias=bias)
    same, none = sliced_loss(
        hidden, slices, targets, scale=0.5, chunk=20, bias=bias, gradient=False
    )
    assert torch.equal(same, loss)
    assert none is None


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    hidden, weight, _, targets = inputs()
    bias = torch.full((VOCABULARY,), offset)
    bias[90] += 500.0  # exp(500) is beyond fp32, and the maximum comes late
    value, wanted = exact(hidden, weight, bias, targets)
    slices = resident_slices(weight, 10)
    loss, gradient = both(sliced_loss(hidden, slices, targets, scale=1.0, chunk=20, bias=bias))
    assert loss.item() == pytest.approx(float(value), rel=1e-4)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-3)


def test_chunks_of_rows_bound_the_logits() -> None:
    """A quarter of the rows at one time takes a quarter of the slice's logits."""
    hidden, weight = torch.randn(64, 4), torch.randn(4096, 4)
    targets = torch.zeros(64, dtype=torch.int64)
    peaks = []
    for chunk in (64, 16):
        with MemoryTrace() as trace:
            sliced_loss(hidden, resident_slices(weight, 1024), targets, scale=1.0, chunk=chunk)
            peaks.append(trace.peak.bytes)
    logits = 64 * 1024 * 4
    assert peaks[0] > logits
    assert peaks[1] < peaks[0] - logits // 2


@pytest.mark.parametrize("rows", [10, 50, 101, 200])
def test_a_streamed_head_is_the_resident_one_under_delays(rows: int) -> None:
    hidden, weight, bias, targets = inputs()

    def run(slices: Slices) -> list[Tensor]:
        found = both(sliced_loss(hidden, slices, targets, scale=0.5, chunk=20, bias=bias))
        return [*found, sliced_logits(hidden, slices, bias=bias)]

    expected = run(resident_slices(weight, rows))
    assert expected[2].shape == (ROWS, VOCABULARY)
    for seed in range(3):
        transport = DelayedTransport(seed)
        head = StreamedHead(on_host(weight, transport), transport, rows=rows)
        head.fetch()
        for _ in range(2):
            for a, b in zip(run(head.slices), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [10, 40, 101])
def test_every_slice_is_ordered_and_comes_once(rows: int) -> None:
    transport = ClockedTransport()
    head = StreamedHead(on_host(inputs()[1], transport), transport, rows=rows)
    count = -(-VOCABULARY // rows)
    assert head.count == count
    for number in range(1, 4):
        starts = []
        for start, weight in head.slices():
            transport.computes_on(weight)
            starts.append(start)
        assert starts == list(range(0, VOCABULARY, rows))
        assert transport.events.count("up") == number * count


def test_a_broken_loss_leaves_the_head_usable() -> None:
    transport = DelayedTransport()
    weight = inputs()[1]
    head = StreamedHead(on_host(weight, transport), transport, rows=10)
    for start, _ in head.slices():
        if start == 30:
            break
    head.reset()
    assert torch.equal(torch.cat([part.clone() for _, part in head.slices()]), weight)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_host_embedding_are_the_resident_ones(seed: int) -> None:
    table = inputs()[1]
    transport = DelayedTransport(seed)
    embedding = HostEmbedding(on_host(table, transport), transport, tokens=4)
    make = torch.Generator().manual_seed(seed)
    kept = []
    for count in (3, 4, 1, 9, 9, 9, 2):
        tokens = torch.randint(VOCABULARY, (count,), generator=make)
        kept.append((embedding.rows(tokens.tolist()), nn.functional.embedding(tokens, table)))
    for found, wanted in kept:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("together", [1, 3])
def test_rows_are_staged_and_sent_in_order(together: int) -> None:
    """Staging is written when the copy that read it is done, rows when their memory is free.

    The host waits for no copy of this pass, nor of the one before.
    """
    transport = ClockedTransport()
    finished: list[object] = []
    transport.finish = lambda *marks: finished.extend(marks)  # type: ignore[method-assign]
    table = on_host(inputs()[1], transport)
    embedding = HostEmbedding(table, transport, tokens=5, together=together)
    sent = []
    for number in range(9):
        transport.computes_on(torch.empty(5, HIDDEN), writes=True)
        before = transport.mark()
        rows = embedding.rows([number] * 5)
        assert embedding._sent[0]["compute"] >= before["compute"]
        transport.computes_on(rows)
        sent.append(embedding._sent[0])
        assert finished == [*[None] * 2 * together, *sent][: number + 1]
        del rows


def test_an_estimate_sees_two_slices_and_the_rows() -> None:
    like = torch.empty(VOCABULARY, HIDDEN)
    size = rounded(10 * HIDDEN * 4)
    for fake in (False, True):
        with FakeTensorMode() if fake else torch.enable_grad():
            transport = (TracedTransport if fake else HostTransport)(CPU)
            table = transport.reserve_like(like, "table")
            with MemoryTrace() as trace:
                head = StreamedHead(table, transport, rows=10)
                assert trace.live_bytes == 2 * size
                for _ in head.slices():
                    pass
                assert trace.peak.bytes == 2 * size
                embedding = HostEmbedding(table, transport, tokens=10)
                rows = embedding.rows([0] * 10)
                assert rows.shape == (10, HIDDEN)
                assert trace.peak.bytes == 3 * size
        assert transport.memory.bytes == VOCABULARY * HIDDEN * 4 + 2 * 10 * HIDDEN * 4
