"""The pointwise operators of a layer in Triton; `fitlora.step.pointwise` says what they compute.

A norm's program holds whole rows in registers, so a row is read once. Everything else is split into
pieces of 16 bytes a thread. Rows may be further apart than they are long; row offsets are 64 bits.
"""

import triton
import triton.language as tl
from torch import Tensor

_GLU_BLOCK = 1024
_VOCABULARY_BLOCK = 8192
_TILE = 4096  # elements of the small rows that one program takes


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Elements from one token to the next, and from one head to the next."""
    assert x.stride(-1) == 1
    return (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), 0)


# --- RMS norm ------------------------------------------------------------------------------------


@triton.jit
def _offsets(row, heads, token_stride, head_stride):  # type: ignore[no-untyped-def]
    return ((row // heads) * token_stride + (row % heads) * head_stride)[:, None]


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    a, b, weight, total, out, rows, heads, n, eps, offset,
    a_token, a_head, b_token, b_head, total_token, total_head, out_token, out_head,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    x = tl.load(a + _offsets(row, heads, a_token, a_head) + column[None, :], mask=inside, other=0.0)
    if ADD:
        at = _offsets(row, heads, b_token, b_head) + column[None, :]
        y = tl.load(b + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(total.dtype.element_ty)
        at = _offsets(row, heads, total_token, total_head) + column[None, :]
        tl.store(total + at, x, mask=inside)
    x = x.to(tl.float32)
    w = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / n + eps)
    y = x * rstd[:, None] * w[None, :]
    at = _offsets(row, heads, out_token, out_head) + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    dy, x, weight, residual, dx, rows, heads, n, eps, offset,
    dy_token, dy_head, x_token, x_head, residual_token, residual_head, dx_token, dx_head,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    at = _offsets(row, heads, x_token, x_head) + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    at = _offsets(row, heads, dy_token, dy_head) + column[None, :]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32) + offset
    grad = grad * w[None, :]
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / n + eps)
    share = tl.sum(grad * value, axis=1) / n * rstd * rstd
    grad = (grad - value * share[:, None]) * rstd[:, None]
    if ADD:
        at = _offsets(row, heads, residual_token, residual_head) + column[None, :]
        grad += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = _offsets(row, heads, dx_token, dx_head) + column[None, :]
    tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)


def _norm_launch(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """Rows, heads, row length; rows of one program, its block, its warps."""
    n = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    block = triton.next_power_of_2(n)
    rows = max(1, min(16, _TILE // block))
    return len(x) * heads, heads, n, rows, block, min(16, max(4, rows * block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """See `fitlora::rms_norm`."""
    rows, heads, n, tile, block, warps = _norm_launch(x)
    strides = (*_row_strides(x), 0, 0, 0, 0, *_row_strides(out))
    _rms_norm[(triton.cdiv(rows, tile),)](
        x, x, weight, out, out, rows, heads, n, eps, offset, *strides,
        ADD=False, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def add_rms_norm(
    a: Tensor, b: Tensor, weight: Tensor, eps: float, offset: float, total: Tensor, out: Tensor
) -> None:
    """See `fitlora::add_rms_norm`."""
    rows, heads, n, tile, block, warps = _norm_launch(a)
    strides = (*_row_strides(a), *_row_strides(b), *_row_strides(total), *_row_strides(out))
    _rms_norm[(triton.cdiv(rows, tile),)](
        a, b, weight, total, out, rows, heads, n, eps, offset, *strides,
        ADD=True, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual_grad: Tensor | None,
    dx: Tensor,
) -> None:
    """See `fitlora::rms_norm_backward`."""
    rows, heads, n, tile, block, warps = _norm_launch(x)
    residual = dy if residual_grad is None else residual_grad
    strides = (*_row_strides(dy), *_row_strides(x), *_row_strides(residual), *_row_strides(dx))
    _rms_norm_backward[(triton.cdiv(rows, tile),)](
        dy, x, weight, residual, dx, rows, heads, n, eps, offset, *strides,
        ADD=residual_grad is not None, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip


# --- rotary embeddings ---------------------------------------------------------------------------


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, cos, sin, head_stride, half, ALL: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    column = tl.arange(0, HALF)[None, :]
    for start in range(0, ALL, HEADS):
        head = (start + tl.arange(0, HEADS))[:, None]
        inside = (head < ALL) & (column < half)
        first = x + head * head_stride + column
        a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(first, (a * cos - b * sin).to(x.dtype.element_ty), mask=inside)
        tl.store(first + half, (b * cos + a * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rope(  # type: ignore[no-untyped-def]
    q, k, cos, sin, half, q_token, q_head, k_token, k_head, cos_token, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * cos_token + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * sin_token + column, mask=column < half, other=0.0)
    if BACKWARD:
        s = -s
    _turn(q + token * q_token, c, s, q_head, half, Q_HEADS, HEADS, HALF)
    _turn(k + token * k_token, c, s, k_head, half, K_HEADS, HEADS, HALF)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """See `fitlora::rope`."""
    tokens, half = cos.shape
    assert cos.stride(1) == sin.stride(1) == 1
    block = triton.next_power_of_2(half)
    heads = max(1, min(triton.next_power_of_2(q.shape[1]), 2048 // block))
    _rope[(tokens,)](
        q, k, cos, sin, half, *_row_strides(q), *_row_strides(k), cos.stride(0), sin.stride(0),
        Q_HEADS=q.shape[1], K_HEADS=k.shape[1], BACKWARD=backward, HEADS=heads, HALF=block,
        num_warps=4,
    )  # fmt: skip


# --- gated units ---------------------------------------------------------------------------------


@triton.jit
def _share(x, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(x) / x, a sigmoid: of x for silu, of 2 y for gelu's form x (1 + tanh(y)) / 2."""
    if GELU:
        x = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    return tl.sigmoid(x)


