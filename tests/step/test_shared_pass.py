"""Micro-batches that share a pass over the layers do what they do one by one, and less is moved."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.offload.transport import HostTransport, Transport
from fitlora.step.layer import DecoderLayer
from fitlora.step.training_step import TrainingStep
from tests.offload.transports import DelayedTransport
from tests.step import steps
from tests.step.test_network import make

LAYERS = (0, 1, 2)
UNTIED = {"tie_word_embeddings": False}
STREAMED: dict[str, Any] = {
    "recompute_layers": LAYERS, "streamed_layers": LAYERS, "checkpoints": "host",
    "embedding": "host", "config": UNTIED,
}  # fmt: skip


def run(made: TrainingStep, count: int = 3) -> list[torch.Tensor]:
    """Losses and norms of some steps of 7 unequal sequences, by twos, and the adapters at the end."""
    found = []
    for index in range(count):
        result = made.run(steps.sequences(7, seed=index), step=index, learning_rate=1e-2)
        found += [result.loss, result.gradient_norm]
    return [*found, *made.adapter_state().values()]


def build(together: int, transport: Transport | None = None, **plan: Any) -> TrainingStep:
    return make(
        "llama", dropout=0.1, micro_batch_size=2, micro_batches_per_pass=together,
        transport=transport, **plan,
    )  # fmt: skip


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@cache
def one_by_one() -> list[torch.Tensor]:
    return run(build(1, config=UNTIED))


def on_late_copies(folder: Path) -> Transport:
    transport = DelayedTransport()
    transport.folder = folder
    return transport


@pytest.mark.parametrize("together", [2, 3, 4])
def test_losses_and_adapters_are_the_same_to_the_bit(together: int, tmp_path: Path) -> None:
    """Of four micro-batches: gradients add up in their order either way."""
    found = run(build(together, on_late_copies(tmp_path), **STREAMED, disk_layers=2))
    assert_same(found, one_by_one())


@pytest.mark.parametrize(
    "plan",
    [
        {"recompute_layers": (0, 2), "recompute_keeps": ("attention",)},
        {"streamed_layers": (0, 2), "streaming_slots": 1},
        {"frozen_layers": (0,), "recompute_layers": LAYERS, "checkpoints": "host"},
        {"frozen_layers": (1,), "mlp_chunk_tokens": 7, "recompute_layers": (0, 1)},
        {**STREAMED, "head": "host"},
        {"layers_per_device": (1, 2), "config": UNTIED},
    ],
    ids=str,
)
def test_whatever_is_kept_frozen_and_moved(plan: dict[str, Any], tmp_path: Path) -> None:
    found = run(build(3, on_late_copies(tmp_path), **plan), 2)
    assert_same(found, run(build(1, **plan), 2))


def test_weights_and_the_head_travel_once_for_all_of_them() -> None:
    layout: dict[str, Any] = {
        "streamed_layers": LAYERS, "streaming_slots": 1, "head": "host", "embedding": "host",
        "config": UNTIED, "effective_batch_size": 8,
    }  # fmt: skip
    moved = {}
    for together in (1, 2, 4):
        transport = HostTransport(torch.device("cpu"))
        made = build(together, transport, **layout)
        for index in range(2):
            before = transport.uploaded_bytes
            made.run(steps.sequences(8), step=index, learning_rate=0.0)
        moved[together] = transport.uploaded_bytes - before
    assert moved[1] - moved[2] == 2 * (moved[2] - moved[4]), "four passes, two, and one"
    rows = sum(len(s.tokens) for s in steps.sequences(8)) * 64 * 4
    assert moved[2] - moved[4] == moved[4] - rows, "all but the embedding's rows"


def test_a_shared_pass_that_broke_off_can_be_done_again_and_one_by_one() -> None:
    """As after an overflow: forward or backward stops at the second micro-batch of a layer."""
    for together in (4, 1):
        made = build(4, DelayedTransport(), **STREAMED)
        for name in ("forward", "backward"):
            left, whole = iter(range(5)), getattr(DecoderLayer, name)

            def broken(*a: Any, left: Any = left, whole: Any = whole, **options: Any) -> Any:
                if next(left, None) is None:
                    raise torch.OutOfMemoryError("broken off")
                return whole(*a, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(DecoderLayer, name, broken)
                with pytest.raises(torch.OutOfMemoryError):
                    made.run(steps.sequences(7), step=0, learning_rate=1e-2)
            made.abandon()
        made.adopt(made.plan.replace(micro_batches_per_pass=together))
        assert_same(run(made), one_by_one())


def test_an_unknown_family_says_that_it_cannot() -> None:
    with pytest.raises(UserError, match="share a pass need a family that FitLoRA does by hand"):
        make("olmo2", micro_batch_size=2, micro_batches_per_pass=2)
