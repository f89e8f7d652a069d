"""The Plan: how one training step is laid out.

A Plan holds decisions and nothing else: no measured rate, no predicted byte. Two machines that
decide alike therefore write the same file, and a change of noise in a measurement changes no hash.
It is chosen once (`fitlora.planner`), read by every later stage, and replaced, never mutated, when
something does not fit.

This module imports no torch: a Plan is compared, listed and tested in microseconds.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

# float8: the products of frozen weights; all else is bfloat16. float16: for GPUs without bfloat16; its
# losses are scaled.
ComputeDtype = Literal["bfloat16", "float16", "float32", "float8"]
Dtype = Literal["bfloat16", "float16", "float32"]
Side = Literal["device", "host"]
AttentionKernel = Literal["flash", "plain"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
# What a layer that recomputes may keep beside its input: the projected queries, keys and values; what
# attention made of them; the residual stream behind it; the gate and up projections.
Kept = Literal["qkv", "attention", "middle", "mlp"]
KEPT: tuple[Kept, ...] = get_args(Kept)

# What layers compute in next, where their numbers overflow.
WIDER: dict[ComputeDtype, ComputeDtype] = {
    "float8": "bfloat16",
    "bfloat16": "float32",
    "float16": "float32",
}
PAGED_OPTIMIZERS: tuple[Optimizer, ...] = ("paged_adamw", "paged_adamw_8bit")
# Decisions that came after plans were written to results by their fingerprints.
_LATER = ("attention",)


class Plan(BaseModel):
    """One layout of the training step.

    The unit of a batch is a sequence. `effective_batch_size` is the user's; `micro_batch_size`
    divides the work of one device, and the last micro-batch of a step may be smaller.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: Literal["cuda", "cpu"]
    devices: int = Field(1, ge=1, description="processes that share one effective batch")
    effective_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    micro_batches_per_pass: int = Field(
        1,
        ge=1,
        description="micro-batches of a step that go through each layer together, so that what is "
        "streamed comes once for all of them; the last pass may have fewer",
    )
    evaluation_batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=1, description="tokens of the longest sequence")
    recompute_layers: tuple[int, ...] = Field(
        (), strict=False, description="decoder layers whose activations are recomputed in backward"
    )
    recompute_keeps: tuple[Kept, ...] = Field(
        (), strict=False, description="what layers that recompute keep all the same"
    )
    compute_dtype: ComputeDtype
    layer_dtype: ComputeDtype | None = Field(
        None, description="what decoder layers compute in instead, after a switch of precision"
    )
    frozen_layers: tuple[int, ...] = Field(
        (), strict=False, description="decoder layers whose adapters are not trained"
    )
    attention: AttentionKernel = Field(
        "flash",
        description="flash: a fused kernel for the types that the device has one for; plain: none, for "
        "GPUs without FlashAttention",
    )
    optimizer: Optimizer
    loss_chunk_tokens: int = Field(ge=1, description="rows of logits that exist at one time")
    mlp_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that go through an MLP at one time, where the layer is done by hand and "
        "keeps nothing of it; null for all",
    )
    streamed_layers: tuple[int, ...] = Field(
        (), strict=False, description="decoder layers whose frozen weights come from host memory"
    )
    streaming_slots: int = Field(2, ge=1, description="streamed layers on the device at one time")
    disk_layers: int = Field(
        0,
        ge=0,
        description="of the streamed layers, how many are read from disk, evenly among them",
    )
    checkpoints: Side = Field(
        "device", description="where recomputed layers' inputs wait for backward"
    )
    embedding: Side = Field("device", description="where the embedding's table is")
    head: Side = Field("device", description="where the language-model head's table is")
    optimizer_device: Side = Field("device", description="where the optimizer's state and work are")
    layers_per_device: tuple[int, ...] = Field(
        (),
        strict=False,
        description="decoder layers of each of the devices that one process spreads them over, bottom "
        "up; none where one device has all",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        if self.micro_batch_size > self.sequences_per_device:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than the "
                f"{self.sequences_per_device} sequences that one device has in a step"
            )
        for name in ("recompute_layers", "streamed_layers", "frozen_layers"):
            layers = list(getattr(self, name))
            if layers != sorted(set(layers)) or (layers and layers[0] < 0):
                raise ValueError(f"{name} must be ascending, from 0, free of duplicates")
        if self.disk_layers > len(self.streamed_layers):
            raise ValueError(
                f"disk_layers is {self.disk_layers}, and {len(self.streamed_layers)} layers are streamed"
            )
        if list(self.recompute_keeps) != [kind for kind in KEPT if kind in self.recompute_keeps]:
            raise ValueError(f"recompute_keeps must be some of {', '.join(KEPT)}, in this order")
        if set(self.recompute_keeps) == set(KEPT):
            raise ValueError("recompute_keeps everything: name no layers to recompute instead")
        if self.device == "cpu" and self.optimizer in PAGED_OPTIMIZERS:
            raise ValueError(f"{self.optimizer} needs a CUDA device; on the CPU nothing is paged")
        if self.layers_per_device:
            self._check_spread()
        return self

    def _check_spread(self) -> None:
        """What layers that are spread over devices do not go with, and why."""
        counts = self.layers_per_device
        if len(counts) < 2 or min(counts) < 1:
            raise ValueError(
                f"layers_per_device is {list(counts)}: name 2 devices or more, each with a layer or "
                "more, or none"
            )
        if self.devices > 1:
            raise ValueError(
                f"devices is {self.devices}, and layers_per_device spreads one process over devices: "
                "these either share a batch or its layers"
            )
        if self.uses_host or self.optimizer_device == "host":
            raise ValueError(
                "layers_per_device is for what fits the devices together: with parts on the host each "
                "device does better with a part of the batch (devices)"
            )
        if self.optimizer != "adamw":
            raise ValueError(
                f"layers_per_device needs adamw, and optimizer is {self.optimizer}, whose code books "
                "are on one device"
            )

    def keeps(self, layer: int) -> tuple[Kept, ...]:
        """What decoder layer `layer` keeps for its backward."""
        return self.recompute_keeps if layer in self.recompute_layers else KEPT

    @property
    def layers_compute_in(self) -> ComputeDtype:
        """What decoder layers compute in."""
        return self.layer_dtype or self.compute_dtype

    def in_precision(self, dtype: ComputeDtype) -> "Plan":
        """The same with decoder layers that compute in `dtype`."""
        return self.replace(layer_dtype=None if dtype == self.compute_dtype else dtype)

    @property
    def lowest_learning(self) -> int:
        """The lowest decoder layer whose adapters are trained: there the backward pass ends."""
        return next(i for i in itertools.count() if i not in self.frozen_layers)

    @property
    def storage_dtype(self) -> Dtype:
        """What weights that are not quantized are in, and activations outside of the layers."""
        return "bfloat16" if self.compute_dtype == "float8" else self.compute_dtype

    @property
    def activation_dtype(self) -> Dtype:
        """What decoder layers' activations are in."""
        dtype = self.layers_compute_in
        return "bfloat16" if dtype == "float8" else dtype

    @property
    def float8_products(self) -> bool:
        """Whether decoder layers take the products of frozen weights in fp8."""
        return self.layers_compute_in == "float8"

    @property
    def flash_types(self) -> tuple[Dtype, ...]:
        """Types whose attention takes a fused kernel: FlashAttention has none for float32."""
        if self.device == "cpu":
            return ("bfloat16", "float16", "float32")
        return ("bfloat16", "float16") if self.attention == "flash" else ()

    @property
    def uses_host(self) -> bool:
        """Whether some part of the step is in host memory, the optimizer aside."""
        sides = (self.checkpoints, self.embedding, self.head)
        return bool(self.streamed_layers) or "host" in sides

    @property
    def devices_of_process(self) -> int:
        """Devices that each process computes on."""
        return max(1, len(self.layers_per_device))

    @property
    def sequences_per_device(self) -> int:
        """The most sequences one device handles in one optimizer step."""
        return -(-self.effective_batch_size // self.devices)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step on one device."""
        return -(-self.sequences_per_device // self.micro_batch_size)

    @property
    def passes(self) -> int:
        """Passes over the layers, forward and backward, in one optimizer step on one device."""
        return -(-self.accumulation // self.micro_batches_per_pass)

    @property
    def sequences_per_pass(self) -> int:
        """The most sequences that one pass has."""
        most = self.micro_batch_size * self.micro_batches_per_pass
        return min(most, self.sequences_per_device)

    def replace(self, **changes: object) -> "Plan":
        """A checked copy with some decisions changed."""
        return Plan.model_validate({**self.model_dump(), **changes})

    def on_devices(self, devices: int) -> "Plan":
        """The same work shared by another number of devices."""
        share = -(-self.effective_batch_size // devices)
        return self.replace(devices=devices, micro_batch_size=min(self.micro_batch_size, share))

    def fingerprint(self) -> str:
        """Twelve hex digits that are equal exactly when the decisions are."""
        content = self.model_dump(mode="json")
        for name in _LATER:  # as it was, where it is what plans did before they named it
            if content[name] == type(self).model_fields[name].default:
                del content[name]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """One line for logs and tables."""
        recompute = len(self.recompute_layers)
        offloaded = [f"{len(self.streamed_layers)} layers"] if self.streamed_layers else []
        if self.disk_layers:
            offloaded[0] += f" ({self.disk_layers} of them on disk)"
        for name in ("checkpoints", "embedding", "head"):
            if getattr(self, name) == "host":
                offloaded.append(name)
        if self.optimizer_device == "host":
            offloaded.append("optimizer")
        host = f", on the host: {', '.join(offloaded)}" if offloaded else ""
        each = f"{self.devices} devices, each " if self.devices > 1 else ""
        if self.layers_per_device:
            counts = " + ".join(map(str, self.layers_per_device))
            each = f"{counts} layers on {len(self.layers_per_device)} devices, "
        frozen = f", {len(self.frozen_layers)} layers frozen" if self.frozen_layers else ""
        dtype: str = self.compute_dtype
        if self.layer_dtype is not None:
            dtype = f"{self.layer_dtype} in place of {dtype}"
        together = min(self.micro_batches_per_pass, self.accumulation)
        shared = f" ({together} share a pass)" if together > 1 else ""
        return (
            f"{each}micro-batch {self.micro_batch_size} x {self.accumulation} accumulation{shared} x "
            f"{self.sequence_length} tokens, {recompute} layers recomputed{frozen}, "
            f"{dtype}, {self.optimizer} on {self.device}{host}"
        )


def layer_ranges(counts: Sequence[int]) -> list[range]:
    """The layers of each of several devices, bottom up, by how many it has."""
    ends = itertools.accumulate(counts)
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
