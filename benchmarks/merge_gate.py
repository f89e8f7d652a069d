"""What the gate sees: right and wrong merges of a run, by the figures that it holds to limits.

    make run && python -m benchmarks.merge_gate --compute-dtypes float32 bfloat16 \
        --json benchmarks/results/merge_gate.cpu.json
    python -m benchmarks.merge_gate --stages --root /tmp/run \
        --json benchmarks/results/merge_gate.h200.json

The second makes the run first, on the shipped model and data, stage by stage and without DVC. Each merge
is measured where the Plan computes, and in its dtype: in bfloat16 base + adapter and the merged model
round differently even where the merge is right. `--compute-dtypes` asks for others.

A row has the distance from base + adapter, and whether the gate's default limits let it pass (answers,
which the gate holds to a limit as well, are not generated here). `none` is no merge but the adapter on
the other base: what merge.base changes, without any rounding. adapter_strength: how much of the trained
adapter is merged, as an adapter that changes little is told from a wrong one with more difficulty.
"""

import argparse
import contextlib
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT, device_label, write_result
from benchmarks.pipeline import STAGES, run_stage
from fitlora.adapter import WEIGHTS
from fitlora.artifacts import ADAPTER, PLAN, QUANTIZED_MODEL, Gate, PlanArtifact
from fitlora.evaluation.compare import HeldOut, read_held_out
from fitlora.evaluation.gate import distance_problems, fidelity, gate_of
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import (
    MAXIMUM_ROWS,
    ON_ORIGINAL,
    Contender,
    Place,
    contenders,
    load,
)
from fitlora.evaluation.scores import Reference, RowScore, mean_loss, score
from fitlora.model import resolve_model
from fitlora.params import EvaluateParams, MergeParams, Params, read_params
from fitlora.plan import ComputeDtype, Plan

Edit = Callable[[dict[str, torch.Tensor]], None]
Base = Literal["dequantized", "original"]
Bits = Literal[16, 4]


def without(part: str) -> Edit:
    """An adapter that forgot the layers whose names have `part`."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if part in name:
                tensor.zero_()

    return edit


def times(factor: float) -> Edit:
    """An adapter of another scale."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.mul_(factor)

    return edit


# By the base that is merged into: the adapter beside it.
AGAINST: dict[Base, str] = {"dequantized": "adapter", "original": ON_ORIGINAL}
STORED: tuple[Bits, ...] = (16, 4)
MERGES = {
    "right": times(1.0),
    "twice the scale": times(2.0),
    "half the scale": times(0.5),
    "one layer left out": without("layers.2."),
    "all q_proj left out": without("q_proj"),
    "one down_proj left out": without("layers.2.mlp.down_proj"),
}
WRONG_TOO = {("dequantized", 16), ("original", 4)}  # into others only the right merge


