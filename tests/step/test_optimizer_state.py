"""An optimizer's states: made ahead, taken, put back, for every optimizer that runs on the CPU."""

from typing import Any

import pytest
import torch
from torch import nn

from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.step.optimizer_state import make_states, put_states, take_states
from tests.step import steps

KINDS = ("adamw", "adamw_8bit", "on_host")


def made(kind: str) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    # 8-bit states begin at 4096 elements
    parameters = {
        name: nn.Parameter(torch.randn(size, 64, generator=generator))
        for name, size in (("large", 64), ("small", 2))
    }
    if kind == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters.values(), lr=0.1), parameters
    plain = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    return (CPUOffloadOptimizer(plain) if kind == "on_host" else plain), parameters


def updates(optimizer: Any, parameters: dict[str, nn.Parameter], count: int, start: int) -> None:
    for number in range(start, start + count):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_states_put_back_go_on_to_the_bit(kind: str) -> None:
    whole, expected = made(kind)
    updates(whole, expected, 5, 0)
    first, parameters = made(kind)
    updates(first, parameters, 3, 0)
    tensors, numbers = take_states(first, parameters)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    updates(first, parameters, 7, 50)  # what was taken is a copy

    again, others = made(kind)
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(weights[name])
        put_states(again, others, tensors, numbers)
    updates(again, others, 2, 3)
    for name, parameter in expected.items():
        assert torch.equal(others[name], parameter), name


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_made_ahead_they_change_nothing_and_an_update_makes_no_more(kind: str) -> None:
    plain, expected = made(kind)
    updates(plain, expected, 2, 0)
    ahead, parameters = made(kind)
    make_states(ahead)
    held = [id(v) for s in ahead.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    make_states(ahead)
    updates(ahead, parameters, 2, 0)
    after = [id(v) for s in ahead.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert after == held
    for name, parameter in expected.items():
        assert torch.equal(parameters[name], parameter)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 5])
def test_out_of_memory_leaves_no_state_half_made(
    kind: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, parameters = made(kind)
    plain, count = torch.zeros_like, iter(range(100))

    def zeros(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(count) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments, **options)

    monkeypatch.setattr(torch, "zeros_like", zeros)
    if fails_at < 4:
        with pytest.raises(torch.OutOfMemoryError):
            make_states(optimizer)
    monkeypatch.undo()
    updates(optimizer, parameters, 1, 0)
    other, expected = made(kind)
    updates(other, expected, 1, 0)
    for name, parameter in expected.items():
        assert torch.equal(parameters[name], parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_update_there_are_none(kind: str) -> None:
    optimizer, parameters = made(kind)
    assert take_states(optimizer, parameters) == ({}, {})
    updates(optimizer, parameters, 1, 0)
    put_states(optimizer, parameters, {}, {})
    assert take_states(optimizer, parameters) == ({}, {})


def test_states_of_another_optimizer_are_refused() -> None:
    one, parameters = made("adamw")
    updates(one, parameters, 1, 0)
    tensors, numbers = take_states(one, parameters)
    other, others = made("adamw_8bit")
    with pytest.raises(ValueError, match="another optimizer"):
        put_states(other, others, tensors, numbers)
    wrong = {name: tensor[:1] if tensor.dim() else tensor for name, tensor in tensors.items()}
    again, theirs = made("adamw")
    with pytest.raises(ValueError, match="another size"):
        put_states(again, theirs, wrong, numbers)


def test_a_step_is_put_back_after_a_half_done_update() -> None:
    step = steps.step(steps.plan(), steps.settings(bits=16))
    batch = steps.sequences(7)
    step.run(batch, step=0, learning_rate=1e-2)
    adapters, states = step.adapter_state(), step.optimizer_state()
    step.run(batch, step=1, learning_rate=1e-2)
    expected = step.adapter_state()
    assert step.optimizer is not None
    with torch.no_grad():
        next(iter(step.adapters.values())).mul_(3.0)
    step.half_updated = True
    step.load_adapter_state(adapters)
    step.load_optimizer_state(*states)
    assert not step.half_updated
    step.run(batch, step=1, learning_rate=1e-2)
    for name, tensor in step.adapter_state().items():
        assert torch.equal(tensor, expected[name])


def test_another_layout_of_the_same_step() -> None:
    step = steps.step(steps.plan(), steps.settings(bits=16))
    step.adopt(steps.plan(micro_batch_size=2, recompute_layers=(0, 1), loss_chunk_tokens=64))
    assert len(step.micro_batches(steps.sequences(7))) == 4
    with pytest.raises(AssertionError):
        step.adopt(steps.plan(optimizer="adamw_8bit"))
