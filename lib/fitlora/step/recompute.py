"""Recomputing a decoder layer in backward instead of keeping its activations.

PyTorch's own checkpoint does the same through hooks on every saved tensor. This one keeps the layer's
input, runs the layer again, and nothing else; random numbers need no care, as dropout masks are a
function of the token, and a model's own dropout is off (`fitlora.step.training_step`).
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Recomputed(torch.autograd.Function):
    """Runs `layer` on `given` without a graph, and with one in backward.

    given: the hidden states, and other tensors that a gradient belongs to. It returns a tensor, or a
    tuple with tensors in it. `anchor` is any tensor that requires grad: without it autograd would skip
    the lowest learning layer's backward, whose input (of frozen layers alone) requires none, though its
    adapters do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        layer: Callable[..., Any],
        at_home: Callable[[bool], AbstractContextManager[None]],
        *given: Tensor,
    ) -> Any:
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.at_home = layer, at_home
        with torch.no_grad(), at_home(False):
            return layer(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        given = [
            x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with ctx.at_home(True):
            with torch.enable_grad():
                out = ctx.layer(*given)
            outs = out if isinstance(out, tuple) else (out,)
            told = [i for i, grad in enumerate(grads) if grad is not None]
            torch.autograd.backward([outs[i] for i in told], [grads[i] for i in told])
        return None, None, None, *(x.grad for x in given)


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

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        # the hidden states, and what some models hand on beside them that a gradient belongs to
        places = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and (i == 0 or x.requires_grad)
        ]
        given = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None  # the rest is held until backward

        def run(*tensors: Tensor) -> Any:
            whole = list(leaves)
            for i, x in zip(places, tensors, strict=True):
                whole[i] = x
            args, kwargs = tree_unflatten(whole, structure)
            return forward(*args, **kwargs)

        anchor = next((p for p in parameters if p.requires_grad), None)
        learns = anchor is not None or any(x.requires_grad for x in given)
        if layer.recomputes and torch.is_grad_enabled() and learns:
            return _Recomputed.apply(anchor, run, home, *given)
        with home(False):
            return forward(*args, **kwargs)

    layer.forward = wrapped
