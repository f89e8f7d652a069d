"""The loss of training with frozen products in fp8 beside that of bf16: the shipped model, step by step.

    python -m benchmarks.float8_loss --json benchmarks/results/float8_loss.h200.json

Same weights, data, order, dropout masks and learning rates (those of params.yaml, over --steps steps).
Rounding alone moves a curve, the more the longer it runs, so a third run shows how far: bf16 again, with
the batch cut into other micro-batches. Curves are compared as means over windows of steps, since the
loss of one small batch late in the run is a small number of tokens' and mostly noise.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, write_result
from fitlora.model import load_config
from fitlora.params import Params, read_params
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import build_step
from fitlora.step.network import HandNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep, learning_rate
from fitlora.step.weights import CheckpointWeights
from fitlora.training.batches import Batches
from fitlora.training.data import load_splits

WINDOW = 20
# name: compute dtype, share of the effective batch in one micro-batch
RUNS = {"bfloat16": ("bfloat16", 1), "float8": ("float8", 1), "bfloat16 again": ("bfloat16", 4)}


def curve(
    checkpoint: Path, params: Params, device: torch.device, dtype: str, parts: int
) -> tuple[list[float], TrainingStep]:
    """The loss of each step."""
    config = load_config(checkpoint)
    rows, _ = load_splits(params.data, checkpoint, config.vocab_size)
    batches = Batches(rows.sequences, params.train.effective_batch_size, params.train.seed)
    steps = params.train.max_steps
    assert steps is not None
    plan = Plan.model_validate(
        {
            "device": device.type,
            "effective_batch_size": batches.size,
            "micro_batch_size": batches.size // parts,
            "evaluation_batch_size": 1,
            "sequence_length": max(len(s.tokens) for s in rows.sequences),
            "compute_dtype": dtype,
            "optimizer": "adamw",
            "loss_chunk_tokens": 1024,
        }
    )
    weights = CheckpointWeights(checkpoint, device, seed=params.train.seed)
    step = build_step(config, plan, StepSettings.of(params), weights)
    losses = [
        step.run(
            batches.batch(index),
            step=index,
            learning_rate=learning_rate(index, steps, params.train),
        ).loss
        for index in range(steps)
    ]
    return torch.stack(losses).tolist(), step


def compared(reference: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How far one curve is from another, as shares of it, window by window and as a whole."""
    windows = [slice(at, at + WINDOW) for at in range(0, len(reference), WINDOW)]
    shares = [sum(other[w]) / sum(reference[w]) - 1 for w in windows]
    return {
        "whole_curve_share": sum(other) / sum(reference) - 1,
        "median_window_share": statistics.median(map(abs, shares)),
        "largest_window_share": max(map(abs, shares)),
        "first_window_share": shares[0],
        "last_window_share": shares[-1],
    }


def groups_in_float8(step: TrainingStep) -> tuple[int, int]:
    """How many of the groups of linear layers take their products in fp8, and of how many."""
    assert isinstance(step.network, HandNetwork)
    groups = [group for layer in step.network.layers for group in layer.groups]
    return sum(group.float8 is not None for group in groups), len(groups)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = read_params(ROOT / "params.yaml", [f"train.max_steps={args.steps}"])
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        quantize_checkpoint(
            ROOT / params.model.id, checkpoint, spec=QuantSpec.of(params.quantization), device=device
        )  # fmt: skip
        for name, (dtype, parts) in RUNS.items():
            start = time.perf_counter()
            curves[name], step = curve(checkpoint, params, device, dtype, parts)
            inside, groups = groups_in_float8(step)
            row = {
                "run": name, "compute_dtype": dtype, "steps": args.steps,
                "seconds": time.perf_counter() - start, "groups_in_float8": inside,
                "groups": groups, "first_loss": curves[name][0], "last_loss": curves[name][-1],
                **compared(curves["bfloat16"], curves[name]),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:>14}: {row['seconds']:.1f} s, {inside} of {groups} groups in fp8, loss "
                f"{row['first_loss']:.4f} to {row['last_loss']:.4f}, whole curve "
                f"{row['whole_curve_share']:+.3%}, windows of {WINDOW} steps up to "
                f"{row['largest_window_share']:.3%} off",
                flush=True,
            )
            if args.json is not None:
                write_result(args.json, "float8_loss", rows, curves=curves)


if __name__ == "__main__":
    main()
