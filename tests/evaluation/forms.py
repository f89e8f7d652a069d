"""A tiny model in all its forms: original, quantized, with an adapter, merged."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fitlora.adapter import adapter_config, save_adapter
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import Contender, contenders
from fitlora.model import load_config
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import lora_targets, step_skeleton
from fitlora.step.settings import StepSettings
from tests.tiny_models import make_checkpoint

CPU = torch.device("cpu")
PROMPTS = (
    "one", "a longer question, with more tokens", "2 + 2 =", "list them", "x", "say: yes", "Where?",
    "what is it that stands here, if one may ask?",
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model's folders, what it was made with, and rows to evaluate it on."""

    original: Path
    quantized: Path
    adapter: Path
    merged: Path
    rows: Path
    quantization: QuantizationParams
    lora: LoraParams
    plan: Plan

    def models(self, merged: Path | None = None, bits: Literal[16, 4] = 16) -> dict[str, Contender]:
        found = contenders(
            original=self.original,
            quantized=self.quantized,
            adapter=self.adapter,
            merged=merged or self.merged,
            quantization=self.quantization,
            lora=self.lora,
            merged_bits=bits,
        )
        return {model.name: model for model in found}


def make_tiny(root: Path, quantization: QuantizationParams, plan: Plan) -> Tiny:
    lora = LoraParams(r=4, alpha=8.0, dropout=0.5)  # a dropout that nobody can miss
    # Larger weights than a fresh model's, which would repeat its last token for ever.
    original = make_checkpoint(root / "original", "llama", initializer_range=0.2)
    bits4 = quantization.bits == 4
    spec = QuantSpec(quantization.type, quantization.block_size, quantization.double)
    quantize_checkpoint(original, root / "quantized", spec=spec if bits4 else None, device=CPU)
    settings = StepSettings(quantization, lora, TrainParams())
    model = step_skeleton(load_config(original), plan, settings).model
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(parameter.shape, generator=generator) * 0.1
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    described = adapter_config(lora, lora_targets(model), base_model=str(original), revision=None)
    save_adapter(root / "adapter", state, described)
    merge_checkpoint(
        original=original,
        quantized=root / "quantized",
        adapter=root / "adapter",
        target=root / "merged",
        base="dequantized",
        device=CPU,
        compute_dtype=getattr(torch, plan.compute_dtype),
    )
    rows = root / "validation.jsonl"
    rows.write_text("".join(_line(prompt, f"answer {i}") for i, prompt in enumerate(PROMPTS)))
    return Tiny(
        original=original,
        quantized=root / "quantized",
        adapter=root / "adapter",
        merged=root / "merged",
        rows=rows,
        quantization=quantization,
        lora=lora,
        plan=plan,
    )


def _line(prompt: str, answer: str) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


PLAN = Plan(
    device="cpu",
    effective_batch_size=4,
    micro_batch_size=2,
    evaluation_batch_size=3,
    sequence_length=64,
    compute_dtype="float32",
    optimizer="adamw",
    loss_chunk_tokens=7,
)
