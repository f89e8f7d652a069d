"""The dropout mask as a Triton kernel; `fitlora.step.ops` has the plain PyTorch twin and the idea."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _mix(h):  # type: ignore[no-untyped-def]
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _dropout(  # type: ignore[no-untyped-def]
    x, row_keys, out, features, x_stride, out_stride, stream, threshold, scale,
    ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    key = _mix(tl.load(row_keys + row).to(tl.uint32, bitcast=True) ^ stream.to(tl.uint32))
    pair = (column // 2).to(tl.uint32)
    bits = _mix(key + pair * 0x9E3779B9)
    half = tl.where(column % 2 == 0, bits & 0xFFFF, bits >> 16)
    keep = half >= threshold.to(tl.uint32)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(keep, value * scale, 0.0)
    if ACCUMULATE:
        value += tl.load(out + row * out_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def dropout(
    x: torch.Tensor,
    row_keys: torch.Tensor,
    stream: int,
    threshold: int,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """out (tokens, features) = x masked and scaled, or has it added. row_keys: int32 (tokens,)."""
    tokens, features = x.shape
    assert x.stride(1) == 1
    assert out.stride(1) == 1
    key = (stream * 0x21F0AAAD + 0x9E3779B9) & 0xFFFFFFFF
    key -= (1 << 32) * (key >> 31)  # Triton takes 32 signed bits
    grid = (tokens, triton.cdiv(features, _BLOCK))
    _dropout[grid](
        x, row_keys, out, features, x.stride(0), out.stride(0), key, threshold,
        1.0 / (1.0 - threshold / 65536), ACCUMULATE=accumulate, BLOCK=_BLOCK,
    )  # fmt: skip
