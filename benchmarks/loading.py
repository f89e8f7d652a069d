"""How long until a model is ready to train: from the 4-bit checkpoint to a step in its place.

    python -m benchmarks.loading --json benchmarks/results/loading.h200.json    on a GPU
    python -m benchmarks.loading --models llama-3-8b --budgets 3 8              others, each budget
    python -m benchmarks.loading --tiny --json /tmp/x.json                      on the CPU, in seconds

The checkpoint is written here as `quantize_model` writes one: a layer of random weights is quantized,
and stands for all of them. Each row is a process of its own that builds the step of benchmarks.offload's
layout for its budget, with the allocator held to it, and then trains on one sequence. *ready* is the
step's building alone, *from start* has Python's start and its imports too, and *first step* comes after
both. In the first row of each budget the kernel has the files in its page cache, as it has after writing
them or after a run; before the second it is told to drop them. A 70B takes 35 GiB of disk until the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    ROOT,
    SHAPES,
    device_label,
    make_checkpoint,
    shape_config,
    write_result,
)
from benchmarks.offload import Case, hardware_of, load_of, plan_case, settings_of
from fitlora.artifacts import Hardware
from fitlora.checkpoint import Checkpoint
from fitlora.device import limit_memory
from fitlora.hardware import profile
from fitlora.memory.estimate import sequences_of
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import make_transport
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.quantization.writer import ModelWriter, read_config
from fitlora.step.build import build_step
from fitlora.step.weights import CheckpointWeights
from fitlora.units import GIB

WRITERS = 4
LAYER = ".layers.0."

Row = dict[str, Any]


def write_checkpoint(model: str, folder: Path, device: torch.device) -> int:
    """A whole 4-bit checkpoint of the shape, all of whose layers are one; returns its bytes."""
    config = shape_config(model)
    one, quantized = folder.with_name(f"{model}-one"), folder.with_name(f"{model}-one-4bit")
    make_checkpoint(model, one, device, num_hidden_layers=1)
    spec = QuantSpec.of(check_params({}).quantization)
    quantize_checkpoint(one, quantized, spec=spec, device=device)
    shutil.rmtree(one)
    source = Checkpoint(quantized)
    tensors = {name: source.tensor(name) for name in source.shards}
    layer = {name: tensor for name, tensor in tensors.items() if LAYER in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in layer}
    shards = {
        f"model-layer-{i:03d}.safetensors": {
            name.replace(LAYER, f".layers.{i}."): tensor for name, tensor in layer.items()
        }
        for i in range(config.num_hidden_layers)
    }
    shards["model-rest.safetensors"] = rest
    with ModelWriter(quantized, folder) as writer:
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(writer.write_shard, shards.keys(), shards.values()))
        whole = {**read_config(quantized), "num_hidden_layers": config.num_hidden_layers}
        total = writer.finish(whole)
    shutil.rmtree(quantized)
    return total


def drop_pages(folder: Path) -> None:
    """Has the kernel forget what it keeps of the folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is still to be written cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(task: Row) -> Row:
    """Builds the step from the checkpoint in this process, and trains on one sequence."""
    case, plan = Case(**task["case"]), Plan.model_validate_json(json.dumps(task["plan"]))
    hardware = Hardware.model_validate_json(json.dumps(task["hardware"]))
    device = torch.device(plan.device)
    if device.type == "cuda":
        limit_memory(hardware)
        torch.cuda.synchronize(device)  # the context is the process's start
    start = time.perf_counter()
    transport = make_transport(device, HostMemory(hardware.host_budget_bytes))
    weights = CheckpointWeights(Path(task["folder"]), device)
    step = build_step(shape_config(case.model), plan, settings_of(), weights, transport)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found: Row = {
        "ready_seconds": time.perf_counter() - start,
        "from_start_seconds": time.time() - task["started"],
        "host_pinned_bytes": transport.pinned_bytes,
    }
    if device.type == "cuda":
        found["peak_reserved_bytes_of_loading"] = torch.cuda.max_memory_reserved(device)
    start = time.perf_counter()
    outcome = step.run(sequences_of(load_of(case).train), step=0, learning_rate=1e-4)
    return {**found, "loss": float(outcome.loss), "first_step_seconds": time.perf_counter() - start}


def measured(case: Case, planned: Row, hardware: Hardware, folder: Path, *, cold: bool) -> Row:
    """What a process of its own found, or its last words."""
    if cold:
        drop_pages(folder)
    task = {
        "case": asdict(case),
        "plan": planned["plan"],
        "hardware": hardware_of(case, hardware).model_dump(mode="json"),
        "folder": str(folder),
        "started": time.time(),
    }
    command = [sys.executable, "-m", "benchmarks.loading", "--task", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["nothing said"]
        return {"error": words[-1][:300]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(model: str, budgets: Sequence[float], hardware: Hardware, work: Path) -> Iterator[Row]:
    """Each budget from the page cache and from the disk."""
    folder = work / f"{model}-4bit"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    size = write_checkpoint(model, folder, torch.device(hardware.device))
    print(
        f"{model}: {size / GIB:.1f} GiB written in {time.perf_counter() - start:.0f} s", flush=True
    )
    try:
        for budget in budgets:
            case = Case(
                model=model, budget_gib=budget, sequence_length=64 if model == "tiny" else 2048
            )
            planned = plan_case(case, hardware)
            asked = {"model": model, "budget_gib": budget, "checkpoint_bytes": size}
            if not planned["fits"]:
                yield {**asked, "error": "nothing fits"}
                continue
            described = Plan.model_validate_json(json.dumps(planned["plan"])).describe()
            for cold in (False, True):
                found = measured(case, planned, hardware, folder, cold=cold)
                yield {**asked, "plan": described, "page_cache": not cold, **found}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def line(row: Row) -> str:
    start = f"{row['model']} in {row['budget_gib']:g} GiB"
    if "error" in row:
        return f"{start}: {row['error']}"
    where = "the page cache" if row["page_cache"] else "the disk"
    rate = row["checkpoint_bytes"] / row["ready_seconds"] / 1e9
    return (
        f"{start} from {where}: ready in {row['ready_seconds']:.1f} s ({rate:.1f} GB/s), "
        f"{row['from_start_seconds']:.1f} s from start"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-70b"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[8.0], help="in GiB")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "loading")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.task is not None:
        print(json.dumps(load(json.loads(args.task))))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {"device": "cpu"} if args.tiny else {}
    hardware = profile(check_params({"hardware": asked}).hardware, args.work)
    path = args.json or ROOT / "benchmarks" / "results" / f"loading.{device_label()}.json"
    models, budgets = (["tiny"], [1.0, 0.003]) if args.tiny else (args.models, args.budgets)
    rows = []
    for model in models:
        for row in rows_of(model, budgets, hardware, args.work):
            rows.append(row)
            print(line(row), flush=True)
            write_result(path, "loading", rows)


if __name__ == "__main__":
    main()
