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
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth",
)  # fmt: skip

# Sizes as their makers published them. `model_type` is llama where it is left out.
_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
_QWEN_2 = {"model_type": "qwen2", "vocab_size": 151936}
_QWEN_3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_GEMMA_3 = {"model_type": "gemma3_text", "head_dim": 256, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "tie_word_embeddings": True,
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
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "sliding_window": None,
    },
    "qwen2.5-0.5b": {
        **_QWEN_2, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        **_QWEN_2, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN_2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        **_QWEN_3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN_3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "gemma-3-1b": {
        **_GEMMA_3, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
        "sliding_window": 512,
    },
    "gemma-3-4b": {
        **_GEMMA_3, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
        "sliding_window": 1024,
    },
    "phi-3-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32064, "sliding_window": 2047,
    },
    "olmo-2-1b": {
        "model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 100352,
    },
}  # fmt: skip


def shape_config(name: str, **changes: Any) -> Any:
    """The transformers config of a shape by name, with 16,384 positions or, of the llamas, 8,192.

    changes: keys of it that are to be otherwise. Nothing is tied but where the shape says so.
    """
    from transformers import AutoConfig

    shape = {"model_type": "llama", **SHAPES[name], **changes}
    family = shape.pop("model_type")
    return AutoConfig.for_model(
        family,
        **{
            "max_position_embeddings": 8192 if family == "llama" else 16384,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **shape,
        },
    )


def make_checkpoint(name: str, folder: Path, device: torch.device, **changes: Any) -> None:
    """A bf16 checkpoint of random weights in the named shape, one shard a layer, with a tokenizer.

    changes: as for `shape_config`.
    One that an earlier benchmark left whole in the folder stays: its index is written last.
    """
    from safetensors.torch import save_file

    from fitlora.model import empty_model

    config = shape_config(name, **changes)
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        there = json.loads((folder / "config.json").read_text())
        assert there["hidden_size"] == config.hidden_size, f"{folder} holds another model"
        assert there["num_hidden_layers"] == config.num_hidden_layers, f"{folder}: other layers"
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    sample = ROOT / "assets" / "sample_model"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(sample / file, folder / file)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for key, value in model.state_dict().items():
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
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device or device_name(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        **more,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
