"""Does training on a GPU survive another process that takes the memory it counted on?

    python -m benchmarks.pressure --model llama-3-8b --work /tmp/w --json OUT

A plan is made for the whole card. Before each run but the first, another process takes so much of the
card that the plan no longer fits and the smallest of the ladder does; at a step drawn with a seed it
lets go. What is compared is each run's log with the first one's: every step once, the same tokens, and
the losses to what another order of summation in 16 bits comes to.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_checkpoint, shape_config, write_result
from benchmarks.three_ways import write_rows
from fitlora.artifacts import Hardware
from fitlora.device import give_back_memory
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.ladder import smaller
from fitlora.planner.model import model_size
from fitlora.planner.search import loss_chunk
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.settings import StepSettings
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train

TAKER = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(1, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.readline()
"""
TOLERANCE = 0.02  # of a loss
ROOM = 1.10  # of the smallest plan's prediction: what is left to the run at the least


def params_for(args: argparse.Namespace) -> Params:
    return check_params(
        {
            "data": {
                "train": str(args.work / "rows.jsonl"),
                "validation": str(args.work / "validation.jsonl"),
                "max_length": args.tokens,
                "train_on": "all",
            },
            "train": {
                "effective_batch_size": args.micro_batch * 2,
                "max_steps": args.steps,
                "warmup_steps": 0,
                "learning_rate": 1.0e-4,
                "evaluate_every": args.steps // 2,
                "checkpoint_every": 10,
            },
        }
    )


def plan_for(args: argparse.Namespace) -> Plan:
    config = shape_config(args.model)
    return Plan(
        device="cuda",
        effective_batch_size=2 * args.micro_batch,
        micro_batch_size=args.micro_batch,
        evaluation_batch_size=args.micro_batch,
        sequence_length=args.tokens,
        compute_dtype="bfloat16",
        optimizer="adamw",
        loss_chunk_tokens=loss_chunk(config.vocab_size),
    )


def once(args: argparse.Namespace, hardware: Hardware) -> list[dict[str, Any]]:
    """A training run from its start; its log."""
    params = params_for(args)
    config = shape_config(args.model)
    rows, validation = load_splits(params.data, args.work / "model", config.vocab_size)
    folder = args.work / "run"
    places = Places(
        folder / "adapter", folder / "log.jsonl", folder / "curves.json", folder / "scratch"
    )
    train(
        params,
        plan_for(args),
        hardware,
        config=config,
        checkpoint=args.work / "quantized",
        rows=rows,
        validation=validation,
        places=places,
    )
    return [json.loads(line) for line in places.log.read_text().splitlines()]


@contextmanager
def memory_taken(left_bytes: int, log: Path, until_step: int) -> Iterator[None]:
    """Another process has all but `left_bytes` of what is free, until the log has a step."""
    with subprocess.Popen(
        [sys.executable, "-c", TAKER, str(left_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as taker:
        assert taker.stdout is not None
        assert taker.stdin is not None
        assert taker.stdout.readline() == "taken\n"
        over = threading.Event()

        def let_go() -> None:
            mark = f'"event": "step", "step": {until_step},'
            while not over.is_set() and not (log.is_file() and mark in log.read_text()):
                time.sleep(0.2)
            taker.communicate("\n")

        watcher = threading.Thread(target=let_go)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    args.work.mkdir(parents=True, exist_ok=True)
    params = params_for(args)
    settings = StepSettings.of(params)
    make_checkpoint(args.model, args.work / "model", device)
    quantize_checkpoint(
        args.work / "model", args.work / "quantized", spec=settings.spec, device=device
    )
    args.micro_batches = [args.micro_batch]
    write_rows(args, 4 * args.micro_batch)
    give_back_memory()
    hardware = profile(params.hardware, args.work)
    config, plan = shape_config(args.model), plan_for(args)
    load = Load.uniform(2 * args.micro_batch, args.tokens)
    estimator = Estimator(config, settings, load, hardware)
    top = estimator(plan).peak_allocated_bytes
    rungs = smaller(plan, Freedom.most(plan, model_size(config, settings)))
    least = min(estimator(rung).peak_allocated_bytes for rung in rungs)
    expected = once(args, hardware)
    draw = random.Random(args.seed)
    rows = []
    for number in range(args.runs):
        give_back_memory()
        left = int(draw.uniform(ROOM * least, 0.95 * top))
        until = draw.randrange(2, args.steps)
        log = args.work / "run" / "log.jsonl"
        log.unlink(missing_ok=True)
        with memory_taken(left, log, until):
            found = once(args, hardware)
        rows.append(compare(expected, found) | {"left_bytes": left, "until_step": until})
        print(number, rows[-1], flush=True)
    return [
        {
            "fault": "pressure from another process on the GPU",
            "model": args.model,
            "injected": len(rows),
            "survived": sum(row["same"] for row in rows),
            "lost_steps": 0,
            "result_differs": sum(not row["same"] for row in rows),
            "overflows": sum(row["overflows"] for row in rows),
            "plan_peak_bytes": top,
            "smallest_plan_peak_bytes": least,
            "least_left_bytes": min(row["left_bytes"] for row in rows),
        }
    ]


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether two logs tell the same run, and how often the second changed its plan."""
    ours, theirs = (
        [(r["step"], r["tokens"], r["loss"]) for r in records if r["event"] == "step"]
        for records in (found, expected)
    )
    pairs = zip(ours, theirs, strict=False)
    worst = max(abs(a[2] - b[2]) / abs(b[2]) for a, b in pairs)
    same = [s[:2] for s in ours] == [s[:2] for s in theirs] and worst <= TOLERANCE
    overflows = sum(r["event"] == "plan" and "out of memory" in r["cause"] for r in found)
    return {"same": same, "worst_loss_difference": worst, "overflows": overflows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = measure(args)
    write_result(args.json, "faults", rows, seed=args.seed)
    print(json.dumps(rows))
    return 0 if rows[0]["survived"] == rows[0]["injected"] else 1


if __name__ == "__main__":
    sys.exit(main())
