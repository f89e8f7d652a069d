"""What a merge takes and what the gate sees.

memory: an adapter into a checkpoint of random weights, in a process of its own. Its peak is the most
of its own memory that was resident (RssAnon); mapped pages of files, which the system drops when it
needs room, are apart. It fails where that is more than --limit-gib.
gate: right and wrong merges of a finished default run, by the figures that the gate holds to limits.

python -m benchmarks.merge memory --folder /tmp --json benchmarks/results/merge.cpu.json
make run && python -m benchmarks.merge gate --json benchmarks/results/merge_gate.cpu.json
"""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import device_label, make_checkpoint, shape_config, write_result
from fitlora.adapter import WEIGHTS, adapter_config, save_adapter
from fitlora.artifacts import ADAPTER, PLAN, QUANTIZED_MODEL, PlanArtifact
from fitlora.evaluation.compare import HeldOut, read_held_out
from fitlora.evaluation.gate import fidelity
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import Contender, Place, contenders, load
from fitlora.evaluation.scores import Reference, RowScore, mean_loss, score
from fitlora.model import empty_model, linear_names, resolve_model
from fitlora.params import LoraParams, Params, read_params
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.units import GIB

CPU = torch.device("cpu")
CASES: tuple[tuple[Literal["dequantized", "original"], Literal[16, 4]], ...] = (
    ("dequantized", 16), ("original", 16), ("original", 4),
)  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------


def make_folders(model: str, folder: Path, device: torch.device) -> None:
    """An original, its 4-bit checkpoint and an adapter of rank 16 on every linear layer."""
    make_checkpoint(model, folder / "original", device)
    quantize_checkpoint(folder / "original", folder / "quantized", spec=QuantSpec(), device=device)
    skeleton = empty_model(shape_config(model), dtype=torch.bfloat16)
    lora = LoraParams(r=16)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in linear_names(skeleton):
        out_features, in_features = skeleton.get_submodule(name).weight.shape
        for side, shape in (("A", (lora.r, in_features)), ("B", (out_features, lora.r))):
            values = torch.randn(shape, generator=generator) * 0.01
            state[f"{name}.lora_{side}.default.weight"] = values
    targets = sorted({name.rpartition(".")[2] for name in linear_names(skeleton)})
    config = adapter_config(lora, targets, base_model=str(folder / "original"), revision=None)
    save_adapter(folder / "adapter", state, config)


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextlib.contextmanager
def anonymous_peak() -> Iterator[Callable[[], int]]:
    """Samples this process's anonymous memory; gives what returns the most that was seen, in bytes."""
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = next(line for line in lines if line.startswith("RssAnon:"))
            peak = max(peak, int(found.split()[1]) * 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def merge_once(folder: Path, base: Any, bits: Any, device: torch.device) -> None:
    """One merge; prints its figures as JSON. Runs in a process of its own."""
    start = time.perf_counter()
    with anonymous_peak() as peak, contextlib.redirect_stdout(sys.stderr):
        merge_checkpoint(
            original=folder / "original",
            quantized=folder / "quantized",
            adapter=folder / "adapter",
            target=folder / "merged",
            base=base,
            bits=bits,
            device=device,
        )
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": round(seconds, 1), "host_peak_bytes": peak()}))


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=args.folder))
    rows = []
    try:
        make_folders(args.model, folder, torch.device(args.device))
        for base, bits in CASES:
            limit = args.limit_gib * GIB
            command = [sys.executable, "-m", "benchmarks.merge", "once", "--folder", str(folder)]
            command += ["--base", base, "--bits", str(bits), "--device", args.device]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = {
                "measured": "memory", "model": args.model, "device": args.device, "base": base,
                "bits": bits, "host_limit_bytes": limit,
                "source_bytes": bytes_of(folder / ("original" if base == "original" else "quantized")),
                "largest_file_bytes": max(
                    f.stat().st_size for f in (folder / "original").glob("*.safetensors")
                ),
                "adapter_bytes": bytes_of(folder / "adapter"),
                "merged_bytes": bytes_of(folder / "merged"),
                **json.loads(found.stdout.splitlines()[-1]),
            }  # fmt: skip
            print(row, flush=True)
            assert row["host_peak_bytes"] <= limit, "above the limit"
            rows.append(row)
            shutil.rmtree(folder / "merged")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


