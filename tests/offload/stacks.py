"""A toy stack of decoder layers that ask for their weights as a step does, and a head in slices."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.offload.residency import Residency
from fitlora.offload.transport import Transport
from fitlora.offload.vocabulary import Slices
from fitlora.step.linear import FrozenLinear

WIDTH = 8


class Layer(nn.Module):
    """Two frozen products and a norm that is trained; the second layer of three has a bias."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.up = FrozenLinear(WIDTH, WIDTH + number, bias=number % 3 == 1, device="meta")
        self.down = FrozenLinear(WIDTH + number, WIDTH, bias=False, device="meta")
        for linear in (self.up, self.down):
            linear.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def weights(self) -> list[Tensor]:
        return [p for linear in (self.up, self.down) for p in linear.parameters()]


def values(stack: list[Layer]) -> list[list[Tensor]]:
    make = torch.Generator().manual_seed(0)
    return [[torch.randn(w.shape, generator=make) for w in layer.weights()] for layer in stack]


def make_stack(count: int) -> list[Layer]:
    return [Layer(number) for number in range(count)]


def resident(count: int, device: str = "cpu") -> list[Layer]:
    stack = make_stack(count)
    for layer, tensors in zip(stack, values(stack), strict=True):
        _fill(layer, tensors, torch.device(device))
    return stack


def streamed(
    count: int, which: tuple[int, ...], transport: Transport, slots: int, **disk: Any
) -> tuple[list[Layer], Residency]:
    """The same with the weights of the layers `which` on the host."""
    stack = make_stack(count)
    residency = Residency(stack, which, transport, slots=slots, **disk)
    for number, (layer, tensors) in enumerate(zip(stack, values(stack), strict=True)):
        if number in which:
            for parameter, tensor in zip(layer.weights(), tensors, strict=True):
                residency.places[id(parameter)].copy_(tensor)
            layer.scale.data = layer.scale.data.to(transport.device)
        else:
            _fill(layer, tensors, transport.device)
    transport.pin()
    residency.start()
    return stack, residency


def _fill(layer: Layer, tensors: list[Tensor], device: torch.device) -> None:
    values = (tensor.to(device) for tensor in tensors)
    layer.scale.data = layer.scale.data.to(device)
    for linear in (layer.up, layer.down):
        for leaf, parameter in linear._parameters.items():
            if parameter is not None:
                linear._parameters[leaf] = nn.Parameter(next(values), requires_grad=False)


class _Visit(torch.autograd.Function):
    """One layer: its input is kept, and it is run again in backward with its weights fetched again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, run: "Run", index: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.index = run, index
        return run.visit(index, x, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run.visit(ctx.index, x, backward=True, grad=grads[0])
        del out
        assert x.grad is not None
        return x.grad, None, None, None


class Run:
    """Passes over a stack, whose layers enter and leave the residency."""

    def __init__(self, stack: list[Layer], residency: Residency | None = None) -> None:
        self.stack, self.residency = stack, residency
        self.fail_at: tuple[int, bool] | None = None
        self.on_use: Any = lambda *tensors: None

    def visit(self, index: int, x: Tensor, *, backward: bool, grad: Tensor | None = None) -> Tensor:
        layer = self.stack[index]
        if self.residency is not None:
            self.residency.enter(index, backward=backward)
        self.on_use(*layer.weights())
        if self.fail_at == (index, backward):
            raise RuntimeError("on purpose")
        out = cast(Tensor, x + layer.scale * layer.down(torch.tanh(layer.up(x))))
        if grad is not None:
            torch.autograd.backward(out, grad)
        if self.residency is not None:
            self.residency.leave(index)
        return out

    def train(self, x: Tensor) -> list[Tensor]:
        """The output and every gradient of one forward and backward."""
        if self.residency is not None:
            self.residency.begin(backward_follows=True)
        for layer in self.stack:
            layer.scale.grad = None
        leaf = x.clone().requires_grad_()
        hidden = leaf
        for index, layer in enumerate(self.stack):
            hidden = _Visit.apply(hidden, layer.scale, self, index)
        hidden.square().sum().backward()
        grads = [layer.scale.grad for layer in self.stack]
        return [hidden.detach(), cast(Tensor, leaf.grad), *cast(list[Tensor], grads)]

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        if self.residency is not None:
            self.residency.begin(backward_follows=False)
        for index in range(len(self.stack)):
            x = self.visit(index, x, backward=False)
        return x


def resident_slices(weight: Tensor, rows: int) -> Slices:
    """The slices of a head that is on the device, so that both heads have the same arithmetic."""

    def slices() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(weight), rows):
            yield start, weight[start : start + rows]

    return slices