@triton.jit
def _glu(  # type: ignore[no-untyped-def]
    gate, up, out, n, blocks, gate_row, up_row, out_row, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    act = g * _share(g, GELU)
    tl.store(out + row * out_row + column, (act * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward(  # type: ignore[no-untyped-def]
    dm, gate, up, n, blocks, dm_row, gate_row, up_row, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    dm += row * dm_row + column
    gate += row * gate_row + column
    up += row * up_row + column
    grad = tl.load(dm, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    s = _share(g, GELU)
    act = g * s
    d_act = act * (1.0 - s)
    if GELU:
        d_act *= 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    d_act += s
    tl.store(dm, (act * u).to(dm.dtype.element_ty), mask=inside)
    tl.store(gate, (grad * u * d_act).to(gate.dtype.element_ty), mask=inside)
    tl.store(up, (grad * act).to(up.dtype.element_ty), mask=inside)


def _is_gelu(kind: str) -> bool:
    assert kind in ("silu", "gelu_tanh"), kind
    return kind == "gelu_tanh"


def glu(gate: Tensor, up: Tensor, kind: str, out: Tensor) -> None:
    """See `fitlora::glu`."""
    rows, n = gate.shape
    assert gate.stride(1) == up.stride(1) == out.stride(1) == 1
    blocks = triton.cdiv(n, _GLU_BLOCK)
    _glu[(rows * blocks,)](
        gate, up, out, n, blocks, gate.stride(0), up.stride(0), out.stride(0),
        GELU=_is_gelu(kind), BLOCK=_GLU_BLOCK,
    )  # fmt: skip


def glu_backward(dm: Tensor, gate: Tensor, up: Tensor, kind: str) -> None:
    """See `fitlora::glu_backward`."""
    rows, n = gate.shape
    assert dm.stride(1) == gate.stride(1) == up.stride(1) == 1
    blocks = triton.cdiv(n, _GLU_BLOCK)
    _glu_backward[(rows * blocks,)](
        dm, gate, up, n, blocks, dm.stride(0), gate.stride(0), up.stride(0),
        GELU=_is_gelu(kind), BLOCK=_GLU_BLOCK,
    )  # fmt: skip


# --- cross-entropy -------------------------------------------------------------------------------


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if CAP:  # softcap * tanh(x / softcap)
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, losses, logits_row, scale, softcap, VOCABULARY: tl.constexpr,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    target = tl.load(targets + row)
    chosen = _capped(tl.load(logits + target).to(tl.float32), softcap, CAP)
    largest = -3.0e38
    sums = tl.zeros((BLOCK,), tl.float32)  # of exp(logit - largest), lane by lane
    for start in range(0, VOCABULARY, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < VOCABULARY
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _capped(x, softcap, CAP), -float("inf"))
        above = tl.maximum(largest, tl.max(x, axis=0))
        sums = sums * tl.exp(largest - above) + tl.exp(x - above)
        largest = above
    total = tl.sum(sums, axis=0)
    tl.store(losses + row, tl.log(total) - (chosen - largest))
    if GRADIENT:
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < VOCABULARY
            x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
            x = _capped(x, softcap, CAP)
            grad = tl.exp(x - largest) * (scale / total) - tl.where(column == target, scale, 0.0)
            if CAP:
                grad *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(
    logits: Tensor, targets: Tensor, scale: float, softcap: float, losses: Tensor, gradient: bool
) -> None:
    """See `fitlora::cross_entropy`."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    assert targets.is_contiguous()
    assert losses.is_contiguous()
    block = min(_VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](
        logits, targets, losses, logits.stride(0), scale, softcap, VOCABULARY=vocabulary,
        CAP=softcap > 0, GRADIENT=gradient, BLOCK=block, num_warps=16 if block > 2048 else 4,
    )  # fmt: skip
