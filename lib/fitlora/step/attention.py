"""Attention inside each sequence of a micro-batch, as transformers' models call it.

Registered with transformers under the name "fitlora": its models then build no mask, and hand every
layer's queries, keys and values to `attention_forward`. FlashAttention does the work where it can
(16-bit types on GPUs that have it, any type on the CPU: `Plan.flash_types`); what it lacks (soft-capped
scores, fp32, GPUs before capability 8.0) takes plain operations, sequence by sequence. Their backward is
written out as well: autograd would keep the scores, and its softmax takes a copy of them that no trace
sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Rule:
    """How scores are made: q k^T * scale, capped, and which of them are seen."""

    scale: float
    window: int  # tokens to the left that are seen; -1 for all
    softcap: float | None

    def attended(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """The share that each token gives each, float32 (heads, length, length), and the tanh of scores
        over the cap, where there is one. q, k: (heads, length, d)."""
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(self.scale)
        tanh = None
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            scores = tanh * self.softcap
        position = torch.arange(q.shape[1], device=q.device)
        hidden = position > position[:, None]
        if self.window >= 0:
            hidden |= position < position[:, None] - self.window
        return scores.float().masked_fill_(hidden, float("-inf")).softmax(-1), tanh


def _by_sequence(lengths: Sequence[int], *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of tensors (tokens, heads, d) each sequence's part, (heads, length, d)."""
    for parts in zip(*(x.split(list(lengths)) for x in tensors), strict=True):
        yield [part.transpose(0, 1) for part in parts]


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: _Rule
) -> Tensor:
    """The same in plain operations; (length, length) scores of one sequence at a time."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    for q1, k1, v1, out1 in _by_sequence(lengths, q, k, v, out):
        shares, _ = rule.attended(q1, k1.repeat_interleave(groups, 0))
        out1.copy_(torch.bmm(shares.to(v.dtype), v1.repeat_interleave(groups, 0)))
    return out


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Sequence[int], rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. What is as large as the scores is there three times at most."""
    groups = q.shape[1] // k.shape[1]
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for grad1, q1, k1, v1, out1, dq1, dk1, dv1 in _by_sequence(lengths, grad, q, k, v, out, *found):
        k1, v1 = (x.repeat_interleave(groups, 0) for x in (k1, v1))
        shares, tanh = rule.attended(q1, k1)
        _sum_groups(torch.bmm(shares.to(v.dtype).transpose(1, 2), grad1), dv1)
        # softmax's: shares * (gradient - their mean by shares), which is gradient and output's product
        mean = (grad1.float() * out1.float()).sum(-1, keepdim=True)
        scores = torch.bmm(grad1, v1.transpose(1, 2)).float().sub_(mean).mul_(shares)
        del shares
        if tanh is not None:
            scores.mul_(tanh.square_().neg_().add_(1))
            del tanh
        scores = scores.to(q.dtype).mul_(rule.scale)
        dq1.copy_(torch.bmm(scores, k1))
        _sum_groups(torch.bmm(scores.transpose(1, 2), q1), dk1)
    return found[0], found[1], found[2]


def _sum_groups(gradient: Tensor, out: Tensor) -> None:
    """Adds up (heads, length, d) over the heads that share one of `out`'s (kv heads, length, d)."""
    torch.sum(gradient.view(len(out), -1, *out.shape[1:]), 1, out=out)


class _PlainAttention(torch.autograd.Function):
    """`_plain_attention` for autograd; the scores are made again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: _Rule
    ) -> Tensor:
        out = _plain_attention(q, k, v, lengths, rule)
        ctx.save_for_backward(q, k, v, out)
        ctx.settings = (lengths, rule)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_plain_backward(grads[0], *ctx.saved_tensors, *ctx.settings), None, None


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
    if not _has_kernel(q, v, softcap, batch.flash_types):
        return _plain_attention(q, k, v, batch.lengths, _Rule(scale, window, softcap)), ()
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
    return _plain_backward(grad, q, k, v, out, batch.lengths, _Rule(scale, window, softcap))


def _has_kernel(
    q: Tensor, v: Tensor, softcap: float | None, flash_types: Sequence[torch.dtype]
) -> bool:
    fits = q.shape[-1] <= _FLASH_HEAD_SIZE and q.shape[-1] == v.shape[-1]
    return softcap is None and fits and q.dtype in flash_types


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
    # no model of `fitlora.step.families.TOGETHER` has either
    assert attention_mask is None
    assert s_aux is None
    context = cast(StepContext, module.fitlora_context)
    # transformers counts the token itself; FlashAttention counts those to its left
    window = -1 if sliding_window is None else sliding_window - 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if _has_kernel(q, v, softcap, context.flash_types):
        out = _Attention.apply(q, k, v, context.starts, context.lengths, scale, window)
    else:
        out = _PlainAttention.apply(q, k, v, context.lengths, _Rule(scale, window, softcap))
    return out[None], None


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
