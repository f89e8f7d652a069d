"""Recomputing a decoder layer in backward instead of keeping its activations.

PyTorch's own checkpoint does the same through hooks on every saved tensor. This one keeps the layer's
input, runs the layer again, and nothing else; random numbers need no care, as dropout masks are a
function of the token.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class _Recomputed(torch.autograd.Function):
    """Runs `layer` on `hidden` without a graph, and with one in backward.

    `anchor` is any tensor that requires grad: without it autograd would skip the lowest learning layer's
    backward, whose input (of frozen layers alone) requires none, though its adapters do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        hidden: Tensor,
        layer: Callable[[Tensor], Tensor],
        at_home: Callable[[bool], AbstractContextManager[None]],
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.layer, ctx.at_home = layer, at_home
        with torch.no_grad(), at_home(False):
            return layer(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        with ctx.at_home(True):
            with torch.enable_grad():
                out = ctx.layer(hidden)
            torch.autograd.backward(out, grads[0])
        return None, hidden.grad, None, None


class AtHome(Protocol):
    """Has a layer's weights on the device inside, wherever they are otherwise."""

    def __call__(self, layer: int, *, backward: bool = False) -> AbstractContextManager[None]: ...


def arrange(
    layers: Sequence[nn.Module], recomputed: Collection[int], *, at_home: AtHome | None = None
) -> None:
    """Makes the decoder layers with these numbers recompute their activations, and the others not.

    It may be called again with another choice, between steps; at_home counts the first time.
    """
    for index, layer in enumerate(layers):
        if not hasattr(layer, "recomputes"):
            _wrap(layer, index, at_home)
        layer.recomputes = index in recomputed  # type: ignore[assignment]


def _wrap(layer: nn.Module, index: int, at_home: AtHome | None) -> None:
    forward = layer.forward
    parameters = [p for p in layer.parameters() if p.requires_grad]  # frozen ones may learn later

    def home(backward: bool) -> AbstractContextManager[None]:
        return nullcontext() if at_home is None else at_home(index, backward=backward)

    def wrapped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            return cast(Tensor, forward(hidden, *args, **kwargs))

        anchor = next((p for p in parameters if p.requires_grad), None)
        in_graph = torch.is_grad_enabled() and (anchor is not None or hidden_states.requires_grad)
        if layer.recomputes and in_graph:
            return cast(Tensor, _Recomputed.apply(anchor, hidden_states, run, home))
        with home(False):
            return run(hidden_states)

    layer.forward = wrapped
