"""Mixtures of experts: read as transformers reads them, and what cannot be done said by name."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fitlora.checkpoint import Checkpoint
from fitlora.errors import UserError
from fitlora.model import load_config
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights
from tests.step import steps
from tests.tiny_models import make_checkpoint, read_tensors

CPU = torch.device("cpu")
BFLOAT16 = {"compute_dtype": "bfloat16"}


def step(
    folder: Path, bits: Literal[4, 16] = 4, lora: dict[str, Any] | None = None, **plan: Any
) -> TrainingStep:
    settings = StepSettings(
        QuantizationParams(bits=bits), LoraParams.model_validate({"r": 2, **(lora or {})}),
        TrainParams(),
    )  # fmt: skip
    weights = CheckpointWeights(folder, CPU)
    return build_step(load_config(folder), steps.plan(**{**BFLOAT16, **plan}), settings, weights)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe"])
def test_a_step_has_what_transformers_loads(
    family: str, bits: Literal[4, 16], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    spec = QuantSpec() if bits == 4 else None
    quantize_checkpoint(source, tmp_path / "q", spec=spec, device=CPU)
    stored = Checkpoint(tmp_path / "q").shards
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    converted = set()
    for name, parameter in step(tmp_path / "q", bits).model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in expected and parameter.dtype == torch.bfloat16:
            assert torch.equal(parameter, expected[plain]), name
            converted |= {plain} - stored.keys()
    first = "model.layers.0.mlp"
    assert {f"{first}.experts.gate_up_proj", f"{first}.experts.down_proj"} <= converted
    assert (f"{first}.gate.weight" in converted) == (family == "mixtral")


def test_experts_compute_in_bfloat16_alone(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    with pytest.raises(UserError, match=r"MixtralForCausalLM .* set plan\.compute_dtype: bfloat16"):
        step(source, 16, compute_dtype="float32")


@pytest.mark.parametrize("asked", ["all-linear", ("gate_proj", "q_proj")], ids=str)
def test_layers_that_peft_takes_for_experts_are_refused(
    asked: str | tuple[str, ...], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", "glm4_moe")
    with pytest.raises(UserError, match=r"PEFT has .*gate_proj.*target_modules: \[(.*)\]") as error:
        step(source, 16, {"target_modules": asked})
    rest = str(error.value).rpartition("[")[2].rstrip("]").split(", ")
    assert step(source, 16, {"target_modules": rest}).adapters


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("1.block_sparse_moe.gate", r"lacks 1 tensor\(s\): model\.layers\.1\.mlp\.gate\.weight"),
        (
            "1.block_sparse_moe.experts.2.w1",
            "parts of model.layers.1.mlp.experts.gate_up_proj do not",
        ),
        (
            "1.block_sparse_moe.experts.2.w2",
            r"experts\.down_proj is .*\(3, 64, 128\), and the model",
        ),
    ],
)
def test_a_part_that_is_lacking_is_named(lost: str, says: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    tensors = read_tensors(source)
    del tensors[f"model.layers.{lost}.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def load() -> None:
        quantize_checkpoint(source, tmp_path / "q", spec=None, device=CPU)
        step(tmp_path / "q", 16)

    with pytest.raises(UserError, match=says):
        load()
