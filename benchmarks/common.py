"""What the benchmarks share: shapes, checkpoints of random weights, and how results are written."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fitlora import known_models

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth",
)  # fmt: skip

# Models are drawn among these, so one that comes to be known later must not join them.
_MODELS = (
    "tinyllama-1.1b",
    "llama-3.2-1b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-2-13b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-8b",
    "gemma-3-1b",
    "gemma-3-4b",
    "phi-3-mini",
    "olmo-2-1b",
)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    },
    **{name: known_models.SHAPES[name] for name in _MODELS},
}  # fmt: skip


def shape_config(name: str, **changes: Any) -> Any:
    """The transformers config of a shape by name. changes: keys of it that are to be otherwise."""
    return known_models.config_of({**SHAPES[name], **changes})


def make_checkpoint(name: str, folder: Path, device: torch.device, **changes: Any) -> None:
    """A bf16 checkpoint of random weights in the named shape, one shard a layer, with a tokenizer.

    changes: as for `shape_config`.
    One that an earlier benchmark left whole in the folder stays: its index is written last.
    """
    from safetensors.torch import save_file

    config = shape_config(name, **changes)
    if (folder / INDEX).is_file():
        there = json.loads((folder / "config.json").read_text())
        assert there["hidden_size"] == config.hidden_size, f"{folder} holds another model"
        assert there["num_hidden_layers"] == config.num_hidden_layers, f"{folder}: other layers"
        return
    model = _write_all_but_weights(config, folder)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for file, tensors in _shards(model):
        shard = {}
        for key, like in tensors:
            filled = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
            if like.dim() == 1:
                filled.fill_(1.0)
            else:
                filled.normal_(0.0, 0.02, generator=generator)
            shard[key] = filled.cpu()
            weight_map[key] = file
        save_file(shard, folder / file, metadata={"format": "pt"})
    _write_index(folder, weight_map, model)


def make_hollow_checkpoint(name: str, folder: Path) -> None:
    """A bf16 checkpoint in the named shape whose weights are holes in its files, one a layer.

    It is as large as it looks to whoever asks, and takes no disk: for what reads headers alone.
    """
    model = _write_all_but_weights(shape_config(name), folder)
    weight_map: dict[str, str] = {}
    for file, tensors in _shards(model):
        header: dict[str, Any] = {}
        total = 0
        for key, like in tensors:
            end = total + like.numel() * 2
            header[key] = {"dtype": "BF16", "shape": list(like.shape), "data_offsets": [total, end]}
            weight_map[key], total = file, end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as content:
            content.write(len(text).to_bytes(8, "little") + text)
            content.truncate(8 + len(text) + total)
    _write_index(folder, weight_map, model)


def _shards(model: torch.nn.Module) -> list[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """The files of a checkpoint and what they have: one for each layer, and one for the rest."""
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        group = parts[2] if parts[1] == "layers" else "rest"
        groups.setdefault(group, []).append((key, value))
    return [
        (f"model-{index:05d}-of-{len(groups):05d}.safetensors", tensors)
        for index, tensors in enumerate(groups.values(), start=1)
    ]


def _write_index(folder: Path, weight_map: dict[str, str], model: torch.nn.Module) -> None:
    total = sum(2 * tensor.numel() for tensor in model.state_dict().values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )


def _write_all_but_weights(config: Any, folder: Path) -> torch.nn.Module:
    """A checkpoint's config and tokenizer; the model that it is of, without content."""
    from fitlora.model import empty_model

    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    sample = ROOT / "assets" / "sample_model"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(sample / file, folder / file)
    return model


def device_label() -> str:
    """How a device is called in a result file's name: h100, h200, cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name(0).lower()
    label = next(
        (part for part in ("h100", "h200", "a100") if part in name), name.replace(" ", "-")
    )
    count = torch.cuda.device_count()
    return label if count == 1 else f"{label}x{count}"


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter to the figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that runs, None outside of a repository."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else None


def called(arguments: Sequence[str]) -> str:
    """How a program was called, but for where it writes: such paths are one machine's."""
    words = iter([Path(arguments[0]).name, *arguments[1:]])
    kept = []
    for word in words:
        if word in ("--json", "--work"):
            next(words, None)
        elif not word.startswith(("--json=", "--work=")):
            kept.append(word)
    return shlex.join(kept)


def write_result(
    path: Path,
    program: str,
    rows: Sequence[dict[str, Any]],
    *,
    device: str | None = None,
    **more: Any,
) -> None:
    """Writes a result file as benchmarks/results/ has them. device: None asks torch here."""
    content = {
        "program": program,
        "command": called(sys.argv),
        "device": device or device_name(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        **more,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
