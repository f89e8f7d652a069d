"""Frozen and LoRA layers, one by one, against autograd on plain products."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitlora.step import ops
from fitlora.step.linear import FrozenLinear, Linear4bit, LoraLinear
from fitlora.step.training_step import TrainingStep
from tests.step import steps

TOKENS = 11


def made(bits: int, dropout: float, *, family: str = "llama") -> TrainingStep:
    """A step whose layers have biases where the family has them."""
    changes: dict[str, Any] = {"attention_bias": True} if family == "biased" else {}
    step = steps.step(the_settings=steps.settings(dropout=dropout, bits=bits), **changes)
    for name, parameter in step.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    step.model.train()
    step.context.row_keys = ops.row_keys(0, 0, torch.zeros(TOKENS).long(), torch.arange(TOKENS))
    return step


def layer(step: TrainingStep, part: str) -> LoraLinear:
    found = [m for n, m in step.model.named_modules() if n.endswith(part)]
    assert isinstance(found[-1], LoraLinear)
    return found[-1]


def dropped(x: Tensor, of: LoraLinear) -> Tensor:
    """The mask as a product, so that plain autograd goes through it."""
    mask = torch.empty_like(x[0])
    torch.ops.fitlora.dropout(
        torch.ones_like(mask), of.context.row_keys, of.stream, of.dropout, mask, False
    )
    return x * mask


def inputs(width: int, out: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=make).requires_grad_()
    return x, torch.randn(1, TOKENS, out, generator=make)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("family", "part"), [("llama", "down_proj"), ("biased", "k_proj")])
def test_lora_is_two_products_beside_a_frozen_one(
    bits: int, dropout: float, family: str, part: str
) -> None:
    lora = layer(made(bits, dropout, family=family), part)
    assert isinstance(lora.frozen, Linear4bit if bits == 4 else FrozenLinear)
    assert (lora.frozen.bias is not None) == (family == "biased")
    weight = lora.frozen.compute_weight(torch.float32)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    x, grad = inputs(weight.shape[1], weight.shape[0])

    def plain() -> Tensor:
        inner = dropped(x, lora) if dropout else x
        y = x @ weight.T + 8.0 * (inner @ a.T @ b.T)  # alpha 32 over rank 4
        return y if lora.frozen.bias is None else y + lora.frozen.bias

    expected = torch.autograd.grad(plain(), (x, a, b), grad)
    found = torch.autograd.grad(lora(x), (x, a, b), grad)
    torch.testing.assert_close(lora(x), plain(), rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_input_has_a_stream_of_its_own() -> None:
    """Layers that share an input share its mask: it is dropped once for all of them."""
    step = made(4, 0.2)
    layers = {n: m for n, m in step.model.named_modules() if isinstance(m, LoraLinear)}
    inputs = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
    for name, layer in layers.items():
        number, part = int(name.split(".")[2]), name.rpartition(".")[2].removesuffix("_proj")
        assert layer.stream == 4 * number + inputs[part]
    x = torch.ones(TOKENS, 64)
    masks = {m.stream: m.dropped(x) for m in layers.values() if m.in_features == 64}
    assert len(masks) == 6
    for one, other in combinations(masks.values(), 2):
        assert not torch.equal(one, other)


def test_no_dropout_in_evaluation() -> None:
    step = made(4, 0.2)
    lora = layer(step, "q_proj")
    x, _ = inputs(64, 64)
    assert lora.dropout == 0.2
    trained = lora(x)
    step.model.eval()
    assert lora.dropout == 0.0
    assert lora.dropped(x) is x
    assert not torch.allclose(lora(x), trained)


def test_without_adapters_it_is_the_frozen_layer() -> None:
    lora = layer(made(4, 0.2), "q_proj")
    x, grad = inputs(64, 64)
    with_adapters = lora(x)
    lora.enable_adapters(False)
    weight = lora.frozen.compute_weight(torch.float32)
    torch.testing.assert_close(lora(x), x @ weight.T)
    assert not torch.allclose(lora(x), with_adapters)
    (found,) = torch.autograd.grad(lora(x), x, grad)
    torch.testing.assert_close(found, grad @ weight)


@pytest.mark.parametrize("bits", [4, 16])
def test_nothing_but_the_input_is_saved(bits: int) -> None:
    """Autograd holds x, h and the adapter; no weight, no mask, no dequantized copy."""
    lora = layer(made(bits, 0.2), "up_proj")
    x, _ = inputs(64, 128)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora(x)
        lora.base_layer(x)
    assert sorted(saved) == sorted([(TOKENS, 64), (4, 64), (TOKENS, 4), (128, 4)])


def test_an_input_without_gradient_gets_none() -> None:
    lora = layer(made(4, 0.2), "q_proj")
    x, grad = inputs(64, 64)
    lora(x.detach()).backward(grad)
    for part in (lora.lora_A, lora.lora_B):
        assert part["default"].weight.grad is not None


def test_a_weight_is_asked_for_again_in_backward() -> None:
    """Where it lies in between is nobody's business: here it is replaced by an equal copy."""
    lora = layer(made(4, 0.0), "q_proj")
    x, grad = inputs(64, 64)
    expected = torch.autograd.grad(lora(x), x, grad)[0]
    y = lora(x)
    packed = lora.base_layer.weight.data
    lora.base_layer.weight.data = packed.clone()
    packed.zero_()
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected)


def test_a_frozen_linear_is_a_linear() -> None:
    plain = nn.Linear(8, 5)
    frozen = FrozenLinear(8, 5)
    frozen.load_state_dict(plain.state_dict())
    frozen.requires_grad_(False)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(frozen(x), plain(x))
    grad = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    found, expected = (torch.autograd.grad(m(x), x, grad)[0] for m in (frozen, plain))
    torch.testing.assert_close(found, expected)
    assert frozen.weight.grad is None


def test_in_bf16_the_result_is_bf16() -> None:
    plan = steps.plan(compute_dtype="bfloat16")
    lora = layer(steps.step(plan, steps.settings(dropout=0.0)), "q_proj")
    x = torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    y = lora(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    grad = lora.lora_A["default"].weight.grad
    assert grad is not None
    assert grad.dtype == torch.float32  # the adapter's own
