"""What a layer does between its matrix products: norms, rotary embeddings, gated units, cross-entropy.

These read and write memory and compute next to nothing, so what they cost is the bytes they move. Each
is one operator that reads its inputs once and writes over what is no longer needed: a norm's backward
adds the residual's gradient on the way, a gated unit's backward leaves its output beside the gradients
so that the product behind it has both, cross-entropy turns logits into their gradient. Nothing is saved
for backward but the inputs; what follows from them is computed again.

The weights of norms are frozen, so they get no gradient. All arithmetic is in float32 and is rounded
once, at the end. Here are the operators and their twins in plain PyTorch, which train on CPUs;
`fitlora.step.pointwise_kernels` has them in Triton.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitlora.step.ops import define, implement

_CHUNK_ELEMENTS = 1 << 16  # of one tensor: a handful of such chunks stay in a core's cache


def _chunks(x: Tensor) -> Iterator[slice]:
    """Groups of rows of x (rows, ...) that stay in the cache."""
    rows = max(1, _CHUNK_ELEMENTS * len(x) // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _on_cuda(name: str) -> Callable[..., None]:
    """The kernel of that name; Triton is imported when it first runs."""

    def run(*arguments: Any) -> None:
        from fitlora.step import pointwise_kernels

        getattr(pointwise_kernels, name)(*arguments)

    return run


def _register(name: str, arguments: str, cpu: Callable[..., None]) -> Callable[..., None]:
    define(f"{name}({arguments}) -> ()")
    return implement(name, cpu, _on_cuda(name))


# --- RMS norm ------------------------------------------------------------------------------------


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 over the root of the mean square of each row of x (..., n), float32 (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight.float()


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension.

    x, out: (rows, n) or (tokens, heads, n); weight (n,).
    """
    scale = _scale(weight, offset)
    for part in _chunks(x):
        value = x[part].float()
        out[part] = (value * _rstd(value, eps)).mul_(scale)


def _add_rms_norm(
    a: Tensor, b: Tensor, weight: Tensor, eps: float, offset: float, total: Tensor, out: Tensor
) -> None:
    """total = a + b, out = rms_norm(total). total may be a or b."""
    scale = _scale(weight, offset)
    for part in _chunks(a):
        total[part] = a[part] + b[part]
        value = total[part].float()
        out[part] = (value * _rstd(value, eps)).mul_(scale)


def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual_grad: Tensor | None,
    dx: Tensor,
) -> None:
    """dx = the gradient of rms_norm's x, and residual_grad where given; may be dy or residual_grad.

    With w = weight + offset and r = 1 / sqrt(mean(x^2) + eps): dx = r w dy - r^3 x mean(w dy x).
    """
    scale = _scale(weight, offset)
    for part in _chunks(x):
        value = x[part].float()
        rstd = _rstd(value, eps)
        grad = dy[part] * scale
        share = torch.linalg.vecdot(grad, value)[..., None].mul_(rstd**3).div_(-x.shape[-1])
        grad.mul_(rstd).addcmul_(value, share)
        dx[part] = grad if residual_grad is None else grad.add_(residual_grad[part])


rms_norm = _register(
    "rms_norm", "Tensor x, Tensor weight, float eps, float offset, Tensor(a!) out", _rms_norm
)
add_rms_norm = _register(
    "add_rms_norm",
    "Tensor a, Tensor b, Tensor weight, float eps, float offset, Tensor(a!) total, Tensor(b!) out",
    _add_rms_norm,
)
rms_norm_backward = _register(
    "rms_norm_backward",
    "Tensor dy, Tensor x, Tensor weight, float eps, float offset, Tensor? residual_grad, "
    "Tensor(a!) dx",
    _rms_norm_backward,
)


# --- rotary embeddings ---------------------------------------------------------------------------


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """Rotates q (tokens, heads, d) and k (tokens, kv heads, d) in place; backward rotates back.

    cos, sin: float32 (tokens, r/2). Feature i < r/2 goes with feature i + r/2, as in transformers;
    features from r on stay.
    """
    half = cos.shape[1]
    for x in (q, k):
        for part in _chunks(x):
            c, s = cos[part, None], sin[part, None]
            first, second = x[part, :, :half], x[part, :, half : 2 * half]
            a, b = first.float(), second.float()
            turned = b * s
            if backward:
                new_second = (b * c).addcmul_(a, s, value=-1)
                first.copy_(turned.addcmul_(a, c))
            else:
                new_second = (b * c).addcmul_(a, s)
                first.copy_(turned.neg_().addcmul_(a, c))
            second.copy_(new_second)


rope = _register("rope", "Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool backward", _rope)


# --- gated units ---------------------------------------------------------------------------------


def _activation(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(gate)
    assert kind == "gelu_tanh", kind
    return F.gelu(gate, approximate="tanh")


def _glu(gate: Tensor, up: Tensor, kind: str, out: Tensor) -> None:
    """out = act(gate) * up; all (rows, n). kind: "silu" or "gelu_tanh"."""
    for part in _chunks(gate):
        out[part] = _activation(gate[part].float(), kind).mul_(up[part])


def _glu_backward(dm: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    """dm holds the gradient of glu's out; afterwards dm is out, gate and up their own gradients."""
    aten = torch.ops.aten
    for part in _chunks(gate):
        g, u, grad = gate[part].float(), up[part].float(), dm[part].float()
        act = _activation(g, kind)
        out, d_up, d_act = act * u, act.mul_(grad), grad * u
        if kind == "silu":
            gate[part] = aten.silu_backward(d_act, g)
        else:
            gate[part] = aten.gelu_backward(d_act, g, approximate="tanh")
        up[part] = d_up
        dm[part] = out


glu = _register("glu", "Tensor gate, Tensor up, str kind, Tensor(a!) out", _glu)
glu_backward = _register(
    "glu_backward", "Tensor(a!) dm, Tensor(b!) gate, Tensor(c!) up, str kind", _glu_backward
)


# --- cross-entropy -------------------------------------------------------------------------------


def _cross_entropy(
    logits: Tensor, targets: Tensor, scale: float, softcap: float, losses: Tensor, gradient: bool
) -> None:
    """losses = logsumexp(logits) - logits[target] of each row, unscaled.

    logits: (rows, vocabulary); targets: int64 (rows,); losses: float32 (rows,). softcap: above 0,
    logits are softcap * tanh(logits / softcap) before all else. With `gradient` the logits are
    overwritten by the gradient of `scale * losses.sum()`.
    """
    for part in _chunks(logits):
        value = logits[part].float()
        if softcap > 0:
            tanh = (value / softcap).tanh_()
            value = tanh * softcap
        value = value - value.amax(1, keepdim=True)
        chosen = value.gather(1, targets[part, None])
        share = value.exp_()
        total = share.sum(1, keepdim=True)
        losses[part] = (total.log() - chosen)[:, 0]
        if not gradient:
            continue
        grad = share.mul_(scale / total)
        grad.scatter_add_(1, targets[part, None], torch.full_like(total, -scale))
        if softcap > 0:
            grad.mul_(tanh.square_().neg_().add_(1.0))
        logits[part] = grad


cross_entropy = _register(
    "cross_entropy",
    "Tensor(a!) logits, Tensor targets, float scale, float softcap, Tensor(b!) losses, "
    "bool gradient",
    _cross_entropy,
)
