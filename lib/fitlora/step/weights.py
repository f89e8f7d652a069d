"""Where a skeleton's tensors come from: nowhere (fake or empty), noise, or a checkpoint.

The builder asks a source for every tensor by name and takes what it gets. What differs between an
estimate, a probe and a training run is this source and nothing else.
"""

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError
from fitlora.quantization.layout import (
    STATE_PREFIX,
    QuantSpec,
    find_state,
    nested_code,
    read_state,
)

# Elements of noise that are drawn at one time: what is for the host is never whole on the device.
NOISE_PART = 2**24


class Source(Protocol):
    """Gives each tensor of a skeleton its place and content.

    fresh: whether adapters begin, so that what follows from the frozen weights is still to be made.
    """

    fresh: bool

    def frozen(self, name: str, like: Tensor) -> Tensor:
        """A frozen weight. name: as in the model without adapters; like: on meta."""

    def adapter(self, name: str, like: Tensor) -> Tensor:
        """An adapter's weight, float32, or what is trained with it (`fitlora.step.whole`)."""

    def constant(self, name: str, value: Tensor) -> Tensor:
        """A buffer that the model computed by itself."""


class Weights(Source, Protocol):
    """What a step is filled with, on one device."""

    device: torch.device

    def on(self, device: torch.device) -> "Weights":
        """The same on another device."""


class EmptyWeights:
    """Tensors of the right shape with no content: enough for an estimate, on meta or fake."""

    fresh = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def frozen(self, name: str, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    adapter = constant = frozen

    def on(self, device: torch.device) -> "EmptyWeights":
        return EmptyWeights(device)


class RandomWeights:
    """Noise of a plausible size, for the probe: finite values, and the power draw of real products."""

    fresh = True

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def on(self, device: torch.device) -> "RandomWeights":
        """It goes on where this one has come to: a model's parts, in order, get what one device has."""
        if device == self.device:
            return self
        other = RandomWeights(device)
        other._generator.set_state(self._generator.get_state())
        return other

    def frozen(self, name: str, like: Tensor) -> Tensor:
        out = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        for part in out.view(-1).split(NOISE_PART):
            self._draw(name, like, part)
        return out

    def parts(self, name: str, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What `frozen` gives, flat, a part of it at a time: which elements, and they on the device."""
        for start in range(0, like.numel(), NOISE_PART):
            part = torch.empty(
                min(NOISE_PART, like.numel() - start), dtype=like.dtype, device=self.device
            )
            self._draw(name, like, part)
            yield slice(start, start + len(part)), part

    def _draw(self, name: str, like: Tensor, part: Tensor) -> None:
        """Fills a part, (elements,), of the tensor of this name that is like `like`."""
        if part.dtype == torch.uint8:
            part.random_(0, 256, generator=self._generator)
        elif name.endswith("absmax"):
            part.fill_(0.02)
        elif name.endswith("nested_offset"):
            part.fill_(0.04)
        elif like.dim() < 2:
            part.fill_(1.0)
        else:
            part.normal_(0.0, 0.02, generator=self._generator)

    def adapter(self, name: str, like: Tensor) -> Tensor:
        return start_adapter(name, like, seed=0).to(self.device)

    def constant(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.device)


def start_adapter(name: str, like: Tensor, seed: int) -> Tensor:
    """A at random and B zero, as in LoRA; drawn on the CPU by name, so alike on every device.

    DoRA's magnitudes are zero until the frozen weights are there.
    A is uniform in +-1/sqrt(in), which is what peft's kaiming_uniform(a=sqrt(5)) comes to.
    """
    if "lora_A" not in name:
        return torch.zeros(like.shape, dtype=like.dtype)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(like.shape[-1])
    return torch.empty(like.shape, dtype=like.dtype).uniform_(-bound, bound, generator=generator)


class CheckpointWeights:
    """A 4-bit or 16-bit checkpoint, and adapters from their start or from a finished one.

    adapter: tensors of an adapter by name as in the model; None starts new ones from `seed`.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        adapter: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.device = device
        self.checkpoint = Checkpoint(folder)
        self._adapter, self.fresh = adapter, adapter is None
        self._seed = seed

    def on(self, device: torch.device) -> "CheckpointWeights":
        other = copy.copy(self)
        other.device = device
        return other

    def frozen(self, name: str, like: Tensor) -> Tensor:
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        if leaf in ("absmax", "nested_absmax"):
            tensor = self.checkpoint.tensor(f"{weight}.{leaf}")
        elif leaf == "nested_offset":
            tensor = torch.tensor(self._state(weight)["nested_offset"], dtype=torch.float32)
        else:
            tensor = self.checkpoint.tensor(name)
        if tensor.shape != like.shape or (like.dtype == torch.uint8) != (
            tensor.dtype == torch.uint8
        ):
            raise ArtifactError(
                f"{self.checkpoint.folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, and the "
                f"model wants {like.dtype} {tuple(like.shape)}; the checkpoint and params differ"
            )
        return tensor.to(device=self.device, dtype=like.dtype)

    def _state(self, weight: str) -> dict[str, Any]:
        key = find_state(self.checkpoint.shards, weight)
        if key is None:
            raise ArtifactError(f"{self.checkpoint.folder} has no quantization state for {weight}")
        return read_state(self.checkpoint, key)

    def check(self, spec: QuantSpec) -> None:
        """Raises ArtifactError where the checkpoint's 4-bit weights are not stored as `spec` says."""
        folder = self.checkpoint.folder
        mark = f".{STATE_PREFIX}"
        names = sorted(n.partition(mark)[0] for n in self.checkpoint.shards if mark in n)
        again = "make it again with: dvc repro --force quantize_model"
        if not names:
            raise ArtifactError(f"{folder} has no 4-bit weights, and params want them; {again}")
        weight = names[0]
        state = self._state(weight)
        found = (state["quant_type"], state["blocksize"], "nested_offset" in state)
        if found != (spec.type, spec.block_size, spec.double):
            raise ArtifactError(f"{folder} is stored as {found} and params want {spec}; {again}")
        if spec.double and not torch.equal(
            self.checkpoint.tensor(f"{weight}.nested_quant_map"), nested_code()
        ):
            raise ArtifactError(f"{folder} has scales with an unknown code book; {again}")

    def adapter(self, name: str, like: Tensor) -> Tensor:
        if self._adapter is None:
            return start_adapter(name, like, self._seed).to(self.device)
        if name not in self._adapter or self._adapter[name].shape != like.shape:
            raise ArtifactError(f"the adapter has no tensor {name} of shape {tuple(like.shape)}")
        return self._adapter[name].to(device=self.device, dtype=like.dtype)

    def constant(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.device)


def fill(modules: Iterable[tuple[str, nn.Module]], weights: Source) -> None:
    """Replaces every tensor of the modules, by their names, by what `weights` gives, tied ones once."""
    done: dict[int, Any] = {}
    for prefix, module in modules:
        plain = prefix.replace(".base_layer", "")
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in done:
                name, learns = f"{prefix}.{leaf}", parameter.requires_grad
                if learns and (".lora_" in name or not weights.fresh):
                    value = weights.adapter(name, parameter)
                else:  # what is trained as a whole starts as it is stored
                    value = weights.frozen(f"{plain}.{leaf}" if plain else leaf, parameter)
                done[id(parameter)] = nn.Parameter(value, requires_grad=learns)
            module._parameters[leaf] = done[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in done:
                done[id(buffer)] = weights.constant(f"{plain}.{leaf}", buffer)
            module._buffers[leaf] = done[id(buffer)]
