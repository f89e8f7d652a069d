"""fp8 operators on the CPU, against plain formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fitlora.step import float8
from tests.step.test_kernels import packed_weight

fitlora = torch.ops.fitlora
E4M3 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, scales = torch.empty(x.shape, dtype=E4M3), torch.full((len(x), 1), math.nan)
    fitlora.quantize_rows(x, column_scale, out, scales)
    return out, scales


def weight_in_float8(
    parts: tuple[Tensor | None, ...], shape: tuple[int, int], how: tuple[Any, ...], turned: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty(shape[::-1] if turned else shape, dtype=E4M3)
    row_scales = torch.full((shape[0],), math.nan)
    fitlora.dequantize_float8(*parts, row_scales, out, turned, *how)
    return out, row_scales


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (400, 1030)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_near(shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    x = (random(*shape) * random(shape[0], 1, seed=1).exp()).to(dtype)
    factor = random(shape[1], seed=2) if scaled else None
    out, scales = quantized(x, factor)
    exact = x.double() if factor is None else x.double() * factor
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double(), largest / 448, rtol=1e-6, atol=0)
    error = (out.double() * scales - exact).abs()
    # three bits of fraction, and the smallest step of the numbers near zero
    assert bool((error <= exact.abs() * 2**-4 * 1.001 + 2**-10 * scales).all())
    assert bool((out.float().abs().amax(1) == 448).all())


def test_rows_of_zeros() -> None:
    x = torch.zeros(2, 16)
    x[1, 3] = 1.0
    out, scales = quantized(x)
    assert scales[0] == 1
    assert not out[0].float().any()
    assert out[1, 3].float() * scales[1] == 1


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-36, 1e-31, 1e-29, 1e-20, 1e38])
def test_rows_of_any_size_stay_finite(largest: float) -> None:
    x = random(3, 64).abs().clamp(max=4) / 4 * largest
    x[:, 5], x[:, 6] = largest, 0.0
    out, scales = quantized(x)
    found = out.float() * scales
    assert bool(found.isfinite().all())
    if largest > float8.SMALLEST:
        torch.testing.assert_close(found, x, rtol=2**-3, atol=largest * 2**-10)
    else:
        assert not found.any()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size", "quant_type"),
    [
        ((16, 64), 64, "nf4"),
        ((48, 96), 32, "fp4"),
        ((3, 512), 128, "nf4"),
        ((5, 8192), 4096, "nf4"),
    ],
)
def test_weights_are_near(
    shape: tuple[int, int], block_size: int, quant_type: Any, double: bool
) -> None:
    parts = packed_weight(shape[0] * shape[1], block_size, double)
    assert parts[1] is not None
    exact, scales = torch.empty(shape), torch.empty(parts[1].shape)
    fitlora.dequantize_4bit(*parts, scales, exact, block_size, quant_type)
    largest = (scales if double else parts[1]).view(shape[0], -1).abs().amax(1)
    found, row_scales = weight_in_float8(parts, shape, (block_size, quant_type), False)
    torch.testing.assert_close(row_scales, largest / 448)
    error = (found.float() * row_scales[:, None] - exact).abs()
    assert bool((error <= exact.abs() * 2**-4 * 1.001 + 2**-10 * row_scales[:, None]).all())
    # both layouts hold the same numbers
    other, same = weight_in_float8(parts, shape, (block_size, quant_type), True)
    assert torch.equal(other.t().float(), found.float())
    assert torch.equal(same, row_scales)


def test_a_row_of_a_weight_may_be_zero() -> None:
    packed, absmax = torch.full((64, 1), 0x7F, dtype=torch.uint8), torch.tensor([0.0, 2.0])
    parts = (packed, absmax, None, None, None)
    found, row_scales = weight_in_float8(parts, (2, 64), (64, "nf4"), False)
    torch.testing.assert_close(row_scales, torch.tensor([1.0, 2 / 448]))
    assert not found[0].float().any()
    assert found[1].float().tolist() == [0.0, 448.0] * 32


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    parts = packed_weight(4 * 96, 64, False)
    with pytest.raises(AssertionError):
        weight_in_float8(parts, (4, 96), (64, "nf4"), False)


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "fits"),
    [(64, 128, 64, True), (16, 32, 32, True), (24, 128, 64, False), (64, 96, 64, False)],
)
def test_which_weights_fit(rows: int, columns: int, block_size: int, fits: bool) -> None:
    assert float8.weight_fits(rows, columns, block_size) is fits


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 32), (1600, 208)])
def test_products(rows: int, n: int, k: int) -> None:
    a, a_scales = quantized(random(rows, k))
    b, b_scales = quantized(random(n, k, seed=1))
    out = torch.full((rows, n), math.nan)
    fitlora.scaled_product(a, a_scales, b, b_scales[:, 0], out)
    exact = (a.double() * a_scales) @ (b.double() * b_scales).t()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_products_of_other_sizes_are_refused() -> None:
    a, scales = quantized(random(4, 24))
    with pytest.raises(AssertionError):
        fitlora.scaled_product(a, scales, a, scales[:, 0], torch.empty(4, 4))


def test_forward_and_backward_of_a_linear() -> None:
    """y = x W^T and dx = dy W: each within fp8's error of the exact product, backward transposed."""
    shape, how = (128, 192), (64, "nf4")
    parts = packed_weight(shape[0] * shape[1], 64, True)
    assert parts[1] is not None
    weight = torch.empty(shape)
    fitlora.dequantize_4bit(*parts, torch.empty(parts[1].shape), weight, *how)
    x, dy = random(50, shape[1]), random(50, shape[0], seed=1)
    y, dx = torch.empty(50, shape[0]), torch.empty(50, shape[1])
    by_rows, row_scales = weight_in_float8(parts, shape, how, False)
    fitlora.scaled_product(*quantized(x), by_rows, row_scales, y)
    by_columns, _ = weight_in_float8(parts, shape, how, True)
    fitlora.scaled_product(*quantized(dy, row_scales), by_columns, torch.ones(shape[1]), dx)
    for found, exact in ((y, x @ weight.t()), (dx, dy @ weight)):
        error = float((found - exact).norm() / exact.norm())
        assert error < 0.06
        assert error > 0.005  # it is fp8 indeed


def test_on_meta() -> None:
    x, out = torch.empty(4, 32, device="meta"), torch.empty(4, 32, device="meta", dtype=E4M3)
    scales, row = torch.empty(4, 1, device="meta"), torch.empty(4, device="meta")
    product = torch.empty(4, 4, device="meta")
    assert fitlora.quantize_rows(x, None, out, scales) is None
    assert fitlora.scaled_product(out, scales, out, row, product) is None
    weight = (torch.empty(64, 1, device="meta", dtype=torch.uint8), row, None, None, None)
    assert fitlora.dequantize_float8(*weight, row, out, False, 32, "nf4") is None
