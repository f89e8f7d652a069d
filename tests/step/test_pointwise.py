"""The pointwise operators on the CPU, against autograd through the plain formulas in float32."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fitlora.step import pointwise  # noqa: F401  (defines the operators)

fitlora = torch.ops.fitlora
# many rows, so that they come in several chunks; rows and sizes that are no power of two
SHAPES = [(1, 1), (1, 7), (3, 4096), (1000, 130), (7, 5, 16), (900, 3, 33)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in rows that lie further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn((*shape[:-1], shape[-1] + 3), generator=generator).to(dtype)
    return wide[..., : shape[-1]]


def empty(like: Tensor) -> Tensor:
    """NaN in rows of their own distance."""
    out = torch.full((*like.shape[:-1], like.shape[-1] + 2), math.nan, dtype=like.dtype)
    return out[..., : like.shape[-1]]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return [*torch.autograd.grad(function(*leaves), leaves, grad)]


# --- RMS norm ------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + offset)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(shape: tuple[int, ...], offset: float) -> None:
    x, weight = random(*shape), random(shape[-1], seed=1)
    out = empty(x)
    fitlora.rms_norm(x, weight, 1e-5, offset, out)
    close(out, norm(x, weight, offset))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("total_is", ["a", "b", None])
def test_norm_of_a_sum(shape: tuple[int, ...], offset: float, total_is: str | None) -> None:
    a, b, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    total = {"a": a, "b": b, None: empty(a)}[total_is]
    out, expected = empty(a), a + b
    fitlora.add_rms_norm(a, b, weight, 1e-5, offset, total, out)
    close(total, expected)
    close(out, norm(expected, weight, offset))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dx_is", ["dy", "residual", None])
def test_norm_backward(shape: tuple[int, ...], offset: float, dx_is: str | None) -> None:
    x, dy, residual = (random(*shape, seed=seed) for seed in range(3))
    weight = random(shape[-1], seed=3)
    (gradient,) = gradients(lambda x: norm(x, weight, offset), [x], dy)
    alone = empty(x)
    fitlora.rms_norm_backward(dy, x, weight, 1e-5, offset, None, alone)
    close(alone, gradient)
    expected = gradient + residual
    dx = {"dy": dy, "residual": residual, None: empty(x)}[dx_is]
    fitlora.rms_norm_backward(dy, x, weight, 1e-5, offset, residual, dx)
    close(dx, expected)


def test_bf16_is_rounded_once() -> None:
    """The norm of bf16 numbers is the nearest bf16 number to the exact one."""
    x, weight = (random(*s, dtype=torch.bfloat16) for s in ((50, 64), (64,)))
    out = empty(x)
    fitlora.rms_norm(x, weight, 1e-5, 0.0, out)
    exact = norm(x.double(), weight.double(), 0.0)
    assert float(((out.double() - exact).abs() / exact.abs()).max()) < 2**-8 * 1.001


# --- rotary embeddings ---------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it."""
    size = 2 * cos.shape[-1]
    cos, sin = (torch.cat((t, t), dim=-1)[:, None] for t in (cos, sin))
    turning, rest = x[..., :size], x[..., size:]
    half = torch.cat((-turning[..., size // 2 :], turning[..., : size // 2]), dim=-1)
    return torch.cat((turning * cos + half * sin, rest), dim=-1)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "turned"),
    [(1, 1, 1, 2, 2), (9, 4, 2, 16, 16), (1000, 5, 1, 24, 10), (333, 12, 12, 128, 128)],
)
def test_rope(tokens: int, heads: int, kv_heads: int, size: int, turned: int) -> None:
    before = [random(tokens, heads, size), random(tokens, kv_heads, size, seed=1)]
    angle = random(tokens, turned // 2, seed=2) * 10
    cos, sin = angle.cos(), angle.sin()
    q, k = (x.clone() for x in before)
    fitlora.rope(q, k, cos, sin, False)
    for found, x in zip((q, k), before, strict=True):
        close(found, rotated(x, cos, sin))
    fitlora.rope(q, k, cos, sin, True)  # and back
    for found, x in zip((q, k), before, strict=True):
        close(found, x)
    # what turns back is also the gradient
    dq, dk = before[0].clone(), before[1].clone()
    fitlora.rope(dq, dk, cos, sin, True)
    for found, x in zip((dq, dk), before, strict=True):
        close(found, gradients(lambda x: rotated(x, cos, sin), [x], x)[0])


def test_rope_within_a_fused_product() -> None:
    """q and k are views of one tensor, whose other parts stay."""
    fused = random(20, 3 * 4 * 8)
    before = fused.clone()
    q, k = (fused[:, 32 * i : 32 * (i + 1)].view(20, 4, 8) for i in (0, 1))
    angle = random(20, 4, seed=1)
    expected = [rotated(x, angle.cos(), angle.sin()) for x in (q, k)]
    fitlora.rope(q, k, angle.cos(), angle.sin(), False)
    for found, other in zip((q, k), expected, strict=True):
        close(found, other)
    assert torch.equal(fused[:, 64:], before[:, 64:])


# --- gated units ---------------------------------------------------------------------------------


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    act = gate * torch.sigmoid(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 5000), (3000, 50)])
def test_gated_unit(shape: tuple[int, int], kind: str) -> None:
    gate, up, dm = random(*shape) * 5, random(*shape, seed=1), random(*shape, seed=2)
    expected = glu(gate, up, kind)
    d_gate, d_up = gradients(lambda g, u: glu(g, u, kind), [gate, up], dm)
    out = empty(gate)
    fitlora.glu(gate, up, kind, out)
    close(out, expected)
    fitlora.glu_backward(dm, gate, up, kind)
    for found, other in zip((dm, gate, up), (expected, d_gate, d_up), strict=True):
        close(found, other)


