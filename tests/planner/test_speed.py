"""The speed model: against the measurement that it was fitted to, and what must hold of any plan."""

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from fitlora.artifacts import Rates
from fitlora.plan import Plan
from fitlora.planner.speed import (
    STREAMING_LOSS,
    Forecast,
    Shape,
    forecast,
    guess_bytes,
    guess_host_bytes,
)
from fitlora.units import GIB

LAYERS = 32
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip
H200 = Rates(
    host_to_device_bytes_per_second=55 * 10**9,
    device_to_host_bytes_per_second=55 * 10**9,
    device_copy_bytes_per_second=3700 * 10**9,
    disk_read_bytes_per_second=None,
    product_flops_per_second={"bfloat16": 768 * 10**12},
)
NOT_MEASURED = Rates(
    host_to_device_bytes_per_second=None,
    device_to_host_bytes_per_second=None,
    device_copy_bytes_per_second=None,
    disk_read_bytes_per_second=None,
    product_flops_per_second={},
)


def shape(bits: int = 4) -> Shape:
    found = Shape.of(LLAMA_8B, bits=bits, rank=16)
    assert found is not None
    return found


def plan(**changes: Any) -> Plan:
    base: dict[str, Any] = {
        "device": "cuda", "effective_batch_size": 4, "micro_batch_size": 4,
        "evaluation_batch_size": 4, "sequence_length": 2048, "compute_dtype": "bfloat16",
        "optimizer": "adamw", "loss_chunk_tokens": 512,
    }  # fmt: skip
    return Plan.model_validate({**base, **changes})


def told(rates: Rates = H200, tokens: int | None = None, **changes: Any) -> Forecast:
    made = plan(**changes)
    found = forecast(made, shape(), rates, tokens or made.micro_batch_size * 2048)
    assert found is not None
    return found


def test_the_shape_is_the_models() -> None:
    found = shape()
    assert (found.qkv, found.attended) == (6144, 4096)
    assert found.weights() == 218_103_808  # of one layer's linear weights
    assert found.adapters == 41_943_040  # rank 16 on all of them
    assert shape(bits=16).layer_bytes == 2 * found.weights()
    assert not shape(bits=16).dequantized


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_a_shape_that_is_not_understood_has_no_speed(family: str) -> None:
    assert Shape.of(AutoConfig.for_model(family), bits=4, rank=16) is None


@pytest.mark.parametrize(("recomputed", "seconds"), [(0, 0.463), (LAYERS, 0.608)])
def test_what_was_measured(recomputed: int, seconds: float) -> None:
    assert told(recompute_layers=range(recomputed)).step_seconds == pytest.approx(seconds, rel=0.03)


def test_unknown_rates_give_none() -> None:
    assert forecast(plan(), shape(), NOT_MEASURED, 8192) is None
    linkless = H200.model_copy(update={"host_to_device_bytes_per_second": None})
    assert forecast(plan(), shape(), linkless, 8192) is not None, "nothing travels"
    assert forecast(plan(streamed_layers=range(LAYERS)), shape(), linkless, 8192) is None
    assert forecast(plan(compute_dtype="float32"), shape(), H200, 8192) is None


def test_recomputation_costs_by_what_is_made_again() -> None:
    seconds = [
        told(recompute_layers=range(layers), recompute_keeps=keeps).step_seconds
        for layers, keeps in (
            (0, ()),
            (16, ()),
            (32, ("qkv", "attention")),
            (32, ("attention",)),
            (32, ()),
        )
    ]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 5
    assert seconds[-1] < 1.34 * seconds[0]


def test_many_tokens_hide_the_link_and_few_do_not() -> None:
    for tokens, bound in ((8192, "compute"), (64, "link")):
        resident = told(tokens=tokens)
        streamed = told(tokens=tokens, streamed_layers=range(LAYERS))
        assert streamed.bound == bound
        hidden = resident.micro_batch_seconds * (1 + STREAMING_LOSS)  # the head is not streamed
        found = streamed.micro_batch_seconds
        assert (found == pytest.approx(hidden, rel=0.1 * STREAMING_LOSS)) is (bound == "compute")
    half = told(tokens=64, streamed_layers=range(16))
    assert resident.step_seconds < half.step_seconds < streamed.step_seconds


def test_what_is_moved_never_makes_a_step_faster() -> None:
    base = {"recompute_layers": range(LAYERS)}
    before = told(**base)
    for name in ("embedding", "checkpoints", "head", "optimizer_device"):
        after = told(**base, **{name: "host"})
        assert after.step_seconds >= before.step_seconds
    assert told(**base, checkpoints="host").step_seconds == before.step_seconds
    assert told(**base, optimizer_device="host").optimizer_seconds > before.optimizer_seconds


def test_more_tokens_at_once_are_faster() -> None:
    speeds = [
        told(effective_batch_size=8, micro_batch_size=micro).tokens_per_second
        for micro in (1, 2, 4, 8)
    ]
    assert speeds == sorted(speeds)
    assert speeds[0] > 0.85 * speeds[-1]
    assert told(effective_batch_size=8, micro_batch_size=2).accumulation == 4


def test_guesses_of_bytes_are_near_the_measured_ones() -> None:
    """Reserved: 32.9 GiB with nothing recomputed, 10.0 GiB with all. The guess leaves things out."""
    for recomputed, gib in ((0, 32.9), (LAYERS, 10.0)):
        found = guess_bytes(plan(recompute_layers=range(recomputed)), shape(), 8192)
        assert 0.85 * gib * GIB < found < gib * GIB


def test_what_leaves_the_device_is_on_the_host() -> None:
    base = plan(recompute_layers=range(LAYERS))
    assert guess_host_bytes(base, shape(), 8192) == 0
    for name in ("embedding", "checkpoints", "head"):
        moved = base.replace(**{name: "host"})
        off = guess_bytes(base, shape(), 8192) - guess_bytes(moved, shape(), 8192)
        assert off == guess_host_bytes(moved, shape(), 8192) > 0
    streamed = base.replace(streamed_layers=range(10))
    off = guess_bytes(base, shape(), 8192) - guess_bytes(streamed, shape(), 8192)
    assert off == 8 * shape().layer_bytes, "two slots stay"
