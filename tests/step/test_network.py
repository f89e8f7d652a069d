"""Layers done by hand against transformers' own forward and autograd, in every family."""

import statistics
from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from fitlora.memory.trace import MemoryTrace
from fitlora.offload.transport import Transport
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.plan import KEPT, Kept
from fitlora.step.build import build_step
from fitlora.step.families import FAMILIES, recognise
from fitlora.step.network import AutogradNetwork, HandNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from tests.step import steps

_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": steps.VOCABULARY, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOWED = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with long positions": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3 with windows": {"model_type": "qwen3", "use_sliding_window": True, **_WINDOWED},
    "phi3": {"model_type": "phi3"},
    "phi4": {
        "model_type": "phi3",
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5
        },
    },
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 24, **_WINDOWED},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 24, **_WINDOWED},
}  # fmt: skip


def make(
    case: str,
    *,
    dropout: float = 0.0,
    targets: Any = "all-linear",
    bits: int = 4,
    dtype: str = "float32",
    seed: int = 0,
    config: Any = None,
    device: str = "cpu",
    transport: Transport | None = None,
    **plan: Any,
) -> TrainingStep:
    """A small step; `case` is one of CASES or a model type. config: changes of the config."""
    known = CASES.get(case, {"model_type": case})
    made_of = AutoConfig.for_model(**{**_SHAPE, **known, **(config or {})})
    settings = StepSettings(
        QuantizationParams.model_validate({"bits": bits}),
        LoraParams(dropout=dropout, r=4, target_modules=targets),
        TrainParams(),
    )
    made = build_step(
        made_of,
        steps.plan(device=device, compute_dtype=dtype, **plan),
        settings,
        RandomWeights(torch.device(device), seed),
        transport,
    )
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name or name.endswith(("norm.weight", "bias")):
                noise = torch.empty(parameter.shape).normal_(0.0, 0.05, generator=make)
                parameter.add_(noise.to(parameter))
    return made


def by_autograd(made: TrainingStep) -> AutogradNetwork:
    """transformers and autograd on the weights of a step by hand."""
    assert isinstance(made.network, HandNetwork)
    return AutogradNetwork(made.model, made.context, made.plan, made.network.placement)


def both_ways(made: TrainingStep) -> tuple[tuple[float, dict[str, Any]], ...]:
    """Loss and gradients by hand, and by transformers and autograd on the same weights."""
    batch = steps.sequences(5)
    found = []
    assert isinstance(made.network, HandNetwork)
    for network in (
        made.network,
        AutogradNetwork(made.model, made.context, made.plan, made.network.placement),
    ):
        made.network = network
        losses: list[float] = []

        def look(loss: float, norm: float, losses: list[float] = losses) -> bool:
            losses.append(loss)
            return True

        gradients = steps.gradients(made, batch, look=look)
        found.append((losses[0], gradients))
    return tuple(found)


def assert_alike(made: TrainingStep) -> None:
    """To fp32's rounding; behind a softmax gradients nearly cancel, and rounding weighs more."""
    (loss, gradients), (expected_loss, expected) = both_ways(made)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
    assert steps.distance(gradients, expected) < 3e-4


def test_every_family_is_tested() -> None:
    assert {case["model_type"] for case in CASES.values()} == FAMILIES


@pytest.mark.parametrize("case", CASES)
def test_a_family_by_hand_is_the_family(case: str) -> None:
    assert_alike(make(case, dropout=0.2, micro_batch_size=3))


@pytest.mark.parametrize("case", ["llama with biases", "phi3", "gemma2"])
@pytest.mark.parametrize("keeps", [(), ("middle",), ("mlp",)])
def test_an_mlp_in_chunks_is_the_whole_one(case: str, keeps: tuple[Kept, ...]) -> None:
    """One layer keeps its MLP and is not cut; the others are, and so is an evaluation."""
    plan: dict[str, Any] = {"recompute_layers": (0, 1), "recompute_keeps": keeps}
    batch, losses, gradients = steps.sequences(5), [], []
    for chunk in (None, 7):
        made = make(case, dropout=0.2, mlp_chunk_tokens=chunk, **plan)
        losses += [float(made.evaluate(batch)[0])]
        gradients.append(steps.gradients(made, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert steps.distance(*gradients) < 1e-4


def test_an_mlp_in_chunks_takes_less_memory() -> None:
    peaks = []
    for chunk in (None, 16):
        made = make("llama", config={"intermediate_size": 4096}, mlp_chunk_tokens=chunk,
                    recompute_layers=(0, 1, 2))  # fmt: skip
        with MemoryTrace() as trace:
            made.run(steps.sequences(7), step=0, learning_rate=0.0)
            peaks.append(trace.peak.bytes)
    tokens = sum(len(s.tokens) for s in steps.sequences(7))
    # of gate, up and their product in backward, all but a chunk's
    assert peaks[0] - peaks[1] > 2.9 * (tokens - 16) * 4096 * 4


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3"])
def test_what_is_recomputed_changes_nothing(case: str) -> None:
    choices = [c for count in range(len(KEPT)) for c in combinations(KEPT, count)]
    whole = both_ways(make(case, dropout=0.2))[0]
    for keeps in choices:
        loss, gradients = both_ways(
            make(case, dropout=0.2, recompute_layers=(0, 2), recompute_keeps=keeps)
        )[0]
        assert loss == whole[0]
        assert steps.distance(gradients, whole[1]) < 1e-6, keeps


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["k_proj", "v_proj"], ["o_proj"], ["up_proj"], ["gate_proj", "down_proj"]],
    ids="+".join,
)
def test_adapters_on_some_layers(targets: list[str]) -> None:
    assert_alike(make("qwen2", dropout=0.1, targets=targets))


