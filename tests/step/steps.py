"""Small steps for tests: a model of two layers, sequences of unequal lengths, plans for the CPU."""

import random
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import LlamaConfig

from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.plan import Plan
from fitlora.step.batch import TokenSequence
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights

VOCABULARY = 128


def config(**changes: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**shape, **changes})


def sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    draw = random.Random(seed)
    found = []
    for sample in range(count):
        length = draw.randint(5, 23)
        found.append(
            TokenSequence(
                sample,
                tuple(draw.randrange(VOCABULARY) for _ in range(length)),
                tuple(position > length // 3 for position in range(length)),
            )
        )
    return found


def plan(**changes: Any) -> Plan:
    base: dict[str, Any] = {
        "device": "cpu", "effective_batch_size": 7, "micro_batch_size": 7,
        "evaluation_batch_size": 7, "sequence_length": 23, "compute_dtype": "float32",
        "optimizer": "adamw", "loss_chunk_tokens": 4096,
    }  # fmt: skip
    return Plan.model_validate({**base, **changes})


def settings(dropout: float = 0.1, bits: int = 4, **train: Any) -> StepSettings:
    return StepSettings(
        QuantizationParams.model_validate({"bits": bits}),
        LoraParams(dropout=dropout, r=4),
        TrainParams.model_validate(train),
    )


def step(
    the_plan: Plan | None = None,
    the_settings: StepSettings | None = None,
    *,
    device: str = "cpu",
    **changes: Any,
) -> TrainingStep:
    """A step on random weights whose adapters already do something (B is not zero)."""
    made = build_step(
        config(**changes),
        the_plan or plan(),
        the_settings or settings(),
        RandomWeights(torch.device(device)),
    )
    for index, (name, parameter) in enumerate(made.adapters.items()):
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(index)
            values = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
            parameter.data.copy_(values)
    return made


def gradients(
    made: TrainingStep,
    batch: list[TokenSequence],
    look: Callable[[float, float], object] = lambda loss, norm: None,
    **options: Any,
) -> dict[str, Any]:
    """The gradients of one optimizer step, before clipping; the weights stay as they are.

    look: handed its loss and its gradients' norm.
    """
    found: dict[str, Any] = {}

    def take(loss: float, norm: float) -> bool:
        look(loss, norm)
        found.update({n: cast(torch.Tensor, p.grad).clone() for n, p in made.learning.items()})
        return False

    made.run(batch, step=3, learning_rate=0.0, accept=take, **options)
    return found


def error_in_float16(attention: str, *, device: str) -> float:
    """The largest error of any gradient, with a loss scale, against the CPU's in float32; norms' share.

    attention: of a GPU's plan, whatever `device` computes.
    """
    batch, scale = sequences(7), 2.0**10
    exact = step()
    changes = {"device": "cuda", "compute_dtype": "float16", "attention": attention}
    made = same_weights(step(plan(**changes, micro_batch_size=3), device=device), exact)
    found = gradients(made, batch, loss_scale=scale)
    return max(
        float((found[name].cpu() / scale - expected).norm() / expected.norm())
        for name, expected in gradients(exact, batch).items()
    )


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of any gradient, as a share of that gradient's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[n].cpu() - b[n].cpu()).abs().max() / b[n].abs().max().cpu()) for n in a)


def plain_model(made: TrainingStep) -> Any:
    """The same model in stock transformers and plain PyTorch, weights dense, LoRA as two products."""
    from fitlora.model import empty_model
    from fitlora.step.linear import LoraLinear

    class Plain(torch.nn.Module):
        def __init__(self, lora: LoraLinear) -> None:
            super().__init__()
            weight = lora.frozen.compute_weight(torch.float32).detach().clone()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.scale = lora.scale
            bias = lora.frozen.bias
            self.shift = 0.0 if bias is None else bias.detach().clone()
            for part in ("lora_A", "lora_B"):
                linear = getattr(lora, part)["default"]
                copy = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
                copy.weight.data.copy_(linear.weight.data)
                setattr(self, part, torch.nn.ModuleDict({"default": copy}))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.lora_A["default"], self.lora_B["default"]
            return x @ self.weight.T + self.shift + self.scale * b(a(x))

    model = empty_model(made.model.config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, module in made.model.named_modules():
        if isinstance(module, LoraLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Plain(module))
    frozen = dict(made.model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.data.copy_(frozen[name].data)
        parameter.requires_grad_("lora_" in name)
    for name, buffer in model.named_buffers():
        buffer.copy_(made.model.get_buffer(name))
    model.set_attn_implementation("eager")
    return model.eval()


def same_weights(target: TrainingStep, source: TrainingStep) -> TrainingStep:
    """`target` with the weights of `source`, which lies on another device."""
    frozen = dict(source.model.named_parameters())
    for name, parameter in target.model.named_parameters():
        parameter.data.copy_(frozen[name].data)
    return target
