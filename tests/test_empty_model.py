"""A model without weights: nothing is computed for them, and what the config says is there."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from fitlora.model import empty_model

TINY = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=32,
)  # fmt: skip


class Filled(TorchDispatchMode):
    """Remembers which meta tensors were written to in place, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.endswith("_") and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def test_no_tensor_without_content_is_filled() -> None:
    with Filled() as filled:
        model = empty_model(TINY, dtype=torch.bfloat16)
    assert filled.names <= {"detach_", "requires_grad_"}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_buffers_have_what_the_config_says() -> None:
    whole, empty = AutoModelForCausalLM.from_config(TINY), empty_model(TINY, dtype=torch.float32)
    expected = dict(whole.named_buffers())
    assert expected
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, expected[name])
