"""Weights reach their place on the host as a resident model would have them, from any source."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.errors import ArtifactError
from fitlora.memory.trace import MemoryTrace
from fitlora.model import decoder_layers
from fitlora.offload.loading import PlacedWeights
from fitlora.offload.residency import Residency
from fitlora.offload.transport import HostTransport, TracedTransport
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import step_skeleton
from fitlora.step.weights import CheckpointWeights, EmptyWeights, RandomWeights, Weights, fill
from tests.step import steps
from tests.tiny_models import make_checkpoint, make_config

CPU = torch.device("cpu")


def skeleton(config: Any, bits: int = 4) -> nn.Module:
    return step_skeleton(config, steps.plan(), steps.settings(bits=bits)).model


def resident(config: Any, weights: Weights, bits: int = 4) -> nn.Module:
    model = skeleton(config, bits)
    fill(model.named_modules(), weights)
    return model


def streamed(config: Any, weights: Weights, bits: int = 4) -> tuple[nn.Module, Residency]:
    """Both layers on the host, through one slot."""
    model = skeleton(config, bits)
    transport = HostTransport(CPU)
    residency = Residency(decoder_layers(model), (0, 1), transport, slots=1)
    placed = PlacedWeights(weights, residency.places, transport)
    fill(model.named_modules(), placed)
    placed.finish()
    residency.start()
    return model, residency


def assert_same_weights(model: nn.Module, residency: Residency, wanted: nn.Module) -> None:
    layers, expected = decoder_layers(model), decoder_layers(wanted)
    for index, (layer, other) in enumerate(zip(layers, expected, strict=True)):
        residency.enter(index)
        found = dict(layer.named_parameters())
        for name, parameter in other.named_parameters():
            assert found[name].dtype == parameter.dtype
            assert torch.equal(found[name], parameter), name
            assert found[name].requires_grad == parameter.requires_grad
        assert all(p.data_ptr() % 4 == 0 for p in found.values())
        residency.leave(index)


@pytest.mark.parametrize("bits", [4, 16])
def test_noise_is_that_of_a_resident_model(bits: int) -> None:
    config = make_config("qwen2")  # has biases
    model, residency = streamed(config, RandomWeights(CPU), bits)
    assert_same_weights(model, residency, resident(config, RandomWeights(CPU), bits))


def test_noise_for_the_host_is_never_whole_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitlora.step.weights.NOISE_PART", 1000)
    like = torch.empty(30, 100, device="meta")
    place = torch.empty(30, 100)
    placed = PlacedWeights(RandomWeights(CPU), {id(like): place}, HostTransport(CPU))
    with MemoryTrace() as trace:
        placed.frozen("model.weight", like)
    assert trace.peak.bytes <= 2 * 4096  # one part, and the next
    assert torch.equal(place, RandomWeights(CPU).frozen("model.weight", like))


@pytest.mark.parametrize("family", ["llama", "llama_odd", "qwen2", "phi3"])
def test_a_quantized_checkpoint_is_read_into_place(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path / "model", family)
    spec = steps.settings().spec
    assert spec is not None
    quantize_checkpoint(tmp_path / "model", tmp_path / "quantized", spec=spec, device=CPU)
    config = make_config(family)

    def weights() -> Weights:
        return CheckpointWeights(tmp_path / "quantized", CPU)

    model, residency = streamed(config, weights())
    assert_same_weights(model, residency, resident(config, weights()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_16_bit_checkpoint_is_read_or_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    """The model computes in float32: its bytes are the file's, or are made from it."""
    make_checkpoint(tmp_path, "llama", dtype=dtype, shards=2)
    config = make_config("llama")
    model, residency = streamed(config, CheckpointWeights(tmp_path, CPU), 16)
    assert_same_weights(model, residency, resident(config, CheckpointWeights(tmp_path, CPU), 16))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", intermediate_size=96)
    with pytest.raises(ArtifactError, match="the checkpoint and params differ"):
        streamed(make_config("llama"), CheckpointWeights(tmp_path, CPU), 16)


def test_an_estimate_fills_without_the_weights() -> None:
    """On fake tensors the device has what is resident and one slot, and the host the rest."""
    config = make_config("llama")
    model = skeleton(config)
    with FakeTensorMode(), MemoryTrace(round_up=False) as trace:
        transport = TracedTransport(CPU)
        residency = Residency(decoder_layers(model), (0, 1), transport, slots=1)
        placed = PlacedWeights(EmptyWeights(CPU), residency.places, transport)
        fill(model.named_modules(), placed)
        placed.finish()
        residency.start()
        streaming = trace.live_bytes
    model = skeleton(config)
    with FakeTensorMode(), MemoryTrace(round_up=False) as trace:
        fill(model.named_modules(), EmptyWeights(CPU))
        whole = trace.live_bytes
    weights = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ".layers." in name and "base_layer" in name
    )
    (slot,) = residency.slot_tensors
    assert streaming == whole - weights + slot.numel()
    assert transport.pinned_bytes == 2 * slot.numel() >= weights
