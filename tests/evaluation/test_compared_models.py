"""Each of the four is the model that stock transformers and peft make of the same files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitlora.adapter import CONFIG, WEIGHTS
from fitlora.errors import ArtifactError
from fitlora.evaluation.models import (
    MAXIMUM_ROWS,
    Contender,
    Memory,
    Place,
    check_adapter,
    check_folder,
    choose_place,
    load,
    on_cpu,
    row_bytes,
    weight_bytes,
)
from fitlora.evaluation.scores import score
from fitlora.model import load_config
from fitlora.params import LoraParams
from fitlora.step.batch import TokenSequence
from tests.evaluation.forms import CPU, Tiny
from tests.evaluation.stock import prompt_tokens, stock_adapter, stock_base, stock_quantized

HERE = Place(CPU, "float32", 8)


@torch.no_grad()
def logits(tiny: Tiny, model: Contender, place: Place = HERE) -> list[Tensor]:
    """Of each prompt, (tokens, vocabulary), through the step's own layout: all in one micro-batch."""
    step = load(model, tiny.plan, place)
    prompts = prompt_tokens(tiny)
    batch = step.micro_batch(
        [TokenSequence(i, tuple(p), (True,) * len(p)) for i, p in enumerate(prompts)]
    )
    step.context.enter(batch)
    assert not step.model.training
    found = step.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits[0]
    return list(found.float().split([len(prompt) for prompt in prompts]))


@torch.no_grad()
def alone(model: Any, tiny: Tiny) -> list[Tensor]:
    """The same by a stock model, a prompt at a time."""
    return [model(input_ids=torch.tensor([p])).logits[0] for p in prompt_tokens(tiny)]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def test_adapter_is_what_peft_makes_of_it(tiny: Tiny) -> None:
    ours = logits(tiny, tiny.models()["adapter"])
    assert largest_difference(ours, alone(stock_adapter(tiny), tiny)) < 1e-4
    assert largest_difference(ours, alone(stock_quantized(tiny), tiny)) > 0.1


@pytest.mark.parametrize(
    "placed",
    [
        {"streamed_layers": (0,), "recompute_layers": (0,)},
        {"streamed_layers": (0, 1), "recompute_layers": (0, 1), "optimizer_device": "host"},
        {"embedding": "host", "head": "host", "checkpoints": "host", "recompute_layers": (0, 1)},
    ],
    ids=["a layer", "layers", "the ends"],
)
@pytest.mark.parametrize("name", ["adapter", "quantized_base", "merged"])
def test_a_plan_with_weights_on_the_host_gives_the_same(
    tiny: Tiny, placed: dict[str, Any], name: str
) -> None:
    model = tiny.models()[name]
    away = replace(tiny, plan=tiny.plan.replace(**placed))
    assert largest_difference(logits(away, model), logits(tiny, model)) == 0
    placed_step, step = load(model, away.plan, HERE), load(model, tiny.plan, HERE)
    streams = placed_step.network.placement.residency is not None
    assert streams == (name != "merged" and "streamed_layers" in placed)
    sequences = [TokenSequence(i, p, (1,) * len(p)) for i, p in enumerate(prompt_tokens(tiny))]
    assert score(placed_step, sequences, lambda n: None) == score(step, sequences, lambda n: None)


def test_weights_that_the_plan_streams_leave_room_for_rows(tiny: Tiny) -> None:
    tokens = {"prompt_tokens": 2, "new_tokens": 1}
    model = tiny.models()["adapter"]
    weights = weight_bytes(load(model, tiny.plan, HERE).model)
    row = row_bytes(load_config(model.folder), 2, 1, "float32")
    memory = Memory(CPU, weights + 4 * row, 2**30)
    resident, _ = choose_place(model, tiny.plan, memory, **tokens)
    assert resident.rows == 2  # half of what is left
    plan = tiny.plan.replace(streamed_layers=(0, 1), recompute_layers=(0, 1), streaming_slots=1)
    assert choose_place(model, plan, memory, **tokens)[0].rows > 2


