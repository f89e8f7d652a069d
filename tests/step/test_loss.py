"""Chunked cross-entropy is cross-entropy, in value and gradient, for any chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fitlora.step.loss import chunked_cross_entropy

ROWS, HIDDEN, VOCABULARY = 37, 16, 101


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=make).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=make).to(dtype)
    bias = torch.randn(VOCABULARY, generator=make).to(dtype)
    return hidden, weight, bias, torch.randint(VOCABULARY, (ROWS,), generator=make)


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> list[Tensor]:
    """Summed loss and its gradient, in float64."""
    hidden = hidden.double().requires_grad_()
    logits = F.linear(hidden, weight.double(), None if bias is None else bias.double())
    loss = F.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    assert hidden.grad is not None
    return [loss.detach(), hidden.grad]


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 4096])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_cross_entropy(chunk: int, with_bias: bool) -> None:
    hidden, weight, b, targets = inputs()
    bias = b if with_bias else None
    expected = exact(hidden, weight, bias, targets)
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, targets, scale=0.25, chunk=chunk, bias=bias)
    assert loss.dtype == torch.float32
    (3.0 * loss).backward()  # what comes back is not always 1
    torch.testing.assert_close(loss.double(), 0.25 * expected[0], rtol=1e-5, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), 0.75 * expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_trained_has_gradients(dtype: torch.dtype, frozen: bool) -> None:
    """In float32, as it is kept; frozen: what comes into the head learns nothing."""
    hidden, weight, bias, targets = inputs(dtype)
    wide = [part.to(torch.float32, copy=True).requires_grad_() for part in (weight, bias)]
    given = hidden if frozen else hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(given, wide[0], targets, scale=0.25, chunk=5, bias=wide[1])
    (3.0 * loss).backward()
    reference = [part.double().requires_grad_() for part in (weight, bias)]
    logits = F.linear(hidden.double(), *reference)
    (0.75 * F.cross_entropy(logits, targets, reduction="sum")).backward()
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for found, exactly in zip(wide, reference, strict=True):
        assert found.grad is not None
        assert exactly.grad is not None
        assert found.grad.dtype == torch.float32
        assert float((found.grad - exactly.grad).norm() / exactly.grad.norm()) < limit


def test_in_bf16_the_loss_is_summed_in_fp32() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    expected = exact(hidden, weight, bias, targets)
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, targets, scale=1.0, chunk=8, bias=bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(float(expected[0]), rel=5e-3)
    error = (leaf.grad.double() - expected[1]).norm() / expected[1].norm()
    assert float(error) < 0.02


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    hidden, weight, _, targets = inputs()
    bias = torch.full((VOCABULARY,), offset)
    bias[3] += 500.0  # exp(500) is beyond fp32
    expected = exact(hidden, weight, bias, targets)
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf, weight, targets, scale=1.0, chunk=10, bias=bias)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected[0]), rel=1e-4)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), expected[1], rtol=1e-2, atol=1e-3)


def test_without_gradients_none_are_made() -> None:
    hidden, weight, _, targets = inputs()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden.requires_grad_(), weight, targets, scale=1.0, chunk=10)
    assert not loss.requires_grad
    alone = chunked_cross_entropy(hidden.detach(), weight, targets, scale=1.0, chunk=10)
    assert not alone.requires_grad
    assert (
        float(alone) == float(loss) == pytest.approx(float(exact(*inputs()[:2], None, targets)[0]))
    )


def test_a_micro_batch_without_targets() -> None:
    hidden, weight, _, targets = inputs()
    leaf = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(leaf[:0], weight, targets[:0], scale=1.0, chunk=10)
    loss.backward()
    assert loss.item() == 0.0
    assert leaf.grad is not None
    assert not leaf.grad.any()
