"""A step whose parts are on the host does what it does with everything on the device."""

import gc
import time
import weakref
from typing import Any

import pytest
import torch

from fitlora.data.packing import pack
from fitlora.errors import UserError
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import HostTransport
from fitlora.step import network, placement
from fitlora.step.training_step import TrainingStep
from tests.step import steps
from tests.step.test_network import make

LAYERS = (0, 1, 2)
UNTIED = {"tie_word_embeddings": False}


def run(made: TrainingStep, count: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some steps with evaluations between them, and the adapters at the end."""
    losses = []
    for index in range(count):
        batch = steps.sequences(7, seed=index)
        losses.append(float(made.run(batch, step=index, learning_rate=1e-2).loss))
        losses.append(float(made.evaluate(steps.sequences(3, seed=index))[0]))
    return losses, made.adapter_state()


def assert_same(
    plan: dict[str, Any], other: dict[str, Any], case: str = "llama", **options: Any
) -> None:
    expected, adapters = run(make(case, dropout=0.1, micro_batch_size=3, **plan, **options))
    found, learned = run(make(case, dropout=0.1, micro_batch_size=3, **other, **options))
    assert found == expected
    for name, value in adapters.items():
        assert torch.equal(learned[name], value), name


@pytest.mark.parametrize("streamed", [(0,), (2,), (0, 2), LAYERS], ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("recomputed", [(), (0, 1), LAYERS], ids=str)
def test_streamed_weights(
    streamed: tuple[int, ...], slots: int, recomputed: tuple[int, ...]
) -> None:
    plan = {"recompute_layers": recomputed}
    assert_same(plan, {**plan, "streamed_layers": streamed, "streaming_slots": slots})


@pytest.mark.parametrize("recomputed", [(0,), (0, 2), LAYERS], ids=str)
@pytest.mark.parametrize("keeps", [(), ("attention",)], ids=str)
def test_checkpoints_on_the_host(recomputed: tuple[int, ...], keeps: tuple[str, ...]) -> None:
    plan = {"recompute_layers": recomputed, "recompute_keeps": keeps}
    assert_same(plan, {**plan, "checkpoints": "host"})


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_the_embedding_on_the_host(case: str) -> None:
    assert_same({}, {"embedding": "host"}, case, config=UNTIED)


def test_the_optimizer_on_the_host() -> None:
    assert_same({}, {"optimizer_device": "host"})


def test_gradients_that_leave_are_rounded_once() -> None:
    """Over the MLP's parts, and over the micro-batches of a pass, they add up in float32."""
    plan: dict[str, Any] = {
        "dtype": "bfloat16", "dropout": 0.1, "mlp_chunk_tokens": 5, "recompute_layers": LAYERS,
        "micro_batch_size": 3, "micro_batches_per_pass": 3,
    }  # fmt: skip
    expected = steps.gradients(make("llama", **plan), steps.sequences(7))
    made = make("llama", optimizer_device="host", **plan)
    host = made.optimizer
    assert isinstance(host, CPUOffloadOptimizer)
    found = {}

    def look(loss: float, norm: float) -> bool:
        found.update({name: host.gradient(p) for name, p in made.adapters.items()})
        return False

    made.run(steps.sequences(7), step=3, learning_rate=0.0, accept=look)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        there = found[name]
        assert there is not None
        assert torch.equal(there, gradient.bfloat16().float()), name


@pytest.mark.parametrize("bits", [4, 16])
def test_everything_on_the_host(bits: int) -> None:
    plan = {"recompute_layers": LAYERS, "streamed_layers": LAYERS}
    sides = {"checkpoints": "host", "optimizer_device": "host", "embedding": "host"}
    assert_same({"recompute_layers": LAYERS}, {**plan, **sides}, bits=bits, config=UNTIED)


def test_packed_rows() -> None:
    rows = pack(steps.sequences(20), 40)[:7]
    assert max(len(row.parts) for row in rows) > 1
    sides: dict[str, Any] = {
        "streamed_layers": LAYERS, "recompute_layers": LAYERS, "checkpoints": "host",
        "embedding": "host", "micro_batches_per_pass": 2,
    }  # fmt: skip
    here, there = (
        make("llama", dropout=0.1, micro_batch_size=2, config=UNTIED, **plan)
        for plan in ({}, sides)
    )
    for index in range(3):
        losses = [made.run(rows, step=index, learning_rate=1e-2).loss for made in (here, there)]
        assert torch.equal(*losses)


def test_an_8_bit_optimizer_beside_streamed_layers() -> None:
    plan = {"optimizer": "adamw_8bit", "recompute_layers": LAYERS}
    assert_same(plan, {**plan, "streamed_layers": LAYERS, "checkpoints": "host"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", ["llama", "olmo2", "logits of its own"])
def test_the_head_on_the_host(case: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of the vocabulary, more than there are slots: another order of the same sums."""
    if case == "logits of its own":
        monkeypatch.setattr(network, "PLAIN_HEAD", frozenset())
        case = "olmo2"
    config = {"tie_word_embeddings": tied}
    expected, adapters = run(make(case, config=config), 2)
    monkeypatch.setattr(placement, "HEAD_SLICE_BYTES", 5000)
    made = make(case, config=config, head="host", embedding="host")
    assert made.network.placement.head.count > 4  # type: ignore[attr-defined]
    found, learned = run(made, 2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert steps.distance(learned, adapters) < 1e-3


def test_an_unknown_family_streams_what_it_recomputes() -> None:
    def general(**plan: Any) -> TrainingStep:
        return make("olmo2", dropout=0.1, micro_batch_size=3, **plan)

    streamed = general(
        recompute_layers=LAYERS, streamed_layers=(0, 2), embedding="host", config=UNTIED
    )
    found, learned = run(streamed)
    expected, adapters = run(general(recompute_layers=LAYERS, config=UNTIED))
    assert found == expected
    for name, value in adapters.items():
        assert torch.equal(learned[name], value), name
    with pytest.raises(UserError, match="layer 1 is streamed and not recomputed"):
        general(streamed_layers=LAYERS, recompute_layers=(0, 2))
    with pytest.raises(UserError, match="by hand"):
        general(recompute_layers=LAYERS, checkpoints="host")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"streamed_layers": (3,)}, "streams layer 3, and the model has 3"),
        ({"embedding": "host", "config": {"tie_word_embeddings": True}}, "the same place"),
    ],
    ids=["too many", "tied"],
)
def test_what_cannot_be_placed_is_said(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("llama", **plan)


def test_a_step_that_broke_off_can_be_done_again() -> None:
    sides = {"streamed_layers": LAYERS, "recompute_layers": LAYERS, "checkpoints": "host"}
    expected, _ = run(make("llama", **sides))
    made = make("llama", **sides)
    layer = type(made.network.layers[1])  # type: ignore[attr-defined]
    for method in ("_gate_up", "_mlp_backward"):
        with pytest.MonkeyPatch.context() as patch:

            def broken(*arguments: Any, **options: Any) -> Any:
                raise torch.OutOfMemoryError("broken off")

            patch.setattr(layer, method, broken)
            with pytest.raises(torch.OutOfMemoryError):
                made.run(steps.sequences(7), step=0, learning_rate=1e-2)
        made.abandon()
    assert run(made)[0] == expected


def test_nothing_is_allocated_for_weights_in_a_step() -> None:
    """The ring is there before the first step, and host buffers are pinned once."""
    transport = HostTransport(torch.device("cpu"))
    sides = {"streamed_layers": LAYERS, "recompute_layers": LAYERS, "checkpoints": "host"}
    made = make("llama", transport=transport, **sides)
    residency = made.network.placement.residency  # type: ignore[attr-defined]
    assert residency is not None
    slots = [slot.data_ptr() for slot in residency.slot_tensors]
    made.run(steps.sequences(7), step=0, learning_rate=1e-2)
    pinned = transport.pinned_bytes
    for index in range(1, 4):
        made.run(steps.sequences(7), step=index, learning_rate=1e-2)
    assert transport.pinned_bytes == pinned
    assert [slot.data_ptr() for slot in residency.slot_tensors] == slots
    weights = sum(len(host) for host in residency._host.values())
    assert transport.uploaded_bytes > 4 * weights  # they came in every step, and more than once


@pytest.mark.parametrize("case", ["llama", "olmo2"])
@pytest.mark.parametrize(
    "sides",
    [
        {"optimizer_device": "host"},
        {"streamed_layers": LAYERS, "embedding": "host", "head": "host"},
    ],
    ids=str,
)
def test_a_step_that_is_dropped_leaves_nothing(case: str, sides: dict[str, Any]) -> None:
    """Hooks and closures hold no tensor of a step that nobody has any more."""
    made = make(case, recompute_layers=LAYERS, config=UNTIED, **sides)
    made.run(steps.sequences(7), step=0, learning_rate=1e-2)
    alive = [weakref.ref(p) for p in made.adapters.values()]
    alive += [weakref.ref(p) for p in made.model.parameters() if p.device.type != "meta"]
    del made
    end = time.monotonic() + 10  # the host's thread holds the step until its last update is done
    while any(ref() is not None for ref in alive) and time.monotonic() < end:
        time.sleep(0.01)  # a collector that runs without a pause leaves that thread no turn
        gc.collect()
    assert not [ref for ref in alive if ref() is not None]