def test_what_was_trained_in_float8_is_evaluated_in_16_bits(tiny: Tiny) -> None:
    plan = tiny.plan.replace(compute_dtype="float8")
    memory = Memory(CPU, 2**30, 2**30)
    place, reason = choose_place(
        tiny.models()["adapter"], plan, memory, prompt_tokens=9, new_tokens=2
    )
    assert place.compute_dtype == "bfloat16"
    assert reason is None
    assert (
        logits(replace(tiny, plan=plan), tiny.models()["adapter"], place)[0].dtype == torch.float32
    )


def test_bases_are_what_transformers_makes_of_them(tiny: Tiny) -> None:
    base = logits(tiny, tiny.models()["base"])
    quantized = logits(tiny, tiny.models()["quantized_base"])
    assert largest_difference(base, alone(stock_base(tiny.original), tiny)) < 1e-4
    assert largest_difference(quantized, alone(stock_quantized(tiny), tiny)) < 1e-4
    assert largest_difference(base, quantized) > 1e-2


def test_merged_is_the_adapter_but_for_the_rounding_of_its_weights(tiny: Tiny) -> None:
    merged = logits(tiny, tiny.models()["merged"])
    adapter = logits(tiny, tiny.models()["adapter"])
    base = logits(tiny, tiny.models()["quantized_base"])
    rounded = stock_adapter(tiny).merge_and_unload()
    for parameter in rounded.parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
    # a sum in another order may round a weight to its neighbour
    assert largest_difference(merged, alone(rounded, tiny)) < 5e-3
    assert largest_difference(merged, adapter) > 2e-2
    assert largest_difference(merged, base) > 10 * largest_difference(merged, adapter)


def test_without_quantization_both_bases_are_one(tiny16: Tiny) -> None:
    place = Place(CPU, "bfloat16", 8)
    models = tiny16.models()
    assert models["quantized_base"].title == "16-bit base"
    base = logits(tiny16, models["base"], place)
    assert largest_difference(base, logits(tiny16, models["quantized_base"], place)) == 0
    assert largest_difference(base, logits(tiny16, models["adapter"], place)) > 0.1


def test_an_original_that_is_quantized_itself_is_its_own_base(tiny: Tiny) -> None:
    models = replace(tiny, original=tiny.quantized).models()
    assert models["base"].quantization.bits == 4
    assert models["merged"].quantization.bits == 16
    assert (
        largest_difference(logits(tiny, models["base"]), logits(tiny, models["quantized_base"]))
        == 0
    )


def test_evaluation_takes_no_more_rows_than_the_plan_or_the_place(tiny: Tiny) -> None:
    model = tiny.models()["base"]
    for rows, expected in ((8, tiny.plan.evaluation_batch_size), (2, 2)):
        step = load(model, tiny.plan, replace(HERE, rows=rows))
        assert step.plan.evaluation_batch_size == expected


# --- where it is evaluated ------------------------------------------------------------------------


def place_of(tiny: Tiny, name: str, device_bytes: int) -> tuple[Place, str | None]:
    # meta stands for a device that is not the CPU
    memory = Memory(torch.device("meta"), device_bytes, 2**30)
    model = tiny.models()[name]
    return choose_place(model, tiny.plan, memory, prompt_tokens=50, new_tokens=10)


def test_weights_that_do_not_fit_go_to_the_cpu(tiny: Tiny) -> None:
    config = load_config(tiny.original)
    weights = weight_bytes(stock_base(tiny.original))
    row = row_bytes(config, 50, 10, "float32")
    chunk = tiny.plan.loss_chunk_tokens * config.vocab_size * (4 + 8)
    enough = weights + row + chunk

    place, reason = place_of(tiny, "base", enough)
    assert (place.device.type, place.compute_dtype, reason) == ("meta", "float32", None)
    place, reason = place_of(tiny, "base", enough - 1)
    assert (place.device.type, place.compute_dtype) == ("cpu", "bfloat16")
    assert str(place) == "cpu, bfloat16"
    assert reason is not None
    assert "KiB of weights and a margin of" in reason
    # the Plan was proven with these
    place, reason = place_of(tiny, "adapter", enough - 1)
    assert (place.device.type, place.compute_dtype, reason) == ("meta", "float32", None)


