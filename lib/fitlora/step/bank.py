"""All adapters in one flat buffer, their gradients in another, and how a layer comes by its own.

Layers that share an input want their adapters' first matrices behind each other, so that one product
serves them all. The parameters that peft made become views of the flat buffer and keep their names, so
optimizers and checkpoints see what they know. A layer's adapters are copied to the dtype that it
computes in when it is entered, in one go, and the copy is gone when it is left.

With an optimizer on the host the flat buffer has that dtype itself (the float32 masters are on the
host), and gradients exist for the layer in work alone: they leave the device when it is left. What the
host has made of a layer's adapters is waited for when the layer is entered, and no earlier.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fitlora.step.group import LinearGroup
from fitlora.step.linear import LoraLinear

_ALIGN = 64  # elements; products run best on operands that begin at whole 128 bytes


class Host(Protocol):
    """An optimizer on the host, as far as the device's parameters are concerned."""

    def send_down(self, parameters: Iterable[Tensor]) -> None:
        """Sends their gradients down."""

    def receive(self, parameters: Iterable[Tensor]) -> None:
        """Later computation has them as they were last updated."""


@dataclass
class _Span:
    """A layer's part of the flat buffer: its groups that have adapters, each with its own part."""

    start: int
    groups: list[tuple[LinearGroup, slice]] = field(default_factory=list)  # relative to start
    end: int = 0
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def whole(self) -> slice:
        return slice(self.start, self.end)


class AdapterBank:
    """The adapters of a stack of layers, given by their groups, computed with in `dtype`.

    leaving: whether gradients leave the device layer by layer, to `host`, which is then to be set.
    Gradients that stay are made at the first `begin` and kept; a model that only evaluates has none.
    """

    def __init__(
        self, layers: Sequence[Sequence[LinearGroup]], dtype: torch.dtype, *, leaving: bool = False
    ) -> None:
        self.dtype, self.leaving = dtype, leaving
        self.host: Host | None = None
        self.gradients: Tensor | None = None
        self._spans = []
        end = 0
        for groups in layers:
            span = _Span(end)
            for group in groups:
                if group.adapters:
                    size = sum(w.numel() for lora in group.adapters for w in _matrices(lora))
                    place = slice(end - span.start, end - span.start + size)
                    span.groups.append((group, place))
                    end += -(-size // _ALIGN) * _ALIGN
            span.end = end
            self._spans.append(span)
        if end == 0:
            return
        first = next(span.groups[0][0] for span in self._spans if span.groups)
        device = _matrices(first.adapters[0])[0].device
        stored = dtype if leaving else torch.float32
        self.flat = torch.zeros(end, dtype=stored, device=device)
        with torch.no_grad():
            for span in self._spans:
                for group, place in span.groups:
                    self._adopt(group, self.flat[span.whole][place], span)

    @staticmethod
    def _adopt(group: LinearGroup, place: Tensor, span: _Span) -> None:
        a, b = _cut(group, place)
        rows = a.split([_matrices(lora)[0].shape[0] for lora in group.adapters])
        for lora, *views in zip(group.adapters, rows, b, strict=True):
            for linear, view in zip(_linears(lora), views, strict=True):
                view.copy_(linear.weight)
                linear.weight = nn.Parameter(view)
                span.parameters.append(linear.weight)

    def begin(self) -> None:
        """Begins an optimizer step: gradients that stay are zero and in their places."""
        if self.leaving or not any(span.groups for span in self._spans):
            return
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.flat)
        else:
            self.gradients.zero_()
        for span in self._spans:
            self._show(span, self.gradients[span.whole])

    def enter(self, layer: int, *, backward: bool) -> None:
        """Gives the layer's groups their adapters and, in backward, where gradients are added."""
        span = self._spans[layer]
        if not span.groups:
            return
        if self.host is not None:
            self.host.receive(span.parameters)
        copies = self.flat[span.whole].to(self.dtype)
        gradients = None
        if backward and self.leaving:
            gradients = torch.zeros_like(self.flat[span.whole])
        elif backward:
            assert self.gradients is not None
            gradients = self.gradients[span.whole]
        for group, place in span.groups:
            group.a, group.b = _cut(group, copies[place])
            if gradients is not None:
                group.grad_a, group.grad_b = _cut(group, gradients[place])
        if gradients is not None and self.leaving:
            self._show(span, gradients)

    def leave(self, layer: int, *, backward: bool) -> None:
        """Takes the copies back; gradients that leave the device begin to."""
        span = self._spans[layer]
        for group, _ in span.groups:
            group.a = group.grad_a = None
            group.b, group.grad_b = [], []
        if backward and self.leaving and span.groups:
            assert self.host is not None
            self.host.send_down(span.parameters)

    @staticmethod
    def _show(span: _Span, gradients: Tensor) -> None:
        """Makes the layer's part of the gradients its parameters' own."""
        for parameter in span.parameters:
            if parameter.grad is None:
                parameter.grad = gradients.as_strided(
                    parameter.shape,
                    parameter.stride(),
                    gradients.storage_offset() + parameter.storage_offset() - span.start,
                )


def _linears(lora: LoraLinear) -> list[nn.Linear]:
    return [cast(nn.Linear, part[lora.adapter]) for part in (lora.lora_A, lora.lora_B)]


def _matrices(lora: LoraLinear) -> list[Tensor]:
    """A (r, in) and B (out, r)."""
    return [linear.weight for linear in _linears(lora)]


def _cut(group: LinearGroup, place: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The group's matrices in its part: every A as one (adapters * r, in), then each B (out, r)."""
    shapes = [[w.shape for w in _matrices(lora)] for lora in group.adapters]
    rows, features = sum(a[0] for a, _ in shapes), shapes[0][0][1]
    end = rows * features
    a, b = place[:end].view(rows, features), []
    for _, shape in shapes:
        b.append(place[end : end + shape.numel()].view(shape))
        end += shape.numel()
    return a, b
