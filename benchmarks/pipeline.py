"""The six stages, one after the other, on a model of random weights: how long each takes, what it needs.

    python -m benchmarks.pipeline --model llama-3-8b --budget 24GiB --work /tmp/w --json OUT

Each stage is a process of its own, started as DVC starts it, in a folder with its own params.yaml.
Losses say nothing here; quality is shown on the shipped sample model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, make_checkpoint, write_result

STAGES = (
    "profile_hardware",
    "estimate_memory",
    "find_batch_size",
    "quantize_model",
    "train_adapters",
    "merge_and_evaluate",
)


def write_inputs(
    work: Path, *, tokens: int, batch: int, steps: int = 3, hardware: dict[str, Any]
) -> None:
    """params.yaml and rows whose texts are longer than any sequence."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    text = " ".join(["the quick brown fox jumps over the lazy dog"] * tokens)
    long = {
        "messages": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}]
    }
    short = {
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "on"}]
    }
    (work / "data/train.jsonl").write_text((json.dumps(long) + "\n") * 4 * batch)
    (work / "data/validation.jsonl").write_text((json.dumps(short) + "\n") * 4)
    (work / "params.yaml").write_text(
        f"""model: {{id: model}}
data: {{train: data/train.jsonl, validation: data/validation.jsonl, max_length: {tokens}}}
hardware: {json.dumps(hardware)}
train: {{effective_batch_size: {batch}, max_steps: {steps}, warmup_steps: 0}}
evaluate: {{max_new_tokens: 8, samples: 1}}
"""
    )


def run_stage(stage: str, work: Path) -> dict[str, Any]:
    """Seconds and highest resident size of one stage, started as DVC starts it."""
    start = time.perf_counter()
    path = os.pathsep.join([str(ROOT / "lib"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    # of all children so far; stages that need more come later, so this is a bound
    highest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "stage": stage,
        "seconds": round(time.perf_counter() - start, 1),
        "host_peak_so_far_bytes": highest,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--budget", help="memory budget of the device, like 24GiB")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_checkpoint(args.model, args.work / "model", device)
    torch.cuda.empty_cache()
    hardware = {"memory_budget": args.budget} if args.budget else {}
    write_inputs(
        args.work, tokens=args.tokens, batch=args.batch, steps=args.steps, hardware=hardware
    )
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        print(f"== {stage}", flush=True)
        case = {"model": args.model, "budget": args.budget, "sequence_length": args.tokens}
        rows.append({**case, **run_stage(stage, args.work)})
        write_result(args.json, "pipeline", rows, **found(args.work / "artifacts"))
    print(json.dumps(rows, indent=1))


def found(artifacts: Path) -> dict[str, Any]:
    """The Plan, the end of training and the evaluation, as far as the pipeline has come."""
    content: dict[str, Any] = {}
    if (artifacts / "plan.json").is_file():
        content["plan"] = json.loads((artifacts / "plan.json").read_text())
    if (artifacts / "training.jsonl").is_file():
        lines = (artifacts / "training.jsonl").read_text().splitlines()
        content["training"] = [json.loads(line) for line in lines]
    if (artifacts / "evaluation.json").is_file():
        content["evaluation"] = json.loads((artifacts / "evaluation.json").read_text())
    return content


if __name__ == "__main__":
    main()
