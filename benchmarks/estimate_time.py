"""What an estimate costs: processor time and memory of the host, imports aside and with them.

    python -m benchmarks.estimate_time --json benchmarks/results/estimate_time.cpu.json

For each model one plan by an estimator that knows nothing yet, a hundred plans as a search looks at
them, and the whole command `fitlora estimate`, each in a process of its own. Seconds are the
processor's, of one thread: what else runs on the machine is not in them. No GPU is used.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, shape_config, write_result
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load
from fitlora.offload.residency import spread
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.step.settings import StepSettings
from fitlora.units import KIB

MODELS = ("llama-3-8b", "llama-3-70b", "gemma-3-4b", "olmo-2-1b")
CARD = {"name": "a card", "memory": "24GiB", "compute_capability": "8.9"}
TOKENS = 2048
SETTINGS = StepSettings.of(check_params({"lora": {"r": 16, "alpha": 32.0, "dropout": 0.05}}))


def plans(layers: int, *, by_hand: bool) -> list[Plan]:
    """A hundred: micro-batches by how many layers recompute, and by how many stream."""
    start = Plan(
        device="cuda",
        effective_batch_size=8,
        micro_batch_size=1,
        evaluation_batch_size=1,
        sequence_length=TOKENS,
        compute_dtype="bfloat16",
        optimizer="adamw",
        loss_chunk_tokens=512,
    )
    every, shares = tuple(range(layers)), range(25)
    sides = {"checkpoints": "host"} if by_hand else {}
    found = []
    for micro in (1, 2):
        sized = start.replace(micro_batch_size=micro, evaluation_batch_size=micro)
        found += [sized.replace(recompute_layers=every[: layers * n // 24]) for n in shares]
        found += [
            sized.replace(
                recompute_layers=every, streamed_layers=spread(layers, layers * n // 24), **sides
            )
            for n in shares
        ]
    return found


def estimated(model: str, count: int) -> dict[str, Any]:
    """In a process of its own: seconds of the first `count` plans, and what it had at most."""
    config = shape_config(model)
    asked = check_params({"hardware": {"target": CARD}}).hardware
    hardware = profile(asked, Path())
    tried = plans(config.num_hidden_layers, by_hand=config.model_type != "olmo2")[-count:]
    start, cpu = time.perf_counter(), time.process_time()
    estimator = Estimator(config, SETTINGS, Load.uniform(2, TOKENS), hardware)
    fitting = sum(estimator(plan).fits for plan in tried)
    return {
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - start, 2),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
        "traced": len(estimator._traces),
        "fit": fitting,
    }


def command(model: str) -> dict[str, Any]:
    """The whole of `fitlora estimate`, its imports as well."""
    with tempfile.TemporaryDirectory() as folder:
        shape_config(model).save_pretrained(folder)
        line = [sys.executable, "-c", "from fitlora.cli import main; main()", "estimate", folder]
        line += ["--gpu-memory", "24GiB", "--micro-batch", "2", "--json"]
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(line, check=True, capture_output=True, cwd=ROOT, env=_environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    return {
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2
        ),
        "wall_seconds": round(time.perf_counter() - start, 2),
        "host_peak_bytes": after.ru_maxrss * KIB,
        "longest_sequence": found["longest_sequence"],
    }


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "lib"), str(ROOT)])
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return {**os.environ, **hidden}


def measured(model: str, what: str) -> dict[str, Any]:
    """A row: `what` is "one plan", "a hundred plans" or "the command"."""
    line = [sys.executable, "-m", "benchmarks.estimate_time", "--role", what, "--models", model]
    done = subprocess.run(line, check=True, capture_output=True, cwd=ROOT, env=_environment())
    return {"model": model, "what": what, **json.loads(done.stdout.splitlines()[-1])}


ROLES = {
    "one plan": lambda model: estimated(model, 1),
    "a hundred plans": lambda model: estimated(model, 100),
    "the command": command,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=tuple(ROLES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.role is not None:
        print(json.dumps(ROLES[args.role](args.models[0])))
        return
    rows = []
    for model in args.models:
        for what in ROLES:
            rows.append(measured(model, what))
            print(json.dumps(rows[-1]), flush=True)
            if args.json is not None:
                write_result(args.json, "estimate_time", rows, device="cpu")


if __name__ == "__main__":
    main()
