"""bitsandbytes' layout of a 4-bit weight in a checkpoint: which tensors it is made of, and their names.

A weight `W: (out, in)` becomes, beside each other in the same safetensors file,

| name                                    | dtype, shape                 | what                        |
|-----------------------------------------|------------------------------|-----------------------------|
| weight                                  | uint8 ((n+1)//2, 1)          | two codes a byte, high first |
| weight.absmax                           | float32 or uint8 (blocks,)   | scale of each block         |
| weight.quant_map                        | float32 (16,)                | the code book               |
| weight.nested_absmax                    | float32 (ceil(blocks/256),)  | double quantization only    |
| weight.nested_quant_map                 | float32 (256,)               | double quantization only    |
| weight.quant_state.bitsandbytes__nf4    | uint8 (bytes of a JSON text) | block size, dtype, shape, … |

Stock transformers and bitsandbytes read exactly this (bitsandbytes `QuantState.as_dict(packed=True)`).
"""

import functools
import itertools
import json
import struct
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from fitlora.artifacts import parse_json
from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError
from fitlora.params import QuantizationParams

QuantType = Literal["nf4", "fp4"]
NESTED_BLOCK_SIZE = 256
STATE_PREFIX = "quant_state.bitsandbytes__"
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_PREFIX)


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is stored in 4 bits."""

    type: QuantType = "nf4"
    block_size: int = 64
    double: bool = True

    @classmethod
    def of(cls, quantization: QuantizationParams) -> "QuantSpec | None":
        """As params.yaml has it; None where the weights stay in 16 bits."""
        if quantization.bits != 4:
            return None
        return cls(quantization.type, quantization.block_size, quantization.double)

    def packed_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` weights."""
        return (numel + 1) // 2

    def blocks(self, numel: int) -> int:
        """Scales of `numel` weights."""
        return -(-numel // self.block_size)


class _State(BaseModel):
    """What is used of a weight's JSON part, which has more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    quant_type: QuantType
    blocksize: PositiveInt
    shape: tuple[PositiveInt, PositiveInt] = Field(strict=False)
    nested_offset: float = 0.0


def state_key(name: str, quant_type: QuantType) -> str:
    """The name of the JSON part of the weight called `name`."""
    return f"{name}.{STATE_PREFIX}{quant_type}"


def find_state(names: Container[str], name: str) -> str | None:
    """Which of `names` is the JSON part of the weight called `name`; None where it has none."""
    kinds: tuple[QuantType, ...] = ("nf4", "fp4")
    return next((key for kind in kinds if (key := state_key(name, kind)) in names), None)


def part_names(name: str, spec: QuantSpec) -> tuple[str, ...]:
    """The names of all tensors that the weight called `name` is stored as."""
    nested = (f"{name}.nested_absmax", f"{name}.nested_quant_map") if spec.double else ()
    return (name, f"{name}.absmax", f"{name}.quant_map", *nested, state_key(name, spec.type))


def spec_of(state: dict[str, Any]) -> QuantSpec:
    """How a weight was quantized, by its JSON part."""
    return QuantSpec(state["quant_type"], state["blocksize"], "nested_offset" in state)


def encode_state(content: dict[str, Any]) -> torch.Tensor:
    """The JSON part as bitsandbytes stores it: the text's bytes as a uint8 tensor."""
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def decode_state(tensor: torch.Tensor) -> dict[str, Any]:
    """The inverse of `encode_state`; raises ValueError where that has not made it."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}, and should be bytes")
    content = parse_json(bytes(tensor.tolist()).decode())
    try:
        _State.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    found: dict[str, Any] = content
    return found


def read_state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """The JSON part of a stored weight, by its own name; raises ArtifactError where it is damaged."""
    tensor = checkpoint.tensor(key)
    try:
        return decode_state(tensor)
    except ValueError as error:
        raise ArtifactError(f"{checkpoint.folder}: {key} is damaged ({error})") from None


def to_float32(number: float) -> float:
    """The nearest float32."""
    value: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return value


@functools.cache
def code_book(kind: QuantType) -> torch.Tensor:
    """What the 4-bit codes stand for, as a part of the scale: float32 (16,).

    NF4: appendix E of the QLoRA paper (Dettmers et al., 2023), as bitsandbytes has it in float32.
    FP4: a sign, two bits of exponent and one of fraction, over the largest.
    """
    if kind == "nf4":
        values = [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]  # fmt: skip
    else:
        magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
        values = [m / 12.0 for m in magnitudes] + [0.0 - m / 12.0 for m in magnitudes]
    return torch.tensor(values, dtype=torch.float32)


@functools.cache
def nested_code() -> torch.Tensor:
    """What the 8-bit codes stand for: float32 (256,), ascending; bitsandbytes' `create_dynamic_map`.

    Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (2015): decades from 1e-6 to 1, the
    k-th with 2**k numbers a sign, each the middle of its part of [0.1, 1]; 0 and 1. bitsandbytes
    computes it in float32 with vector instructions that differ between machines, so every rounding is
    spelled out here, from double precision, where the steps are exact enough to round but once.
    """
    values = [0.0, 1.0]
    for k in range(7):
        step = to_float32(to_float32(0.9) / 2**k)
        halves = 2**k + 1
        ends = [
            to_float32(to_float32(0.1) + step * i)
            if i < halves / 2
            else to_float32(1.0 - step * (halves - 1 - i))
            for i in range(halves)
        ]
        for low, high in itertools.pairwise(ends):
            middle = to_float32(to_float32(low + high) / 2)
            value = to_float32(to_float32(10.0 ** (k - 6)) * middle)
            values += [value, -value]
    return torch.tensor(sorted(values), dtype=torch.float32)
