"""The frozen linear layer, in 4 bits or 16, and the LoRA adapter on it as one autograd function.

A frozen weight is needed twice in a step, in forward and in backward, and in between only its packed
form exists: each pass dequantizes into a fresh buffer that the allocator hands out again and again.
Autograd therefore saves a handle of the layer and never its packed tensors, so that where those lie
(on the device, or on their way from the host) is nobody else's business.

`Linear4bit` is ours outside (plain uint8 parameters, bitsandbytes' checkpoint layout) and
bitsandbytes' kernels inside. bitsandbytes' own `Linear4bit` cannot be traced on fake tensors, and on
some CPUs repacks its weights in place.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantSpec
from fitlora.step import ops
from fitlora.step.batch import StepContext
from fitlora.step.dora import DoraProduct, Magnitude, row_norms


class FrozenLinear(nn.Linear):
    """A 16- or 32-bit linear layer whose weight is not trained; its bias may be.

    It is an `nn.Linear` in all but its gradient, so that checkpoints load into it as they are.
    """

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in `dtype`."""
        return self.weight.to(dtype)

    def write_weight(self, out: Tensor) -> None:
        """Copies it into `out` (out, in)."""
        out.copy_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return _by_rows(input, _FrozenProduct, self.bias, self)


class Linear4bit(nn.Module):
    """A linear layer whose weight is stored in 4 bits.

    Attributes:
        weight: uint8 ((out * in + 1) // 2, 1), two codes a byte.
        absmax: scale of each block; float32 (blocks,), or uint8 under double quantization.
        nested_absmax, nested_offset: float32 (ceil(blocks / 256),) and (); double quantization only.
        nested_code: float32 (256,), the code book of the scales, one tensor shared by all layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        spec: QuantSpec,
        nested_code: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        numel = in_features * out_features
        blocks = spec.blocks(numel)

        def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

        self.weight = frozen((spec.packed_bytes(numel), 1), torch.uint8)
        self.absmax = frozen((blocks,), torch.uint8 if spec.double else torch.float32)
        if spec.double:
            self.nested_absmax = frozen((-(-blocks // NESTED_BLOCK_SIZE),), torch.float32)
            self.nested_offset = frozen((), torch.float32)
        else:
            self.register_parameter("nested_absmax", None)
            self.register_parameter("nested_offset", None)
        self.register_buffer("nested_code", nested_code if spec.double else None, persistent=False)
        if bias:
            self.bias = frozen((out_features,), dtype)
        else:
            self.register_parameter("bias", None)

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in `dtype`, dequantized into a new buffer."""
        shape = (self.out_features, self.in_features)
        out = torch.empty(shape, dtype=dtype, device=self.weight.device)
        self.write_weight(out)
        return out

    def write_weight(self, out: Tensor) -> None:
        """Dequantizes into `out` (out, in), contiguous."""
        nested = self.nested_absmax is not None
        scales = torch.empty(
            self.absmax.shape if nested else (0,), dtype=torch.float32, device=out.device
        )
        ops.dequantize_4bit(
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_code,
            self.nested_offset,
            scales,
            out,
            self.spec.block_size,
            self.spec.type,
        )

    def forward(self, x: Tensor) -> Tensor:
        return _by_rows(x, _FrozenProduct, self.bias, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"


AnyFrozenLinear = FrozenLinear | Linear4bit


def _by_rows(x: Tensor, product: type[torch.autograd.Function], *rest: Any) -> Tensor:
    """`product` of x's rows. x: (..., in) -> (..., out).

    The view is taken outside of it: models may write into what a layer returns, and a function's own
    views are not to be written to.
    """
    y = cast(Tensor, product.apply(x.reshape(-1, x.shape[-1]), *rest))
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (tokens, in), weight: (out, in) -> (tokens, out)."""
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias.to(x.dtype), x, weight.t())


def bias_grad(ctx: Any, dy: Tensor, index: int) -> Tensor | None:
    """The gradient of the bias that is a function's input number `index`: dy's sum, float32 (out,).

    dy: (tokens, out). None where it is frozen, or there is none.
    """
    return dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[index] else None


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with nothing saved: backward asks the layer for its weight again. x: (tokens, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: AnyFrozenLinear) -> Tensor:
        ctx.layer = layer
        return _product(x, layer.compute_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = grads
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, ctx.layer.compute_weight(dy.dtype))
        return dx, bias_grad(ctx, dy, 1), None


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + s * dropout(x) A^T B^T. x: (tokens, in).

    Saved: x (which the layers that share it save as well: one tensor), h = dropout(x) A^T (tokens, r)
    and the adapter; of one that is frozen the adapter alone. The weight, the mask and 16-bit copies of A
    and B are had again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, layer: "LoraLinear"
    ) -> Tensor:
        y = _product(x, layer.frozen.compute_weight(x.dtype), bias)
        dropped = layer.dropped(x)
        h = torch.mm(dropped, a.to(x.dtype).t())
        del dropped
        y.addmm_(h, b.to(x.dtype).t(), alpha=layer.scale)
        ctx.layer = layer
        ctx.save_for_backward(*((x, h) if a.requires_grad else (None, None)), a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        (dy,) = grads
        dh = torch.mm(dy, b.to(dy.dtype)).mul_(layer.scale)
        da = db = dx = None
        if x is not None:
            db = torch.mm(dy.t(), h).to(b.dtype).mul_(layer.scale)
            dropped = layer.dropped(x)
            da = torch.mm(dh.t(), dropped).to(a.dtype)
            del dropped
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, layer.frozen.compute_weight(dy.dtype))
            layer.add_dropped_grad(dx, dh, a.to(dy.dtype))
        return dx, da, db, bias_grad(ctx, dy, 3), None


class LoraLinear(nn.Module, LoraLayer):
    """peft's LoRA layer on a frozen linear of ours; peft makes it, saves it and loads it.

    `stream` numbers the dropout masks, one for all layers that share an input; `context` has the keys
    of the tokens in flight; both are set by the builder.
    """

    adapter = "default"
    stream = 0
    context: StepContext
    # peft's, which has no annotations
    base_layer: AnyFrozenLinear
    scaling: dict[str, float]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        assert adapter_name == self.adapter, "one adapter is trained at a time"
        LoraLayer.update_layer(self, adapter_name, kwargs["r"], kwargs["lora_alpha"], config=config)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(self.frozen.out_features)

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's, float32 (out,); None without it."""
        part = cast(dict[str, Magnitude], self.lora_magnitude_vector)
        return part[self.adapter].weight if self.adapter in part else None

    def start_magnitude(self) -> None:
        """Makes it that of the frozen weight, where there is one."""
        if self.magnitude is not None:
            weight = self.frozen.compute_weight(torch.float32)
            self.magnitude.data.copy_(row_norms(weight))

    def resolve_lora_variant(self, **_: Any) -> None:
        """None: what a variant of LoRA does is done here and not by peft."""

    @property
    def frozen(self) -> AnyFrozenLinear:
        return self.base_layer

    @property
    def scale(self) -> float:
        return self.scaling[self.adapter]

    @property
    def rate(self) -> float:
        """The dropout that it trains with."""
        layer = self.lora_dropout[self.adapter]
        return float(layer.p) if isinstance(layer, nn.Dropout) else 0.0

    @property
    def dropout(self) -> float:
        """The dropout that applies now: a frozen adapter is a part of the model, and drops nothing."""
        learns = cast(nn.Linear, self.lora_A[self.adapter]).weight.requires_grad
        return self.rate if self.training and learns else 0.0

    def dropped(self, x: Tensor) -> Tensor:
        """x: (tokens, in), masked; x itself where there is no dropout."""
        if self.dropout == 0.0:
            return x
        out = torch.empty_like(x)
        ops.dropout(x, self._keys(len(x)), self.stream, self.dropout, out, False)
        return out

    def _keys(self, rows: int) -> Tensor:
        """Of the masks of so many rows, which are the tokens, or those that a model makes of them."""
        keys = self.context.row_keys
        return keys if len(keys) == rows else ops.other_keys(keys, rows)

    def add_dropped_grad(self, dx: Tensor, dh: Tensor, a: Tensor) -> None:
        """dx (tokens, in) += mask * (dh A), in place; dh: (tokens, r), a: (r, in)."""
        if self.dropout == 0.0:
            dx.addmm_(dh, a)
            return
        self.add_dropped(torch.mm(dh, a), dx)

    def add_dropped(self, x: Tensor, out: Tensor) -> None:
        """out += mask * x, both (tokens, in)."""
        ops.dropout(x, self._keys(len(x)), self.stream, self.dropout, out, True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return cast(Tensor, self.frozen(x))
        a, b = (cast(nn.Linear, part[self.adapter]).weight for part in (self.lora_A, self.lora_B))
        if self.magnitude is not None:
            y = _by_rows(x, DoraProduct, a, b, self.magnitude, self)
            return y if self.frozen.bias is None else y + self.frozen.bias.to(y.dtype)
        return _by_rows(x, _LoraProduct, a, b, self.frozen.bias, self)