class FinishedRun:
    """The trained run in the working directory, and a scratch folder to merge in."""

    def __init__(self, scratch: Path, rows: int, **changes: Any) -> None:
        """rows: how many held-out ones; changes: of the Plan, which says where and in which dtype."""
        self.scratch = scratch
        self.params: Params = read_params()
        self.plan: Plan = PlanArtifact.read(PLAN).plan.replace(**changes)
        self.original = resolve_model(self.params.model.id, None, weights=True)
        data, evaluate = self.params.data, EvaluateParams(rows=rows)
        self.held_out: HeldOut = read_held_out(self.original, data, evaluate)
        dtype = cast(ComputeDtype, self.plan.storage_dtype)
        self.place = Place(torch.device(self.plan.device), dtype, MAXIMUM_ROWS)
        self.reference = Reference()

    def adapter(self, edits: Sequence[Edit]) -> Path:
        """The run's adapter, edited."""
        folder = self.scratch / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ADAPTER, folder)
        tensors = load_file(folder / WEIGHTS)
        for edit in edits:
            edit(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return folder

    def models(self, adapter: Path, bits: Bits = 16) -> dict[str, Contender]:
        found = contenders(
            original=self.original,
            quantized=QUANTIZED_MODEL,
            adapter=adapter,
            merged=self.scratch / "merged",
            quantization=self.params.quantization,
            lora=self.params.lora,
            merged_bits=bits,
        )
        return {model.name: model for model in found}

    def merge(self, adapter: Path, base: Base, bits: Bits) -> Contender:
        with contextlib.redirect_stdout(io.StringIO()):
            merge_checkpoint(
                original=self.original,
                quantized=QUANTIZED_MODEL,
                adapter=adapter,
                target=self.scratch / "merged",
                base=base,
                bits=bits,
                device=self.place.device,
                compute_dtype=getattr(torch, self.plan.storage_dtype),
            )
        return self.models(adapter, bits)["merged"]

    def measure_from(self, model: Contender) -> None:
        """Takes the model's predictions as what others are held against."""
        self.reference = Reference()
        self._score(model, record=self.reference)

    def distance(self, model: Contender, gate: Gate) -> dict[str, Any]:
        """The model's loss, how far it is from the reference, and what the limits say."""
        scores = self._score(model, against=self.reference)
        found = fidelity(scores)
        return {
            "device": self.place.device.type,
            "compute_dtype": self.place.compute_dtype,
            "loss": mean_loss(scores),
            **found.model_dump(),
            "max_kl_divergence": gate.max_kl_divergence,
            "min_top1_agreement": gate.min_top1_agreement,
            "passes": not distance_problems(found, gate),
        }

    def _score(self, model: Contender, **reference: Reference) -> list[RowScore]:
        step = load(model, self.plan, self.place)
        return score(step, self.held_out.sequences, lambda count: None, **reference)


def rows(run: FinishedRun, strength: float) -> Iterator[dict[str, Any]]:
    """A row for every merge, right and wrong, and for what lies between the two bases."""
    weaker = times(strength)
    for base, against in AGAINST.items():
        models = run.models(run.adapter([weaker]))
        run.measure_from(models[against])
        same = {"base": base, "adapter_strength": strength}
        (other,) = (models[name] for name in AGAINST.values() if name != against)
        strictest = gate_of(MergeParams(base=base), against)
        yield {"merge": "none", "bits": 16, **same, **run.distance(other, strictest)}
        for bits in STORED:
            gate = gate_of(MergeParams(base=base, bits=bits), against)
            for what in MERGES if (base, bits) in WRONG_TOO else ["right"]:
                merged = run.merge(run.adapter([weaker, MERGES[what]]), base, bits)
                yield {"merge": what, "bits": bits, **same, **run.distance(merged, gate)}


def make_run(root: Path) -> None:
    """The default run in `root`, up to its adapter, each stage as DVC starts it."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    shutil.copytree(ROOT / "assets", root / "assets", dirs_exist_ok=True)
    for stage in STAGES[:-1]:
        print(run_stage(stage, root), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="where the run's artifacts are")
    parser.add_argument("--stages", action="store_true", help="make the run there first")
    parser.add_argument(
        "--compute-dtypes", nargs="+", choices=["bfloat16", "float32"], help="by default the Plan's"
    )
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0, 0.3], help="of the adapter"
    )
    parser.add_argument("--rows", type=int, default=100, help="held-out ones")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    result = args.json.resolve()
    if args.stages:
        make_run(args.root)
    os.chdir(args.root)  # params.yaml names the model and the data from there
    asked = [{"compute_dtype": dtype} for dtype in args.compute_dtypes or ()] or [{}]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for changes in asked:
            run = FinishedRun(Path(scratch), args.rows, **changes)
            for row in itertools.chain(*(rows(run, strength) for strength in args.strengths)):
                found.append(row)
                print(row, flush=True)
                write_result(result, "merge_gate", found, label=device_label())


if __name__ == "__main__":
    main()
