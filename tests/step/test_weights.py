"""Where the step's tensors come from: checkpoints that do not fit, and adapters' starts."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError, UserError
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights, RandomWeights, start_adapter
from tests.step import steps
from tests.tiny_models import dequantized, make_checkpoint, make_config, read_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"), "qwen2", shards=2, tied=True)


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "model"
    quantize_checkpoint(source, target, spec=QuantSpec(), device=CPU)
    return target


def step(folder: Path, quantization: dict[str, Any] | None = None, **options: Any) -> TrainingStep:
    settings = StepSettings(
        QuantizationParams.model_validate(quantization or {}),
        LoraParams(r=4),
        TrainParams(),
    )
    weights = CheckpointWeights(folder, CPU, **options)
    if settings.spec is not None:
        weights.check(settings.spec)
    return build_step(make_config("qwen2", tied=True), steps.plan(), settings, weights)


def test_a_step_has_the_checkpoint_s_tensors(quantized: Path) -> None:
    expected = dequantized(read_tensors(quantized))
    model = step(quantized).model
    compared = 0
    for name, module in model.named_modules():
        if hasattr(module, "compute_weight") and ".base_layer" in name:
            plain = name.replace(".base_layer", "")
            found = module.compute_weight(torch.float32)  # type: ignore[operator]
            torch.testing.assert_close(found, expected[f"{plain}.weight"], rtol=1e-6, atol=1e-9)
            compared += 1
            if getattr(module, "bias", None) is not None:
                assert torch.equal(module.bias, expected[f"{plain}.bias"].float())  # type: ignore[arg-type]
                compared += 1
    assert compared == 14 + 6
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(embedding, expected["model.embed_tokens.weight"].float())
    assert model.get_output_embeddings().weight is embedding  # type: ignore[operator]
    assert torch.equal(
        model.get_parameter("model.norm.weight"), expected["model.norm.weight"].float()
    )


def test_sixteen_bits_are_the_source(source: Path) -> None:
    expected = read_tensors(source)
    model = step(source, {"bits": 16}).model
    name = "model.layers.1.mlp.down_proj"
    found = model.get_parameter(f"{name}.base_layer.weight")
    assert torch.equal(found, expected[f"{name}.weight"].float())


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"type": "fp4"}, "is stored as ('nf4', 64, True) and params want"),
        ({"block_size": 128}, "is stored as ('nf4', 64, True) and params want"),
        ({"double": False}, "is stored as ('nf4', 64, True) and params want"),
    ],
)
def test_a_checkpoint_of_other_params(
    quantization: dict[str, Any], said: str, quantized: Path
) -> None:
    with pytest.raises(ArtifactError) as caught:
        step(quantized, quantization)
    assert str(caught.value).startswith(f"{quantized} {said}")
    assert str(caught.value).endswith("dvc repro --force quantize_model")


def test_sixteen_bits_where_four_are_wanted(source: Path) -> None:
    with pytest.raises(ArtifactError, match="has no 4-bit weights, and params want them"):
        step(source)


def test_four_bits_where_sixteen_are_wanted(quantized: Path) -> None:
    with pytest.raises(ArtifactError, match=r"weight is torch\.uint8 .*the checkpoint and params"):
        step(quantized, {"bits": 16})


def copy_with(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors `change` has changed, file by file, in place."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_scales_with_another_code_book(quantized: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("nested_quant_map"):
                tensors[name] = tensors[name] * 0.5

    with pytest.raises(ArtifactError, match="scales with an unknown code book"):
        step(copy_with(quantized, tmp_path / "copy", change))


def test_a_tensor_of_another_shape(quantized: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.ones(65)

    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is torch\.float32 \(65,\), and"):
        step(copy_with(quantized, tmp_path / "copy", change))


def test_a_tensor_that_is_not_there(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"has no tensor model\.norm\.weight"):
        step(folder, {"bits": 16})


def test_folders_that_are_no_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors and no index"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        Checkpoint(tmp_path)
    for text in ("{", '{"metadata": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
            Checkpoint(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name} cannot be read"):
        step(folder, {"bits": 16})


# --- adapters --------------------------------------------------------------------------------------


def test_a_start_depends_on_name_and_seed_alone() -> None:
    like = torch.empty(4, 64, device="meta")
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    torch.manual_seed(1)
    first = start_adapter(name, like, 0)
    start_adapter(name.replace("layers.0", "layers.1"), like, 0)
    torch.manual_seed(2)
    again = start_adapter(name, torch.empty(4, 64), 0)
    assert torch.equal(first, again)
    others = [
        start_adapter(name, like, 1),
        start_adapter(name.replace("q_proj", "k_proj"), like, 0),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.initial_seed() == 2, "the caller's random numbers stay as they are"


def test_a_start_is_that_of_lora() -> None:
    a = start_adapter("x.lora_A.default.weight", torch.empty(300, 100), 0)
    bound = 1 / math.sqrt(100)
    assert float(a.abs().max()) <= bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(a.mean())) < 5 * bound / math.sqrt(3 * a.numel())
    b = start_adapter("x.lora_B.default.weight", torch.empty(100, 300), 0)
    assert not b.any()


def test_every_source_starts_alike(source: Path, quantized: Path) -> None:
    states = [
        step(source, {"bits": 16}).adapter_state(),
        step(quantized).adapter_state(),
        build_step(
            make_config("qwen2", tied=True),
            steps.plan(recompute_layers=(0, 1)),
            StepSettings(QuantizationParams(), LoraParams(r=4), TrainParams()),
            RandomWeights(CPU),
        ).adapter_state(),
    ]
    assert len(states[0]) == 28
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[n], states[0][n]) for n in state)
    other = step(source, {"bits": 16}, seed=1).adapter_state()
    assert any(not torch.equal(other[n], states[0][n]) for n in other)


def test_a_finished_adapter(quantized: Path) -> None:
    state = {n: torch.full_like(t, 0.5) for n, t in step(quantized).adapter_state().items()}
    found = step(quantized, adapter=state).adapter_state()
    assert all(torch.equal(found[n], state[n]) for n in state)
    name = sorted(state)[3]
    for wrong in ({}, {**state, name: torch.zeros(1)}):
        with pytest.raises(ArtifactError, match="the adapter has no tensor"):
            step(quantized, adapter=wrong)
