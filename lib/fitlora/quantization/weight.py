"""One weight from 16 or 32 bits to 4: the tensors that bitsandbytes would store, byte for byte.

Blocks are quantized independently of each other, so a weight goes through in pieces of whole blocks
and the result does not depend on the pieces; temporaries stay small for any size of layer, on the host
and on a GPU. The codes are those of bitsandbytes' CUDA kernels, wherever they are computed (`codes`).

In one thing there is no kernel to agree with: double quantization subtracts the mean of a weight's
scales, and CUDA sums in an order that depends on the card. Here it is the exact sum divided once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fitlora.checkpoint import TensorInfo
from fitlora.errors import UserError
from fitlora.quantization.codes import quantize_4bit, quantize_8bit
from fitlora.quantization.layout import (
    NESTED_BLOCK_SIZE,
    QuantSpec,
    code_book,
    encode_state,
    nested_code,
    part_names,
)

CHUNK_ELEMENTS = 1 << 23  # 32 MiB in float32; a multiple of every block size
_CACHED_ELEMENTS = 1 << 18  # what a CPU's cache holds with the temporaries; likewise
_CHUNK_SCALES = 1 << 20  # a multiple of the nested block size


def quantize_weight(
    name: str, weight: Tensor, spec: QuantSpec, device: torch.device
) -> dict[str, Tensor]:
    """The tensors that `weight` becomes, by their names in a checkpoint, on the CPU.

    weight: (out, in), bfloat16, float16 or float32, of any size; an odd number of elements leaves the
    last half byte zero's code. device: where the work is done. Raises UserError for a weight with
    elements that are not finite.
    """
    info = TensorInfo(weight.dtype, tuple(weight.shape))
    pieces = (piece.to(device) for piece in chunks(weight))
    return quantize_pieces(name, info, pieces, spec, device)


def quantize_pieces(
    name: str, info: TensorInfo, pieces: Iterable[Tensor], spec: QuantSpec, device: torch.device
) -> dict[str, Tensor]:
    """`quantize_weight` of a weight that comes in flat pieces on `device`.

    All pieces but the last are of CHUNK_ELEMENTS. When the next one is asked for, the device is done
    with the last. info: the whole weight's dtype and shape. Memory on the device: one piece with about
    12 bytes an element, and the weight's scales.
    """
    count = info.bytes // info.dtype.itemsize
    codes = torch.empty(spec.packed_bytes(count), 1, dtype=torch.uint8)
    scales = torch.empty(spec.blocks(count), dtype=torch.float32, device=device)
    start = 0
    for piece in pieces:
        step = _CACHED_ELEMENTS if device.type == "cpu" else piece.numel()
        for part in torch.split(piece, step):
            packed, absmax = quantize_4bit(part, spec.block_size, spec.type)
            to_host(codes[start // 2 :][: len(packed), 0], packed)
            scales[start // spec.block_size :][: len(absmax)] = absmax
            start += part.numel()
        # The largest of a block is finite only if all of it is.
        first = (start - piece.numel()) // spec.block_size
        if not torch.isfinite(scales[first : spec.blocks(start)]).all():
            require_finite(name, piece)
    assert start == count, name
    state: dict[str, Any] = {
        "quant_type": spec.type,
        "blocksize": spec.block_size,
        "dtype": str(info.dtype).removeprefix("torch."),
        "shape": list(info.shape),
    }
    tensors = [codes, scales, code_book(spec.type)]
    if spec.double:
        offset = exact_mean(scales)
        parts = [
            quantize_8bit(part - offset, NESTED_BLOCK_SIZE)
            for part in torch.split(scales, _CHUNK_SCALES)
        ]
        tensors[1] = torch.cat([part for part, _ in parts])
        tensors += [torch.cat([nested for _, nested in parts]), nested_code()]
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    tensors.append(encode_state(state))
    return dict(zip(part_names(name, spec), (part.cpu() for part in tensors), strict=True))


def to_host(target: Tensor, values: Tensor) -> None:
    """Copies to the CPU, from a GPU through pinned memory: it writes to no other at its full rate."""
    staged = values.to("cpu", non_blocking=True)  # pinned, where it comes from a GPU
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    target.numpy()[:] = staged.numpy()  # in this thread alone; PyTorch would wake one a core


def exact_mean(values: Tensor) -> Tensor:
    """The mean of positive finite float32 numbers, correctly rounded to float64 and then to float32.

    Summed as integers, one sum for each exponent, so that no order matters, on any device. Subnormals
    count as 0. Returns a scalar on the CPU.
    """
    sums = torch.zeros(256, dtype=torch.int64, device=values.device)
    for part in torch.split(values, _CHUNK_SCALES):
        bits = part.view(torch.int32)
        exponents = (bits >> 23).to(torch.int64)
        mantissas = (bits & 0x7FFFFF | 0x800000).to(torch.int64)
        sums.scatter_add_(0, exponents, mantissas)
    total = sum(value << exponent for exponent, value in enumerate(sums.tolist()) if exponent)
    # A number is its mantissa times 2**(exponent - 150); a quotient of ints is rounded correctly.
    return torch.tensor(total / (len(values) << 150), dtype=torch.float64).to(torch.float32)


def chunks(values: Tensor) -> tuple[Tensor, ...]:
    """The tensor as flat pieces of a bounded size, views where it is contiguous."""
    return torch.split(values.reshape(-1), CHUNK_ELEMENTS)


def require_finite(name: str, values: Tensor) -> None:
    """Raises UserError that names the tensor where a value is infinite or not a number."""
    for chunk in chunks(values):
        if not chunk.numel() or torch.isfinite(torch.stack(torch.aminmax(chunk))).all():
            continue  # a NaN would be both the least and the largest
        bad = int((~torch.isfinite(chunk)).sum())
        raise UserError(
            f"{name} has values that are not finite, {bad} of them in one piece of "
            f"{chunk.numel()}; the checkpoint is damaged or overflowed when it was made"
        )