@pytest.mark.parametrize("recompute", [(), (0, 1, 2)])
@pytest.mark.parametrize("frozen", [(0,), (0, 1), (1,), (0, 2), (2,)])
def test_frozen_layers_learn_nothing_and_the_others_as_before(
    frozen: tuple[int, ...], recompute: tuple[int, ...]
) -> None:
    assert_alike(make("llama", dropout=0.2, frozen_layers=frozen, recompute_layers=recompute))
    whole = both_ways(make("llama", recompute_layers=recompute))[0][1]
    _, found = both_ways(make("llama", frozen_layers=frozen, recompute_layers=recompute))[0]
    kept = {n: g for n, g in whole.items() if int(n.split(".")[2]) not in frozen}
    assert found.keys() == kept.keys()
    assert steps.distance(found, kept) == 0.0


def test_backward_ends_above_the_lowest_frozen_layers() -> None:
    made = make("llama", frozen_layers=(0, 1))
    assert isinstance(made.network, HandNetwork)
    seen: list[int | None] = []
    made.network.watch = seen.append
    made.run(steps.sequences(3), step=0, learning_rate=0.0)
    assert seen == [0, 1, 2, None, 2, None]


def test_sixteen_bits_are_not_dequantized() -> None:
    assert_alike(make("llama", bits=16))


def test_evaluation_is_the_same() -> None:
    made = make("gemma2", dropout=0.5)
    batch = steps.sequences(5)
    loss, count = made.evaluate(batch)
    made.network = by_autograd(made)
    expected, _ = made.evaluate(batch)
    assert count > 0
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_in_bf16_the_error_is_that_of_autograd() -> None:
    """Against fp32 on the same dequantized weights; of many gradients, as one is mostly chance."""
    ratios = []
    for seed in range(6):
        (_, exact), _ = both_ways(make("llama", seed=seed))
        (_, by_hand), (_, by_autograd) = both_ways(make("llama", seed=seed, dtype="bfloat16"))
        for name, value in exact.items():
            errors = [(found[name] - value).norm() for found in (by_hand, by_autograd)]
            assert 1e-3 < errors[0] / value.norm() < 0.2
            ratios.append(float(errors[0] / errors[1]))
    assert statistics.median(ratios) <= 1.1


def test_an_unknown_family_goes_the_general_way() -> None:
    config = AutoConfig.for_model("olmo2", **_SHAPE)
    made = build_step(config, steps.plan(), steps.settings(), RandomWeights(torch.device("cpu")))
    layers, reason = recognise(made.model)
    assert not layers
    assert "olmo2" in reason
    assert isinstance(made.network, AutogradNetwork)
    before = float(made.run(steps.sequences(7), step=0, learning_rate=1e-2).loss)
    for index in range(1, 6):
        after = float(made.run(steps.sequences(7), step=index, learning_rate=1e-2).loss)
    assert after < before


def test_float8_products_are_near() -> None:
    """Per gradient within fp8's rounding of fp32 on the same dequantized weights, and it learns."""
    wide = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    (loss, exact), _ = both_ways(make("qwen2", config=wide))
    made = make("qwen2", config=wide, dtype="float8")
    assert isinstance(made.network, HandNetwork)
    assert all(group.float8 is not None for group in made.network.layers[0].groups)
    (found_loss, found), _ = both_ways(made)
    assert found_loss == pytest.approx(loss, rel=0.01)
    flat, reference = (torch.cat([d[n].float().flatten() for n in exact]) for d in (found, exact))
    assert 0.01 < float((flat - reference).norm() / reference.norm()) < 0.15
    made = make("qwen2", config=wide, dtype="float8")
    losses = [
        float(made.run(steps.sequences(7), step=i, learning_rate=1e-2).loss) for i in range(6)
    ]
    assert losses[-1] < losses[0] - 0.05


def test_what_fp8_cannot_take_stays_in_bf16() -> None:
    made = make("llama", dtype="float8", config={"intermediate_size": 90})
    assert isinstance(made.network, HandNetwork)
    layer = made.network.layers[0]
    assert layer.qkv.float8 is not None
    assert layer.down.float8 is None
    assert float(made.run(steps.sequences(7), step=0, learning_rate=0.0).loss) > 0
