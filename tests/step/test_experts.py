"""Mixtures of experts: read as transformers reads them, and what cannot be done said by name."""

import statistics
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fitlora.checkpoint import Checkpoint
from fitlora.device import give_back_memory
from fitlora.errors import UserError
from fitlora.memory.estimate import Load, rehearse, trace_step
from fitlora.model import load_config
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights, RandomWeights
from tests.step import steps
from tests.step.test_against_peft import LIMIT, SEEDS, by_peft, rows_of
from tests.step.test_network import make
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


def test_layers_that_peft_takes_for_experts_are_refused_by_name(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "glm4_moe")
    asked = {"target_modules": ("gate_proj", "q_proj")}
    with pytest.raises(UserError, match=r"PEFT has gate_proj .*target_modules: \[q_proj\]"):
        step(source, 16, asked)
    assert not [name for name in step(source, 16).adapters if "gate_proj" in name]


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


# --- against stock peft, and the estimate -----------------------------------------------------------

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4},
}  # fmt: skip
ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)
ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def mixture(family: str, device: str, *, config: Any = None, **plan: Any) -> TrainingStep:
    """Of random weights, in bfloat16; B is not zero. config: changes of the config."""
    changes = {"num_experts_per_tok": 2, **MIXTURES[family], **(config or {})}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return make(
        family,
        dropout=0.2,
        dtype="bfloat16",
        targets=targets,
        config=changes,
        device=device,
        **plan,
    )


@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_in_bf16_errs_no_more_than_peft(family: str, device: str) -> None:
    """By the median, as there: in both a token may take another expert than in fp32."""
    ratios, shares = [], []
    for seed in SEEDS:
        made, rows = mixture(family, device, recompute_layers=(1,), seed=seed), rows_of(seed)
        _, exact = by_peft(made, rows, torch.float32)
        _, peft = by_peft(made, rows, torch.bfloat16)
        found = steps.gradients(made, rows)
        for name, gradient in exact.items():
            theirs, ours = (float((g[name].cpu() - gradient).norm()) for g in (peft, found))
            ratios.append(ours / theirs)
            shares.append(ours / float(gradient.norm()))
    assert 1e-3 < statistics.median(shares) < 0.5, "it is the same gradient, and bf16's"
    assert statistics.median(ratios) <= LIMIT


LARGER = {
    "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 1024, "num_experts_per_tok": 2,
}  # fmt: skip


def test_shapes_take_what_a_real_step_of_a_mixture_takes() -> None:
    made, load = mixture("mixtral", "cpu", recompute_layers=(1,)), Load.uniform(2, 23)
    of = made.model.config, made.plan, made.settings, load
    assert trace_step(*of).peak_bytes == trace_step(*of, RandomWeights(CPU)).peak_bytes


@ON_GPU.marks[0]
@ON_GPU.marks[1]
@pytest.mark.parametrize("kept", [(), (0, 1, 2)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", MIXTURES)
def test_what_a_mixture_takes_is_what_is_told(family: str, kept: tuple[int, ...]) -> None:
    """Allocated bytes, libraries' workspaces apart, which are there from the first run on."""
    load, peaks = Load.uniform(1, 2048), []
    for _ in range(2):
        give_back_memory()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = mixture(
            family, "cuda", config=LARGER, recompute_layers=kept, micro_batch_size=1,
            sequence_length=2048,
        )  # fmt: skip
        rehearse(made, load)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        config, plan, settings = made.model.config, made.plan, made.settings
        del made
    told = trace_step(config, plan, settings, load).peak_bytes
    assert peaks[1] == pytest.approx(told, rel=0.015)
