"""The operators of the step that are more than a line of PyTorch, for the CPU, for CUDA, and as shapes.

Each is registered as one operator, so that a trace on fake tensors and a run on a device see the same
thing. An operator allocates nothing that outlives it and, where we write the kernel, nothing at all:
outputs and scratch are made by the caller with `torch.empty` and mutated. What a library's kernel
allocates inside and frees again is told to the trace by `scratch_bytes`, beside the operator that
calls it.

The dispatcher takes longer than the launch of a small kernel, and a step on few tokens waits for its
launches. So the step calls what `implement` returns, which hands plain tensors on a GPU to the kernel.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes  # noqa: F401  (defines the operators that are called below)
import torch
from torch import Tensor, nn

from fitlora.quantization.layout import NESTED_BLOCK_SIZE

library = torch.library.Library("fitlora", "DEF")

# What a library kernel allocates and frees inside: operator name -> its arguments -> block sizes.
scratch_bytes: dict[str, Callable[..., list[int]]] = {}


def define(schema: str) -> None:
    library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))


def implement(
    name: str,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    meta: Callable[..., Any] = lambda *arguments: None,
) -> Callable[..., Any]:
    """Gives a defined operator its kernels; returns it as the step calls it.

    Fake tensors and whatever else is no plain tensor go through the dispatcher, where a trace sees
    them.
    """
    for kernel, device in ((cpu, "CPU"), (cuda, "CUDA"), (meta, "Meta")):
        library.impl(name, kernel, device)
    registered = getattr(torch.ops.fitlora, name).default

    def call(first: Tensor, *rest: Any) -> Any:
        if first.is_cuda and type(first) in (Tensor, nn.Parameter):
            return cuda(first, *rest)
        return registered(first, *rest)

    return call


# --- 4-bit weights -------------------------------------------------------------------------------

define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, Tensor(a!) scales, Tensor(b!) out, int block_size, str quant_type) -> ()"
)


def _dequantize_4bit_cpu(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    scales: Tensor,
    out: Tensor,
    block_size: int,
    quant_type: str,
) -> None:
    bnb = torch.ops.bitsandbytes
    if nested_absmax is not None:
        assert nested_offset is not None
        scales.copy_(
            bnb.dequantize_blockwise(
                absmax, nested_absmax, nested_code, NESTED_BLOCK_SIZE, torch.float32
            )
        )
        scales.add_(nested_offset)
        absmax = scales
    # On CPUs with AVX512 bitsandbytes 0.50 is wrong where a row is no whole number of blocks, and slow
    # for odd rows and blocks of 2048 and more: one long row in blocks of at most 1024 is neither.
    block = min(block_size, 1024)
    if block < block_size:
        absmax = absmax.repeat_interleave(block_size // block)
    shape = (1, 2 * packed.numel())
    flat = bnb.dequantize_4bit(packed, absmax, block, quant_type, shape, out.dtype)
    out.view(-1).copy_(flat.view(-1)[: out.numel()])


def _dequantize_4bit_cuda(*arguments: Any) -> None:
    from fitlora.step.dequantize_kernel import dequantize_4bit

    dequantize_4bit(*arguments)


dequantize_4bit = implement("dequantize_4bit", _dequantize_4bit_cpu, _dequantize_4bit_cuda)


# --- gradients of adapters -------------------------------------------------------------------------

define("add_product(Tensor a, Tensor b, float scale, Tensor(a!) out) -> ()")


def _add_product_cpu(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    """out += scale * a^T b. a: (tokens, n), b: (tokens, m), out: (n, m), of their type or float32."""
    out.add_(torch.mm(a.t(), b), alpha=scale)


def _add_product_cuda(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a.t(), b, alpha=scale)
    else:  # 16-bit factors, summed and added in float32
        torch.ops.aten.addmm.dtype_out(out, a.t(), b, out.dtype, alpha=scale, out=out)


add_product = implement("add_product", _add_product_cpu, _add_product_cuda)


# --- dropout -------------------------------------------------------------------------------------

define(
    "dropout(Tensor x, Tensor row_keys, int stream, float p, Tensor(a!) out, bool accumulate) -> ()"
)

_MIX_1, _MIX_2, _GOLDEN = 0x21F0AAAD, 0x735A2D97, 0x9E3779B9


def _as_int32(value: int) -> int:
    """The signed number with the same 32 bits."""
    return (value & 0xFFFFFFFF) - (1 << 32) * ((value >> 31) & 1)


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32 bits that scrambles them, in place on int32 (wrapping products).

    The "lowbias32" constants of Chris Wellons' hash prospector (bias 0.11 of 2**-10 bits).
    """
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
    h.mul_(_as_int32(_MIX_1))
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    h.mul_(_as_int32(_MIX_2))
    return h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))


