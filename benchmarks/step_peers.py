"""The peers of `benchmarks.step_speed`: what others run for the same optimizer step.

`peft` is transformers with peft and bitsandbytes as their documentation says to train in 4 bits, and
`peft+liger` the same with Liger's kernels. `unsloth` loads a checkpoint through its own loader, and
recomputes with its own offloaded checkpointing. All have adapters in float32 under bfloat16 autocast,
as their trainers have, and the AdamW that ours has.

Unsloth needs a GPU already to be imported. Packages beside those of this project, as they were run with
torch 2.11 and transformers 5.17: unsloth and unsloth_zoo 2026.10.9, trl 1.15.0, datasets 4.8.5, tyro,
typeguard, docstring-parser, cut-cross-entropy, hf-transfer, diffusers, importlib-metadata, msgspec,
json5, nest-asyncio, structlog, torchao, certifi, dill 0.4.1, multiprocess 0.70.19.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import make_checkpoint, shape_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32

# Runs one optimizer step on (micro-batch, tokens) random tokens and returns its loss.
Step = Callable[[int], float]
# Makes the step of a case: (micro-batch, whether it recomputes) -> step.
Arrange = Callable[[int, bool], Step]

_NEEDS = {
    "fitlora": (),
    "peft": ("peft", "bitsandbytes"),
    "peft+liger": ("peft", "bitsandbytes", "liger_kernel"),
    "unsloth": ("unsloth", "unsloth_zoo"),
}


def missing(system: str) -> list[str]:
    """The packages that `system` needs and that are not installed."""
    return [name for name in _NEEDS[system] if importlib.util.find_spec(name) is None]


def build(system: str, model: str, tokens: int, folder: Path) -> Arrange:
    """A peer's model on the device. folder: for a checkpoint, where one is needed and not there."""
    return _unsloth(model, tokens, folder) if system == "unsloth" else _peft(system, model, tokens)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _train(model: Any, tokens: int) -> Callable[[int], Step]:
    """How a trainer runs one step of `model`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    device, vocabulary = _device(), model.config.vocab_size

    def of(micro_batch: int) -> Step:
        ids: Tensor = torch.randint(0, vocabulary, (micro_batch, tokens), device=device)

        def step(index: int) -> float:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss)

        return step

    return of


def _peft(system: str, name: str, tokens: int) -> Arrange:
    from peft import LoraConfig, get_peft_model

    if system == "peft+liger":
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            apply_liger_kernel_to_llama,
        )

        apply_liger_kernel_to_llama()
    base = _random_model(name)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    of = _train(model, tokens)

    def arrange(micro_batch: int, recompute: bool) -> Step:
        if recompute:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        return of(micro_batch)

    return arrange


def _random_model(name: str) -> Any:
    """transformers' model in bitsandbytes' NF4 with double quantization, of random weights."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    config, device = shape_config(name), _device()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not path.endswith("lm_head"):
            parent = model.get_submodule(path.rpartition(".")[0])
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            weight = torch.empty(
                module.out_features, module.in_features, dtype=torch.bfloat16, device=device
            ).normal_(0.0, 0.02)
            new.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            setattr(parent, path.rpartition(".")[2], new)
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                filled.normal_(0.0, 0.02) if parameter.dim() > 1 else filled.fill_(1.0)
                module._parameters[leaf] = torch.nn.Parameter(filled, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    return model


def _unsloth(name: str, tokens: int, folder: Path) -> Arrange:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder.parent / "unsloth")  # else where it is run
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before transformers

    if not (folder / "model.safetensors.index.json").is_file():
        make_checkpoint(name, folder, _device())
    base, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    made: list[Any] = []  # the kind of checkpointing is chosen with the adapters, once

    def arrange(micro_batch: int, recompute: bool) -> Step:
        if not made:
            model = FastLanguageModel.get_peft_model(
                base, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=TARGETS,
                use_gradient_checkpointing="unsloth" if recompute else False, random_state=0,
            )  # fmt: skip
            model.train()
            made.extend([recompute, _train(model, tokens)])
        assert made[0] == recompute, "one process for each kind of checkpointing"
        step: Step = made[1](micro_batch)
        return step

    return arrange
