"""Blocks of numbers to codes of 4 or 8 bits: exactly what bitsandbytes' CUDA kernels write.

bitsandbytes 0.50 writes other bytes on a CPU than on a GPU, so a checkpoint would depend on where it
was made. The GPU's are the ones that the world's checkpoints have; here they are computed by integer
operations and by float32 operations that IEEE 754 fixes to the last bit (a product, a difference,
comparisons), one at a time in plain PyTorch, which gives the same on any CPU, any GPU and any number
of threads. What the kernel (`kQuantizeBlockwise` in csrc/kernels.cu) does that a reader would not
expect:

- it is compiled with --use_fast_math: subnormal numbers count as zeros, going in and coming out, and
  `1.0f / absmax` is the chip's approximation (`reciprocal`), by which every element is multiplied;
- the smallest code whose upper limit is not exceeded is taken, so a tie goes down; the 8-bit search
  ends at every second entry of its table, so there a tie goes to the even code;
- a block of zeros multiplies by infinity, and NaN compares false: its codes are 0 (which is -1 times
  the scale 0);
- a missing last half byte is the code of 0.0 in its block.
"""

import functools

import torch
from torch import Tensor

from fitlora.quantization.layout import QuantType, nested_code
from fitlora.quantization.reciprocal import reciprocal

SMALLEST_NORMAL = 2.0**-126
LARGEST_SUBNORMAL = SMALLEST_NORMAL - 2.0**-149


# The limits of dQuantizeNF4 and dQuantizeFP4, in the 9 digits that name a float32. A code is the number
# of limits that are exceeded; FP4's limits are of magnitudes, and its codes swap places in between.
# (Four literals of the kernel's NF4 lie so near the middle of two floats that reading them as a double
# first, as Python does, would move them by one.)
_NF4_LIMITS = (
    -0.84809643, -0.610632896, -0.45999527, -0.33967942, -0.234607399, -0.137911737, -0.0455250181,
    0.0397901498, 0.120255254, 0.203521252, 0.292013764, 0.389312536, 0.501663387, 0.64278692,
    0.861478388,
)  # fmt: skip
_FP4_LIMITS = (
    0.00260417, 0.0859375, 0.208333328, 0.291666657, 0.416666687, 0.583333015, 0.833333313,
)  # fmt: skip


def quantize_4bit(values: Tensor, block_size: int, kind: QuantType) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor in 4 bits.

    values: (n,), bfloat16, float16 or float32. Returns uint8 ((n + 1) // 2,), two codes a byte with the
    first one high, and float32 (ceil(n / block_size),). Infinite values give what the kernel gives;
    a NaN makes its block's scale NaN.
    """
    blocks, absmax = _blocks(values, block_size)
    scaled = blocks.mul_(reciprocal(absmax)[:, None]).view(-1)
    if kind == "nf4":
        codes = _count_above(scaled, _NF4_LIMITS)
    else:
        negative = scaled < -LARGEST_SUBNORMAL
        codes = _count_above(scaled.abs_(), _FP4_LIMITS)
        codes ^= (codes & 2) << 1
        codes |= negative.view(torch.uint8) << 3
    pairs = codes.view(torch.int16)  # the first code is the low byte
    packed = pairs.bitwise_and(0x0F).mul_(16).bitwise_or_(pairs.bitwise_right_shift(8))
    return packed.to(torch.uint8)[: (values.numel() + 1) // 2], absmax


def quantize_8bit(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of `nested_code` and scales. values: float32 (n,). Returns uint8 (n,), float32 (blocks,)."""
    blocks, absmax = _blocks(values, block_size)
    scaled = blocks.mul_(reciprocal(absmax)[:, None]).view(-1)[: values.numel()]
    codes = torch.bucketize(scaled, _dynamic_limits().to(values.device), out_int32=True)
    return codes.masked_fill_(scaled.isnan(), 0).to(torch.uint8), absmax


def _blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """A float32 copy in rows of one block each, subnormals and the end filled with zeros; its absmax."""
    blocks = values.to(torch.float32, copy=True)
    missing = -blocks.numel() % block_size
    if missing:
        blocks = torch.nn.functional.pad(blocks, (0, missing))
    blocks = torch.hardshrink(blocks, LARGEST_SUBNORMAL, out=blocks).view(-1, block_size)
    # A fresh tensor of absolute values would cost more than looking twice.
    return blocks, torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()


def _count_above(values: Tensor, limits: tuple[float, ...]) -> Tensor:
    """How many of the limits each value exceeds, uint8."""
    # Comparing into float32 and adding there keeps to the fast loops of PyTorch on CPUs.
    count, above = torch.empty_like(values), torch.empty_like(values)
    torch.gt(values, limits[0], out=count)
    for limit in limits[1:]:
        count.add_(torch.gt(values, limit, out=above))
    return count.to(torch.uint8)


@functools.cache
def _dynamic_limits() -> Tensor:
    """The limits between neighbouring 8-bit codes: float32 (255,).

    Middles in float32. The kernel takes the upper code above a limit that follows an even code, and at
    one that follows an odd code too; the latter are moved down by one float for a single comparison.
    """
    values = nested_code()
    middles = (values[1:] + values[:-1]) * 0.5
    below = torch.nextafter(middles, torch.tensor(-2.0))
    return torch.where(torch.arange(255) % 2 == 1, below, middles)
