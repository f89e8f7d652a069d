"""An adapter to go on from: one of ours or of peft's, if it is what params would make anew.

The run takes the adapter's weights and nothing else: the optimizer, the schedule and the order of the
data start afresh. So whatever shapes the product (rank, alpha, layers) must agree with params, and is
refused by its name where it does not; dropout may differ, as it belongs to the run.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fitlora.adapter import CONFIG, WEIGHTS, load_adapter
from fitlora.artifacts import read_json
from fitlora.errors import UserError
from fitlora.params import LoraParams

# Settings of peft that do not change what the two matrices mean; every other one must be off.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Ways to start an adapter that leave the base model's weights alone.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def read_start(folder: Path, lora: LoraParams) -> dict[str, Tensor]:
    """The adapter's tensors by name as in the model.

    Raises UserError where it is missing, damaged, of another kind, or not what `lora` says.
    """
    config = _read_config(folder)
    saved = config.get("modules_to_save") or []
    wanted = {
        "lora.r": (lora.r, config.get("r")),
        "lora.alpha": (lora.alpha, config.get("lora_alpha")),
        "lora.rslora": (lora.rslora, bool(config.get("use_rslora", False))),
        "lora.dora": (lora.dora, bool(config.get("use_dora", False))),
        "lora.bias": (lora.bias, config.get("bias", "none")),
        "lora.modules_to_save": (
            sorted(lora.modules_to_save),
            sorted(map(str, saved)) if isinstance(saved, list) else saved,
        ),
    }
    problems = [
        f"its {name.removeprefix('lora.')} is {found!r} and {name} is {asked!r}; set {name}: {found!r}"
        for name, (asked, found) in wanted.items()
        if asked != found
    ]
    if config.get("peft_type") != "LORA":
        problems = [f"it is {config.get('peft_type')!r}, and FitLoRA trains LORA"]
    for key, value in config.items():
        if key not in _HARMLESS and value:
            problems.append(f"its {key} is {value!r}, a kind of LoRA that FitLoRA does not train")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        problems.append(
            f"its init_lora_weights is {config['init_lora_weights']!r}, which changed the base model"
        )
    if problems:
        raise UserError(f"train.from_adapter {folder}: {'; '.join(problems)}")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"train.from_adapter {folder} has no {WEIGHTS}; FitLoRA reads no pickle")
    return load_adapter(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"train.from_adapter {folder} has no {CONFIG}; name the folder of an adapter, or null"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"train.from_adapter: {path} is damaged (it holds no object)")
    return content


def check_start(folder: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises UserError where the adapter's tensors are not the ones that the model's adapters have.

    wanted: the step's adapters by name, of which the shapes count.
    """
    if set(state) != set(wanted):
        raise UserError(
            f"train.from_adapter {folder} has adapters on {_leaves(state)}, and lora.target_modules "
            f"puts them on {_leaves(wanted)} of this model's layers; the two must be the same"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"train.from_adapter {folder}: {name} is {tuple(tensor.shape)}, and this model's is "
                f"{tuple(wanted[name].shape)}; it belongs to another model"
            )


def _leaves(names: Iterable[str]) -> str:
    layers = {name.partition(".lora_")[0].removesuffix(".weight") for name in names}
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    return f"{len(layers)} layers ({', '.join(leaves)})"
