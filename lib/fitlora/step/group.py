"""Frozen linear layers that share an input, with their adapters: forward and backward by hand.

Queries, keys and values read the same hidden states, and so do the gate and up projections. Taken
together they drop out once, go through their adapters' first matrices in one product, and their
backward reads the input once. A frozen weight is dequantized once in each pass into a buffer that is
gone after its product; adapters' gradients are added to where they belong at once.

Nothing is remembered here: what backward needs is handed back to it, or made again.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fitlora.step import ops
from fitlora.step.float8_products import Float8Products
from fitlora.step.linear import AnyFrozenLinear, LoraLinear


class LinearGroup:
    """Linear layers with one input.

    fused: their weights are laid behind each other for one product, with one output (tokens, the sum
    of out); otherwise each has a product and an output of its own. Fusing pays where single products
    are too small to fill the device; its buffer is as large as all the weights.
    """

    def __init__(self, modules: Sequence[nn.Module], *, fused: bool = False) -> None:
        self.frozen = [
            m.frozen if isinstance(m, LoraLinear) else cast(AnyFrozenLinear, m) for m in modules
        ]
        self.adapted = [m if isinstance(m, LoraLinear) else None for m in modules]
        self.fused = fused and len(modules) > 1
        self.sizes = [m.out_features for m in self.frozen]
        self.adapters = [m for m in self.adapted if m is not None]
        self.numbered = [(i, lora) for i, lora in enumerate(self.adapted) if lora is not None]
        # where the adapters' 16-bit weights and their gradients lie; the bank fills these in
        self.a: Tensor | None = None  # (adapters * r, in)
        self.b: list[Tensor] = []  # (out, r) of each adapter
        self.grad_a: Tensor | None = None
        self.grad_b: list[Tensor] = []
        self.float8: Float8Products | None = None

    def in_float8(self, wanted: bool) -> None:
        """From now on takes the frozen products in fp8, where all its layers can; or no longer."""
        self.float8 = None
        if wanted and Float8Products.fits(self.frozen):
            self.float8 = Float8Products(self.frozen, fused=self.fused)

    @property
    def learns(self) -> bool:
        """Whether there is a place for its adapters' gradients: in a backward where they are trained."""
        return self.grad_a is not None

    # --- the products ----------------------------------------------------------------------------

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """x: (tokens, in); keys: of the dropout masks, int32 (tokens,), None without dropout.

        Returns each layer's output (tokens, out), slices of one tensor where fused, and what the
        adapters' first matrices make of x: (tokens, adapters * r), None without adapters.
        """
        h = self.narrow(x, keys)
        if self.float8 is not None:
            outputs = self.float8.forward(x)
            for index, out in enumerate(outputs):
                self._small_part(index, h, out, add=True)
            return outputs, h
        if self.fused:
            whole = x.new_empty(len(x), sum(self.sizes))
            outputs = list(whole.split(self.sizes, 1))
            for index, out in enumerate(outputs):
                self._small_part(index, h, out)
            whole.addmm_(x, self._fused_weight(x).t())
            return outputs, h
        outputs = []
        for index, module in enumerate(self.frozen):
            if self.adapted[index] is None and module.bias is None:
                outputs.append(torch.mm(x, module.compute_weight(x.dtype).t()))
                continue
            out = x.new_empty(len(x), self.sizes[index])
            self._small_part(index, h, out)
            outputs.append(out.addmm_(x, module.compute_weight(x.dtype).t()))
        return outputs, h

    def _small_part(self, index: int, h: Tensor | None, out: Tensor, *, add: bool = False) -> None:
        """out (tokens, out) = bias + adapter, or has them added.

        The frozen product is best added to it where it is stored: in this order the wide output is
        written, read and written; the other way round it is read and written once more.
        """
        bias, lora = self.frozen[index].bias, self.adapted[index]
        if bias is not None:
            out.add_(bias) if add else out.copy_(bias)
        if lora is not None:
            assert h is not None
            place = self.adapters.index(lora)
            beta = 0 if bias is None and not add else 1
            out.addmm_(self._parts(h)[place], self.b[place].t(), beta=beta, alpha=lora.scale)
        elif bias is None and not add:
            out.zero_()

    def narrow(self, x: Tensor, keys: Tensor | None) -> Tensor | None:
        """dropout(x) A^T of every adapter: (tokens, adapters * r)."""
        if not self.adapters:
            return None
        assert self.a is not None, "the bank has not entered this layer"
        return torch.mm(self._dropped(x, keys), self.a.t())

    def input_gradient(
        self, gradients: Sequence[Tensor], keys: Tensor | None, *, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of x (tokens, in), where `wanted`, and of what `narrow` gave.

        gradients: of each layer's output, (tokens, out); where fused, slices of one tensor.
        """
        dh = self._narrow_gradient(gradients)
        if not wanted:
            return None, dh
        if self.float8 is not None:
            dx = self.float8.input_gradient([joined(gradients)] if self.fused else gradients)
        elif self.fused:
            whole = joined(gradients)
            dx = torch.mm(whole, self._fused_weight(whole))
        else:
            first, *others = zip(gradients, self.frozen, strict=True)
            dx = torch.mm(first[0], first[1].compute_weight(first[0].dtype))
            for dy, module in others:
                dx.addmm_(dy, module.compute_weight(dy.dtype))
        if dh is not None:
            assert self.a is not None
            if keys is None:
                dx.addmm_(dh, self.a)
            else:
                self._drop(torch.mm(dh, self.a), keys, dx, accumulate=True)
        return dx, dh

    def adapter_gradients(
        self,
        gradients: Sequence[Tensor],
        x: Tensor,
        h: Tensor | None,
        dh: Tensor | None,
        keys: Tensor | None,
    ) -> None:
        """Adds the adapters' gradients, if they learn.

        h: as `forward` gave it, None to have it made again.
        """
        if dh is None or self.grad_a is None:
            return
        assert self.a is not None
        dropped = self._dropped(x, keys)
        if h is None:
            h = torch.mm(dropped, self.a.t())
        ops.add_product(dh, dropped, 1.0, self.grad_a)
        del dropped
        for (index, lora), part, grad in zip(
            self.numbered, self._parts(h), self.grad_b, strict=True
        ):
            ops.add_product(gradients[index], part, lora.scale, grad)

    # --- pieces ----------------------------------------------------------------------------------

    def _parts(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.chunk(len(self.adapters), 1)

    def _narrow_gradient(self, gradients: Sequence[Tensor]) -> Tensor | None:
        if not self.adapters:
            return None
        assert self.a is not None
        dh = gradients[0].new_empty(len(gradients[0]), len(self.a))
        numbered = zip(self.numbered, self._parts(dh), self.b, strict=True)
        for (index, lora), part, b in numbered:
            part.addmm_(gradients[index], b, beta=0, alpha=lora.scale)
        return dh

    def _fused_weight(self, like: Tensor) -> Tensor:
        whole = like.new_empty(sum(self.sizes), self.frozen[0].in_features)
        for module, part in zip(self.frozen, whole.split(self.sizes), strict=True):
            module.write_weight(part)
        return whole

    def _dropped(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            return x
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._drop(x, keys, out, accumulate=False)
        return out

    def _drop(self, x: Tensor, keys: Tensor, out: Tensor, *, accumulate: bool) -> None:
        lora = self.adapters[0]
        ops.dropout(x, keys, lora.stream, lora.rate, out, accumulate)


def joined(slices: Sequence[Tensor]) -> Tensor:
    """The tensor (tokens, all) that these neighbouring slices of its columns were cut from."""
    first = slices[0]
    if len(slices) == 1:
        return first
    width = sum(s.shape[1] for s in slices)
    assert first.stride(0) >= width
    return first.as_strided((first.shape[0], width), first.stride(), first.storage_offset())
