"""What the gate sees: right and wrong merges of a run, by the figures that it holds to limits.

    make run && python -m benchmarks.merge_gate --json benchmarks/results/merge_gate.cpu.json
    python -m benchmarks.merge_gate --stages --root /tmp/run \
        --json benchmarks/results/merge_gate.h200.json

The second makes the run first, on the shipped model and data, stage by stage and without DVC. Each merge
is measured where the Plan computes, and in its dtype: in bfloat16 base + adapter and the merged model
round differently even where the merge is right. `--compute-dtype` asks for another one.

A row has the distance from base + adapter, and whether the gate's default limits let it pass (answers,
which the gate holds to a limit as well, are not generated here). `adapter on original` is no merge but
what merge.base: original comes to without any rounding. adapter_strength: how much of the trained
adapter is merged, as an adapter that changes little is told from a wrong one with more difficulty.
"""

import argparse
import contextlib
import io
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
from fitlora.artifacts import ADAPTER, PLAN, QUANTIZED_MODEL, PlanArtifact
from fitlora.evaluation.compare import HeldOut, read_held_out
from fitlora.evaluation.gate import distance_problems, fidelity
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
from fitlora.params import MergeParams, Params, read_params
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


RIGHT: list[tuple[Base, Bits]] = [
    ("dequantized", 16), ("dequantized", 4), ("original", 16), ("original", 4),
]  # fmt: skip
WRONG = {
    "twice the scale": times(2.0),
    "half the scale": times(0.5),
    "one layer left out": without("layers.2."),
    "all q_proj left out": without("q_proj"),
    "one down_proj left out": without("layers.2.mlp.down_proj"),
}


class FinishedRun:
    """The trained run in the working directory, and a scratch folder to merge in."""

    def __init__(self, scratch: Path, **changes: Any) -> None:
        """changes: of the Plan, which says where and in which dtype models are measured."""
        self.scratch = scratch
        self.params: Params = read_params()
        self.plan: Plan = PlanArtifact.read(PLAN).plan.replace(**changes)
        self.original = resolve_model(self.params.model.id, None, weights=True)
        data, evaluate = self.params.data, self.params.evaluate
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

    def distance(self, model: Contender) -> dict[str, Any]:
        """The model's loss, how far it is from the reference, and what the default limits say."""
        scores = self._score(model, against=self.reference)
        limits, found = MergeParams(), fidelity(scores)
        return {
            "device": self.place.device.type,
            "compute_dtype": self.place.compute_dtype,
            "loss": mean_loss(scores),
            **found.model_dump(),
            "max_kl_divergence": limits.max_kl_divergence,
            "min_top1_agreement": limits.min_top1_agreement,
            "passes": not distance_problems(found, limits),
        }

    def _score(self, model: Contender, **reference: Reference) -> list[RowScore]:
        step = load(model, self.plan, self.place)
        return score(step, self.held_out.sequences, lambda count: None, **reference)


def rows(run: FinishedRun, strengths: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A row for every merge, right and wrong, and for what lies between the two bases."""
    for strength in strengths:
        weaker = times(strength)
        adapter = run.adapter([weaker])
        run.measure_from(run.models(adapter)["adapter"])
        same = {"adapter_strength": strength}
        for base, bits in RIGHT:
            merged = run.merge(adapter, base, bits)
            yield {"merge": "right", "base": base, "bits": bits, **same, **run.distance(merged)}
        other = run.models(adapter)[ON_ORIGINAL]
        yield {"merge": "adapter on original", "base": "original", **same, **run.distance(other)}
        for what, wrong in WRONG.items():
            merged = run.merge(run.adapter([weaker, wrong]), "dequantized", 16)
            yield {"merge": what, "base": "dequantized", "bits": 16, **same, **run.distance(merged)}


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
    parser.add_argument("--compute-dtype", choices=["bfloat16", "float32"], help="the Plan's")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0, 0.3], help="of the adapter"
    )
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    result = args.json.resolve()
    if args.stages:
        make_run(args.root)
    os.chdir(args.root)  # params.yaml names the model and the data from there
    changes = {} if args.compute_dtype is None else {"compute_dtype": args.compute_dtype}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(FinishedRun(Path(scratch), **changes), args.strengths):
            found.append(row)
            print(row, flush=True)
            write_result(result, "merge_gate", found, label=device_label())


if __name__ == "__main__":
    main()