def row_keys(seed: int, step: int, samples: Tensor, positions: Tensor) -> Tensor:
    """One key for each token, from which every layer's mask follows.

    samples, positions: int64 (tokens,): which row of the data, and where in it. Returns int32
    (tokens,). The key depends on nothing else, so masks do not depend on how a batch is split.
    """
    keys = torch.full_like(samples, _as_int32(seed * _GOLDEN + 1), dtype=torch.int32)
    for part in (step, samples, positions):
        value = part.to(torch.int32) if isinstance(part, Tensor) else _as_int32(part)
        keys = _mix(keys.bitwise_xor_(_mix_constant(value)))
    return keys


def other_keys(row_keys: Tensor, rows: int) -> Tensor:
    """Keys of rows that are not the tokens (those that an expert is given, say): int32 (rows,).

    They follow from the first token's key and the row's number, so that a layer that is run again has
    the same.
    """
    numbers = torch.arange(rows, dtype=torch.int32, device=row_keys.device)
    return _mix(numbers.mul_(_as_int32(_GOLDEN)).bitwise_xor_(row_keys[:1]))


def _mix_constant(value: Tensor | int) -> Tensor | int:
    if isinstance(value, Tensor):
        return value * _as_int32(_GOLDEN)
    return _as_int32(value * _GOLDEN)


def keep_threshold(p: float) -> int:
    """Elements whose 16 random bits are below this are dropped."""
    return round(p * 65536)


def _dropout_cpu(
    x: Tensor, row_keys: Tensor, stream: int, p: float, out: Tensor, accumulate: bool
) -> None:
    tokens, features = x.shape
    threshold, scale = keep_threshold(p), 1.0 / (1.0 - keep_threshold(p) / 65536)
    pairs = (features + 1) // 2
    columns = torch.arange(pairs, dtype=torch.int32).mul_(_as_int32(_GOLDEN))
    stream_key = _as_int32(stream * _MIX_1 + _GOLDEN)
    rows = max(1, (1 << 18) // pairs)  # chunks that stay in the cache
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        keys = _mix(row_keys[part] ^ stream_key)
        bits = _mix(keys[:, None] + columns)
        halves = torch.stack(((bits & 0xFFFF), (bits >> 16).bitwise_and_(0xFFFF)), dim=-1)
        keep = halves.view(len(keys), 2 * pairs)[:, :features] >= threshold
        value = x[part] * keep.to(x.dtype).mul_(scale)
        if accumulate:
            out[part] += value
        else:
            out[part] = value


def _dropout_cuda(
    x: Tensor, row_keys: Tensor, stream: int, p: float, out: Tensor, accumulate: bool
) -> None:
    from fitlora.step.dropout_kernel import dropout

    dropout(x, row_keys, stream, keep_threshold(p), out, accumulate)


dropout = implement("dropout", _dropout_cpu, _dropout_cuda)


# --- attention over sequences that lie behind each other -------------------------------------------

define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, int[] lengths, float scale, int window) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor rng, Tensor unused, Tensor starts, int[] lengths, float scale, int window) "
    "-> (Tensor, Tensor, Tensor)"
)


