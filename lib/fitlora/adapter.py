"""The adapter on disk, in peft's format: adapter_config.json and adapter_model.safetensors.

Stock peft loads it. The files are written by us and not by peft's `save_pretrained`, whose config
holds sets in no particular order and the versions of libraries: the same adapter would not be the
same bytes. Only safetensors and JSON are read back.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fitlora.errors import ArtifactError
from fitlora.params import LoraParams

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = ".default.weight"  # how peft names the one adapter inside a model
_MAGNITUDE = "lora_magnitude_vector"  # which peft stores without a last part


def adapter_config(
    lora: LoraParams, target_modules: list[str], *, base_model: str, revision: str | None
) -> dict[str, Any]:
    """What peft needs to know, sorted."""
    return {
        "base_model_name_or_path": base_model,
        "bias": lora.bias,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": sorted(lora.modules_to_save) or None,
        "peft_type": "LORA",
        "r": lora.r,
        "revision": revision,
        "target_modules": sorted(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }


def save_adapter(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes the adapter. state: by name as in the model (`…q_proj.lora_A.default.weight`).

    What is trained as a whole has the model's own name, and so it is in peft's files.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PREFIX + name.replace(_NAME, "" if _MAGNITUDE in name else ".weight"): tensor
        for name, tensor in sorted(state.items())
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by name as in the model; raises ArtifactError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    again = "train it again with: dvc repro --force train_adapters"
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ArtifactError(f"{folder / WEIGHTS} is missing; {again}") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} is damaged ({error}); {again}") from None
    found = {}
    for name, tensor in tensors.items():
        part = name.removeprefix(_PREFIX)
        found[part.removesuffix(".weight") + _NAME if ".lora_" in part else part] = tensor
    return found
