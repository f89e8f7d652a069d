"""The Plan: what it refuses, what follows from it, and that its fingerprint sees every decision."""

from typing import Any

import pytest
from pydantic import ValidationError

from fitlora.plan import PAGED_OPTIMIZERS, Plan

BASE: dict[str, Any] = {
    "device": "cuda",
    "devices": 1,
    "effective_batch_size": 32,
    "micro_batch_size": 4,
    "micro_batches_per_pass": 1,
    "evaluation_batch_size": 4,
    "sequence_length": 512,
    "recompute_layers": (0, 1),
    "recompute_keeps": (),
    "compute_dtype": "bfloat16",
    "layer_dtype": None,
    "frozen_layers": (),
    "attention": "flash",
    "optimizer": "adamw",
    "loss_chunk_tokens": 1024,
    "mlp_chunk_tokens": None,
    "streamed_layers": (),
    "streaming_slots": 2,
    "disk_layers": 0,
    "checkpoints": "device",
    "embedding": "device",
    "head": "device",
    "optimizer_device": "device",
    "layers_per_device": (),
}
OTHER: dict[str, Any] = {
    "device": "cpu",
    "devices": 2,
    "effective_batch_size": 31,
    "micro_batch_size": 5,
    "micro_batches_per_pass": 3,
    "evaluation_batch_size": 5,
    "sequence_length": 513,
    "recompute_layers": (0, 2),
    "recompute_keeps": ("attention",),
    "compute_dtype": "float32",
    "layer_dtype": "float32",
    "frozen_layers": (1,),
    "attention": "plain",
    "optimizer": "adamw_8bit",
    "loss_chunk_tokens": 1023,
    "mlp_chunk_tokens": 8192,
    "streamed_layers": (0, 3),
    "streaming_slots": 3,
    "disk_layers": 1,
    "checkpoints": "host",
    "embedding": "host",
    "head": "host",
    "optimizer_device": "host",
    "layers_per_device": (30, 2),
}


def plan(**changes: Any) -> Plan:
    return Plan.model_validate({**BASE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 33},
        {"micro_batch_size": 17, "devices": 2},
        {"micro_batch_size": 0},
        {"micro_batch_size": 2.0},
        {"micro_batch_size": True},
        {"evaluation_batch_size": 0},
        {"sequence_length": 0},
        {"loss_chunk_tokens": 0},
        {"mlp_chunk_tokens": 0},
        {"devices": 0},
        {"recompute_layers": (1, 0)},
        {"recompute_layers": (0, 0)},
        {"recompute_keeps": ("hidden",)},
        {"recompute_keeps": ("mlp", "qkv")},
        {"recompute_keeps": ("qkv", "qkv")},
        {"recompute_keeps": ("qkv", "attention", "middle", "mlp")},
        {"device": "cpu", "optimizer": "paged_adamw"},
        {"device": "cpu", "optimizer": "paged_adamw_8bit"},
        {"device": "tpu"},
        {"compute_dtype": "float64"},
        {"layer_dtype": "int8"},
        {"attention": "cudnn"},
        {"frozen_layers": (1, 0)},
        {"streamed_layers": (2, 1)},
        {"streaming_slots": 0},
        {"disk_layers": -1},
        {"disk_layers": 1},
        {"streamed_layers": (0, 3), "disk_layers": 3},
        {"head": "disk"},
        {"optimizer": "sgd"},
        {"peak_bytes": 1},
    ],
)
def test_what_it_refuses(changes: dict[str, Any]) -> None:
    plan()
    with pytest.raises(ValidationError):
        plan(**changes)
    with pytest.raises(ValidationError):
        plan().replace(**changes)


@pytest.mark.parametrize("optimizer", PAGED_OPTIMIZERS)
def test_paged_states_on_a_gpu(optimizer: str) -> None:
    assert plan(optimizer=optimizer).optimizer == optimizer


@pytest.mark.parametrize(
    ("effective", "devices", "micro", "share", "accumulation"),
    [
        (32, 1, 4, 32, 8),
        (32, 1, 5, 32, 7),  # six of five and one of two
        (32, 1, 32, 32, 1),
        (7, 3, 2, 3, 2),  # three, two and two sequences
        (1, 1, 1, 1, 1),
        (2, 4, 1, 1, 1),
    ],
)
def test_accumulation(
    effective: int, devices: int, micro: int, share: int, accumulation: int
) -> None:
    made = plan(effective_batch_size=effective, devices=devices, micro_batch_size=micro)
    assert made.sequences_per_device == share
    assert made.accumulation == accumulation


def test_micro_batches_cover_the_share_exactly() -> None:
    for effective in range(1, 20):
        for micro in range(1, effective + 1):
            made = plan(effective_batch_size=effective, micro_batch_size=micro)
            last = effective - micro * (made.accumulation - 1)
            assert 1 <= last <= micro


def test_the_fingerprint_sees_every_decision() -> None:
    assert set(BASE) == set(OTHER) == set(Plan.model_fields)
    base = plan(streamed_layers=(0, 1, 2))
    prints = {base.fingerprint()}
    for key, value in OTHER.items():
        assert value != BASE[key]
        # a copy that nobody checks: not all of them go together
        prints.add(base.model_copy(update={key: value}).fingerprint())
    assert len(prints) == 1 + len(OTHER)


def test_the_fingerprint_is_the_decisions_alone() -> None:
    assert plan().fingerprint() == plan(recompute_layers=[0, 1]).fingerprint()
    assert plan().replace(micro_batch_size=8).replace(micro_batch_size=4) == plan()
    # written down, so that a change of the form is noticed: DVC would see other bytes everywhere
    assert plan().fingerprint() == "8bc55c9a0e85"
    assert len(plan().fingerprint()) == 12


@pytest.mark.parametrize(
    ("micro", "together", "passes", "sequences"),
    [(4, 1, 8, 4), (4, 2, 4, 8), (4, 3, 3, 12), (4, 100, 1, 32), (5, 3, 3, 15), (5, 7, 1, 32)],
)
def test_passes_cover_the_micro_batches(
    micro: int, together: int, passes: int, sequences: int
) -> None:
    made = plan(micro_batch_size=micro, micro_batches_per_pass=together)
    assert (made.passes, made.sequences_per_pass) == (passes, sequences)


def test_it_is_replaced_and_never_mutated() -> None:
    made = plan()
    assert made.replace(micro_batch_size=8).micro_batch_size == 8
    assert made.micro_batch_size == 4
    with pytest.raises(ValidationError):
        made.micro_batch_size = 8  # type: ignore[misc]


def test_it_is_described_in_a_line() -> None:
    assert plan(micro_batch_size=5).describe() == (
        "micro-batch 5 x 7 accumulation x 512 tokens, 2 layers recomputed, bfloat16, adamw on cuda"
    )
    shared = plan(micro_batch_size=5, micro_batches_per_pass=9).describe()
    assert shared.startswith("micro-batch 5 x 7 accumulation (7 share a pass) x 512 tokens")
