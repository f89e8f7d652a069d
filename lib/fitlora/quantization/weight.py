"""One weight from 16 or 32 bits to 4.

Blocks are quantized independently of each other, so a weight goes through in chunks of whole blocks
and the result does not depend on the chunk; temporaries stay small for any size of layer, on the host
and on a GPU. bitsandbytes' own kernels do the work, and what they leave open stays so: the bytes of
the CPU and of a GPU differ in rounding.
"""

import torch
from torch import Tensor

from fitlora.errors import UserError
from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantSpec

CHUNK_ELEMENTS = 1 << 24  # 64 MiB in float32; a multiple of every block size


def quantize_weight(
    name: str, weight: Tensor, spec: QuantSpec, device: torch.device
) -> dict[str, Tensor]:
    """The tensors that `weight` becomes, by their names in a checkpoint, on the CPU.

    weight: (out, in), bfloat16, float16 or float32, of any size; an odd number of elements leaves the
    last half byte zero's code. device: where the work is done. Raises UserError for a weight with
    elements that are not finite.
    """
    from bitsandbytes import functional

    codes, scales, code_book = [], [], None
    for chunk in chunks(weight):
        chunk = chunk.to(device)
        require_finite(name, chunk)
        packed, state = functional.quantize_4bit(
            chunk, blocksize=spec.block_size, quant_type=spec.type
        )
        codes.append(packed.cpu())
        scales.append(state.absmax)
        code_book = state.code
    absmax = torch.cat(scales)
    offset = nested = None
    if spec.double:
        offset = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=code_book,
        blocksize=spec.block_size,
        quant_type=spec.type,
        dtype=weight.dtype,
        offset=offset,
        state2=nested,
    )
    parts: dict[str, Tensor] = state.as_dict(packed=True)
    return {
        name: torch.cat(codes),
        **{f"{name}.{suffix}": part.cpu() for suffix, part in parts.items()},
    }


def chunks(values: Tensor) -> tuple[Tensor, ...]:
    """The tensor as flat pieces of a bounded size, views where it is contiguous."""
    return torch.split(values.reshape(-1), CHUNK_ELEMENTS)


def require_finite(name: str, values: Tensor) -> None:
    """Raises UserError that names the tensor where a value is infinite or not a number."""
    for chunk in chunks(values):
        # A sum is finite only if all its terms are, and costs a fraction of looking at each; it may
        # overflow over values near the largest float, so what it suspects is looked at.
        if torch.isfinite(chunk.sum(dtype=torch.float32)):
            continue
        bad = int((~torch.isfinite(chunk)).sum())
        if bad:
            raise UserError(
                f"{name} has values that are not finite, {bad} of them in one piece of "
                f"{chunk.numel()}; the checkpoint is damaged or overflowed when it was made"
            )