def test_rows_of_a_batch_follow_from_the_memory_that_is_left(tiny: Tiny) -> None:
    row = row_bytes(load_config(tiny.original), 50, 10, "float32")
    weights = weight_bytes(stock_base(tiny.original))
    assert place_of(tiny, "base", weights + 10 * row)[0].rows == 5
    assert place_of(tiny, "base", weights + 1000 * row)[0].rows == MAXIMUM_ROWS
    assert place_of(tiny, "adapter", 0)[0].rows == 1
    memory = Memory(CPU, 0, 12 * row_bytes(load_config(tiny.original), 50, 10, "bfloat16"))
    assert on_cpu(tiny.models()["base"], memory, prompt_tokens=50, new_tokens=10).rows == 3


def test_bound_of_a_row_covers_its_keys_and_values(tiny: Tiny) -> None:
    model = stock_base(tiny.original)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 60, dtype=torch.long)).past_key_values
    kept = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    logits = 3 * 4 * model.config.vocab_size
    assert kept > 0
    # a prompt of no tokens has no activations
    assert row_bytes(model.config, 0, 60, "float32") == kept + logits
    assert row_bytes(model.config, 60, 0, "float32") > kept + logits


# --- what does not belong together ----------------------------------------------------------------


@pytest.fixture
def spoilt(tiny: Tiny, tmp_path: Path) -> Tiny:
    """With an adapter that a test may spoil."""
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    return replace(tiny, adapter=tmp_path / "adapter")


def test_sound_inputs_pass(tiny: Tiny) -> None:
    check_adapter(tiny.adapter, tiny.lora)
    check_folder(tiny.quantized, "quantize_model")


def test_missing_model_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no model.*repro --force quantize_model"):
        check_folder(tmp_path / "none", "quantize_model")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_missing_or_damaged_adapter_names_its_stage(spoilt: Tiny, file: str) -> None:
    path = spoilt.adapter / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=f"{file} is damaged.*train_adapters"):
        check_adapter(spoilt.adapter, spoilt.lora)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{file} is missing.*train_adapters"):
        check_adapter(spoilt.adapter, spoilt.lora)


@pytest.mark.parametrize("content", ['{"r": 4}', "[]"])
def test_adapter_config_without_its_numbers_is_refused(spoilt: Tiny, content: str) -> None:
    (spoilt.adapter / CONFIG).write_text(content)
    with pytest.raises(ArtifactError, match=r"says .* None, and params.yaml"):
        check_adapter(spoilt.adapter, spoilt.lora)


@pytest.mark.parametrize(
    ("lora", "key"),
    [(LoraParams(r=8, alpha=8.0), "r 4"), (LoraParams(r=4, alpha=4.0), "lora_alpha 8.0")],
)
def test_adapter_of_other_params_is_refused(tiny: Tiny, lora: LoraParams, key: str) -> None:
    with pytest.raises(ArtifactError, match=f"says {key}, and params.yaml"):
        check_adapter(tiny.adapter, lora)


def test_adapter_with_more_than_the_params_have_is_refused(tiny: Tiny) -> None:
    narrow = tiny.lora.model_copy(update={"target_modules": ("q_proj",)})
    model = replace(tiny.models()["adapter"], lora=narrow)
    with pytest.raises(ArtifactError, match=r"has model.*lora_A.*target_modules does not"):
        load(model, tiny.plan, HERE)


def test_adapter_with_less_than_the_params_have_is_refused(spoilt: Tiny) -> None:
    tensors = load_file(spoilt.adapter / WEIGHTS)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, spoilt.adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match="the adapter has no tensor"):
        load(spoilt.models()["adapter"], spoilt.plan, HERE)


def test_weights_that_are_stored_in_another_way_are_refused(tiny: Tiny) -> None:
    other = tiny.quantization.model_copy(update={"type": "fp4"})
    model = replace(tiny.models()["quantized_base"], quantization=other)
    with pytest.raises(ArtifactError, match="quantize_model"):
        load(model, tiny.plan, HERE)


def test_adapter_files_are_what_the_tests_think(tiny: Tiny) -> None:
    """B is not zero, or nothing above says anything."""
    tensors = load_file(tiny.adapter / WEIGHTS)
    assert all(tensor.abs().max() > 0.01 for tensor in tensors.values())
    assert json.loads((tiny.adapter / CONFIG).read_text())["r"] == tiny.lora.r
