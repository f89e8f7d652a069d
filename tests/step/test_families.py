"""Models that are not done by hand: what stock transformers gives, or a refusal that says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from fitlora.errors import UserError
from fitlora.memory.estimate import Load, trace_step
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.plan import Plan
from fitlora.planner.model import model_size
from fitlora.step.batch import PackedSequence, TokenSequence
from fitlora.step.build import build_step, lora_targets, step_skeleton
from fitlora.step.families import FAMILIES, TOGETHER
from fitlora.step.network import AutogradNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from tests.step import steps
from tests.step.test_network import CASES
from tests.step.test_network import make as by_hand

_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": steps.VOCABULARY, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
# of each way in which a token's past reaches it; sizes that transformers would make large
ALONE: dict[str, dict[str, Any]] = {
    "jamba": {  # state space layers
        "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "qwen3_next": {  # linear attention
        "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # convolutions
    "llama4_text": {  # attention in chunks, and results that are written into
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8,
        "moe_layers": [], "intermediate_size_mlp": 96,
    },
    "granite_swa": {"sliding_window": 6},  # attention sinks
    "doge": {},  # masks of its own
    "bloom": {"n_head": 4, "n_layer": 2},  # attention of its own, and layers that return tuples
    "gemma3n_text": {  # layers that hand on more than hidden states
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": steps.VOCABULARY, "intermediate_size": [96, 96],
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0], "sliding_window": 6,
    },
}  # fmt: skip


def config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**_SHAPE, **ALONE.get(family, {}), **changes})


# of whose linear layers PEFT leaves some without adapters, and why
BARE = {
    "qwen3_next": {"gate_proj", "up_proj", "down_proj"},  # it takes them for experts'
    "mamba": {"out_proj"},  # kernels for state spaces take its weight alone
}


def settings(dropout: float = 0.0, bits: Any = 4) -> StepSettings:
    return StepSettings(
        QuantizationParams(bits=bits), LoraParams(r=4, dropout=dropout), TrainParams()
    )


def make(family: str, *, dropout: float = 0.0, **plan: Any) -> TrainingStep:
    weights = RandomWeights(torch.device("cpu"))
    # `steps.plain_model` takes 4 bits where all linear layers have adapters
    bits = 16 if family in BARE else 4
    made = build_step(config(family), steps.plan(**plan), settings(dropout, bits), weights)
    noise = torch.Generator().manual_seed(0)
    for name, parameter in made.adapters.items():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.05, generator=noise)
    return made


def stock(
    made: TrainingStep, rows: list[TokenSequence], dtype: torch.dtype = torch.float32
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of stock transformers on the same weights, each row alone."""
    model, loss = steps.plain_model(made).to(dtype), torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(row.learned[1:], dtype=torch.bool)
        targets = torch.tensor(row.tokens[1:])[wanted]
        loss = loss + nn.functional.cross_entropy(logits[wanted], targets, reduction="sum")
    loss = loss / sum(row.target_tokens for row in rows)
    loss.backward()
    return loss.item(), {n: cast(Tensor, model.get_parameter(n).grad) for n in made.learning}


@pytest.mark.parametrize("family", ALONE)
def test_a_family_of_any_kind_trains_as_stock_transformers_does(family: str) -> None:
    rows = steps.sequences(3)
    made = make(family, recompute_layers=(0, 1), micro_batch_size=3)
    assert isinstance(made.network, AutogradNetwork)
    assert not made.network.together
    losses: list[float] = []
    found = steps.gradients(made, rows, lambda loss, norm: losses.append(loss))
    loss, expected = stock(made, rows)
    assert losses == [pytest.approx(loss, rel=1e-6)]
    assert steps.distance(found, expected) < 1e-4
    assert min(float(gradient.abs().max()) for gradient in expected.values()) > 0


