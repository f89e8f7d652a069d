"""Cross-entropy without the logits: a chunk of rows at a time, its gradient taken at once.

Logits of a 128k vocabulary are the largest tensor of a step: 2,048 tokens take 1 GiB in fp32, and
autograd would keep them. Here a chunk of rows goes through the head, gives its loss and the gradient
of its hidden states, and its buffer is used again. The idea is that of Liger's fused linear
cross-entropy; this is the plain PyTorch form.
"""

from typing import Any, cast

import torch
from torch import Tensor


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
        need_grad: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if need_grad else None
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            target = targets[start : start + chunk, None]
            logits = torch.mm(rows, weight.t())
            if bias is not None:
                logits.add_(bias)
            p = logits.to(torch.float32)
            del logits
            p.sub_(p.amax(1, keepdim=True))
            chosen = p.gather(1, target)
            p.exp_()
            norm = p.sum(1, keepdim=True)
            total.add_((norm.log() - chosen).sum(), alpha=scale)
            if grad is not None:
                p.div_(norm)
                p.scatter_add_(1, target, torch.full_like(chosen, -1.0))
                p.mul_(scale)
                torch.mm(p.to(weight.dtype), weight, out=grad[start : start + chunk])
            del p
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
