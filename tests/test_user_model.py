"""find_optimal_batch_size: what it finds, and that it leaves the user's model as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora import UserError, find_optimal_batch_size
from fitlora.memory.trace import MemoryTrace
from tests.tiny_models import make_config, make_tokenizer

TOKENS = 32


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return make_tokenizer(tmp_path)


@pytest.fixture
def model() -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(make_config("llama", attention_dropout=0.1))


def bytes_of_a_step(model: Any, rows: int) -> int:
    """A step's peak with AdamW's states, counted apart from the code that is tested."""
    ids = torch.zeros((rows, TOKENS), dtype=torch.long)
    with MemoryTrace(model, round_up=False) as trace:
        trace.watch([*model.parameters(), *model.buffers(), ids])
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
        ).loss.backward()
    model.zero_grad(set_to_none=True)
    return trace.peak.bytes + sum(8 * p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("start", "rows"), [(8, 11), (1, 3), (16, 2), (4, 4)])
def test_finds_the_largest_that_fits(model: Any, tokenizer: Any, start: int, rows: int) -> None:
    model.train()
    budget = (bytes_of_a_step(model, rows) + bytes_of_a_step(model, rows + 1)) // 2
    found = find_optimal_batch_size(
        model, tokenizer, start, sequence_length=TOKENS, memory_budget=budget
    )
    assert found == rows


def test_tries_six_times_at_most(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_optimal_batch_size(model, tokenizer, 1, sequence_length=4, memory_budget="1GiB")
    assert found == 32
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    model.eval()
    model.model.layers[0].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    gradient = weight.grad
    model.register_buffer("count", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: module.count.add_(1) and None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()

    find_optimal_batch_size(model, tokenizer, 2, sequence_length=8, memory_budget="4MiB")

    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert not model.model.embed_tokens.weight.requires_grad
    assert weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(weight))
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not m._forward_hooks for m in model.modules())


def test_stops_a_step_that_goes_over_the_budget(model: Any, tokenizer: Any) -> None:
    """The host is not filled to find out that something does not fit."""
    rows, most = 4096, 0
    watching = MemoryTrace(round_up=False)
    with watching:
        found = find_optimal_batch_size(
            model, tokenizer, rows, sequence_length=8, memory_budget="32MiB"
        )
    most = watching.peak.bytes
    assert 1 <= found < rows
    assert most < 2 * 2**25


def test_default_length_is_the_tokenizers_and_the_models(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    tokenizer.model_max_length = 16
    find_optimal_batch_size(
        model=model, tokenizer=tokenizer, start_batch_size=64, memory_budget="8MiB"
    )
    assert seen[0] == (64, 16)
    tokenizer.model_max_length = 10**30
    find_optimal_batch_size(model, tokenizer, 1, memory_budget="32MiB")
    assert (1, 256) in seen, "the model's positions"


def test_refuses_what_cannot_be_measured(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="a batch of 1 does not fit"):
        find_optimal_batch_size(model, tokenizer, memory_budget="1MiB")
    with pytest.raises(UserError, match="start_batch_size is 0"):
        find_optimal_batch_size(model, tokenizer, 0)
    with pytest.raises(UserError, match="sequence_length is 1"):
        find_optimal_batch_size(model, tokenizer, sequence_length=1)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model requires a gradient"):
        find_optimal_batch_size(model, tokenizer)
