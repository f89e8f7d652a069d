"""On a GPU the copies really are beside the computation: late, into poisoned slots, and yet in order."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitlora.device import give_back_memory
from fitlora.offload.checkpoints import HostCheckpoints
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import CudaTransport, Transport
from fitlora.offload.vocabulary import HostEmbedding, StreamedHead, sliced_losses
from fitlora.step.build import build_step
from fitlora.step.layer import DecoderLayer
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from tests.offload.stacks import WIDTH, Run, resident, resident_slices, streamed
from tests.offload.test_step import assert_same, run
from tests.step import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
LAYERS = 6
LONGEST_DELAY = 2_000_000  # cycles, about a millisecond


class LateCopies(CudaTransport):
    """Before a copy comes a wait of random length; what it will overwrite is poisoned."""

    def __init__(self, seed: int, longest_delay: int = LONGEST_DELAY) -> None:
        super().__init__(DEVICE, HostMemory())
        self._draw, self._longest = random.Random(seed), longest_delay

    def _copy(self, destination: Tensor, source: Tensor) -> None:
        if destination.is_cuda:
            destination.view(-1).view(torch.uint8).fill_(0xFF)
        torch.cuda._sleep(self._draw.randrange(self._longest))
        super()._copy(destination, source)


def late_computation(*_: Any) -> None:
    """The device falls behind the host, so that a copy that does not wait for it is too early."""
    torch.cuda._sleep(LONGEST_DELAY // 2)


@pytest.mark.parametrize("slots", [1, 2, 3, LAYERS])
@pytest.mark.parametrize("on_disk", [(), (1, 3, 5)])
def test_streamed_weights_are_the_resident_ones(
    tmp_path: Path, slots: int, on_disk: tuple[int, ...]
) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    plain = Run(resident(LAYERS, "cuda"))
    run = Run(
        *streamed(
            LAYERS, tuple(range(LAYERS)), LateCopies(slots), slots, on_disk=on_disk, folder=tmp_path
        )
    )
    run.on_use = late_computation
    for _ in range(3):
        assert_same(run.train(x), plain.train(x))
    assert torch.equal(run.evaluate(x), plain.evaluate(x))


@pytest.mark.parametrize("seed", range(3))
def test_checkpoints_come_back_and_their_memory_is_the_same_every_time(seed: int) -> None:
    transport = LateCopies(seed)
    checkpoints = HostCheckpoints(transport)
    shape = (256, 1024)
    peaks = []
    for step in range(4):
        give_back_memory()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for index in range(LAYERS):
            checkpoints.put(index, torch.full(shape, float(index + step), device="cuda"))
            late_computation()
        for index in reversed(range(LAYERS)):
            late_computation()
            found = checkpoints.get(index)
            assert found.eq(index + step).all()
            del found
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() == before
    assert len(set(peaks[1:])) == 1
    assert peaks[1] <= 3 * 256 * 1024 * 4 + 2**20  # and what comparing takes


def test_the_host_never_waits_for_a_copy_of_weights() -> None:
    """Asking for a whole pass takes a fraction of the time that the device needs for it."""
    _, residency = streamed(LAYERS, tuple(range(LAYERS)), LateCopies(0), 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    after = torch.cuda.current_stream().record_event()
    residency.begin(backward_follows=True)
    for backward in (False, True):
        for index in reversed(range(LAYERS)) if backward else range(LAYERS):
            residency.enter(index, backward=backward)
            residency.leave(index)
    assert not after.query()
    torch.cuda.synchronize()


def test_pinned_memory_is_pinned_and_given_back() -> None:
    transport = CudaTransport(DEVICE, HostMemory())
    buffer = transport.reserve(2**24 + 123, "test")
    buffer.fill_(7)
    assert not buffer.is_pinned()
    transport.pin()
    assert buffer.is_pinned()
    assert transport.pinned_bytes == transport.memory.bytes == 2**24 + 123
    on_device = torch.empty_like(buffer, device="cuda")
    transport.wait(transport.upload(on_device, buffer))
    assert on_device.eq(7).all()
    torch.cuda.synchronize()
    del buffer
    assert transport.memory.bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_an_optimizer_on_the_host_is_near_the_devices(
    dtype: torch.dtype, offload_gradients: bool
) -> None:
    def parameters(device: str) -> list[nn.Parameter]:
        make = torch.Generator().manual_seed(0)
        shapes = ((64, 33), (7,), (128, 16))
        return [nn.Parameter(torch.randn(s, generator=make).to(dtype).to(device)) for s in shapes]

    def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for step in range(5):
            optimizer.zero_grad()
            late_computation()
            for _ in range(2):
                sum((p.float() * (1 + step)).sin().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
        return [p.detach().float().cpu() for p in params]

    params = parameters("cuda")
    optimizer = CPUOffloadOptimizer(
        torch.optim.AdamW(params, lr=0.01, fused=True),
        transport=LateCopies(0),
        offload_gradients=offload_gradients,
    )
    found = train(params, optimizer)
    on_host = parameters("cpu")
    wrapped = CPUOffloadOptimizer(
        torch.optim.AdamW(on_host, lr=0.01, fused=True), offload_gradients=offload_gradients
    )
    for a, b in zip(found, train(on_host, wrapped), strict=True):
        # gradients differ by the sine's last bit, which Adam's first steps may turn into a step
        assert (a - b).norm() / b.norm() < (1e-4 if dtype == torch.float32 else 1e-2)


def test_both_ends_of_the_vocabulary() -> None:
    make = torch.Generator().manual_seed(0)
    table = torch.randn(101, 16, generator=make)
    targets = torch.randint(101, (37,), generator=make).cuda()
    transport = LateCopies(0)
    place = transport.reserve_like(table, "table")
    place.copy_(table)
    transport.pin()
    head = StreamedHead(place, transport, rows=16)
    embedding = HostEmbedding(place, transport, tokens=8)
    for step in range(4):
        tokens = torch.randint(101, (37,), generator=make)
        late_computation()
        hidden = embedding.rows(tokens.tolist())
        assert torch.equal(hidden.cpu(), table[tokens]), step
        results = []
        for slices in (head.slices, resident_slices(table.cuda(), 16)):
            ((loss, gradient),) = sliced_losses([(hidden, targets)], slices, scale=1.0, chunk=20)
            assert gradient is not None
            results.append([loss, gradient])
        assert_same(*results)


# --- the whole step ------------------------------------------------------------------------------

ALL = tuple(range(LAYERS))
# the head's loss sums in another order when it comes in slices, so that it is compared with itself
HOST: dict[str, Any] = {"checkpoints": "host", "embedding": "host"}


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel gives the same bits each time; memory that is not written is full of NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(transport: Transport | None = None, **changes: Any) -> TrainingStep:
    config = steps.config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, tie_word_embeddings=False
    )
    plan = steps.plan(
        device=DEVICE.type, compute_dtype="bfloat16", micro_batch_size=3, recompute_layers=ALL
    )
    weights = RandomWeights(DEVICE)
    return build_step(config, plan.replace(**changes), steps.settings(), weights, transport)


def late_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device falls behind in every layer, so that a copy that does not wait for it is too early."""
    for name in ("forward", "backward"):
        whole = getattr(DecoderLayer, name)

        def late(layer: DecoderLayer, *a: Any, whole: Any = whole, **options: Any) -> Any:
            late_computation()
            return whole(layer, *a, **options)

        monkeypatch.setattr(DecoderLayer, name, late)


