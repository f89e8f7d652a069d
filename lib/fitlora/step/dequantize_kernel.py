"""4-bit weights to 16 or 32 bits as one Triton kernel, bit for bit what bitsandbytes' two give.

A thread turns four packed bytes into eight weights, which are 16 bytes to store in 16-bit types: loads
and stores of a warp are both in one piece, and a block's scale belongs to all eight. Scales that are
themselves quantized are taken apart on the way, so no array of them is written. Products and sums are
rounded one by one, as bitsandbytes rounds them: no fused multiply-add.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantType, code_book

_WORDS = 512  # of four bytes, for one program


@triton.jit
def _look_up(book, codes, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code book's entries: from the L1 cache, or chosen among 16 registers."""
    if HOW == "load":
        return tl.load(book + codes)
    value = tl.load(book) + tl.zeros_like(codes).to(tl.float32)
    for i in tl.static_range(1, 16):
        value = tl.where(codes == i, tl.load(book + i), value)
    return value


@triton.jit
def load_words(packed, left, ALIGNED: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """WORDS words of eight codes each from where packed points; only `left` codes are there."""
    word = tl.arange(0, WORDS)
    if ALIGNED and left >= 8 * WORDS:
        words = tl.load(packed.to(tl.pointer_type(tl.int32)) + word)
    else:
        words = tl.zeros((WORDS,), tl.int32)
        for i in tl.static_range(4):
            byte = tl.load(packed + 4 * word + i, mask=8 * word + 2 * i < left, other=0)
            words |= byte.to(tl.int32) << (8 * i)
    return words


@triton.jit
def load_scales(  # type: ignore[no-untyped-def]
    absmax, nested_absmax, nested_code, nested_offset, block, inside,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The scales of blocks, float32, as bitsandbytes rounds them."""
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(nested_code + scale)
        scale = scale * tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale = scale + tl.load(nested_offset)
    return scale


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    packed, book, absmax, nested_absmax, nested_code, nested_offset, out, size,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, LOOKUP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (8 * WORDS)
    left = size - start
    words = load_words(packed + start // 2, left, ALIGNED, WORDS)
    word = tl.arange(0, WORDS)
    scale = load_scales(
        absmax, nested_absmax, nested_code, nested_offset, (start + 8 * word) // BLOCK_SIZE,
        8 * word < left, NESTED, NESTED_BLOCK,
    )  # fmt: skip
    column = tl.arange(0, 8)
    shift = 4 * column + 4 - 8 * (column % 2)  # of two codes in a byte the high one is first
    codes = (words[:, None] >> shift[None, :]) & 15
    value = _look_up(book, codes, LOOKUP) * scale[:, None]
    element = 8 * word[:, None] + column[None, :]
    tl.store(out + start + element, value.to(out.dtype.element_ty), mask=element < left)


@functools.cache
def book_on(quant_type: QuantType, device: torch.device) -> Tensor:
    """The code book on a device, where it stays: 64 bytes."""
    return code_book(quant_type).to(device)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    scales: Tensor,
    out: Tensor,
    block_size: int,
    quant_type: QuantType,
    lookup: str = "load",
) -> None:
    """See `fitlora::dequantize_4bit`; scales are not used. lookup: "load" or "select"."""
    size = out.numel()
    assert out.is_contiguous()
    assert packed.numel() == (size + 1) // 2
    assert block_size % 8 == 0
    book = book_on(quant_type, out.device)
    # what is not there is not read, but a kernel's argument must be some tensor
    nested = [
        book if part is None else part for part in (nested_absmax, nested_code, nested_offset)
    ]
    _dequantize[(triton.cdiv(size, 8 * _WORDS),)](
        packed, book, absmax, *nested, out, size,
        BLOCK_SIZE=block_size, NESTED=nested_absmax is not None, NESTED_BLOCK=NESTED_BLOCK_SIZE,
        ALIGNED=packed.data_ptr() % 4 == 0, LOOKUP=lookup, WORDS=_WORDS, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
