"""Attention inside each sequence of a micro-batch, as transformers' models call it.

Registered with transformers under the name "fitlora": its models then build no mask, and hand every
layer's queries, keys and values to `attention_forward`. FlashAttention does the work where it can
(bfloat16 on CUDA, any type on the CPU); what it lacks here (soft-capped scores, fp32 and fp16 on CUDA)
takes plain operations, sequence by sequence.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fitlora.step import ops
from fitlora.step.batch import MicroBatch, StepContext

NAME = "fitlora"
_FLASH_HEAD_SIZE = 256  # the largest that FlashAttention 2 has kernels for


class _Attention(torch.autograd.Function):
    """q: (tokens, heads, d), k and v: (tokens, kv heads, d) -> (tokens, heads, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        lengths: list[int],
        scale: float,
        window: int,
    ) -> Tensor:
        out, lse, rng, unused = ops.attention(q, k, v, starts, lengths, scale, window)
        ctx.save_for_backward(q, k, v, out, lse, rng, unused, starts)
        ctx.settings = (lengths, scale, window)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ops.attention_backward(grads[0], *ctx.saved_tensors, *ctx.settings)
        return dq, dk, dv, None, None, None, None


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    softcap: float | None,
) -> Tensor:
    """The same in plain operations; (length, length) scores of one sequence at a time."""
    groups = q.shape[1] // k.shape[1]
    parts = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        length = q1.shape[0]
        k1 = k1.repeat_interleave(groups, dim=1)
        v1 = v1.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q1, k1) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        hidden = distance < 0
        if window >= 0:
            hidden |= distance > window
        scores = scores.float().masked_fill(hidden, float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v1.dtype), v1))
    return torch.cat(parts)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: MicroBatch,
    scale: float,
    window: int,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention inside each sequence, without autograd.

    q: (tokens, heads, d), k and v: (tokens, kv heads, d). Returns (tokens, heads, d) and what
    `attend_backward` needs beside its arguments.
    """
    if not _has_kernel(q, v, softcap, batch.kind):
        with torch.no_grad():
            return _plain_attention(q, k, v, batch.lengths, scale, window, softcap), ()
    out, *rest = ops.attention(q, k, v, batch.starts, batch.lengths, scale, window)
    return out, tuple(rest)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rest: tuple[Tensor, ...] | None,
    batch: MicroBatch,
    scale: float,
    window: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; grad and out: (tokens, heads, d)."""
    if rest:
        dq, dk, dv = ops.attention_backward(
            grad, q, k, v, out, *rest, batch.starts, batch.lengths, scale, window
        )
        return dq, dk, dv
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = _plain_attention(q, k, v, batch.lengths, scale, window, softcap)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad)
    return dq, dk, dv


def _has_kernel(q: Tensor, v: Tensor, softcap: float | None, kind: str) -> bool:
    # GPUs that float16 is for, those without bfloat16, have no FlashAttention
    fast = q.dtype == torch.bfloat16 or kind == "cpu"
    fits = q.shape[-1] <= _FLASH_HEAD_SIZE and q.shape[-1] == v.shape[-1]
    return softcap is None and fits and fast


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    query: (1, heads, tokens, d), key and value: (1, kv heads, tokens, d). Returns
    (1, tokens, heads, d).
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks have no kernel here")
    context = cast(StepContext, module.fitlora_context)
    # transformers counts the token itself; FlashAttention counts those to its left
    window = -1 if sliding_window is None else sliding_window - 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if _has_kernel(q, v, softcap, context.kind):
        out = _Attention.apply(q, k, v, context.starts, context.lengths, scale, window)
    else:
        out = _plain_attention(q, k, v, context.lengths, scale, window, softcap)
    return out[None], None


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
