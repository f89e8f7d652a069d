"""A device's adapters in one flat buffer, their gradients in another, and how a layer comes by its own.

Layers that share an input want their adapters' first matrices behind each other, so that one product
serves them all. The parameters that peft made become views of the flat buffer and keep their names, so
optimizers and checkpoints see what they know. A layer's adapters are copied to the dtype that it
computes in when it is entered, in one go, and the copy is gone when it is left.

Adapters of layers that are frozen lie among the others and have no gradients.

With an optimizer on the host the flat buffer has that dtype itself (the float32 masters are on the
host), and gradients exist for the layer in work alone: they add up in float32, and leave the device in
the adapters' dtype when the layer is left. What the host has made of a layer's adapters is waited for
when the layer is entered, and no earlier.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
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


# A matrix in a layer's part: its size, its strides, and the elements before it.
_Place = tuple[tuple[int, int], tuple[int, int], int]


@dataclass(frozen=True)
class _Share:
    """A group's places in its layer's part: every A as one (adapters * r, in), then each B (out, r)."""

    group: LinearGroup
    a: _Place
    b: list[_Place]

    @classmethod
    def of(cls, group: LinearGroup, start: int) -> "_Share":
        shapes = [[w.shape for w in _matrices(lora)] for lora in group.adapters]
        places = []
        for rows, columns in (
            (sum(a[0] for a, _ in shapes), shapes[0][0][1]),
            *(b for _, b in shapes),
        ):
            places.append(((rows, columns), (columns, 1), start))
            start += rows * columns
        return cls(group, places[0], places[1:])

    @property
    def end(self) -> int:
        (rows, columns), _, start = self.b[-1]
        return start + rows * columns

    def cut(self, part: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A and every B in a layer's part of a flat buffer. It runs twice a layer: one call each."""
        first = part.storage_offset()
        a, *b = (
            part.as_strided(size, stride, first + start)
            for size, stride, start in (self.a, *self.b)
        )
        return a, b


@dataclass
class _Span:
    """A layer's part of the flat buffer: its groups that have adapters, each with its share."""

    start: int
    shares: list[_Share] = field(default_factory=list)
    end: int = 0
    parameters: list[nn.Parameter] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)  # the parameters', where they stay
    learned: slice | None = None  # of the flat gradients, where its adapters learn
    leaving: Tensor | None = None  # its part of the gradients, while backward adds to them

    @property
    def whole(self) -> slice:
        return slice(self.start, self.end)


