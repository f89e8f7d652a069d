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

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import torch

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

    def packed_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` weights."""
        return (numel + 1) // 2

    def blocks(self, numel: int) -> int:
        """Scales of `numel` weights."""
        return -(-numel // self.block_size)


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
    """The inverse of `encode_state`."""
    content = json.loads(bytes(tensor.tolist()).decode())
    assert isinstance(content, dict)
    return content


def nested_code() -> torch.Tensor:
    """The code book of the 8-bit scales: float32 (256,), bitsandbytes' dynamic map."""
    from bitsandbytes.functional import create_dynamic_map

    code: torch.Tensor = create_dynamic_map()
    return code.to(torch.float32)
