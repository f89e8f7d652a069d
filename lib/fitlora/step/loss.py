"""Cross-entropy without the logits: a chunk of rows at a time, its gradient taken at once.

Logits of a 128k vocabulary are the largest tensor of a step: 2,048 tokens take 1 GiB in fp32, and
autograd would keep them. Here a chunk of rows goes through the head, gives its loss and the gradient
of its hidden states, and its buffer is used again. The idea is that of Liger's fused linear
cross-entropy; a chunk's logits are turned into their gradient where they lie.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fitlora.offload.vocabulary import Slices, sliced_losses
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
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`scale` times the summed cross-entropy of `targets` under the head, and the gradient of hidden.

    hidden: (rows, hidden), weight: (vocabulary, hidden), targets: int64 (rows,). softcap: above 0,
    logits are softcap * tanh(logits / softcap). weight_grad, bias_grad: float32, where the head's own
    gradients are added, with `gradient`. Returns float32 () and, with `gradient`, (rows, hidden).
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
        if weight_grad is not None:
            weight_grad.add_(torch.mm(logits.t(), hidden[part]))
        if bias_grad is not None:
            bias_grad.add_(logits.sum(0, dtype=torch.float32))
        del logits
    return losses.sum().mul_(scale), grad


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients for `inputs` are there already; those of None are none."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [None if part is None else part.mul_(grads[0]) for part in ctx.saved_tensors]
        return None, None, *parts


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

    hidden: (rows, hidden), weight: (vocabulary, hidden), bias: (vocabulary,); each may be trained.
    targets: int64 (rows,). Returns a float32 scalar. Backward may be called once.
    """
    inputs = hidden, weight, bias
    gradient = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in inputs
    )
    with torch.no_grad():
        # of a head that is trained, which is kept in float32 and computed with as hidden is
        learned = [
            torch.zeros_like(part) if gradient and part is not None and part.requires_grad else None
            for part in (weight, bias)
        ]
        loss, grad = head_loss(
            hidden,
            weight.to(hidden.dtype),
            targets,
            scale=scale,
            chunk=chunk,
            bias=bias,
            gradient=gradient,
            weight_grad=learned[0],
            bias_grad=learned[1],
        )
    if grad is None:
        return loss
    return cast(Tensor, _KnownGradients.apply(loss, (grad, *learned), *inputs))


def sliced_cross_entropy(
    hidden: Tensor,
    slices: Slices,
    targets: Tensor,
    *,
    scale: float,
    chunk: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`chunked_cross_entropy` under a frozen head that comes in slices, as `sliced_losses` takes it."""
    with torch.no_grad():
        ((loss, grad),) = sliced_losses(
            [(hidden, targets)],
            slices,
            scale=scale,
            chunk=chunk,
            bias=bias,
            gradient=hidden.requires_grad,
        )
    return loss if grad is None else cast(Tensor, _KnownGradients.apply(loss, (grad,), hidden))