@pytest.mark.parametrize("optimizer", ["device", "host"])
def test_twenty_steps_are_the_resident_ones_bit_for_bit(
    optimizer: str, deterministic: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Losses, norms, evaluations and adapters, at several sizes of the ring, under late copies."""
    resident_steps = run(build(optimizer_device=optimizer), 20)
    assert_same(run(build(optimizer_device=optimizer), 20), resident_steps)
    late_layers(monkeypatch)
    layouts: list[dict[str, Any]] = [
        {"streamed_layers": ALL, "streaming_slots": 1, **HOST},
        {"streamed_layers": ALL, "streaming_slots": 2, **HOST},
        {"streamed_layers": (0, 2, 3, 5), "streaming_slots": 3, "checkpoints": "host"},
        {"streamed_layers": ALL, "disk_layers": 4, "streaming_slots": 2, **HOST},
        {"streamed_layers": ALL, "recompute_layers": (0, 1), "streaming_slots": LAYERS},
    ]
    for seed, layout in enumerate(layouts):
        transport = LateCopies(seed)
        transport.folder = tmp_path
        found = run(build(transport, optimizer_device=optimizer, **layout), 20)
        assert_same(found, resident_steps)


@pytest.mark.parametrize("optimizer", ["device", "host"])
def test_a_shared_pass_is_the_resident_one_bit_for_bit(
    optimizer: str, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimizer on the device it is that of one micro-batch after the other as well.

    On the host it is not: gradients are rounded on their way down, once for a pass.
    """
    shared = {"optimizer_device": optimizer, "micro_batches_per_pass": 2}
    expected = run(build(**shared), 10)
    if optimizer == "device":
        assert_same(run(build(), 10), expected)
    late_layers(monkeypatch)
    for seed, layout in enumerate(({"streaming_slots": 1, **HOST}, {"streaming_slots": 3})):
        step = build(LateCopies(seed), streamed_layers=ALL, **layout, **shared)
        assert_same(run(step, 10), expected)


def test_a_step_that_was_broken_off_may_be_run_again(
    deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C or an overflow: nothing hangs, and the next steps are the resident ones."""
    layout = {"streamed_layers": ALL, "optimizer_device": "host", **HOST}
    step = build(LateCopies(0), **layout)
    for name in ("forward", "backward"):
        left = iter(range(4))
        whole = getattr(DecoderLayer, name)

        def broken(*a: Any, left: Any = left, whole: Any = whole, **options: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return whole(*a, **options)

        with monkeypatch.context() as patch:
            patch.setattr(DecoderLayer, name, broken)
            with pytest.raises(KeyboardInterrupt):
                step.run(steps.sequences(7), step=0, learning_rate=1e-2)
        step.abandon()
    assert_same(run(step, 4), run(build(optimizer_device="host"), 4))


def test_five_hundred_steps_of_varying_lengths_have_no_nan() -> None:
    transport = LateCopies(0, longest_delay=LONGEST_DELAY // 20)
    step = build(
        transport,
        streamed_layers=ALL,
        head="host",
        optimizer_device="host",
        mlp_chunk_tokens=16,
        **HOST,
    )
    found = []
    for index in range(500):
        batch = steps.sequences(1 + index % 7, seed=index)
        result = step.run(batch, step=index, learning_rate=1e-3)
        found.append(torch.stack([result.loss, result.gradient_norm.to(DEVICE)]))
    assert torch.stack(found).isfinite().all()


def test_the_peak_is_flat_from_the_second_step_on() -> None:
    transport = CudaTransport(DEVICE, HostMemory())
    step = build(transport, streamed_layers=ALL, head="host", optimizer_device="host", **HOST)
    peaks = []
    for index in range(5):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step.run(steps.sequences(7), step=index, learning_rate=1e-2)
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated(), transport.pinned_bytes))
    assert len(set(peaks[1:])) == 1


def test_memory_goes_back_when_a_step_is_dropped() -> None:
    memory = HostMemory()
    give_back_memory()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = build(
        CudaTransport(DEVICE, memory),
        streamed_layers=ALL,
        head="host",
        optimizer_device="host",
        **HOST,
    )
    step.run(steps.sequences(7), step=0, learning_rate=1e-2)
    torch.cuda.synchronize()
    assert memory.taken["streamed weights"] > 0
    del step
    torch._C._cuda_clearCublasWorkspaces()
    give_back_memory()
    assert memory.taken["streamed weights"] == memory.taken["activation checkpoints"] == 0
    assert torch.cuda.memory_allocated() <= before