class AdapterBank:
    """The adapters of a stack of layers, given by number and groups, computed with in `dtype`.

    dtype: what they are stored in where gradients leave, and computed in until it is set to another.
    leaving: whether gradients leave the device layer by layer, to `host`, which is then to be set.
    Gradients that stay are made at the first `begin` and kept; a model that only evaluates has none.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[LinearGroup]],
        dtype: torch.dtype,
        *,
        leaving: bool = False,
    ) -> None:
        self.dtype, self.leaving = dtype, leaving
        self.host: Host | None = None
        self.gradients: Tensor | None = None
        self._spans: dict[int, _Span] = {}
        end = 0
        for layer, groups in layers.items():
            span = self._spans[layer] = _Span(end)
            for group in groups:
                if group.adapters:
                    share = _Share.of(group, end - span.start)
                    span.shares.append(share)
                    end = span.start + -(-share.end // _ALIGN) * _ALIGN
            span.end = end
        self.freeze(())
        if end == 0:
            return
        spans = self._spans.values()
        first = next(span.shares[0].group for span in spans if span.shares)
        device = _matrices(first.adapters[0])[0].device
        stored = dtype if leaving else torch.float32
        self.flat = torch.zeros(end, dtype=stored, device=device)
        with torch.no_grad():
            for span in spans:
                for share in span.shares:
                    self._adopt(share, self.flat[span.whole], span)

    @staticmethod
    def _adopt(share: _Share, part: Tensor, span: _Span) -> None:
        group = share.group
        a, b = share.cut(part)
        rows = a.split([_matrices(lora)[0].shape[0] for lora in group.adapters])
        for lora, *views in zip(group.adapters, rows, b, strict=True):
            for linear, view in zip(_linears(lora), views, strict=True):
                view.copy_(linear.weight)
                linear.weight = nn.Parameter(view)
                span.parameters.append(linear.weight)

    def freeze(self, layers: Collection[int]) -> None:
        """From now on these layers' adapters have no gradients, and all others have; between steps."""
        self.gradients, self._learned = None, 0
        for layer, span in self._spans.items():
            span.learned, span.gradients, span.leaving = None, [], None
            for parameter in span.parameters:
                parameter.grad = None
            if span.shares and layer not in layers:
                size = span.end - span.start
                span.learned = slice(self._learned, self._learned + size)
                self._learned += size

    def by_layer(self) -> list[tuple[Tensor, dict[int, int]]]:
        """The flat buffers that there are, each with the bytes that it has of every layer."""
        if not any(span.shares for span in self._spans.values()):
            return []
        found = [(self.flat, {n: span.whole for n, span in self._spans.items()})]
        if self.gradients is not None:
            learned = {
                n: span.learned for n, span in self._spans.items() if span.learned is not None
            }
            found.append((self.gradients, learned))
        return [
            (flat, {n: (p.stop - p.start) * flat.element_size() for n, p in parts.items()})
            for flat, parts in found
        ]

    def begin(self) -> None:
        """Begins an optimizer step: gradients that stay are zero and in their places."""
        if self.leaving or self._learned == 0:
            return
        learning = [span for span in self._spans.values() if span.learned is not None]
        if self.gradients is None:
            self.gradients = torch.zeros(
                self._learned, dtype=self.flat.dtype, device=self.flat.device
            )
            for span in learning:
                span.gradients = self._like(span, self.gradients[span.learned])
        else:
            self.gradients.zero_()
        for span in learning:
            for parameter, gradient in zip(span.parameters, span.gradients, strict=True):
                parameter.grad = gradient

    def enter(self, layer: int, *, backward: bool) -> None:
        """Gives the layer's groups their adapters and, in backward, where gradients are added."""
        span = self._spans[layer]
        if not span.shares:
            return
        if self.host is not None:
            self.host.receive(span.parameters)
        copies = self.flat[span.whole].to(self.dtype)
        gradients = None
        if backward and span.learned is not None:
            if self.leaving:
                gradients = span.leaving = torch.zeros(
                    span.end - span.start, dtype=torch.float32, device=self.flat.device
                )
            else:
                assert self.gradients is not None
                gradients = self.gradients[span.learned]
        for share in span.shares:
            share.group.a, share.group.b = share.cut(copies)
            if gradients is not None:
                share.group.grad_a, share.group.grad_b = share.cut(gradients)

    def leave(self, layer: int, *, backward: bool) -> None:
        """Takes the copies back; gradients that leave the device begin to."""
        span = self._spans[layer]
        for share in span.shares:
            share.group.a = share.group.grad_a = None
            share.group.b, share.group.grad_b = [], []
        if backward and span.leaving is not None:
            assert self.host is not None
            gradients, span.leaving = span.leaving.to(self.flat.dtype), None
            for parameter, gradient in zip(
                span.parameters, self._like(span, gradients), strict=True
            ):
                parameter.grad = gradient
            self.host.send_down(span.parameters)

    @staticmethod
    def _like(span: _Span, gradients: Tensor) -> list[Tensor]:
        """The layer's part of the gradients, cut as its parameters are."""
        before = gradients.storage_offset() - span.start
        return [
            gradients.as_strided(p.shape, p.stride(), before + p.storage_offset())
            for p in span.parameters
        ]


def _linears(lora: LoraLinear) -> list[nn.Linear]:
    return [cast(nn.Linear, part[lora.adapter]) for part in (lora.lora_A, lora.lora_B)]


def _matrices(lora: LoraLinear) -> list[Tensor]:
    """A (r, in) and B (out, r)."""
    return [linear.weight for linear in _linears(lora)]
