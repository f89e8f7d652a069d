"""Does one step serve three purposes? Peak memory as estimated, as probed, and as trained.

    python -m benchmarks.three_ways --model llama-3-8b --work /tmp/w --json OUT

Per case (micro-batch, recompute): the estimate is made in a process that sees no GPU, from a described
one; the probe and the training run are made on the device. Training is the real loop on a real 4-bit
checkpoint (of random weights), three optimizer steps of two micro-batches and a validation.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, make_checkpoint, shape_config, write_result
from fitlora.artifacts import Hardware, SequenceSize
from fitlora.device import give_back_memory
from fitlora.hardware import profile
from fitlora.memory.estimate import Load, estimate
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner.probe import probe
from fitlora.planner.search import loss_chunk
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.settings import StepSettings
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train


def params_for(args: argparse.Namespace, micro_batch: int) -> Params:
    """params.yaml of one case."""
    content: dict[str, Any] = {
        "data": {
            "train": str(args.work / "rows.jsonl"),
            "validation": str(args.work / "validation.jsonl"),
            "max_length": args.tokens,
            "train_on": "all",
        },
        "train": {
            "effective_batch_size": 2 * micro_batch,
            "max_steps": 3,
            "warmup_steps": 0,
            "learning_rate": 1.0e-4,
        },
    }
    if args.describe:
        content["hardware"] = {
            "target": {"name": "described", "memory": "80GiB", "compute_capability": "9.0"}
        }
    return check_params(content)


def plan_for(args: argparse.Namespace, micro_batch: int, recompute: str, device: str) -> Plan:
    config = shape_config(args.model)
    layers = config.num_hidden_layers
    return Plan.model_validate(
        {
            "device": device,
            "effective_batch_size": 2 * micro_batch,
            "micro_batch_size": micro_batch,
            "evaluation_batch_size": micro_batch,
            "sequence_length": args.tokens,
            "recompute_layers": tuple(range(layers)) if recompute == "all" else (),
            "compute_dtype": "bfloat16" if device == "cuda" else "float32",
            "optimizer": "adamw",
            "loss_chunk_tokens": loss_chunk(config.vocab_size),
        }
    )


def load_for(args: argparse.Namespace, micro_batch: int) -> Load:
    size = SequenceSize(tokens=args.tokens, target_tokens=args.tokens - 1)
    return Load([size] * (2 * micro_batch), [size] * micro_batch)


def cases(args: argparse.Namespace) -> list[tuple[int, str]]:
    return [(size, recompute) for recompute in ("all", "none") for size in args.micro_batches]


def estimates(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Every case's estimate; runs where no GPU is visible."""
    found = []
    for micro_batch, recompute in cases(args):
        params = params_for(args, micro_batch)
        hardware = profile(params.hardware, args.work)
        plan = plan_for(args, micro_batch, recompute, device)
        start = time.perf_counter()
        result = estimate(
            shape_config(args.model),
            plan,
            StepSettings.of(params),
            load_for(args, micro_batch),
            hardware,
        )
        found.append(
            {
                "predicted_allocated_bytes": result.peak_allocated_bytes,
                "estimate_seconds": round(time.perf_counter() - start, 2),
                "instant": result.instant,
            }
        )
    return found


def estimates_elsewhere(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The same in a process from which every GPU is hidden."""
    program = [sys.executable, "-m", "benchmarks.three_ways", "--estimate-for", device]
    options = ["--model", args.model, "--work", str(args.work), "--tokens", str(args.tokens)]
    options += ["--micro-batches", *map(str, args.micro_batches)]
    if device == "cuda":
        options.append("--describe")
    done = subprocess.run(
        [*program, *options],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_rows(args: argparse.Namespace, rows: int) -> None:
    """Conversations longer than any sequence, so that each is cut to the same length."""
    text = " ".join(["the quick brown fox jumps over the lazy dog"] * args.tokens)
    row = json.dumps(
        {"messages": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}]}
    )
    for name, count in (("rows.jsonl", rows), ("validation.jsonl", max(args.micro_batches))):
        (args.work / name).write_text((row + "\n") * count)


def train_case(
    args: argparse.Namespace, micro_batch: int, recompute: str, hardware: Hardware
) -> dict[str, Any]:
    """The real loop on the real checkpoint; the log's last record, and the speed of its last step."""
    params = params_for(args, micro_batch)
    config = shape_config(args.model)
    rows, validation = load_splits(params.data, args.work / "model", config.vocab_size)
    places = Places(
        args.work / "adapter", args.work / "log.jsonl", args.work / "curves.json", args.work / "s"
    )
    end = train(
        params,
        plan_for(args, micro_batch, recompute, hardware.device),
        hardware,
        config=config,
        checkpoint=args.work / "quantized",
        rows=rows,
        validation=validation,
        places=places,
    )
    steps = [json.loads(line) for line in places.log.read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in steps if line["event"] == "step"]
    return {**end, "tokens_per_second": speeds[-1]}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)
    beside = ThreadPoolExecutor(1)
    awaited = beside.submit(estimates_elsewhere, args, device.type)
    start = time.perf_counter()
    make_checkpoint(args.model, args.work / "model", device)
    made = time.perf_counter()
    params = params_for(args, 1)
    quantize_checkpoint(
        args.work / "model",
        args.work / "quantized",
        spec=StepSettings.of(params).spec,
        device=device,
    )
    print(
        f"checkpoint {made - start:.0f} s, quantized {time.perf_counter() - made:.0f} s", flush=True
    )
    write_rows(args, 2 * max(args.micro_batches))
    predicted = awaited.result()  # before the profile, whose rates other work would spoil
    print(f"{len(predicted)} estimates", flush=True)
    hardware = profile(params.hardware, args.work)
    rows = []
    for (micro_batch, recompute), first in zip(cases(args), predicted, strict=True):
        give_back_memory()
        plan = plan_for(args, micro_batch, recompute, device.type)
        probed = probe(
            shape_config(args.model),
            plan,
            StepSettings.of(params_for(args, micro_batch)),
            load_for(args, micro_batch),
            hardware,
        )
        assert probed.fits, probed.why
        give_back_memory()
        trained = train_case(args, micro_batch, recompute, hardware)
        measured = trained["measured_peak_bytes"]
        row = {
            "model": args.model,
            "micro_batch": micro_batch,
            "sequence_length": args.tokens,
            "recompute": recompute,
            "compute_dtype": plan.compute_dtype,
            **first,
            "probed_allocated_bytes": probed.peak_allocated_bytes,
            "probed_reserved_bytes": probed.peak_reserved_bytes,
            "measured_allocated_bytes": measured,
            "measured_reserved_bytes": trained["measured_reserved_bytes"],
            "estimate_error": first["predicted_allocated_bytes"] / measured - 1,
            "probe_error": probed.peak_allocated_bytes / measured - 1,
            "tokens_per_second": trained["tokens_per_second"],
            "probed_tokens_per_second": probed.tokens_per_second,
            "context_bytes": hardware.context_bytes,
            "workspace_bytes": hardware.workspace_bytes,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_result(args.json, "three_ways", rows, hardware=hardware.model_dump(mode="json"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--estimate-for", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.estimate_for:
        print(json.dumps(estimates(args, args.estimate_for)))
        return
    rows = measure(args)
    worst = max(max(abs(r["estimate_error"]), abs(r["probe_error"])) for r in rows)
    print(f"{len(rows)} cases, worst disagreement {worst:.2%}")


if __name__ == "__main__":
    main()
