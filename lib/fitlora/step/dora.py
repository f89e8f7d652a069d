"""DoRA: the magnitude of each output is learned apart from its direction (arXiv 2402.09353, eq. 5).

With V = W + s B A, an output is m / ||V|| times that of V, row by row; m starts as ||W||, and ||V|| is
taken as a constant in backward (section 4.3). As in peft, dropout applies to what DoRA changes and not
to the frozen product. ||V|| comes from W and the two small matrices without V being made:

    ||V||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 B (A A^T) . B       (products of rows)
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fitlora.step.linear import LoraLinear


class Magnitude(nn.Module):
    """m, float32 (out,), by the name that peft has for it."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, dtype=torch.float32, device="meta"))


def row_norms(weight: Tensor) -> Tensor:
    """weight: (out, in). Returns float32 (out,)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norms


def _norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||weight + scale * b a|| of each row, float32 (out,). a: (r, in), b: (out, r), float32."""
    crossed = torch.mm(weight, a.to(weight.dtype).t()).float()
    squares = row_norms(weight).square_()
    squares.add_(crossed.mul_(b).sum(1), alpha=2 * scale)
    squares.add_(torch.mm(b, torch.mm(a, a.t())).mul_(b).sum(1), alpha=scale**2)
    return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


class DoraProduct(torch.autograd.Function):
    """x W^T with DoRA's change. x: (tokens, in), a: (r, in), b: (out, r), m: (out,) -> (tokens, out).

    With u = x' W^T + s x' A^T B^T, x' = dropout(x) and c = m / ||V||, the output is
    c u + (x - x') W^T. Saved: x, h = x' A^T, u and ||V||.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, m: Tensor, layer: "LoraLinear"
    ) -> Tensor:
        weight = layer.frozen.compute_weight(x.dtype)
        norms = _norms(weight, a, b, layer.scale)
        dropped = layer.dropped(x)
        h = torch.mm(dropped, a.to(x.dtype).t())
        u = torch.mm(dropped, weight.t())
        u.addmm_(h, b.to(x.dtype).t(), alpha=layer.scale)
        y = u * (m / norms).to(x.dtype)
        if layer.dropout > 0.0:
            y.addmm_(x - dropped, weight.t())
        ctx.layer = layer
        ctx.save_for_backward(x, h, u, norms, a, b, m)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, u, norms, a, b, m = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        (dy,) = grads
        dm = (dy * u).sum(0, dtype=torch.float32).div_(norms)
        du = dy * (m / norms).to(dy.dtype)
        db = torch.mm(du.t(), h).to(b.dtype).mul_(layer.scale)
        dh = torch.mm(du, b.to(dy.dtype)).mul_(layer.scale)
        da = torch.mm(dh.t(), layer.dropped(x)).to(a.dtype)
        if not ctx.needs_input_grad[0]:
            return None, da, db, dm, None
        weight = layer.frozen.compute_weight(dy.dtype)
        if layer.dropout > 0.0:
            dx = torch.mm(dy, weight)
            through = torch.mm(du.sub_(dy), weight).addmm_(dh, a.to(dy.dtype))
            layer.add_dropped(through, dx)
        else:
            dx = torch.mm(du, weight).addmm_(dh, a.to(dy.dtype))
        return dx, da, db, dm, None