@pytest.mark.parametrize("case", CASES)
def test_a_family_by_hand_is_stock_transformers_in_fp32(case: str) -> None:
    """Its own attention and masks, each row alone, in fp64: gradients are within 1e-5 of its.

    Where stock fp32 is itself further off than a third of that, three times as far.
    """
    rows, losses = steps.sequences(5), list[float]()
    made = by_hand(case, micro_batch_size=5, recompute_layers=(1,))
    found = steps.gradients(made, rows, lambda loss, norm: losses.append(loss))
    loss, expected = stock(made, rows, torch.float64)
    _, rounded = stock(made, rows)
    assert losses == [pytest.approx(loss, rel=1e-6)]
    flat = [torch.cat([d[n].flatten() for n in expected]) for d in (expected, found, rounded)]
    ours, theirs = (float((part - flat[0]).norm() / flat[0].norm()) for part in flat[1:])
    assert ours < max(1e-5, 3 * theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["jamba", "llama4_text"])
def test_its_memory_is_told_to_the_byte(family: str) -> None:
    """Tensors without content take what real ones take, dropout among it."""
    plan, load = steps.plan(micro_batch_size=2, recompute_layers=(0,)), Load.uniform(2, 9)
    peaks = [
        trace_step(config(family), plan, settings(0.1), load, weights).peak_bytes
        for weights in (None, RandomWeights(torch.device("cpu")))
    ]
    assert peaks[0] == peaks[1]


def test_packed_rows_are_taken_apart() -> None:
    rows = steps.sequences(3)
    packed = make("bloom"), [PackedSequence.of(rows[:2]), rows[2]]
    found, expected = (
        steps.gradients(step, batch) for step, batch in (packed, (make("bloom"), rows))
    )
    assert steps.distance(found, expected) == 0.0
    sums = [step.evaluate(batch)[0] for step, batch in (packed, (make("bloom"), rows))]
    assert sums[0] == sums[1]


def test_what_goes_together_has_been_compared() -> None:
    path = Path(__file__).parents[2] / "benchmarks/results/families.cpu.json"
    rows = json.loads(path.read_text())["rows"]
    compared = {r["model_type"] for r in rows if r["way"] in ("by hand", "together")}
    assert compared == TOGETHER
    assert {r["model_type"] for r in rows if r["way"] == "by hand"} == FAMILIES
    trained = [r for r in rows if r["way"] in ("by hand", "together", "alone")]
    assert len(trained) > 150
    for row in trained:
        assert max(row["loss_off"], row["recomputing_off"]) < 1e-6, row["family"]
    assert all(row["refused"] or row["stock"] for row in rows if row not in trained)


def shared_keys() -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    changes = {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4}
    return config(
        "gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=layers, **changes
    )


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no linear layers"),
        ("bert", {}, "BertLMHeadModel with this config looks ahead"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("xlm", {}, "XLMWithLMHeadModel has no decoder layers"),
        ("musicgen", {}, "cannot make a causal language model of this musicgen config"),
        ("jetmoe", {}, "JetMoeForCausalLM cannot be estimated"),
    ],
    ids=str,
)
def test_what_cannot_be_done_says_so(family: str, changes: dict[str, Any], says: str) -> None:
    of = AutoConfig.for_model(family) if family == "musicgen" else config(family, **changes)
    plan: Plan = steps.plan(compute_dtype="bfloat16")
    with pytest.raises(UserError, match=says):
        trace_step(of, plan, settings(), Load.uniform(1, 9))


@pytest.mark.parametrize("family", BARE)
def test_all_linear_is_what_peft_puts_adapters_on(family: str) -> None:
    skeleton = step_skeleton(config(family), steps.plan(), settings())
    names = set(lora_targets(skeleton.model))
    assert names
    assert not names & BARE[family]
    assert f"; {', '.join(sorted(BARE[family]))} without adapters" in skeleton.reason
    asked = LoraParams(target_modules=(*sorted(BARE[family]), *sorted(names)))
    named = replace(settings(), lora=asked)
    with pytest.raises(UserError, match=rf"target_modules: \[{', '.join(sorted(names))}\]"):
        step_skeleton(config(family), steps.plan(), named)


def test_layers_that_share_keys_are_not_recomputed() -> None:
    model_size(shared_keys(), settings())  # of a config that cannot be cut short
    skeleton = step_skeleton(shared_keys(), steps.plan(recompute_layers=(0,)), settings())
    with pytest.raises(UserError, match=r"plan\.recompute: none"):
        skeleton.fill(RandomWeights(torch.device("cpu")))