def test_gated_unit_within_a_fused_product() -> None:
    """gate and up are the halves of one product's rows."""
    both, dm = random(30, 80), random(30, 40, seed=1)
    gate, up = both.chunk(2, dim=1)
    expected = gradients(lambda g, u: glu(g, u, "silu"), [gate, up], dm)
    fitlora.glu_backward(dm, gate, up, "silu")
    close(both, torch.cat(expected, dim=1))


def test_gates_far_out() -> None:
    """Neither overflow nor 0 * inf."""
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]])
    for kind in ("silu", "gelu_tanh"):
        g, up, dm = gate.clone(), torch.ones_like(gate), torch.ones_like(gate)
        fitlora.glu_backward(dm, g, up, kind)
        close(dm, gate.relu())
        close(g, (gate > 0).float())
        close(up, gate.relu())


# --- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 33), (400, 1000), (3, 100_003)])
def test_cross_entropy(rows: int, vocabulary: int, softcap: float, gradient: bool) -> None:
    logits = random(rows, vocabulary) * 5
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))

    def losses_of(logits: Tensor) -> Tensor:
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction="none")

    expected = losses_of(logits)
    (grad,) = gradients(losses_of, [logits], torch.full((rows,), 0.25))
    before, losses = logits.clone(), torch.full((rows,), math.nan)
    fitlora.cross_entropy(logits, targets, 0.25, softcap, losses, gradient)
    close(losses, expected)
    assert torch.equal(logits, before) if not gradient else True
    if gradient:
        close(logits, grad)


def test_large_logits_do_not_overflow() -> None:
    logits, losses = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]]), torch.zeros(2)
    fitlora.cross_entropy(logits, torch.tensor([0, 1]), 1.0, 0.0, losses, True)
    close(losses, torch.tensor([math.log(2), math.log(3)]))
    close(logits, torch.tensor([[-0.5, 0.0, 0.5], [1 / 3, -2 / 3, 1 / 3]]))


# --- all -----------------------------------------------------------------------------------------


def calls(device: str) -> list[tuple[str, tuple[Any, ...]]]:
    def make(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    targets = torch.zeros(3, dtype=torch.int64, device=device)
    return [
        ("rms_norm", (make(3, 4), make(4), 1e-5, 0.0, make(3, 4))),
        ("add_rms_norm", (make(3, 4), make(3, 4), make(4), 1e-5, 0.0, make(3, 4), make(3, 4))),
        ("rms_norm_backward", (make(3, 4), make(3, 4), make(4), 1e-5, 0.0, None, make(3, 4))),
        ("rope", (make(3, 2, 4), make(3, 1, 4), make(3, 2), make(3, 2), True)),
        ("glu", (make(3, 4), make(3, 4), "silu", make(3, 4))),
        ("glu_backward", (make(3, 4), make(3, 4), make(3, 4), "silu")),
        ("cross_entropy", (make(3, 4), targets, 1.0, 0.0, make(3), True)),
    ]


def test_they_run_on_meta() -> None:
    for name, arguments in calls("meta"):
        assert getattr(fitlora, name)(*arguments) is None


def test_they_say_what_they_mutate() -> None:
    """A trace that believed otherwise would free or reorder what is still needed."""
    for name, arguments in calls("cpu"):
        schema = getattr(fitlora, name).default._schema
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        getattr(fitlora, name)(*arguments)
        for argument, old, new in zip(schema.arguments, before, arguments, strict=True):
            if isinstance(new, Tensor):
                mutable = argument.alias_info is not None and argument.alias_info.is_write
                assert torch.equal(old, new) != mutable, (name, argument.name)
