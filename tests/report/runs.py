"""What a finished run leaves, made up: enough of it for every part of the report."""

from pathlib import Path
from typing import Any

from fitlora.artifacts import (
    DATASET,
    HARDWARE,
    MEMORY_ESTIMATE,
    MODEL,
    PLAN,
    TRAINING_LOG,
    Components,
    Dataset,
    Estimate,
    Evaluation,
    Fidelity,
    Group,
    Hardware,
    MemoryEstimate,
    Metrics,
    ModelFacts,
    Moment,
    Percentiles,
    PlanArtifact,
    Rates,
    Sample,
    SequenceSize,
    Split,
    dump_line,
)
from fitlora.evaluation.gate import gate_of
from fitlora.params import MergeParams
from fitlora.plan import Plan
from fitlora.units import MIB

STEPS = 12
PREDICTED, MEASURED = 200 * MIB, 198 * MIB


def make_plan(**changes: Any) -> Plan:
    return Plan(
        device="cpu",
        effective_batch_size=32,
        micro_batch_size=8,
        evaluation_batch_size=8,
        sequence_length=128,
        compute_dtype="float32",
        optimizer="adamw",
        loss_chunk_tokens=1024,
    ).replace(**changes)


def make_metrics(loss: float, exact_match: float) -> Metrics:
    return Metrics(
        loss=loss,
        perplexity=2.0,
        exact_match=exact_match,
        loss_interval=(0.9 * loss, 1.1 * loss),
        perplexity_interval=(1.9, 2.1),
        exact_match_interval=(max(0.0, exact_match - 0.01), min(1.0, exact_match + 0.005)),
    )


def make_evaluation(**changes: Any) -> Evaluation:
    models = {
        "base": make_metrics(2.5, 0.0),
        "quantized_base": make_metrics(2.53125, 0.005),
        "adapter": make_metrics(0.03, 0.975),
        "merged": make_metrics(0.03, 0.97),
    }
    content: dict[str, Any] = {
        "rows": 200,
        "base_bits": 4,
        **models,
        "gate": gate_of(MergeParams(), "adapter"),
        "fidelity": {
            "base": Fidelity(tokens=900, kl_divergence=2.0, top1_agreement=0.2),
            "quantized_base": Fidelity(tokens=900, kl_divergence=2.1, top1_agreement=0.21),
            "merged": Fidelity(tokens=900, kl_divergence=2.5e-8, top1_agreement=0.99951),
            "adapter_on_original": Fidelity(tokens=900, kl_divergence=9e-5, top1_agreement=0.998),
        },
        "groups": (
            Group(by="length", name="9 to 30 tokens", rows=120, models=models),
            Group(by="length", name="31 to 64 tokens", rows=80, models=models),
        ),
        "devices": dict.fromkeys(models, "cpu, float32"),
        "samples": (Sample(prompt="Why?", expected="So.", answers=dict.fromkeys(models, "So.")),),
    }
    return Evaluation(**{**content, **changes})


def _components(peak: int) -> Components:
    parts = dict.fromkeys(Components.model_fields, 0)
    return Components(**{**parts, "weights": peak // 3, "activations": peak - peak // 3})


def _estimate(plan: Plan, peak: int) -> Estimate:
    return Estimate(
        plan=plan,
        peak_allocated_bytes=peak,
        process_bytes=peak + 5 * MIB,
        fits=True,
        instant="backward, aten::mul",
        phase_peak_bytes={"load": peak // 4, "forward": peak - MIB, "backward": peak},
        components=_components(peak),
    )


def write_facts(root: Path) -> None:
    """What the first stages leave: machine, model, data, estimate and plan."""
    Hardware(
        device="cpu",
        gpus=(),
        cpu_name="any",
        cpu_cores=1,
        host_memory_bytes=2**30,
        host_budget_bytes=2**30,
        budget_bytes=2**30,
        context_bytes=0,
        workspace_bytes=0,
        rates=Rates(
            host_to_device_bytes_per_second=None,
            device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None,
            disk_read_bytes_per_second=None,
            product_flops_per_second={},
        ),
        target=None,
    ).write(root / HARDWARE)
    ModelFacts(source="models/tiny", revision=None, definition="ab" * 32, weights="cd" * 32).write(
        root / MODEL
    )
    split = Split(
        source="data/train.jsonl",
        rows=2000,
        formats={"messages": 2000},
        tokens=9000,
        target_tokens=900,
        truncated_rows=3,
        skipped_rows=1,
        length=Percentiles(p50=20, p90=30, p99=40, maximum=64),
        fingerprint="ef" * 32,
    )
    size = SequenceSize(tokens=64, target_tokens=9)
    Dataset(
        train=split,
        validation=split.model_copy(update={"source": "data/validation.jsonl", "rows": 200}),
        longest_train=(size,),
        longest_validation=(size,),
        padding=None,
    ).write(root / DATASET)
    plan = make_plan()
    MemoryEstimate(
        model="models/tiny",
        parameters=1000,
        trainable_parameters=10,
        budget_bytes=2**30,
        default=_estimate(plan, PREDICTED),
        over_step=tuple(
            Moment(name=name, components=_components(peak))
            for name, peak in (
                ("forward", MIB * 90),
                ("backward", PREDICTED),
                ("backward", MIB * 40),
            )
        ),
        neighbours={"half the micro-batch": _estimate(plan.replace(micro_batch_size=4), MIB * 99)},
    ).write(root / MEMORY_ESTIMATE)
    reasons = {"micro_batch_size": "the largest that fits", "recompute_layers": "all fits"}
    PlanArtifact(plan=plan, reasons=reasons).write(root / PLAN)


def write_log(root: Path, *more: dict[str, Any], **end: Any) -> None:
    """A training log; `more` are records on the way, `end` further keys of the last one."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        counted = step < 3  # on the CPU only some steps are
        lines.append(
            {
                "event": "step",
                "step": step,
                "loss": 3.0 / step**2,
                "learning_rate": 1e-3,
                "gradient_norm": 1.0,
                "tokens": 100,
                "tokens_per_second": 1000.0 + step,
                "allocated_bytes": MEASURED if counted else None,
                "reserved_bytes": None,
                "phase_bytes": {"forward": MEASURED - MIB, "backward": MEASURED} if counted else {},
                "component_bytes": {"weights": 66 * MIB, "activations": 132 * MIB}
                if counted
                else {},
            }
        )
    lines.append({"event": "evaluation", "step": STEPS, "validation_loss": 0.02, "seconds": 1.0})
    last = {
        "event": "end",
        "steps": STEPS,
        "seconds": 61.4,
        "best_step": STEPS,
        "best_validation_loss": 0.02,
        "stopped_early": False,
        "predicted_peak_bytes": PREDICTED,
        "measured_peak_bytes": MEASURED,
        "measured_reserved_bytes": None,
    }
    path = root / TRAINING_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(dump_line, [*lines, *more, {**last, **end}])), encoding="utf-8")
