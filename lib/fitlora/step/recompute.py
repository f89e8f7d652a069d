"""Recomputing a decoder layer in backward instead of keeping its activations.

PyTorch's own checkpoint does the same through hooks on every saved tensor. This one keeps the layer's
input, runs the layer again, and nothing else; random numbers need no care, as dropout masks are a
function of the token.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class _Recomputed(torch.autograd.Function):
    """Runs `layer` on `hidden` without a graph, and with one in backward.

    `anchor` is any tensor that requires grad: without it autograd would skip the first layer's
    backward, whose input (the frozen embedding's output) requires none, though its adapters do.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, hidden: Tensor, layer: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.layer = layer
        with torch.no_grad():
            return layer(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            out = ctx.layer(hidden)
        torch.autograd.backward(out, grads[0])
        return None, hidden.grad, None


def arrange(layers: Sequence[nn.Module], recomputed: Collection[int]) -> None:
    """Makes the decoder layers with these numbers recompute their activations, and the others not.

    It may be called again with another choice, between steps.
    """
    for index, layer in enumerate(layers):
        if not hasattr(layer, "recomputes"):
            _wrap(layer)
        layer.recomputes = index in recomputed  # type: ignore[assignment]


def _wrap(layer: nn.Module) -> None:
    forward = layer.forward
    anchor = next((p for p in layer.parameters() if p.requires_grad), None)

    def wrapped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if anchor is None or not layer.recomputes or not torch.is_grad_enabled():
            return cast(Tensor, forward(hidden_states, *args, **kwargs))

        def run(hidden: Tensor) -> Tensor:
            return cast(Tensor, forward(hidden, *args, **kwargs))

        return cast(Tensor, _Recomputed.apply(anchor, hidden_states, run))

    layer.forward = wrapped
