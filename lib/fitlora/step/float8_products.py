"""The frozen products of a group in fp8: twice the rate of bf16 on cards that have it.

Activations and gradients are scaled by row, weights by output feature. Backward contracts the other
axis of the same fp8 weight: its scales go into the gradient before that is quantized, so the weight is
rounded once, and forward and backward see the same. Adapters, and the sums, stay in bf16.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fitlora.step.float8 import dequantize_float8, quantize_rows, scaled_product, weight_fits
from fitlora.step.linear import AnyFrozenLinear, Linear4bit

_E4M3 = torch.float8_e4m3fn


class Float8Products:
    """x W^T of 4-bit layers with one input. fused: with their weights behind each other."""

    def __init__(self, layers: Sequence[AnyFrozenLinear], *, fused: bool) -> None:
        assert self.fits(layers)
        self.layers = cast(Sequence[Linear4bit], layers)
        self.sizes = [layer.out_features for layer in layers]
        self.runs = [range(len(layers))] if fused else [range(i, i + 1) for i in range(len(layers))]

    @staticmethod
    def fits(layers: Sequence[AnyFrozenLinear]) -> bool:
        """Whether every layer is in 4 bits and of sizes that fp8 products take."""
        return all(
            isinstance(layer, Linear4bit)
            and weight_fits(layer.out_features, layer.in_features, layer.spec.block_size)
            for layer in layers
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (tokens, in). Returns (tokens, out) of each layer, without bias."""
        quantized, scales = _quantize(x, None)
        outputs: list[Tensor] = []
        for run in self.runs:
            weight, row_scales = self._weight(run, x, transposed=False)
            out = x.new_empty(len(x), len(weight))
            scaled_product(quantized, scales, weight, row_scales, out)
            del weight
            outputs += out.split([self.sizes[i] for i in run], 1)
        return outputs

    def input_gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """gradients: (tokens, out) of each run, whole where fused. Returns (tokens, in)."""
        dx: Tensor | None = None
        for run, dy in zip(self.runs, gradients, strict=True):
            weight, row_scales = self._weight(run, dy, transposed=True)
            quantized, scales = _quantize(dy, row_scales)
            part = dy.new_empty(len(dy), len(weight))
            ones = torch.ones(len(weight), dtype=torch.float32, device=dy.device)
            scaled_product(quantized, scales, weight, ones, part)
            del weight, quantized
            dx = part if dx is None else dx.add_(part)
        assert dx is not None
        return dx

    def _weight(self, run: range, like: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
        """The run's weights, (all out, in) or (in, all out), and the scale of each output feature."""
        sizes = [self.sizes[i] for i in run]
        features = self.layers[0].in_features
        shape = (features, sum(sizes)) if transposed else (sum(sizes), features)
        whole = torch.empty(shape, dtype=_E4M3, device=like.device)
        scales = torch.empty(sum(sizes), dtype=torch.float32, device=like.device)
        places = whole.split(sizes, 1 if transposed else 0)
        for i, place, part in zip(run, places, scales.split(sizes), strict=True):
            layer = self.layers[i]
            dequantize_float8(
                layer.weight, layer.absmax, layer.nested_absmax, layer.nested_code,
                layer.nested_offset, part, place, transposed, layer.spec.block_size, layer.spec.type,
            )  # fmt: skip
        return whole, scales


def _quantize(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=_E4M3, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    quantize_rows(x, column_scale, out, scales)
    return out, scales
