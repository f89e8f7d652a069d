"""Does training on a GPU survive another process that takes the memory it counted on?

    python -m benchmarks.pressure --work /tmp/w --json OUT      (about two minutes)

A plan is made for the whole card. Before each run but the first, another process takes so much of the
card that the plan no longer fits: in some runs a smaller one on the GPU still does, in others only one
with more on the host. At a step drawn with a seed it lets go. What is compared is each run's log with
the first one's: every step once, the same tokens, and the losses to what another order of summation in
16 bits comes to.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SHAPES, make_checkpoint, shape_config, write_result
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
ROOM = 1.10  # of the prediction of what is to fit: what is left to the run at the least
TIGHT = 0.93  # of the prediction of what is not to fit, which has a margin of its own


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
                "checkpoint_every": 4,
            },
        }
    )


def plan_for(args: argparse.Namespace) -> Plan:
    on_gpu = torch.cuda.is_available()
    return Plan(
        device="cuda" if on_gpu else "cpu",
        effective_batch_size=2 * args.micro_batch,
        micro_batch_size=args.micro_batch,
        evaluation_batch_size=args.micro_batch,
        sequence_length=args.tokens,
        compute_dtype="bfloat16" if on_gpu else "float32",
        optimizer="adamw",
        loss_chunk_tokens=loss_chunk(shape_config(args.model).vocab_size),
    )


def prepare(args: argparse.Namespace, device: torch.device) -> None:
    """The 4-bit checkpoint and the rows."""
    args.work.mkdir(parents=True, exist_ok=True)
    make_checkpoint(args.model, args.work / "model", device)
    spec = StepSettings.of(params_for(args)).spec
    quantize_checkpoint(args.work / "model", args.work / "quantized", spec=spec, device=device)
    args.micro_batches = [args.micro_batch]
    write_rows(args, 4 * args.micro_batch)
    give_back_memory()


@dataclass(frozen=True)
class Needs:
    """Bytes that the process is predicted to take: by the plan, by the smallest plan with nothing on
    the host, and by the smallest of all."""

    top: int
    least_on_gpu: int
    least: int

    @classmethod
    def of(cls, args: argparse.Namespace, hardware: Hardware) -> "Needs":
        config, settings = shape_config(args.model), StepSettings.of(params_for(args))
        estimator = Estimator(
            config, settings, Load.uniform(2 * args.micro_batch, args.tokens), hardware
        )
        plan = plan_for(args)
        free = Freedom.most(plan.replace(device="cuda"), model_size(config, settings))
        rungs = list(smaller(plan, free))
        on_gpu = [rung for rung in rungs if not rung.uses_host and rung.optimizer_device != "host"]
        least, least_on_gpu = (
            min(estimator(rung).process_bytes for rung in some) for some in (rungs, on_gpu)
        )
        return cls(estimator(plan).process_bytes, least_on_gpu, least)

    def left(self, *, host: bool) -> tuple[int, int]:
        """The least and the most to leave for a run that the plan is too large for."""
        if host:
            return int(ROOM * self.least), int(TIGHT * self.least_on_gpu)
        return int(ROOM * self.least_on_gpu), int(TIGHT * self.top)


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


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kind of pressure, as soon as it is there."""
    start = time.perf_counter()
    prepare(args, torch.device("cuda"))
    hardware = profile(params_for(args).hardware, args.work)
    needs = Needs.of(args, hardware)
    expected = once(args, hardware)
    draw = random.Random(args.seed)
    for host in (False, True):
        found: list[dict[str, Any]] = []
        for number in range(args.runs):
            if time.perf_counter() - start > args.limit_seconds:
                break
            give_back_memory()
            # the context of this process is there already
            left = int(draw.uniform(*needs.left(host=host))) - hardware.context_bytes
            until = draw.randrange(2, args.steps)
            log = args.work / "run" / "log.jsonl"
            log.unlink(missing_ok=True)
            with memory_taken(left, log, until):
                disturbed = once(args, hardware)
            found.append(compare(expected, disturbed) | {"left_bytes": left, "until_step": until})
            print(number, found[-1], flush=True)
        if found:
            yield row_of(args, needs, found, host=host)


def row_of(
    args: argparse.Namespace, needs: Needs, found: Sequence[dict[str, Any]], *, host: bool
) -> dict[str, Any]:
    """What came of one kind of pressure. It is survived where it was felt, and nobody can tell."""
    where = "the host" if host else "a smaller plan"
    survived = [one["same"] and one["overflows"] > 0 and one["host"] >= host for one in found]
    return {
        "fault": f"pressure from another process on the GPU, down to {where}",
        "model": args.model,
        "injected": len(found),
        "survived": sum(survived),
        "lost_steps": 0,
        "result_differs": sum(not one["same"] for one in found),
        "overflows": sum(one["overflows"] for one in found),
        "worst_loss_difference": max(one["worst_loss_difference"] for one in found),
        "plan_bytes": needs.top,
        "smallest_plan_on_the_gpu_bytes": needs.least_on_gpu,
        "smallest_plan_bytes": needs.least,
        "least_left_bytes": min(one["left_bytes"] for one in found),
    }


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether two logs tell the same run, and how often the second changed its plan."""
    ours, theirs = (
        [(r["step"], r["tokens"], r["loss"]) for r in records if r["event"] == "step"]
        for records in (found, expected)
    )
    pairs = zip(ours, theirs, strict=False)
    worst = max(abs(a[2] - b[2]) / abs(b[2]) for a, b in pairs)
    same = [s[:2] for s in ours] == [s[:2] for s in theirs] and worst <= TOLERANCE
    changes = [r for r in found if r["event"] == "plan" and "out of memory" in r["cause"]]
    plans = [Plan.model_validate(change["after"]) for change in changes]
    return {
        "same": same,
        "worst_loss_difference": worst,
        "overflows": len(changes),
        "host": any(plan.uses_host or plan.optimizer_device == "host" for plan in plans),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=4, help="of each kind")
    parser.add_argument("--limit-seconds", type=float, default=150, help="no run begins after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for row in measure(args):
        rows.append(row)
        write_result(args.json, "faults", rows, seed=args.seed)
        print(json.dumps(row), flush=True)
    return 0 if all(row["survived"] == row["injected"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
