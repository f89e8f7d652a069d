"""DoRA against its formula under autograd, against stock peft, and through the step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitlora.adapter import adapter_config, load_adapter, save_adapter
from fitlora.artifacts import SequenceSize
from fitlora.memory.estimate import Load, trace_step
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.step.build import build_step, lora_targets, step_skeleton
from fitlora.step.linear import LoraLinear
from fitlora.step.network import AutogradNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights, RandomWeights
from tests.step import steps
from tests.tiny_models import make_checkpoint, make_config

DORA = LoraParams(r=4, alpha=12.0, dropout=0.0, dora=True)


def settings(lora: LoraParams = DORA, bits: int = 4) -> StepSettings:
    quantization = QuantizationParams.model_validate({"bits": bits})
    return StepSettings(quantization, lora, TrainParams(max_gradient_norm=None))


def make(lora: LoraParams = DORA, **plan: Any) -> TrainingStep:
    weights = RandomWeights(torch.device("cpu"))
    return build_step(steps.config(), steps.plan(**plan), settings(lora), weights)


def layer_of(step: TrainingStep) -> LoraLinear:
    """The one with the largest output, its adapter set to numbers that do something."""
    layers = [m for m in step.model.modules() if isinstance(m, LoraLinear)]
    layer = max(layers, key=lambda m: m.frozen.out_features)
    make_numbers = torch.Generator().manual_seed(0)
    for part in (layer.lora_A, layer.lora_B):
        weight = part[layer.adapter].weight
        weight.data = torch.randn(weight.shape, generator=make_numbers) / 4
    assert layer.magnitude is not None
    layer.magnitude.data.mul_(torch.rand(layer.magnitude.shape, generator=make_numbers) + 0.5)
    return layer


def formula(layer: LoraLinear, x: Tensor, mask: Tensor) -> Tensor:
    """Equation 5, the norm a constant; what dropout takes away goes through W alone."""
    weight = layer.frozen.compute_weight(x.dtype)
    a, b = (part[layer.adapter].weight for part in (layer.lora_A, layer.lora_B))
    turned = weight + layer.scale * b @ a
    norms = turned.detach().norm(dim=1, keepdim=True)
    assert layer.magnitude is not None
    dropped = x * mask
    return (x - dropped) @ weight.t() + dropped @ (layer.magnitude[:, None] * turned / norms).t()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_is_its_formula(dropout: float) -> None:
    step = make(DORA.model_copy(update={"dropout": dropout}))
    layer = layer_of(step)
    layer.train()
    x = torch.randn(11, layer.frozen.in_features)
    layer.context.row_keys = torch.arange(11, dtype=torch.int32) * 7919
    mask = layer.dropped(torch.ones_like(x))
    trained = [p for n, p in layer.named_parameters() if "lora_" in n]
    assert len(trained) == 3
    x.requires_grad_()
    grad = torch.randn(11, layer.frozen.out_features)
    found = layer(x)
    expected = formula(layer, x, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(
        torch.autograd.grad(found, [x, *trained], grad),
        torch.autograd.grad(expected, [x, *trained], grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_frozen_model() -> None:
    step, plain = make(), make(DORA.model_copy(update={"dora": False}))
    assert isinstance(step.network, AutogradNetwork)
    assert not isinstance(plain.network, AutogradNetwork)
    layers = [m for m in step.model.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        assert layer.magnitude is not None
        norms = layer.frozen.compute_weight(torch.float32).norm(dim=1)
        torch.testing.assert_close(layer.magnitude.detach(), norms)
    rows = steps.sequences(7)
    loss, expected = (float(made.evaluate(rows)[0]) for made in (step, plain))
    assert loss == pytest.approx(expected, rel=1e-5)
    losses = [float(step.run(rows, step=i, learning_rate=1e-2).loss) for i in range(6)]
    assert losses[-1] < losses[0]


def test_the_reason_for_the_general_step_is_named() -> None:
    skeleton = step_skeleton(steps.config(), steps.plan(), settings())
    assert (list(skeleton.layers), skeleton.reason) == ([], "DoRA has no step by hand")


def test_its_estimate_is_what_it_takes() -> None:
    load = Load([SequenceSize(tokens=t, target_tokens=t // 2) for t in (90, 71, 40)], [])
    plan = steps.plan(micro_batch_size=2, recompute_layers=(0,))
    weights = RandomWeights(torch.device("cpu"))
    given = (steps.config(), plan, settings(DORA.model_copy(update={"dropout": 0.1})), load)
    found, taken = (trace_step(*given, source).phase_peak_bytes for source in (None, weights))
    # but for buffers while loading, which on the CPU are where they should be
    assert {**found, "load": 0} == {**taken, "load": 0}
    assert found["backward"] > found["optimizer"] > 0


def test_layers_from_the_host_start_and_train_alike() -> None:
    both = {"recompute_layers": (0, 1), "streamed_layers": (0, 1)}
    resident, streamed = make(recompute_layers=(0, 1)), make(**both)
    rows = steps.sequences(7)
    for index in range(2):
        losses = [
            float(made.run(rows, step=index, learning_rate=1e-2).loss)
            for made in (resident, streamed)
        ]
        assert losses[0] == losses[1]
    states = [made.adapter_state() for made in (resident, streamed)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_stock_peft_has_the_same_outputs_and_gradients(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32, tokenizer=False)
    weights = CheckpointWeights(checkpoint, torch.device("cpu"))
    step = build_step(make_config("llama"), steps.plan(), settings(bits=16), weights)
    rows = steps.sequences(7)
    for index in range(3):
        step.run(rows, step=index, learning_rate=1e-2)
    folder = tmp_path / "adapter"
    config = adapter_config(DORA, lora_targets(step.model), base_model="a", revision=None)
    save_adapter(folder, step.adapter_state(), config)
    assert load_adapter(folder).keys() == step.adapters.keys()

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    total = sum(row.target_tokens for row in rows)
    losses = []
    for row in rows:
        logits = theirs(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        wanted = torch.tensor(list(row.learned[1:]), dtype=torch.bool)
        targets = torch.tensor(row.tokens[1:])[wanted]
        losses.append(nn.functional.cross_entropy(logits[wanted], targets, reduction="sum"))
    loss = torch.stack(losses).sum() / total
    loss.backward()
    seen: dict[str, Tensor] = {}
    update = step.optimizer
    assert update is not None
    update.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in step.adapters.items()})  # type: ignore[union-attr]
    )
    found = step.run(rows, step=3, learning_rate=0.0)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    named = dict(theirs.base_model.model.named_parameters())
    for name, gradient in seen.items():
        expected = named[name].grad
        assert float(expected.norm()) > 0
        assert float((gradient - expected).norm() / expected.norm()) < 1e-3, name
