"""The adapter on disk: peft's format, the same bytes each time, and damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fitlora.adapter import CONFIG, WEIGHTS, adapter_config, load_adapter, save_adapter
from fitlora.errors import ArtifactError
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.step.build import build_step, lora_targets
from fitlora.step.linear import LoraLinear
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights
from tests.step import steps
from tests.tiny_models import make_checkpoint, make_config

LORA = LoraParams(r=4, alpha=12.0, dropout=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "llama", dtype=torch.float32, tokenizer=False)


def trained(checkpoint: Path, lora: LoraParams) -> TrainingStep:
    """A step with adapters that already do something."""
    settings = StepSettings(
        QuantizationParams(bits=16), lora, TrainParams(learning_rate=1e-2, warmup_steps=0)
    )
    weights = CheckpointWeights(checkpoint, torch.device("cpu"))
    made = build_step(make_config("llama"), steps.plan(), settings, weights)
    for index in range(3):
        made.run(steps.sequences(7), step=index, learning_rate=1e-2)
    return made


@pytest.fixture(scope="module")
def step(checkpoint: Path) -> TrainingStep:
    return trained(checkpoint, LORA)


def save(folder: Path, step: TrainingStep, lora: LoraParams = LORA) -> dict[str, Tensor]:
    config = adapter_config(lora, lora_targets(step.model), base_model="a/b", revision="0" * 40)
    state = step.adapter_state()
    save_adapter(folder, state, config)
    return state


def test_round_trip(step: TrainingStep, tmp_path: Path) -> None:
    state = save(tmp_path / "new" / "adapter", step)
    found = load_adapter(tmp_path / "new" / "adapter")
    assert found.keys() == state.keys() == step.adapters.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    before = step.adapter_state()
    step.load_adapter_state(found)
    assert all(torch.equal(before[n], t) for n, t in step.adapter_state().items())


def test_the_same_adapter_is_the_same_bytes(step: TrainingStep, tmp_path: Path) -> None:
    state = save(tmp_path / "a", step)
    config = adapter_config(
        LORA, lora_targets(step.model)[::-1], base_model="a/b", revision="0" * 40
    )
    save_adapter(tmp_path / "b", dict(reversed(state.items())), dict(reversed(config.items())))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([CONFIG, WEIGHTS])


def test_the_config_says_what_peft_needs(step: TrainingStep, tmp_path: Path) -> None:
    save(tmp_path, step)
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "base_model_name_or_path": "a/b",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 12.0,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": "0" * 40,
        "target_modules": [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
        ],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_stock_peft_computes_the_same(rslora: bool, checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = LORA.model_copy(update={"rslora": rslora})
    step = trained(checkpoint, lora)
    save(tmp_path, step, lora)
    scales = {m.scale for m in step.model.modules() if isinstance(m, LoraLinear)}
    assert scales == {12 / 2 if rslora else 12 / 4}
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        logits = adapted(input_ids=ids).logits
        step.model.eval()
        step.context.lengths, step.context.flash_types = [20], [torch.float32]
        step.context.starts = torch.tensor([0, 20], dtype=torch.int32)
        model: Any = step.model
        found = model(input_ids=ids, position_ids=torch.arange(20)[None], use_cache=False).logits
    assert float((logits - plain).abs().max()) > 0.01, "the adapter does something"
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_a_missing_or_damaged_adapter_is_named(step: TrainingStep, tmp_path: Path) -> None:
    again = "dvc repro --force train_adapters"
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is missing; .*{again}"):
        load_adapter(tmp_path)
    save(tmp_path, step)
    file = tmp_path / WEIGHTS
    whole = file.read_bytes()
    for content in (b"", whole[:4], whole[:100], whole[:-10], b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged .*{again}"):
            load_adapter(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is damaged .*{again}"):
        load_adapter(tmp_path)
