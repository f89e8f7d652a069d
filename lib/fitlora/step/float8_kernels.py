"""Activations and 4-bit weights to fp8 as Triton kernels; `fitlora.step.float8` says what they compute.

A weight takes two kernels: one reads the scales of blocks and finds those of rows, the other turns codes
into fp8, tile by tile. Where the result is transposed the tile turns round inside the program, so both
its reads and its writes are in one piece.
"""

import triton
import triton.language as tl
from torch import Tensor

from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantType
from fitlora.step.dequantize_kernel import book_on, load_scales
from fitlora.step.float8 import LARGEST, SMALLEST

_LARGEST = tl.constexpr(LARGEST)
_SMALLEST = tl.constexpr(SMALLEST)
_SCALE_ROWS = 16  # of one program that finds the scales of rows
_TILE = (4, 128)  # rows and words of eight codes
_TRANSPOSED_TILE = (128, 8)


@triton.jit
def _scale_of(largest):  # type: ignore[no-untyped-def]
    return tl.where(largest > _SMALLEST, largest / _LARGEST, 1.0)


# --- activations ---------------------------------------------------------------------------------


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x, column_scale, out, scales, n, x_row, out_row, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(column_scale + column, mask=inside, other=0.0)
    scale = _scale_of(tl.max(tl.abs(value), axis=0))
    tl.store(scales + row, scale)
    value = value * (1.0 / scale)
    tl.store(out + row * out_row + column, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, column_scale: Tensor | None, out: Tensor, scales: Tensor) -> None:
    """See `fitlora::quantize_rows`."""
    rows, n = x.shape
    assert x.stride(1) == out.stride(1) == 1
    assert scales.is_contiguous()
    assert column_scale is None or column_scale.is_contiguous()
    block = triton.next_power_of_2(n)
    _quantize_rows[(rows,)](
        x, x if column_scale is None else column_scale, out, scales, n, x.stride(0), out.stride(0),
        SCALED=column_scale is not None, BLOCK=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip


# --- weights -------------------------------------------------------------------------------------


@triton.jit
def _row_scales(  # type: ignore[no-untyped-def]
    absmax, nested_absmax, nested_code, nested_offset, row_scales, rows, blocks,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < blocks)
    block = row[:, None] * blocks + column
    scale = load_scales(
        absmax, nested_absmax, nested_code, nested_offset, block, inside, NESTED, NESTED_BLOCK
    )
    largest = tl.max(tl.where(inside, tl.abs(scale), 0.0), axis=1)
    tl.store(row_scales + row, _scale_of(largest), mask=row < rows)


@triton.jit
def _dequantize_float8(  # type: ignore[no-untyped-def]
    packed, book, absmax, nested_absmax, nested_code, nested_offset, row_scales, out, rows, columns,
    tiles, out_row, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(0) % tiles * WORDS + tl.arange(0, WORDS)
    inside = (row < rows)[:, None] & (word * 8 < columns)[None, :]
    row = row.to(tl.int64)
    at = row[:, None] * (columns // 8) + word[None, :]
    words = tl.load(packed.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    block = row[:, None] * (columns // BLOCK_SIZE) + (word * 8 // BLOCK_SIZE)[None, :]
    scale = load_scales(
        absmax, nested_absmax, nested_code, nested_offset, block, inside, NESTED, NESTED_BLOCK
    )
    scale = scale / tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None]
    part = tl.arange(0, 8)
    shift = 4 * part + 4 - 8 * (part % 2)  # of two codes in a byte the high one is first
    codes = (words[:, :, None] >> shift[None, None, :]) & 15
    value = tl.load(book + codes) * scale[:, :, None]
    column = (word * 8)[None, :, None] + part[None, None, :]
    if TRANSPOSED:
        at = column.to(tl.int64) * out_row + row[:, None, None]
    else:
        at = row[:, None, None] * out_row + column
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, :, None])


def dequantize_float8(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    row_scales: Tensor,
    out: Tensor,
    transposed: bool,
    block_size: int,
    quant_type: QuantType,
) -> None:
    """See `fitlora::dequantize_float8`."""
    rows, columns = out.shape[::-1] if transposed else out.shape
    assert out.stride(1) == 1
    assert row_scales.is_contiguous()
    assert columns % block_size == 0
    assert packed.data_ptr() % 4 == 0
    book = book_on(quant_type, out.device)
    # what is not there is not read, but a kernel's argument must be some tensor
    nested = [
        book if part is None else part for part in (nested_absmax, nested_code, nested_offset)
    ]
    kind = {"NESTED": nested_absmax is not None, "NESTED_BLOCK": NESTED_BLOCK_SIZE}
    blocks = columns // block_size
    _row_scales[(triton.cdiv(rows, _SCALE_ROWS),)](
        absmax, *nested, row_scales, rows, blocks, **kind, ROWS=_SCALE_ROWS,
        BLOCK=triton.next_power_of_2(blocks), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    height, words = _TRANSPOSED_TILE if transposed else _TILE
    tiles = triton.cdiv(columns, 8 * words)
    _dequantize_float8[(triton.cdiv(rows, height) * tiles,)](
        packed, book, absmax, *nested, row_scales, out, rows, columns, tiles, out.stride(0),
        BLOCK_SIZE=block_size, **kind, TRANSPOSED=transposed, ROWS=height, WORDS=words, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
