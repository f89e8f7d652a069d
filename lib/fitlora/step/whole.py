"""What is trained beside the adapters: biases of the model, and embedding, head and norms as a whole.

peft trains a copy of such a module and keeps the original. Here the model's own parameter is trained, so
that nothing is there twice; on disk it has the name that peft gives its copy (`fitlora.adapter`). As
adapters are, it is float32 while it is learned: a norm's weight is near 1, where bfloat16 has steps of
0.4 to 0.8%, and would never move. The step computes with what it rounds to, so it begins as the frozen
model to the bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fitlora.errors import UserError
from fitlora.params import LoraParams
from fitlora.step.linear import FrozenLinear, Linear4bit


def train_whole(model: Any, lora: LoraParams) -> None:
    """Has the parameters that `lora` names trained; its adapters are there already.

    model: a causal model of transformers, on meta. Raises UserError for modules of another kind.
    """
    _check_modules(model, lora.modules_to_save)
    for name, module in model.named_modules():
        learned = {
            leaf: parameter.dtype
            for leaf, parameter in module._parameters.items()
            if parameter is not None and _is_trained(name, leaf, lora)
        }
        for leaf in learned:
            parameter = module._parameters[leaf]
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        if learned and not isinstance(module, FrozenLinear | Linear4bit):  # which do it themselves
            _compute_in(module, learned)


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained beside the adapters, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}


def _is_trained(module: str, leaf: str, lora: LoraParams) -> bool:
    """By the names alone, as peft has it."""
    with_bias = lora.bias == "all" or (lora.bias == "lora_only" and module.endswith(".base_layer"))
    return module.endswith(lora.modules_to_save) or (leaf == "bias" and with_bias)


def _check_modules(model: Any, wanted: tuple[str, ...]) -> None:
    modules = {name: module for name, module in model.named_modules() if ".lora_" not in name}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = tables[0].weight is tables[1].weight
    norms = {name for name, module in modules.items() if _is_norm(module)}
    able = norms | {name for name, m in modules.items() if m in tables and not tied}
    for ending in wanted:
        found = {name for name in modules if name.endswith(ending)}
        if found and not found - able:
            continue
        if tied and any(modules[name] in tables for name in found):
            why = (
                "embedding and head are one table in this model (tie_word_embeddings), which cannot be "
                "trained; leave it out"
            )
        else:
            why = "only norms, embedding and head can be trained as a whole"
        leaves = sorted({name.rpartition(".")[2] for name in able})
        raise UserError(
            f"lora.modules_to_save has {ending}; {why}. Here it may name {', '.join(leaves)}; linear "
            "layers are for lora.target_modules"
        )


def _is_norm(module: nn.Module) -> bool:
    """Whether it has a weight for each of its features, and nothing inside."""
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(p.dim() == 1 for p in own)


def _compute_in(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Has the module compute with copies of its parameters, in the dtypes that are given by name."""
    forward = module.forward

    def with_copies(*inputs: Any, **options: Any) -> Any:
        learned = dict(module._parameters)
        try:
            for leaf, dtype in dtypes.items():
                module._parameters[leaf] = learned[leaf].to(dtype)  # type: ignore[union-attr, assignment]
            return forward(*inputs, **options)
        finally:
            module._parameters.update(learned)

    module.forward = with_copies
