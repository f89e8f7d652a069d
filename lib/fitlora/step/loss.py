"""Cross-entropy without the logits: a chunk of rows at a time, its gradient taken at once.

Logits of a 128k vocabulary are the largest tensor of a step: 2,048 tokens take 1 GiB in fp32, and
autograd would keep them. Here a chunk of rows goes through the head, gives its loss and the gradient
of its hidden states, and its buffer is used again. The idea is that of Liger's fused linear
cross-entropy; a chunk's logits are turned into their gradient where they lie.
"""

from typing import Any, cast

import torch
from torch import Tensor

from fitlora.step.pointwise import cross_entropy


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float,
    chunk: int,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`scale` times the summed cross-entropy of `targets` under the head, and the gradient of hidden.

    hidden: (rows, hidden), weight: (vocabulary, hidden), targets: int64 (rows,). softcap: above 0,
    logits are softcap * tanh(logits / softcap). Returns float32 () and, with `gradient`, (rows, hidden).
    """
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden) if gradient else None
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        logits = torch.mm(hidden[part], weight.t())
        if bias is not None:
            logits.add_(bias)
        cross_entropy(logits, targets[part], scale, softcap, losses[part], gradient)
        if grad is not None:
            torch.mm(logits, weight, out=grad[part])
        del logits
    return losses.sum().mul_(scale), grad


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        chunk: int,
        gradient: bool,
    ) -> Tensor:
        total, grad = head_loss(
            hidden, weight, targets, scale=scale, chunk=chunk, bias=bias, gradient=gradient
        )
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grads[0]), None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float,
    chunk: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`scale` times the summed cross-entropy of `targets` under the head `weight`.

    hidden: (rows, hidden), weight: (vocabulary, hidden), frozen; targets: int64 (rows,). Returns a
    float32 scalar. Backward may be called once.
    """
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    return cast(
        Tensor,
        _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, scale, chunk, need_grad),
    )
