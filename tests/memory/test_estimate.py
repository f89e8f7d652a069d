"""Estimates of a tiny model: equal to what the same step takes on real tensors, to the byte."""

import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3TextConfig, Olmo2Config, Qwen2Config

from fitlora.artifacts import Gpu, Hardware, Rates, SequenceSize
from fitlora.memory import estimate as memory_estimate
from fitlora.memory.estimate import (
    CPU_MARGIN,
    REPLAY_MARGIN,
    Estimator,
    Load,
    Traced,
    TraceResult,
    count_parameters,
    estimate,
    layer_kinds,
    rehearse,
    rehearse_save,
    sequences_of,
    trace_run,
    trace_step,
)
from fitlora.offload.optimizer import STATE_PURPOSE, CPUOffloadOptimizer
from fitlora.offload.residency import spread
from fitlora.offload.transport import HostTransport, tensor_bytes
from fitlora.plan import Plan
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.weights import RandomWeights, Weights
from fitlora.training.recovery import Learned
from tests.step import steps

CONFIG = steps.config()
SETTINGS = steps.settings()
LOAD = Load(
    [SequenceSize(tokens=t, target_tokens=t // 2) for t in (90, 90, 71, 64, 40, 12, 9)],
    [SequenceSize(tokens=t, target_tokens=t - 1) for t in (80, 50, 33, 8)],
)


def hardware(**changes: Any) -> Hardware:
    base: dict[str, Any] = {
        "device": "cpu", "gpus": (), "cpu_name": "", "cpu_cores": 1, "host_memory_bytes": 1,
        "host_budget_bytes": 2**40, "budget_bytes": 2**30, "context_bytes": 0, "workspace_bytes": 0,
        "rates": Rates(
            host_to_device_bytes_per_second=None, device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None, disk_read_bytes_per_second=None,
            product_flops_per_second={},
        ),
        "target": None,
    }  # fmt: skip
    return Hardware.model_validate({**base, **changes})


@cache
def traced(
    plan: Plan,
    settings: StepSettings | None = None,
    *,
    real: bool = False,
    **changes: Any,
) -> TraceResult:
    """changes: keys of the model's config. Remembered, as a trace takes most of a second."""
    weights = RandomWeights(torch.device("cpu")) if real else None
    return trace_step(steps.config(**changes), plan, settings or SETTINGS, LOAD, weights)


def drawn(count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Plans and settings at random, with every choice of each at least once."""
    draw = random.Random(4)
    found = []
    for index in range(count):
        plan = {
            "micro_batch_size": draw.randint(1, 7),
            "evaluation_batch_size": draw.randint(1, 4),
            "recompute_layers": [(), (0,), (1,), (0, 1)][index % 4],
            "optimizer": ["adamw", "adamw_8bit"][index // 2 % 2],
            "loss_chunk_tokens": draw.choice([7, 50, 4096]),
            "compute_dtype": draw.choice(["float32", "bfloat16"]),
            "layer_dtype": [None, "bfloat16", None, "float32", "float8"][index],
            "frozen_layers": [(0,), (), (1,), (), ()][index],
        }
        found.append((plan, {"bits": [4, 4, 16][index % 3], "dropout": [0.0, 0.1][index % 2]}))
    return found


@pytest.mark.parametrize(("plan", "settings"), drawn(5))
def test_fake_tensors_take_what_real_ones_take(
    plan: dict[str, Any], settings: dict[str, Any]
) -> None:
    made = steps.plan(**plan), steps.settings(**settings)
    fake, real = traced(*made), traced(*made, real=True)
    # but for buffers, which are where they should be on the CPU, and are copied to a device
    sizes = [r.phase_peak_bytes.pop("load") for r in (fake, real)]
    assert 0 <= sizes[0] - sizes[1] <= 4096
    assert fake == real


def test_the_same_plan_gives_the_same_estimate() -> None:
    again = trace_step(CONFIG, steps.plan(), SETTINGS, LOAD)
    assert again == traced(steps.plan())


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 1, "recompute_layers": (0, 1)}, {"optimizer": "adamw_8bit"}]
)
def test_components_add_up_to_the_peak(changes: dict[str, Any]) -> None:
    here = hardware(workspace_bytes=2000)  # half of it: one thread computes
    found = estimate(CONFIG, steps.plan(**changes), SETTINGS, LOAD, here)
    assert found.components.total == found.peak_allocated_bytes
    assert found.components.library_workspaces == 1000
    assert max(found.phase_peak_bytes.values()) == found.peak_allocated_bytes - 1000
    assert min(found.components.model_dump().values()) >= 0


def test_components_are_what_they_say() -> None:
    plan, settings = steps.plan(micro_batch_size=3), steps.settings(bits=16, dropout=0.0)
    found = traced(plan, settings).components
    whole, adapters = count_parameters(CONFIG, plan, settings)
    model = steps.step(plan, settings).model
    assert adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # every size here is a multiple of 512 bytes but for the buffers and the counts of AdamW
    assert found["adapters"] == 4 * adapters
    assert 4 * whole <= found["weights"] <= 4 * whole + 4096
    assert found["optimizer_states"] >= 2 * 4 * adapters
    assert 0 <= found["optimizer_states"] - 2 * 4 * adapters <= 512 * 28
    assert found["gradients"] <= 4 * adapters
    assert found["activations"] > 0


def test_four_bits_take_less_than_sixteen() -> None:
    weights = [traced(steps.plan(), steps.settings(bits=b)).components["weights"] for b in (4, 16)]
    assert weights[0] < weights[1]


def test_it_grows_with_the_micro_batch() -> None:
    peaks = [traced(steps.plan(micro_batch_size=m)).peak_bytes for m in (2, 7)]
    assert peaks == sorted(set(peaks))


def test_it_shrinks_with_recomputation() -> None:
    """But for the last layer's, which is the first in backward and has all its activations there."""
    none, one, two = (
        traced(steps.plan(recompute_layers=layers)).peak_bytes for layers in ((), (0,), (0, 1))
    )
    assert none - one > 700_000
    assert two == pytest.approx(one, rel=0.02)


def test_a_change_of_the_loss_chunk_shows() -> None:
    targets = sum(size.target_tokens for size in LOAD.train)
    plan = steps.plan(recompute_layers=(0, 1))
    whole, same, small = (
        traced(plan.replace(loss_chunk_tokens=n), vocab_size=4096).phase_peak_bytes["forward"]
        for n in (4096, targets, targets // 3)
    )
    assert whole == same
    assert whole - small > targets * 4096 * 4 // 2  # two thirds of the logits


def test_gradients_are_there_from_the_first_micro_batch_on() -> None:
    """They are one buffer, kept: accumulating takes no more than one micro-batch does."""
    once = traced(steps.plan(effective_batch_size=3, micro_batch_size=3, evaluation_batch_size=1))
    twice = traced(steps.plan(effective_batch_size=6, micro_batch_size=3, evaluation_batch_size=1))
    assert once.components["gradients"] > 0
    assert twice == once


def test_evaluation_is_traced() -> None:
    peaks = {}
    for size in (1, 4):
        found = traced(steps.plan(micro_batch_size=1, evaluation_batch_size=size))
        peaks[size] = found.phase_peak_bytes["evaluation"]
        assert set(found.phase_peak_bytes) >= {
            "load", "forward", "backward", "optimizer", "evaluation",
        }  # fmt: skip
    assert peaks[4] > peaks[1]


def test_a_large_evaluation_batch_is_the_peak() -> None:
    load = Load(LOAD.train[-1:], [SequenceSize(tokens=2000, target_tokens=1999)])
    plan = steps.plan(effective_batch_size=1, micro_batch_size=1, evaluation_batch_size=1)
    found = trace_step(CONFIG, plan, steps.settings(), load)
    assert found.instant.startswith("evaluation")
    assert found.peak_bytes == found.phase_peak_bytes["evaluation"]


def test_without_validation_rows() -> None:
    found = trace_step(CONFIG, steps.plan(), steps.settings(), Load(LOAD.train, []))
    assert "evaluation" not in found.phase_peak_bytes


def test_what_fits_counts_context_and_fragmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = traced(steps.plan()).peak_bytes
    monkeypatch.setattr(memory_estimate, "trace_step", lambda *arguments: traced(steps.plan()))
    process = int((peak + 512) * (1 + CPU_MARGIN)) + 10_000
    for budget, fits in ((process, True), (process - 1, False)):
        here = hardware(context_bytes=10_000, workspace_bytes=1024, budget_bytes=budget)
        found = estimate(CONFIG, steps.plan(), SETTINGS, LOAD, here)
        assert found.process_bytes == process
        assert found.fits is fits


def test_float16_is_estimated_with_the_attention_that_it_takes() -> None:
    length, load = 512, Load.uniform(1, 512)

    def peak(dtype: str, kernel: str, weights: Weights | None = None) -> int:
        plan = steps.plan(
            device="cuda", effective_batch_size=1, micro_batch_size=1, evaluation_batch_size=1,
            sequence_length=length, compute_dtype=dtype, attention=kernel,
        )  # fmt: skip
        return trace_step(CONFIG, plan, SETTINGS, load, weights).peak_bytes

    flash, plain = (peak("float16", kernel) for kernel in ("flash", "plain"))
    assert flash == peak("bfloat16", "flash")
    scores = 4 * 4 * length * length  # of four heads, in float32
    assert flash + 2 * scores < plain < flash + 3.5 * scores
    assert plain == peak("float16", "plain", RandomWeights(torch.device("cpu")))


def test_paged_states_are_beside_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = steps.plan(device="cuda", optimizer="paged_adamw")
    small = estimate(CONFIG, plan, SETTINGS, LOAD, hardware())  # too small to be paged
    assert (small.paged_bytes, small.components.optimizer_states > 0) == (0, True)
    monkeypatch.setattr(memory_estimate, "PAGED_NUMEL", 1)
    paged = estimate(CONFIG, plan, SETTINGS, LOAD, hardware())
    adapters = paged.components.adapters
    assert paged.paged_bytes == pytest.approx(2 * adapters, rel=0.01)  # two fp32 states
    assert paged.safe_peak_bytes is not None
    assert paged.process_bytes == paged.safe_peak_bytes + paged.paged_bytes
    assert paged.peak_allocated_bytes < small.peak_allocated_bytes


def test_a_replay_reserves_the_peak_and_little_more() -> None:
    here = hardware(device="cuda", budget_bytes=2**30, workspace_bytes=64 * 2**20)
    found = Estimator(CONFIG, SETTINGS, LOAD, here)(steps.plan())
    reserved = found.peak_reserved_bytes
    assert reserved is not None
    # a granule of each pool, at most, is not full at its end
    assert found.peak_allocated_bytes <= reserved <= found.peak_allocated_bytes + 22 * 2**20
    assert found.safe_peak_bytes == int(reserved * (1 + REPLAY_MARGIN))


def test_what_fits_is_decided_by_what_is_reserved() -> None:
    plan = steps.plan()
    here = hardware(device="cuda", budget_bytes=2**30, context_bytes=10_000)
    needed = Estimator(CONFIG, SETTINGS, LOAD, here)(plan).process_bytes
    for budget, fits in ((needed, True), (needed - 1, False)):
        there = hardware(device="cuda", budget_bytes=budget, context_bytes=10_000)
        assert Estimator(CONFIG, SETTINGS, LOAD, there)(plan).fits is fits


def test_the_cpu_reserves_nothing() -> None:
    assert Estimator(CONFIG, SETTINGS, LOAD, hardware())(steps.plan()).peak_reserved_bytes is None


def test_the_load_is_made_of_the_longest() -> None:
    assert LOAD.tokens(2) == 180
    assert LOAD.tokens(100) == sum(size.tokens for size in LOAD.train)
    uniform = Load.uniform(3, 10)
    assert uniform.tokens(2) == 20
    for size, sequence in zip(LOAD.train, sequences_of(LOAD.train), strict=True):
        assert len(sequence.tokens) == size.tokens
        assert sequence.target_tokens == size.target_tokens


def test_all_tokens_of_a_sequence_may_be_learned() -> None:
    (sequence,) = sequences_of([SequenceSize(tokens=5, target_tokens=4)])
    assert sequence.target_tokens == 4


def deep_cases() -> list[tuple[int, int, dict[str, Any]]]:
    """Layers, how many of them recompute, and other choices of the plan."""
    draw = random.Random(1)
    found = []
    for layers, recomputed in ((6, 0), (6, 6), (7, 4), (5, 1), (5, 4)):
        changes = {
            "micro_batch_size": draw.randint(1, 7),
            "evaluation_batch_size": draw.randint(1, 4),
            "loss_chunk_tokens": draw.choice([5, 4096]),
        }
        found.append((layers, recomputed, changes))
    return found


HOST = ("streamed_layers", "disk_layers", "checkpoints", "embedding", "head", "optimizer_device")
OFFLOADED = [
    (7, 7, {"streamed_layers": (0, 1, 2, 3, 4, 5, 6), "checkpoints": "host"}),
    (12, 12, {"streamed_layers": spread(12, 9), "embedding": "host", "head": "host"}),
    (9, 4, {"streamed_layers": (0, 2, 4, 5, 6, 7, 8), "streaming_slots": 3}),
    (12, 12, {"streamed_layers": (1, 4, 5, 6, 7, 8, 11), "streaming_slots": 5}),
    (12, 12, {"streamed_layers": spread(12, 7), "disk_layers": 4, "checkpoints": "host"}),
    (6, 6, {"optimizer_device": "host", "micro_batch_size": 3}),
    (9, 9, {"optimizer_device": "host", "checkpoints": "host", "micro_batch_size": 1}),
    (7, 7, {"checkpoints": "host", "recompute_keeps": ("attention",)}),
    (9, 9, {"frozen_layers": (0, 1, 2, 3), "streamed_layers": (0, 1, 2, 3, 4, 6, 7, 8)}),
    # three micro-batches of unequal lengths in a pass, and then the rest
    (9, 9, {"streamed_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8), "checkpoints": "host", "head": "host",
            "embedding": "host", "optimizer_device": "host", "compute_dtype": "bfloat16",
            "micro_batch_size": 2, "micro_batches_per_pass": 3}),
]  # fmt: skip
FROZEN: list[tuple[int, int, dict[str, Any]]] = [
    (7, 0, {"frozen_layers": (0, 1, 2), "micro_batch_size": 3}),
    (12, 12, {"frozen_layers": (0, 1, 2, 3, 4), "optimizer_device": "host"}),
    (9, 3, {"frozen_layers": (0, 1, 2, 3, 4)}),
    (8, 0, {"frozen_layers": (1, 2, 3, 4), "micro_batch_size": 3}),
    (8, 8, {"frozen_layers": (1, 2, 3, 4)}),
    (12, 0, {"frozen_layers": (0, 1, 2, 4, 5, 6), "layer_dtype": "bfloat16"}),
    (12, 8, {"frozen_layers": (0, 1, 2, 3), "micro_batch_size": 3, "micro_batches_per_pass": 2}),
]


def test_processes_of_a_host_have_one_copy_of_what_streams_and_the_rest_each() -> None:
    def pinned(devices: int, **changes: Any) -> int:
        plan = steps.plan(devices=devices, micro_batch_size=2, recompute_layers=(0, 1), **changes)
        return Estimator(CONFIG, SETTINGS, LOAD, hardware())(plan).host_pinned_bytes

    weights = {"streamed_layers": (0, 1), "embedding": "host", "head": "host"}
    own = pinned(1, checkpoints="host")
    assert own > 0
    assert pinned(3, checkpoints="host") == 3 * own
    staging = (pinned(3, **weights) - pinned(1, **weights)) // 2
    assert pinned(3, streamed_layers=(0, 1)) == pinned(1, streamed_layers=(0, 1)) > 0
    assert pinned(3, checkpoints="host", **weights) == pinned(1, **weights) + 2 * staging + 3 * own


def happened(traced: Traced) -> list[tuple[bool, int, str]]:
    """Every event in order: whether it frees, how many bytes, and what the block was made by."""
    blocks = traced.timeline.blocks
    found = ((e < 0, blocks[e if e >= 0 else ~e]) for e in traced.timeline.events)
    return [(frees, block.size, block.operator) for frees, block in found]


def check_few_tell_of_many(config: Any, plan: Plan) -> None:
    """The shortcut against the trace at full depth: every event, level, instant and pinned byte."""
    short = Estimator(config, SETTINGS, LOAD, hardware(device="cuda", budget_bytes=2**33))
    found = short.trace(plan)
    full = trace_run(config, plan, SETTINGS, LOAD)
    assert happened(found) == happened(full)
    assert found.levels == full.levels
    for name in ("pinned", "shared", "masters", "adapters", "states"):
        assert getattr(found.host, name) == getattr(full.host, name)
    assert found.paged_bytes == full.paged_bytes
    assert all(len(layers) < config.num_hidden_layers for _, layers in short._traces), (
        "no full trace"
    )


@pytest.mark.parametrize(("layers", "recomputed", "changes"), [*deep_cases(), *OFFLOADED, *FROZEN])
def test_few_layers_tell_of_many(layers: int, recomputed: int, changes: dict[str, Any]) -> None:
    plan = steps.plan(recompute_layers=tuple(range(recomputed)), **changes)
    check_few_tell_of_many(steps.config(num_hidden_layers=layers), plan)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_device": "host"},
        {"optimizer_device": "host", "frozen_layers": (0,), "checkpoints": "host"},
        {"optimizer_device": "host", "compute_dtype": "bfloat16"},
        {"optimizer": "adamw_8bit"},
        {"frozen_layers": (1,)},
    ],
    ids=str,
)
def test_what_is_told_of_the_host_is_what_a_step_has_there(changes: dict[str, Any]) -> None:
    plan = steps.plan(recompute_layers=(0, 1), **changes)
    found = Estimator(CONFIG, SETTINGS, LOAD, hardware())(plan)
    transport = HostTransport(torch.device("cpu"))
    step = build_step(CONFIG, plan, SETTINGS, RandomWeights(torch.device("cpu")), transport)
    rehearse(step, LOAD)
    if isinstance(step.optimizer, CPUOffloadOptimizer):
        step.optimizer.join()
    assert found.host_pinned_bytes == transport.pinned_bytes
    assert found.host_unpinned_bytes == transport.memory.taken.get(STATE_PURPOSE, 0)
    assert (found.host_unpinned_bytes > 0) is (plan.optimizer_device == "host")
    assert found.host_pinned_bytes + found.host_unpinned_bytes == transport.memory.bytes
    learned = Learned.of(step)
    copies = [*step.adapter_state().values(), *learned.adapter.values()]
    copies += learned.optimizer.values()
    rehearsed = [copy for held in rehearse_save(step) for copy in held.values()]
    assert found.host_copies_bytes == sum(map(tensor_bytes, copies))
    assert found.host_copies_bytes == sum(map(tensor_bytes, rehearsed))


def test_a_rehearsal_has_its_update_whatever_the_gradients_are() -> None:
    step = build_step(CONFIG, steps.plan(), SETTINGS, RandomWeights(torch.device("cpu")))
    with torch.no_grad():
        next(iter(step.adapters.values())).fill_(float("nan"))
    rehearse(step, LOAD)
    assert all(step.states_of([parameter]) for parameter in step.learning.values())


def test_each_process_of_a_host_has_memory_of_its_own_there() -> None:
    def own(config: Any = CONFIG, *, optimizer: str = "host", **here: Any) -> Any:
        changes: dict[str, Any] = {"micro_batch_size": 2, "recompute_layers": (0, 1)}
        plan = steps.plan(devices=2, optimizer_device=optimizer, **changes)
        return Estimator(config, SETTINGS, LOAD, hardware(**here))(plan)

    def mib(*parts: str) -> int:
        return sum(memory_estimate.OWN_HOST_MIB[part] for part in parts) * 2**20

    gpu = Gpu(name="", compute_capability="8.0", memory_bytes=1, bf16=True, fp8=False)
    alone, both = (own(device="cuda", gpus=(gpu,) * count) for count in (1, 2))
    assert alone.host_own_bytes == mib("every process")
    assert both.host_own_bytes == 2 * alone.host_own_bytes
    here = own(optimizer="device", device="cuda", gpus=(gpu,))
    assert here.host_own_bytes == mib("every process", "optimizer on the device")
    parts = (both.host_pinned_bytes, both.host_unpinned_bytes, both.host_copies_bytes)
    assert all(parts)
    assert both.host_bytes == both.host_own_bytes + sum(parts)
    config = Olmo2Config(**SMALL, num_hidden_layers=2)
    for optimizer in ("host", "device"):  # whose kernels there are then
        by_autograd = own(config, optimizer=optimizer, device="cuda", gpus=(gpu,))
        assert by_autograd.host_own_bytes == mib("every process", "layers by autograd")
    assert own().host_own_bytes == 0


def test_states_on_the_host_count_against_its_budget() -> None:
    plan = steps.plan(device="cuda", optimizer_device="host")
    needed = Estimator(CONFIG, SETTINGS, LOAD, hardware(device="cuda"))(plan).host_bytes
    for budget, fits in ((needed, True), (needed - 1, False)):
        here = hardware(device="cuda", host_budget_bytes=budget)
        assert Estimator(CONFIG, SETTINGS, LOAD, here)(plan).fits is fits


class _Copies(TorchDispatchMode):
    """Counts copies of contiguous tensors to the host, for which a GPU allocates nothing, and allows
    nothing else."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name == "aten::_to_copy":
            assert kwargs["device"] == torch.device("cpu")
            assert kwargs.get("dtype") in (None, args[0].dtype)
            assert args[0].is_contiguous()
            self.count += 1
        else:
            assert func._schema.name == "aten::detach"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw_8bit"}, {"optimizer_device": "host"}], ids=str
)
def test_saving_takes_nothing_of_the_device(changes: dict[str, Any]) -> None:
    """So that a checkpoint needs no phase of its own in an estimate."""
    plan = steps.plan(recompute_layers=(0, 1), **changes)
    step = build_step(CONFIG, plan, SETTINGS, RandomWeights(torch.device("cpu")))
    rehearse(step, LOAD)
    with _Copies() as copies:
        held = rehearse_save(step)
    assert copies.count == sum(map(len, held)) > 0


def test_layers_on_disk_pin_their_buffers_alone() -> None:
    """At any depth: by the shortcut as by the trace of all layers."""
    config = steps.config(num_hidden_layers=12)
    layers = tuple(range(12))
    whole = steps.plan(recompute_layers=layers, streamed_layers=layers)
    estimator = Estimator(config, SETTINGS, LOAD, hardware())
    bytes_each = estimator(whole).host_pinned_bytes // 12
    for count in (0, 1, 3, 5, 9):
        plan = whole.replace(disk_layers=count)
        found = estimator(plan)
        assert found.host_pinned_bytes == (12 - count + min(3, count)) * bytes_each
        assert found.peak_allocated_bytes == estimator(whole).peak_allocated_bytes
    full = trace_run(config, plan, SETTINGS, LOAD)
    assert full.host.pinned == found.host_pinned_bytes


@pytest.mark.parametrize("changes", [changes for *_, changes in OFFLOADED], ids=str)
def test_what_is_on_the_host_is_not_on_the_device(changes: dict[str, Any]) -> None:
    """The estimate of a step with host parts against the same step on real tensors of the CPU."""
    layers = 12
    config = steps.config(num_hidden_layers=layers)
    plan = steps.plan(recompute_layers=tuple(range(layers)), **changes)
    estimator = Estimator(config, SETTINGS, LOAD, hardware())
    measured = trace_step(config, plan, SETTINGS, LOAD, RandomWeights(torch.device("cpu")))
    assert estimator(plan).peak_allocated_bytes == measured.peak_bytes
    assert estimator(plan).host_pinned_bytes > 0
    here = {key: Plan.model_fields[key].default for key in changes if key in HOST}
    everything = estimator(plan.replace(**here))
    assert everything.host_pinned_bytes == 0
    assert measured.peak_bytes < everything.peak_allocated_bytes


def test_the_choice_of_what_to_freeze_is_part_of_the_estimate() -> None:
    config = steps.config(num_hidden_layers=8)
    plan = steps.plan(frozen_layers=(1, 2, 3, 4, 5, 6), micro_batch_size=1)
    by_place, by_gradients = (
        Estimator(config, steps.settings(freeze=freeze), LOAD, hardware())(plan)
        for freeze in ("speed", "memory")
    )
    full = trace_step(config, plan, steps.settings(freeze="memory"), LOAD)
    assert by_gradients.peak_allocated_bytes == full.peak_bytes >= by_place.peak_allocated_bytes
    assert by_gradients.phase_peak_bytes == full.phase_peak_bytes != by_place.phase_peak_bytes


def test_what_is_frozen_has_no_gradients_and_no_states() -> None:
    config = steps.config(num_hidden_layers=8)
    estimator = Estimator(config, SETTINGS, LOAD, hardware())
    whole, below, between = (
        estimator(steps.plan(frozen_layers=frozen)).components
        for frozen in ((), (0, 1, 2, 3), (1, 2, 3, 4))
    )
    for found in (below, between):
        assert found.adapters == whole.adapters
        # what is rounded up, of each of them, does not halve
        assert found.gradients == pytest.approx(whole.gradients / 2, rel=0.01)
        assert found.optimizer_states == pytest.approx(whole.optimizer_states / 2, rel=0.05)
    assert below.activations < 0.6 * whole.activations
    assert between.activations == pytest.approx(whole.activations, rel=0.01)


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128,
}  # fmt: skip


@pytest.mark.parametrize("recomputed", [0, 14])
def test_layers_that_alternate_are_traced_once_in_each_place(recomputed: int) -> None:
    config = Gemma3TextConfig(**SMALL, num_hidden_layers=14, sliding_window=32)
    assert len(set(layer_kinds(config))) == 2
    plan = steps.plan(micro_batch_size=2, recompute_layers=tuple(range(recomputed)))
    check_few_tell_of_many(config, plan)


@pytest.mark.slow
@pytest.mark.parametrize(("recomputed", "streamed"), [(0, ()), (7, ()), (7, (0, 1, 3, 6))])
def test_layers_that_autograd_does_are_traced_once_in_each_place(
    recomputed: int, streamed: tuple[int, ...]
) -> None:
    config = Olmo2Config(**SMALL, num_hidden_layers=7)
    plan = steps.plan(
        micro_batch_size=2, recompute_layers=tuple(range(recomputed)), streamed_layers=streamed
    )
    check_few_tell_of_many(config, plan)


def test_layers_of_two_sizes_are_all_there() -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, use_sliding_window=True, sliding_window=8,
        max_window_layers=3,
    )  # fmt: skip
    assert len(set(layer_kinds(config))) == 2
    plan = steps.plan(micro_batch_size=2)
    found = Estimator(config, SETTINGS, LOAD, hardware())(plan)
    assert found.peak_allocated_bytes == trace_step(config, plan, SETTINGS, LOAD).peak_bytes


def test_plans_share_their_traces() -> None:
    estimator = Estimator(steps.config(num_hidden_layers=12), SETTINGS, LOAD, hardware())
    peaks = [
        estimator(steps.plan(recompute_layers=tuple(range(n)))).peak_allocated_bytes
        for n in range(13)
    ]
    # the top layer has its activations in its own backward either way, so the last step saves nothing
    assert peaks[:-1] == sorted(peaks[:-1], reverse=True)
    assert peaks[-1] < peaks[0] / 3
    # none and all; one, two, three or more of each stack beside three of the other
    assert len(estimator._traces) == 7


def test_patterns_of_streamed_layers_share_their_traces() -> None:
    """One that has both in every place tells them all; that it tells the truth is seen above."""
    layers = 24
    estimator = Estimator(steps.config(num_hidden_layers=layers), SETTINGS, LOAD, hardware())
    whole = steps.plan(recompute_layers=tuple(range(layers)), checkpoints="host")
    peaks = [
        estimator(whole.replace(streamed_layers=spread(layers, count))).peak_allocated_bytes
        for count in range(3, 9)
    ]
    falls = {before - after for before, after in pairwise(peaks)}
    assert len(falls) == 1
    assert min(falls) > 0
    assert len(estimator._traces) == 1


def test_a_load_of_shorter_rows() -> None:
    one, packed = (
        SequenceSize(tokens=10, target_tokens=9),
        SequenceSize(tokens=10, target_tokens=7, parts=(4, 3, 3)),
    )
    cut = Load([one, packed], [one]).cut_to(6)
    assert cut.train == [
        SequenceSize(tokens=6, target_tokens=5),
        SequenceSize(tokens=6, target_tokens=4, parts=(4, 2)),
    ]
    assert cut.validation == [SequenceSize(tokens=6, target_tokens=5)]
    assert Load([one, packed], []).cut_to(10).train == [one, packed]
    assert Load([packed], []).cut_to(4).train == [SequenceSize(tokens=4, target_tokens=3)]
