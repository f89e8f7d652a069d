"""The same models as stock transformers and peft make them: what ours are compared with."""

from pathlib import Path
from typing import Any

import torch

from fitlora.data.templates import load_tokenizer, render
from tests.evaluation.forms import Tiny
from tests.rows import rows_in
from tests.tiny_models import dequantized, read_tensors


def stock_base(folder: Path) -> Any:
    """A 16-bit folder in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stock_quantized(tiny: Tiny) -> Any:
    """The 4-bit folder, its weights dequantized to float32 in plain PyTorch."""
    model = stock_base(tiny.original)
    state = {
        name: tensor.float() for name, tensor in dequantized(read_tensors(tiny.quantized)).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"])
    assert unexpected == []
    return model


def stock_adapter(tiny: Tiny) -> Any:
    """The same with the adapter, loaded by peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(stock_quantized(tiny), str(tiny.adapter)).eval()


def prompt_tokens(tiny: Tiny) -> list[list[int]]:
    """The rows' prompts as token ids."""
    tokenizer = load_tokenizer(tiny.original)
    return [
        tokenizer(render(tokenizer, row.prompt, prompt=True), add_special_tokens=False)["input_ids"]
        for row in rows_in(tiny.rows)
    ]


@torch.no_grad()
def stock_answer(model: Any, prompt: list[int], *, ends: list[int], new_tokens: int) -> list[int]:
    """One prompt alone, token by token, by the model's forward and nothing else."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
