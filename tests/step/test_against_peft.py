"""Each family in bf16 against fp32 on the same dequantized weights: no further off than peft is.

The peer is stock transformers with stock peft under autocast, as trainers run it, on dense weights that
are to the bit what bitsandbytes dequantizes to (`test_kernels`); bitsandbytes' own layer repacks its
weights on some CPUs. Dropout masks are the step's, put in where peft drops. One gradient's error is
mostly chance, so the median over all of them and several seeds is held.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fitlora.model import empty_model
from fitlora.step import network, ops
from fitlora.step.batch import TokenSequence
from fitlora.step.build import lora_targets
from fitlora.step.linear import FrozenLinear, Linear4bit, LoraLinear
from fitlora.step.network import HandNetwork
from fitlora.step.training_step import TrainingStep
from tests.step import steps
from tests.step.test_network import CASES, make

LIMIT = 1.2
SEEDS = range(2)
DROPOUT = 0.2
STEP = 3  # of `steps.gradients`, on which masks depend
ODD = {
    "hidden_size": 63, "intermediate_size": 95, "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip


def rows_of(seed: int) -> list[TokenSequence]:
    """Of odd and even lengths, of which the latter part is learned."""
    draw = random.Random(seed)
    return [
        TokenSequence(
            sample,
            tuple(draw.randrange(steps.VOCABULARY) for _ in range(length)),
            tuple(position > length // 3 for position in range(length)),
        )
        for sample, length in enumerate((61, 128, 37))
    ]


class Masked(nn.Module):
    """The step's mask in the place of peft's dropout. keys: of the tokens that go through."""

    keys: Tensor

    def __init__(self, stream: int) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.empty(x.shape[-2:])
        ops.dropout(torch.ones_like(mask), Masked.keys, self.stream, DROPOUT, mask, False)
        return x * mask.to(x.dtype)


def stock(made: TrainingStep, dtype: torch.dtype) -> Any:
    """transformers and peft on the step's weights, dequantized to bf16 and stored in `dtype`."""
    from peft import LoraConfig, get_peft_model

    model: Any = empty_model(made.model.config, dtype=dtype).to_empty(device="cpu")
    model.tie_weights()
    targets = lora_targets(made.model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=targets))
    inner = model.base_model.model
    given = dict(made.model.named_parameters())
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            module, _, leaf = name.rpartition(".")
            layer = made.model.get_submodule(module)
            if leaf == "weight" and isinstance(layer, FrozenLinear | Linear4bit):
                parameter.copy_(layer.compute_weight(torch.bfloat16))
            else:
                parameter.copy_(given[name])
        for name, buffer in inner.named_buffers():
            buffer.copy_(made.model.get_buffer(name))
    for name, layer in made.model.named_modules():
        if isinstance(layer, LoraLinear):
            inner.get_submodule(name).lora_dropout["default"] = Masked(layer.stream)
    # its softcap is there in no other
    gemma2 = made.model.config.model_type == "gemma2"
    inner.set_attn_implementation("eager" if gemma2 else "sdpa")
    return inner


def by_peft(
    made: TrainingStep, rows: Sequence[TokenSequence], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the head is given for the learned tokens, and gradients; each row alone."""
    model = stock(made, dtype).train()
    outputs: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: outputs.append(given[0][0, :-1])
    )
    for row in rows:
        count = len(row.tokens)
        samples, positions = torch.full((count,), row.sample), torch.arange(count)
        Masked.keys = ops.row_keys(made.settings.train.seed, STEP, samples, positions)
        wanted = torch.tensor(list(row.learned[1:]), dtype=torch.bool)
        targets = torch.tensor(row.tokens[1:])[wanted]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits[wanted].float(), targets, reduction="sum")
        (loss / sum(other.target_tokens for other in rows)).backward()
        outputs[-1] = outputs[-1].detach()[wanted]
    found = {name: cast(Tensor, model.get_parameter(name).grad) for name in made.learning}
    return torch.cat(outputs), found


def by_step(
    made: TrainingStep, rows: Sequence[TokenSequence], patch: pytest.MonkeyPatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by the step: all rows in one micro-batch."""
    outputs: list[Tensor] = []
    name = "head_loss" if isinstance(made.network, HandNetwork) else "chunked_cross_entropy"
    plain = getattr(network, name)

    def look(hidden: Tensor, *given: Any, **options: Any) -> Any:
        outputs.append(hidden.detach().clone())
        return plain(hidden, *given, **options)

    patch.setattr(network, name, look)
    gradients = steps.gradients(made, list(rows))
    patch.undo()
    return torch.cat(outputs), gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "odd sizes", "olmo2"])
def test_a_family_in_bf16_errs_no_more_than_peft(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: dict[str, list[float]] = {"outputs": [], "gradients": []}
    shares = []
    for seed in SEEDS:
        config = {**(ODD if case == "odd sizes" else {}), "tie_word_embeddings": False}
        name = "llama" if case == "odd sizes" else case
        made = make(name, dropout=DROPOUT, dtype="bfloat16", seed=seed, config=config)
        rows = rows_of(seed)
        exact = by_peft(made, rows, torch.float32)
        found = [by_peft(made, rows, torch.bfloat16), by_step(made, rows, monkeypatch)]
        errors = [float((out - exact[0]).norm()) for out, _ in found]
        ratios["outputs"].append(errors[1] / errors[0])
        for name, gradient in exact[1].items():
            theirs, ours = (float((each[name] - gradient).norm()) for _, each in found)
            ratios["gradients"].append(ours / theirs)
            shares.append(ours / float(gradient.norm()))
    assert 1e-3 < statistics.median(shares) < 0.5, "it is the same gradient, and bf16's"
    for kind, each in ratios.items():
        assert statistics.median(each) <= LIMIT, kind