def _segments(lengths: Sequence[int]) -> list[slice]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _window_mask(length: int, window: int, dtype: torch.dtype) -> Tensor | None:
    """Additive (length, length) mask of a sliding window; None where the window covers all."""
    if window < 0 or window >= length:
        return None
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance <= window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _heads_first(x: Tensor, groups: int) -> Tensor:
    """(tokens, kv heads, d) -> (1, heads, tokens, d)."""
    x = x.transpose(0, 1)[None]
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    out, lse, rng, unused = _attention_meta(q, k, v, starts, lengths, scale, window)
    for part in _segments(lengths):
        mask = _window_mask(part.stop - part.start, window, q.dtype)
        o, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[part], 1),
            _heads_first(k[part], groups),
            _heads_first(v[part], groups),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        out[part] = o[0].transpose(0, 1)
        lse[:, part] = logsumexp[0].view(q.shape[1], -1)
    return out, lse, rng, unused


def _attention_meta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((heads, tokens), dtype=torch.float32),
        q.new_empty((2,), dtype=torch.int64),
        q.new_empty((0,), dtype=torch.int64),
    )


def _attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest = max(lengths)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=window if window >= 0 else None, window_size_right=0,
    )  # fmt: skip
    return out, lse, rng, unused


def _attention_backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
    unused: Tensor, starts: Tensor, lengths: Sequence[int], scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    for part in _segments(lengths):
        mask = _window_mask(part.stop - part.start, window, q.dtype)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad_out[part], 1),
            _heads_first(q[part], 1),
            _heads_first(k[part], groups),
            _heads_first(v[part], groups),
            _heads_first(out[part], 1),
            lse[:, part].contiguous()[None],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        for grad, value in zip(grads, found, strict=True):
            value = value[0].transpose(0, 1)
            if value.shape[1] != grad.shape[1]:  # sum over the query heads that share a key head
                value = value.reshape(value.shape[0], -1, groups, value.shape[2]).sum(2)
            grad[part] = value
    return grads


def _attention_backward_meta(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v)


def _attention_backward_cuda(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
    unused: Tensor, starts: Tensor, lengths: Sequence[int], scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    longest = max(lengths)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, starts, starts, longest, longest, 0.0, True, rng, unused,
        scale=scale, window_size_left=window if window >= 0 else None, window_size_right=0,
    )  # fmt: skip
    return dq, dk, dv


def _attention_backward_scratch(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> list[int]:
    """What FlashAttention 2's backward allocates inside (flash_api.cpp `mha_varlen_bwd`).

    The fp32 sum of dQ and the fp32 row sums of dO*O, both padded by 128 rows for each sequence, and,
    where query heads share a key head, dK and dV for every query head before they are summed.
    """
    lengths = next(argument for argument in rest if isinstance(argument, list | tuple))
    tokens, heads, size = q.shape
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    rows = tokens + 128 * len(lengths)
    blocks = [4 * rows * heads * rounded, 4 * rows * heads]
    if k.shape[1] != heads:
        blocks += 2 * [tokens * heads * size * q.element_size()]
    return blocks


attention = implement("attention", _attention_cpu, _attention_cuda, _attention_meta)
attention_backward = implement(
    "attention_backward",
    _attention_backward_cpu,
    _attention_backward_cuda,
    _attention_backward_meta,
)
scratch_bytes["fitlora::attention_backward"] = _attention_backward_scratch


# --- products of a mixture's experts ---------------------------------------------------------------


def _grouped_scratch(a: Tensor, b: Tensor, *_: Any) -> list[int]:
    """What CUTLASS is handed for each expert, and its tensor maps for each of Hopper's multiprocessors.

    b: (experts, in, out). As in PyTorch's GroupMM.cu: three pointers, three sizes and three strides; two
    maps of the inputs and three of the outputs, 128 bytes each.
    """
    return [b.shape[0] * (3 * 8 + 3 * 4 + 3 * 8), 132 * (2 + 3) * 128]


scratch_bytes["aten::_grouped_mm"] = _grouped_scratch
