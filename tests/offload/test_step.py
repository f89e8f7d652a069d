"""The whole step with its parts on the host is the resident one, bit for bit, under late copies."""

import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.memory.trace import MemoryTrace
from fitlora.offload import optimizer as optimizer_module
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import HostTransport, Transport
from fitlora.plan import Plan
from fitlora.step.build import build_step
from fitlora.step.layer import DecoderLayer
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from tests.offload.transports import DelayedTransport
from tests.step import steps

CPU = torch.device("cpu")
LAYERS = 4
ALL = tuple(range(LAYERS))
HOST: dict[str, Any] = {"checkpoints": "host", "embedding": "host", "optimizer_device": "host"}


def plan(**changes: Any) -> Plan:
    return steps.plan(micro_batch_size=3, recompute_layers=ALL).replace(**changes)


def build(the_plan: Plan, transport: Transport | None = None) -> TrainingStep:
    config = steps.config(num_hidden_layers=LAYERS, tie_word_embeddings=False)
    return build_step(config, the_plan, steps.settings(), RandomWeights(CPU), transport)


def run(step: TrainingStep, count: int) -> list[torch.Tensor]:
    """Losses and norms of steps of varying lengths, with evaluations between, and the adapters."""
    found = []
    for index in range(count):
        batch = steps.sequences(7, seed=index)
        result = step.run(batch, step=index, learning_rate=1e-2)
        found += [result.loss.clone(), result.gradient_norm.clone()]
        if index % 3 == 1:
            found.append(step.evaluate(steps.sequences(5, seed=90 + index))[0])
    return [*found, *step.adapter_state().values()]


@cache
def resident(count: int) -> list[torch.Tensor]:
    return run(build(plan()), count)


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize(
    "changes",
    [
        {"streamed_layers": ALL, "streaming_slots": 1},
        {"streamed_layers": (0, 2, 3), "streaming_slots": 2},
        {"streamed_layers": ALL, "disk_layers": 3},
        {"checkpoints": "host"},
        {"embedding": "host"},
        {"optimizer_device": "host"},
        {"streamed_layers": ALL, **HOST},
    ],
)
def test_each_part_alone_and_all_together(changes: dict[str, Any], tmp_path: Path) -> None:
    transport = DelayedTransport()
    transport.folder = tmp_path
    assert_same(run(build(plan(**changes), transport), 4), resident(4))
    assert list(tmp_path.iterdir()) == []


def test_the_next_forward_begins_beside_the_hosts_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of the upper layers is held up until the lowest layer has been through its forward."""
    monkeypatch.setattr(optimizer_module, "BUCKET_BYTES", 1)  # a bucket for each parameter
    step = build(plan(**HOST, streamed_layers=ALL), DelayedTransport())
    assert isinstance(step.optimizer, CPUOffloadOptimizer)
    inner, lowest_is_done = step.optimizer.inner.step, threading.Event()
    buckets = iter(range(10**6))
    upper = len(step.adapters) // LAYERS  # the number of its first parameter

    def update(closure: Any = None) -> Any:
        if next(buckets) >= upper:
            assert lowest_is_done.wait(10), "the forward waits for all of the update"
        return inner(closure)

    forward = DecoderLayer.forward

    def watched(layer: DecoderLayer, *arguments: Any, **options: Any) -> Any:
        found = forward(layer, *arguments, **options)
        lowest_is_done.set()
        return found

    monkeypatch.setattr(step.optimizer.inner, "step", update)
    first = step.run(steps.sequences(7, seed=0), step=0, learning_rate=1e-2)
    monkeypatch.setattr(DecoderLayer, "forward", watched)
    step.run(steps.sequences(7, seed=1), step=1, learning_rate=1e-2)
    assert torch.equal(first.loss, resident(4)[0])


@pytest.mark.slow
@pytest.mark.parametrize("slots", range(1, LAYERS + 1))
def test_twenty_steps_at_every_size_of_the_ring(slots: int) -> None:
    the_plan = plan(streamed_layers=ALL, streaming_slots=slots, **HOST)
    assert_same(run(build(the_plan, DelayedTransport(slots)), 20), resident(20))


@pytest.mark.slow
def test_many_steps_of_varying_lengths_have_no_nan() -> None:
    step = build(plan(streamed_layers=ALL, head="host", **HOST), DelayedTransport(0, 1e-5))
    for index in range(50):
        batch = steps.sequences(1 + index % 7, seed=index)
        result = step.run(batch, step=index, learning_rate=1e-3)
        assert torch.isfinite(result.loss), index
        assert torch.isfinite(result.gradient_norm), index


def test_a_head_on_the_host_is_near_the_resident_one() -> None:
    found = run(build(plan(head="host"), DelayedTransport()), 4)
    for a, b in zip(found, resident(4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("together", [1, 2])
def test_the_peak_is_flat_from_the_second_step_on(together: int) -> None:
    peaks = []
    transport = HostTransport(CPU)
    with MemoryTrace() as trace:
        layout = plan(streamed_layers=ALL, head="host", micro_batches_per_pass=together, **HOST)
        step = build(layout, transport)
        trace.watch([*step.model.parameters(), *step.model.buffers()])
        pinned = []
        for index in range(4):
            trace.reset_peak()
            step.run(steps.sequences(7), step=index, learning_rate=1e-2)
            peaks.append(trace.peak.bytes)
            pinned.append(transport.pinned_bytes)
    assert len(set(peaks[1:])) == 1
    assert peaks[0] <= peaks[1]
    assert len(set(pinned)) == 1 or len(set(pinned[1:])) == 1


def test_a_step_that_was_broken_off_may_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C: what was under way is dropped, and the next steps are the resident ones."""
    step = build(plan(streamed_layers=ALL, **HOST), DelayedTransport())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name in ("forward", "backward"):
        with monkeypatch.context() as patch:
            patch.setattr(DecoderLayer, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                step.run(steps.sequences(7), step=0, learning_rate=1e-2)
        step.abandon()
    assert_same(run(step, 4), resident(4))
