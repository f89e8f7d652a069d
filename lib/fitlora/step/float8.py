"""Products of frozen weights in fp8 (e4m3): twice the rate of bf16, for three bits of fraction.

Each row of an activation and each row of a weight has a scale, the largest magnitude of the row over
448, the largest number of e4m3. The base product takes both in fp8 and sums in float32; adapters and
their gradients stay in bf16.

A 4-bit weight becomes fp8 without a detour: a block's absmax is its largest magnitude (both code books
have a code of 1), so a row's scale follows from the absmax of its blocks before any code is read.

Backward contracts the other axis, and products in fp8 want both operands contracted along their rows:
it needs the weight transposed. There the row scales lie along the contraction, where the product takes
none, so they go into the gradient before it is quantized: dx = (dy * row_scales) @ W8. Both layouts
hold the same fp8 numbers.

Here are the operators and their twins in plain PyTorch; `fitlora.step.float8_kernels` has them in
Triton, and the product is PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor

from fitlora.step.ops import define, dequantize_4bit, implement

LARGEST = 448.0  # of e4m3
# Rows that are smaller throughout are taken for zero: what takes them to 448 is beyond float32. Such
# gradients come from tokens that the loss sees through attention alone, at probabilities near zero.
SMALLEST = 2.0**-100
MULTIPLE = 16  # of the contracted and the output dimension; the rows of an activation are free
_CHUNK_ELEMENTS = 1 << 18


def scale_of(largest: Tensor) -> Tensor:
    """What takes 448 to the largest magnitude; 1 for next to nothing, which becomes zero."""
    return torch.where(largest > SMALLEST, largest / LARGEST, 1.0)


# --- activations ---------------------------------------------------------------------------------

define(
    "quantize_rows(Tensor x, Tensor? column_scale, Tensor(a!) out, Tensor(b!) scales) -> ()",
)


def _quantize_rows_cpu(x: Tensor, column_scale: Tensor | None, out: Tensor, scales: Tensor) -> None:
    """out * scales ~ x * column_scale, with the largest of each row at 448.

    x, out: (rows, n), out float8_e4m3fn; column_scale: float32 (n,); scales: float32 (rows, 1).
    """
    rows = max(1, _CHUNK_ELEMENTS // x.shape[1])
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        value = x[part].float()
        if column_scale is not None:
            value = value * column_scale
        scale = scale_of(value.abs().amax(1, keepdim=True))
        scales[part] = scale
        out[part] = (value / scale).to(out.dtype)


def _quantize_rows_cuda(*arguments: Any) -> None:
    from fitlora.step.float8_kernels import quantize_rows

    quantize_rows(*arguments)


quantize_rows = implement("quantize_rows", _quantize_rows_cpu, _quantize_rows_cuda)


# --- weights -------------------------------------------------------------------------------------

define(
    "dequantize_float8(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, Tensor(a!) row_scales, Tensor(b!) out, bool transposed, int block_size, "
    "str quant_type) -> ()"
)


def weight_fits(out_features: int, in_features: int, block_size: int) -> bool:
    """Whether a 4-bit weight can be multiplied in fp8; others stay in bf16."""
    whole = in_features % block_size == 0
    return whole and in_features % MULTIPLE == 0 and out_features % MULTIPLE == 0


def _dequantize_float8_cpu(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    row_scales: Tensor,
    out: Tensor,
    transposed: bool,
    block_size: int,
    quant_type: str,
) -> None:
    """out * row_scales ~ the weight, whose rows are whole numbers of blocks.

    row_scales: float32 (out_features,); out: float8_e4m3fn (out_features, in_features), or the same
    numbers as (in_features, out_features) where `transposed`.
    """
    by_rows = out.t() if transposed else out
    rows, columns = by_rows.shape
    assert columns % block_size == 0
    scales = torch.empty(absmax.shape, dtype=torch.float32)
    weight = torch.empty(rows, columns, dtype=torch.float32)
    dequantize_4bit(
        packed, absmax, nested_absmax, nested_code, nested_offset, scales, weight, block_size,
        quant_type,
    )  # fmt: skip
    if nested_absmax is None:
        scales = absmax
    row_scales.copy_(scale_of(scales.view(rows, -1).abs().amax(1)))
    by_rows.copy_(weight.div_(row_scales[:, None]))


def _dequantize_float8_cuda(*arguments: Any) -> None:
    from fitlora.step.float8_kernels import dequantize_float8

    dequantize_float8(*arguments)


dequantize_float8 = implement("dequantize_float8", _dequantize_float8_cpu, _dequantize_float8_cuda)


# --- products ------------------------------------------------------------------------------------

define("scaled_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor(a!) out) -> ()")


def _check_product(a: Tensor, b: Tensor) -> None:
    assert a.shape[1] == b.shape[1]
    assert a.shape[1] % MULTIPLE == 0
    assert b.shape[0] % MULTIPLE == 0


def _scaled_product_cpu(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor
) -> None:
    """out = (a * a_scales) @ (b * b_scales[:, None]).T.

    a: float8_e4m3fn (rows, k), a_scales float32 (rows, 1); b: float8_e4m3fn (n, k), b_scales float32
    (n,); out: (rows, n), bfloat16 on a GPU. k and n are multiples of 16, rows are any number.
    """
    _check_product(a, b)
    left = a.float()
    rows = max(1, _CHUNK_ELEMENTS // b.shape[1])
    for start in range(0, len(b), rows):
        part = slice(start, start + rows)
        product = torch.mm(left, b[part].float().t())
        out[:, part] = product.mul_(a_scales).mul_(b_scales[part])


def _scaled_product_cuda(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor
) -> None:
    _check_product(a, b)
    assert out.is_contiguous()
    torch.ops.aten._scaled_mm.out(
        a, b.t(), a_scales, b_scales[None], out_dtype=out.dtype, use_fast_accum=True, out=out
    )


scaled_product = implement("scaled_product", _scaled_product_cpu, _scaled_product_cuda)