# --- gate -----------------------------------------------------------------------------------------

Edit = Callable[[dict[str, torch.Tensor]], None]


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


RIGHT = [("right", base, bits, None) for base in ("dequantized", "original") for bits in (16, 4)]
WRONG = [
    ("twice the scale", "dequantized", 16, times(2.0)),
    ("half the scale", "dequantized", 16, times(0.5)),
    ("one layer left out", "dequantized", 16, without("layers.2.")),
    ("all q_proj left out", "dequantized", 16, without("q_proj")),
    ("one down_proj left out", "dequantized", 16, without("layers.2.mlp.down_proj")),
]


class DefaultRun:
    """A finished run in `root`, and a scratch folder to merge in."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        self.params: Params = read_params(root / "params.yaml")
        self.plan: Plan = PlanArtifact.read(root / PLAN).plan
        self.original = resolve_model(self.params.model.id, None, weights=True)

    def adapter(self, edits: Sequence[Edit]) -> Path:
        """The run's adapter, edited."""
        folder = self.scratch / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / ADAPTER, folder)
        tensors = load_file(folder / WEIGHTS)
        for edit in edits:
            edit(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return folder

    def models(self, adapter: Path, bits: Any) -> dict[str, Contender]:
        found = contenders(
            original=self.original,
            quantized=self.root / QUANTIZED_MODEL,
            adapter=adapter,
            merged=self.scratch / "merged",
            quantization=self.params.quantization,
            lora=self.params.lora,
            merged_bits=bits,
        )
        return {model.name: model for model in found}

    def merge(self, adapter: Path, base: Any, bits: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            merge_checkpoint(
                original=self.original,
                quantized=self.root / QUANTIZED_MODEL,
                adapter=adapter,
                target=self.scratch / "merged",
                base=base,
                bits=bits,
                device=CPU,
                compute_dtype=getattr(torch, self.plan.compute_dtype),
            )

    def score(self, model: Contender, held_out: HeldOut, **reference: Reference) -> list[RowScore]:
        step = load(model, self.plan, Place(CPU, self.plan.compute_dtype, 64))
        return score(step, held_out.sequences, lambda count: None, **reference)


def measure_gate(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        run = DefaultRun(args.root, Path(scratch))
        held_out = read_held_out(run.original, run.params.data, run.params.evaluate)
        for strength in (1.0, 0.3):
            weaker = times(strength)
            reference = Reference()
            adapter = run.models(run.adapter([weaker]), 16)["adapter"]
            run.score(adapter, held_out, record=reference)
            for what, base, bits, wrong in [*RIGHT, *WRONG]:
                folder = run.adapter([weaker] if wrong is None else [weaker, wrong])
                run.merge(folder, base, bits)
                merged = run.models(folder, bits)["merged"]
                scores = run.score(merged, held_out, against=reference)
                row = {
                    "measured": "gate", "merge": what, "base": base, "bits": bits,
                    "adapter_strength": strength,
                    "loss": mean_loss(scores), **fidelity(scores).model_dump(),
                }  # fmt: skip
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    memory, once, gate = (commands.add_parser(name) for name in ("memory", "once", "gate"))
    for command in (memory, once):
        command.add_argument(
            "--folder", type=Path, required=True, help="needs room: see source_bytes"
        )
        command.add_argument("--device", default="cpu")
    memory.add_argument("--model", default="llama-3-8b")
    memory.add_argument("--limit-gib", type=int, default=8)
    once.add_argument("--base", required=True)
    once.add_argument("--bits", type=int, required=True)
    gate.add_argument("--root", type=Path, default=Path(), help="where the run's artifacts are")
    for command in (memory, gate):
        command.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "once":
        device = torch.device(args.device)
        merge_once(args.folder, args.base, args.bits, device)
        return
    if args.what == "memory":
        args.folder.mkdir(parents=True, exist_ok=True)
    rows = measure_memory(args) if args.what == "memory" else measure_gate(args)
    write_result(args.json, "merge", rows, label=device_label())


if __name__ == "__main__":
    main()
