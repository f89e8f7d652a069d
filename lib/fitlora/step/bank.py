"""All adapters in one flat float32 buffer, their gradients in another, and copies to compute with.

Layers that share an input want their adapters' first matrices behind each other, so that one product
serves them all, and a step wants one copy to 16 bits, not one a matrix. The parameters that peft made
become views of the flat buffer and keep their names, so optimizers and checkpoints see what they know.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fitlora.step.group import LinearGroup
from fitlora.step.linear import LoraLinear

_ALIGN = 64  # elements; products run best on operands that begin at whole 128 bytes


class AdapterBank:
    """The adapters of `groups`, computed with in `dtype`.

    gradients are made at the first `begin` and stay; until then there are none, so that a model that
    only evaluates has none.
    """

    def __init__(self, groups: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self.groups = [group for group in groups if group.adapters]
        self.parameters: list[nn.Parameter] = []
        if not self.groups:
            return
        starts = [0]
        for group in self.groups:
            size = sum(w.numel() for lora in group.adapters for w in _matrices(lora))
            starts.append(starts[-1] + -(-size // _ALIGN) * _ALIGN)
        device = _matrices(self.groups[0].adapters[0])[0].device
        self.flat = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        self.copies = (
            self.flat if dtype == torch.float32 else self.flat.new_empty(starts[-1], dtype=dtype)
        )
        self.gradients: Tensor | None = None
        self._spans = list(pairwise(starts))
        with torch.no_grad():
            for group, (start, end) in zip(self.groups, self._spans, strict=True):
                self._adopt(group, self.flat[start:end])
                group.a, group.b = _cut(group, self.copies[start:end])

    def _adopt(self, group: LinearGroup, place: Tensor) -> None:
        a, b = _cut(group, place)
        rows = a.split([_matrices(lora)[0].shape[0] for lora in group.adapters])
        for lora, *views in zip(group.adapters, rows, b, strict=True):
            for linear, view in zip(_linears(lora), views, strict=True):
                view.copy_(linear.weight)
                linear.weight = nn.Parameter(view)
                self.parameters.append(linear.weight)

    def refresh(self) -> None:
        """Takes the parameters' present values into the copies that are computed with."""
        if self.groups and self.copies is not self.flat:
            self.copies.copy_(self.flat)

    def begin(self) -> None:
        """Begins an optimizer step: fresh copies, gradients at zero and in their places."""
        self.refresh()
        if not self.groups:
            return
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.flat)
            for group, (start, end) in zip(self.groups, self._spans, strict=True):
                group.grad_a, group.grad_b = _cut(group, self.gradients[start:end])
        else:
            self.gradients.zero_()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = self.gradients.as_strided(
                    parameter.shape, parameter.stride(), parameter.storage_offset()
                )


def _linears(lora: LoraLinear) -> list[nn.Linear]:
    return [cast(nn.Linear, part[lora.adapter]) for part in (lora.lora_A, lora.lora_B)]


def _matrices(lora: LoraLinear) -> list[Tensor]:
    """A (r, in) and B (out, r)."""
    return [linear.weight for linear in _linears(lora)]


def _cut(group: LinearGroup, place: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The group's matrices in its span: every A as one (adapters * r, in), then each B (out, r)."""
    shapes = [[w.shape for w in _matrices(lora)] for lora in group.adapters]
    rows, features = sum(a[0] for a, _ in shapes), shapes[0][0][1]
    end = rows * features
    a, b = place[:end].view(rows, features), []
    for _, shape in shapes:
        b.append(place[end : end + shape.numel()].view(shape))
        end += shape.numel()
    return a, b
