"""The step's operators on the CPU, against references that share no code with them."""

import math
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from fitlora.memory.trace import MemoryTrace
from fitlora.quantization.layout import QuantSpec, decode_state, state_key
from fitlora.step import ops
from fitlora.step.attention import _plain_attention, _plain_backward, _PlainAttention, _Rule
from tests.tiny_models import dequantized

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


NAME = "w.weight"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- 4-bit weights ---------------------------------------------------------------------------------


def quantize(weight: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors of a checkpoint's weight "w.weight", as bitsandbytes makes them."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=spec.block_size, quant_type=spec.type, compress_statistics=spec.double
    )
    parts = state.as_dict(packed=True)
    return {NAME: packed, **{f"{NAME}.{suffix}": part for suffix, part in parts.items()}}


def dequantize(parts: dict[str, Tensor], shape: Any, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    out = torch.full(shape, math.nan, dtype=dtype)
    absmax = parts[f"{NAME}.absmax"]
    scales = torch.full(absmax.shape, math.nan)
    nested: tuple[Tensor | None, ...] = (None, None, None)
    if spec.double:
        offset = decode_state(parts[state_key(NAME, spec.type)])["nested_offset"]
        nested = (
            parts[f"{NAME}.nested_absmax"],
            parts[f"{NAME}.nested_quant_map"],
            torch.tensor(offset),
        )
    torch.ops.fitlora.dequantize_4bit(
        parts[NAME], absmax, *nested, scales, out, spec.block_size, spec.type
    )
    return out


def check_dequantize(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=generator(shape[0])) * 0.02
    parts = quantize(weight, spec)
    expected = dequantized(parts)[NAME]
    found = dequantize(parts, shape, spec, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    else:  # a scale or a product may be rounded on its way
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-9)
    # and it is near what went in: the code book's widest gap is 0.3 of the block's largest
    assert (expected - weight).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantizing_is_that_of_plain_pytorch(
    block_size: int, double: bool, quant_type: Any
) -> None:
    spec = QuantSpec(quant_type, block_size, double)
    check_dequantize((24, 512), spec, torch.float32)
    check_dequantize((33, 95), spec, torch.float32)  # odd, and rows are no whole number of blocks


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (3, 1), (1, 63), (5, 13), (7, 64), (64, 65), (3, 1000), (70, 300)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_any_shape(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for double in (True, False):
        check_dequantize(shape, QuantSpec("nf4", 64, double), dtype)


# --- dropout ---------------------------------------------------------------------------------------

SCALE = 1 / (1 - ops.keep_threshold(0.25) / 65536)


def keys(tokens: int, *, seed: int = 3, step: int = 5, sample: int = 7) -> Tensor:
    return ops.row_keys(seed, step, torch.full((tokens,), sample), torch.arange(tokens))


def mask(row_keys: Tensor, features: int, *, stream: int = 0, p: float = 0.25) -> Tensor:
    """Which elements are kept."""
    out = torch.full((len(row_keys), features), math.nan)
    torch.ops.fitlora.dropout(torch.ones_like(out), row_keys, stream, p, out, False)
    return out != 0


def test_kept_elements_are_scaled() -> None:
    x = torch.randn(20, 33, generator=generator())
    out = torch.empty_like(x)
    torch.ops.fitlora.dropout(x, keys(20), 4, 0.25, out, False)
    expected = torch.where(mask(keys(20), 33, stream=4), x * SCALE, torch.zeros_like(x))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulating_adds(dtype: torch.dtype) -> None:
    x, before = (torch.randn(9, 40, generator=generator(s)).to(dtype) for s in (1, 2))
    alone, out = torch.empty_like(x), before.clone()
    torch.ops.fitlora.dropout(x, keys(9), 1, 0.25, alone, False)
    torch.ops.fitlora.dropout(x, keys(9), 1, 0.25, out, True)
    torch.testing.assert_close(out, before + alone)
    assert not torch.equal(out, before)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_the_one_that_was_asked_for(p: float) -> None:
    kept = mask(keys(1000), 1001, p=p)
    count = kept.numel()
    sigma = math.sqrt(count * p * (1 - p))
    assert abs(int((~kept).sum()) - count * p) < 5 * sigma
    for share in (kept.float().mean(0), kept.float().mean(1)):  # in each column and each row
        spread = math.sqrt(p * (1 - p) / 1000)
        assert float((share - (1 - p)).abs().max()) < 6 * spread
        assert float(share.std()) == pytest.approx(spread, rel=0.2)


def test_neighbours_are_independent() -> None:
    """Columns come in pairs of one random number; neither in pairs nor in rows do they go together."""
    kept = mask(keys(2000), 2000, p=0.5).float() * 2 - 1
    bound = 5 / math.sqrt(kept.numel())
    for a, b in (
        (kept[:, :-1], kept[:, 1:]),
        (kept[:, 0::2], kept[:, 1::2]),
        (kept[:-1], kept[1:]),
        (kept[:-1, :-1], kept[1:, 1:]),
    ):
        assert abs(float((a * b).mean())) < 2 * bound


def test_a_token_s_mask_depends_on_its_key_alone() -> None:
    """Not on the row it stands in, on the rows beside it or on how many features there are."""
    all_keys = keys(600)
    whole = mask(all_keys, 1001)
    order = torch.randperm(600, generator=generator())
    assert torch.equal(mask(all_keys[order], 1001), whole[order])
    assert torch.equal(mask(all_keys[17:18], 1001), whole[17:18])
    for features in (1, 2, 7, 512):
        assert torch.equal(mask(all_keys, features), whole[:, :features])


def test_different_places_have_different_masks() -> None:
    base: dict[str, Any] = {"seed": 3, "step": 5, "sample": 7}
    masks = [mask(keys(50, **base), 64, p=0.5)]
    masks += [
        mask(keys(50, **{**base, name: value}), 64, p=0.5)
        for name in base
        for value in (0, 1, base[name] + 1, 2**31 + 5, 2**32 - 1)
        if not (name == "sample" and value > 2**31)
    ]
    # the same number in another part of the key is another key
    masks += [mask(keys(50, seed=5, step=3, sample=7), 64, p=0.5)]
    masks += [mask(keys(50, seed=3, step=7, sample=5), 64, p=0.5)]
    masks += [mask(keys(50, **base), 64, stream=s, p=0.5) for s in (1, 2, 3, 1000)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < float((a == b).float().mean()) < 0.6
    rows = masks[0].float() * 2 - 1  # positions
    alike = (rows @ rows.t() / 64).fill_diagonal_(0)
    assert float(alike.abs().max()) < 6 / math.sqrt(64)


def test_keys_do_not_collide() -> None:
    samples = torch.arange(100).repeat_interleave(500)
    positions = torch.arange(500).repeat(100)
    found = torch.cat([ops.row_keys(seed, 0, samples, positions) for seed in (0, 1)])
    assert found.dtype == torch.int32
    # 100,000 numbers of 32 bits: 1.2 pairs are expected to meet
    assert len(found.unique()) > len(found) - 12


def test_masks_are_written_down() -> None:
    """Masks are part of a run's result: another one, on any device, is another run."""
    bits = mask(keys(2), 16, stream=3, p=0.5).int().tolist()
    assert ["".join(map(str, row)) for row in bits] == MASKS


MASKS = ["0100011101100011", "0111111000000111"]


def test_the_kernel_is_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel, interpreted on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from fitlora.step.dropout_kernel import dropout

    for features, accumulate in ((5, False), (1100, True)):
        x = torch.randn(6, features, generator=generator())
        expected = torch.randn(6, features, generator=generator(1))
        found = expected.clone()
        torch.ops.fitlora.dropout(x, keys(6), 11, 0.1, expected, accumulate)
        dropout(x, keys(6), 11, ops.keep_threshold(0.1), found, accumulate)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# --- attention -------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp, in the inputs' dtype, token by token as it is defined."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    outs, sums = [], []
    start = 0
    for length in lengths:
        for at in range(length):
            first = start + (max(0, at - window) if window >= 0 else 0)
            seen = slice(first, start + at + 1)
            row, lse = [], []
            for head in range(heads):
                scores = k[seen, head // groups] @ q[start + at, head] * scale
                row.append(scores.softmax(0) @ v[seen, head // groups])
                lse.append(scores.logsumexp(0))
            outs.append(torch.stack(row))
            sums.append(torch.stack(lse))
        start += length
    return torch.stack(outs), torch.stack(sums, dim=1)


def inputs(
    lengths: list[int], heads: int, kv_heads: int, size: int = 16
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v; the gradient that comes back; where sequences start."""
    total, make = sum(lengths), generator()
    shapes = [heads, kv_heads, kv_heads, heads]
    q, k, v, g = (torch.randn(total, h, size, generator=make) for h in shapes)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return [q, k, v], g, starts


def expected_gradients(
    qkv: list[Tensor], g: Tensor, lengths: list[int], scale: float, window: int
) -> list[Tensor]:
    exact = [x.double().requires_grad_() for x in qkv]
    out, lse = reference(exact[0], exact[1], exact[2], lengths, scale, window)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, exact, g.double())]


@pytest.mark.parametrize("lengths", [[9], [1], [5, 1, 12, 3], [33, 20]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [-1, 0, 3, 100])
def test_attention_is_softmax_attention(lengths: list[int], kv_heads: int, window: int) -> None:
    qkv, g, starts = inputs(lengths, 4, kv_heads)
    scale = 0.3
    arguments = (starts, lengths, scale, window)
    out, lse, rng, unused = torch.ops.fitlora.attention(*qkv, *arguments)
    found = torch.ops.fitlora.attention_backward(g, *qkv, out, lse, rng, unused, *arguments)
    expected = expected_gradients(qkv, g, lengths, scale, window)
    for a, b in zip((out, lse, *found), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_in_16_bits_is_near_the_truth(
    dtype: torch.dtype, bound: float, kv_heads: int
) -> None:
    lengths = [33, 1, 20]
    qkv, g, starts = inputs(lengths, 4, kv_heads)
    low, g = [x.to(dtype) for x in qkv], g.to(dtype)
    out, lse, *rest = torch.ops.fitlora.attention(*low, starts, lengths, 0.3, -1)
    found = torch.ops.fitlora.attention_backward(g, *low, out, lse, *rest, starts, lengths, 0.3, -1)
    expected = expected_gradients(low, g, lengths, 0.3, -1)
    assert {x.dtype for x in (out, *found)} == {dtype}
    for a, b in zip((out, lse, *found), expected, strict=True):
        assert torch.linalg.vector_norm(a.double() - b) <= bound * torch.linalg.vector_norm(b)


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "gradient"])
def test_float16_that_overflows_is_seen_behind_attention(which: int, device: str) -> None:
    """No kernel may make a number of it again: the guard of steps reads the loss and the gradients."""
    lengths = [33, 7]
    qkv, g, starts = inputs(lengths, 4, 2)
    given = [x.to(device, torch.float16) for x in (*qkv, g)]
    given[which][7, 0, 3] = math.inf
    *low, g = given
    arguments = (starts.to(device), lengths, 0.3, -1)
    made = torch.ops.fitlora.attention(*low, *arguments)
    gradients = torch.ops.fitlora.attention_backward(g, *low, *made, *arguments)
    assert not all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("window", [-1, 3])
def test_attention_on_slices_of_one_tensor(window: int) -> None:
    """As models hand them over: transposed views that are not contiguous."""
    lengths = [7, 4]
    qkv, g, starts = inputs(lengths, 4, 2)
    strided = [
        torch.stack([x, x], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        for x in qkv
    ]
    assert not any(x.is_contiguous() for x in strided)
    arguments = (starts, lengths, 0.25, window)
    plain = torch.ops.fitlora.attention(*qkv, *arguments)
    found = torch.ops.fitlora.attention(*strided, *arguments)
    torch.testing.assert_close(found[0], plain[0])
    assert found[0].is_contiguous()
    for a, b in zip(
        torch.ops.fitlora.attention_backward(g, *strided, *found, *arguments),
        torch.ops.fitlora.attention_backward(g, *qkv, *plain, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [-1, 3])
def test_plain_attention_is_the_same(window: int) -> None:
    lengths = [5, 12]
    qkv, g, _ = inputs(lengths, 4, 2)
    expected = expected_gradients(qkv, g, lengths, 0.3, window)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = _PlainAttention.apply(*leaves, lengths, _Rule(0.3, window, None))
    found = [out, *torch.autograd.grad(out, leaves, g)]
    for a, b in zip(found, [expected[0], *expected[2:]], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def attention_in_float64(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cap: float) -> Tensor:
    """Capped scores of each token with those before it, at most three back, head by head."""
    groups, found, first = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        rows = slice(first, first := first + length)
        far = torch.arange(length)[:, None] - torch.arange(length)
        seen = (far >= 0) & (far <= 3)
        heads = []
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // groups].T * 0.3
            scores = (cap * torch.tanh(scores / cap)).where(seen, -math.inf)
            heads.append(scores.softmax(-1) @ v[rows, head // groups])
        found.append(torch.stack(heads, 1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_gradients_of_capped_attention_are_near_the_truth(dtype: torch.dtype, bound: float) -> None:
    lengths, cap = [5, 12, 1], 0.7
    qkv, g, _ = inputs(lengths, 4, 2)
    low = [x.to(dtype).requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in low]
    out = _PlainAttention.apply(*low, lengths, _Rule(0.3, 3, cap))
    expected = attention_in_float64(*exact, lengths, cap)
    found = [out, *torch.autograd.grad(out, low, g.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, g.to(dtype).double())]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.linalg.vector_norm(a.double() - b) <= bound * torch.linalg.vector_norm(b)


def test_plain_attention_has_no_more_than_three_of_its_scores() -> None:
    length, heads = 256, 4
    trace = MemoryTrace(shapes=True)
    with trace, torch.no_grad():
        q, g, out = (torch.empty(length, heads, 16, device="meta") for _ in range(3))
        k, v = (torch.empty(length, 2, 16, device="meta") for _ in range(2))
        _plain_backward(g, q, k, v, out, [length], _Rule(1.0, -1, None))
    scores = length * length * heads * 4
    assert 2 * scores <= trace.peak.bytes < 3.3 * scores


def test_soft_capped_scores() -> None:
    lengths = [4, 6]
    (q, k, v), _, _ = inputs(lengths, 2, 1)
    cap = 0.7
    out = _plain_attention(q, k, v, lengths, _Rule(1.0, -1, cap))
    for token, first in ((3, 0), (4, 4), (9, 4)):
        for head in range(2):
            scores = cap * torch.tanh(k[first : token + 1, 0] @ q[token, head] / cap)
            expected = scores.softmax(0) @ v[first : token + 1, 0]
            torch.testing.assert_close(out[token, head], expected, rtol=1e-5, atol=1e-6)


def test_shapes_on_meta_are_those_of_the_cpu() -> None:
    lengths = [9, 4]
    qkv, g, starts = inputs(lengths, 4, 2)
    arguments = (lengths, 0.3, -1)
    results = []
    for device in ("cpu", "meta"):
        moved = [x.to(device) for x in qkv]
        there = starts.to(device)
        forward = torch.ops.fitlora.attention(*moved, there, *arguments)
        backward = torch.ops.fitlora.attention_backward(
            g.to(device), *moved, *forward, there, *arguments
        )
        results.append([(t.shape, t.stride(), t.dtype) for t in (*forward, *backward)])
    assert results[0] == results[1]
