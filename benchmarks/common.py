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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")

_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    },
    "llama-3-8b": {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-2-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    },
}  # fmt: skip


def shape_config(name: str) -> Any:
    """The transformers config of a shape by name; 8,192 positions, nothing tied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_checkpoint(name: str, folder: Path, device: torch.device) -> None:
    """A bf16 checkpoint of random weights in the named shape, one shard a layer, with a tokenizer."""
    from safetensors.torch import save_file

    from fitlora.model import empty_model

    folder.mkdir(parents=True, exist_ok=True)
    config = shape_config(name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    sample = ROOT / "assets" / "sample_model"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(sample / file, folder / file)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for key, value in empty_model(config, dtype=torch.bfloat16).state_dict().items():
        parts = key.split(".")
        group = parts[2] if parts[1] == "layers" else "rest"
        groups.setdefault(group, []).append((key, value))
    for index, tensors in enumerate(groups.values(), start=1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        shard = {}
        for key, like in tensors:
            filled = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
            if like.dim() == 1:
                filled.fill_(1.0)
            else:
                filled.normal_(0.0, 0.02, generator=generator)
            shard[key] = filled.cpu()
            weight_map[key] = file
            total += filled.numel() * 2
        save_file(shard, folder / file, metadata={"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )


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


def write_result(path: Path, program: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Writes a result file as benchmarks/results/ has them."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = found.stdout.strip() if found.returncode == 0 else None
    content = {
        "program": program,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device_name(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        **more,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
