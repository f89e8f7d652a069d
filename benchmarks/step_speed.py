"""Tokens per second of the training step over the memory it takes, ours beside its peers.

    python -m benchmarks.step_speed --json benchmarks/results/step_speed.h100.json --limit-seconds 250

The work is one optimizer step of QLoRA: NF4 with double quantization, LoRA of rank 16 on all linear
layers, AdamW, sequences of --tokens tokens, no dropout, on random weights of the model's shape. Ours is
swept over micro-batch, recomputation and what is on the host; the peers are in `benchmarks.step_peers`,
with checkpointing and without; one that is not installed is left out and said so. Each runs in a process
of its own, with expandable segments, builds its model once, and gives everything back between two
cases. The most telling cases come first, so that a limit cuts the least. A new row takes the place of
the old one of the same case, and a row of a budget is the fastest case whose process, context and all,
stays within it.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHAPES, commit, device_label, shape_config, write_result
from benchmarks.step_peers import Step, build, missing
from fitlora.units import GIB

WARM_STEPS, TIMED_STEPS = 2, 5
BUDGETS_GIB = (8, 12, 16, 24, 48, 80)
SYSTEMS = ("fitlora", "peft", "unsloth", "peft+liger")

Row = dict[str, Any]
# compute dtype, micro-batch, layers recomputed (a share), what those keep, what is on the host
Layout = tuple[str, int, float, tuple[str, ...], tuple[str, ...]]

_BF16, _FP8 = "bfloat16", "float8"
_EMBEDDING, _BOTH = ("embedding",), ("embedding", "checkpoints")
# One or two for each budget, from which the rest of the frontier can be told.
FIRST: tuple[Layout, ...] = (
    (_BF16, 4, 1.0, (), _BOTH),
    (_BF16, 6, 1.0, (), _BOTH),
    (_BF16, 1, 0.0, (), _EMBEDDING),
    (_BF16, 2, 0.25, (), _EMBEDDING),
    (_BF16, 2, 0.0, (), _EMBEDDING),
    (_BF16, 3, 0.0, (), _EMBEDDING),
    (_BF16, 4, 0.0, (), ()),
    (_BF16, 6, 0.0, (), ()),
    (_FP8, 3, 0.0, (), _EMBEDDING),
    (_FP8, 4, 0.0, (), ()),
    (_FP8, 8, 0.0, (), ()),
)
# Between them: every kind that may be kept, shares of the layers, larger micro-batches.
FINER: tuple[Layout, ...] = (
    (_BF16, 1, 1.0, (), _BOTH),
    (_BF16, 2, 1.0, (), _BOTH),
    (_BF16, 8, 1.0, (), _BOTH),
    (_BF16, 4, 1.0, ("attention",), _BOTH),
    (_BF16, 1, 0.0, (), ()),
    (_BF16, 2, 0.0, (), ()),
    (_BF16, 1, 0.5, (), _EMBEDDING),
    (_BF16, 2, 0.75, (), _EMBEDDING),
    (_BF16, 2, 0.5, (), _EMBEDDING),
    (_BF16, 3, 0.75, (), _EMBEDDING),
    (_BF16, 3, 0.5, (), _EMBEDDING),
    (_BF16, 3, 0.25, (), _EMBEDDING),
    (_BF16, 4, 0.5, (), _EMBEDDING),
    (_BF16, 4, 0.25, (), _EMBEDDING),
    (_BF16, 4, 1.0, ("attention",), _EMBEDDING),
    (_BF16, 4, 1.0, ("qkv", "attention"), _EMBEDDING),
    (_BF16, 4, 1.0, ("qkv", "attention", "middle"), _EMBEDDING),
    (_BF16, 4, 1.0, ("mlp",), _EMBEDDING),
    (_BF16, 4, 1.0, ("attention", "middle", "mlp"), _EMBEDDING),
    (_BF16, 5, 0.0, (), ()),
    (_BF16, 8, 0.0, (), ()),
    (_FP8, 4, 1.0, (), _BOTH),
    (_FP8, 1, 0.0, (), _EMBEDDING),
    (_FP8, 2, 0.0, (), _EMBEDDING),
    (_FP8, 6, 0.0, (), ()),
)
# micro-batch, recomputed
PEERS: dict[str, tuple[tuple[int, bool], ...]] = {
    "peft": ((4, True), (2, False), (1, True), (2, True), (1, False), (4, False), (8, True)),
    "peft+liger": ((4, True), (4, False), (1, True), (2, False), (1, False), (2, True), (8, True)),
    "unsloth": ((4, False), (2, False), (1, False), (2, True), (8, True), (1, True), (4, True)),
}


def _ours(sweep: Sequence[Layout]) -> list[Row]:
    return [
        {
            "system": "fitlora",
            "micro_batch": micro_batch,
            "compute_dtype": dtype,
            "recomputed_share": share,
            "recompute_keeps": list(keeps),
            "on_the_host": list(host),
        }
        for dtype, micro_batch, share, keeps, host in sweep
    ]


def cases(args: argparse.Namespace) -> list[Row]:
    """Every case that was asked for, as a flat record of what is asked, the most telling first."""
    found = _ours(FIRST)
    for system in ("peft", "unsloth", "peft+liger"):
        for micro_batch, recompute in PEERS[system]:
            found.append(
                {
                    "system": system,
                    "micro_batch": micro_batch,
                    "compute_dtype": _BF16,
                    "recomputed_share": float(recompute),
                }
            )
    found += _ours(FINER)
    return [
        {"model": args.model, "sequence_length": args.tokens, **case}
        for case in found
        if case["system"] in args.systems
        and case["compute_dtype"] in args.dtypes
        and (args.micro_batches is None or case["micro_batch"] in args.micro_batches)
        and (args.shares is None or case["recomputed_share"] in args.shares)
    ]


def process_of(case: Row) -> tuple[Any, ...]:
    """Cases with the same answer share a process."""
    apart = case["recomputed_share"] if case["system"] == "unsloth" else None
    return case["system"], apart


# --- in the process of a system --------------------------------------------------------------------


def build_fitlora(alike: Sequence[Row]) -> Callable[[Row], Step]:
    """Our step, once for cases with the same dtype and places: it adopts each one's layout."""
    from fitlora.artifacts import SequenceSize
    from fitlora.memory.estimate import sequences_of
    from fitlora.params import check_params
    from fitlora.plan import Plan
    from fitlora.planner.search import loss_chunk
    from fitlora.step.build import build_step
    from fitlora.step.settings import StepSettings
    from fitlora.step.weights import RandomWeights

    config = shape_config(alike[0]["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = config.num_hidden_layers
    largest = max(case["micro_batch"] for case in alike)

    def plan_of(case: Row) -> Plan:
        return Plan.model_validate(
            {
                "device": device.type,
                "effective_batch_size": largest,
                "micro_batch_size": case["micro_batch"],
                "evaluation_batch_size": 1,
                "sequence_length": case["sequence_length"],
                "recompute_layers": tuple(range(round(case["recomputed_share"] * layers))),
                "recompute_keeps": tuple(case["recompute_keeps"]),
                "compute_dtype": case["compute_dtype"],
                "optimizer": "adamw",
                "loss_chunk_tokens": loss_chunk(config.vocab_size),
                **dict.fromkeys(case["on_the_host"], "host"),
            }
        )

    settings = StepSettings.of(
        check_params({"lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "train": {}})
    )
    built = build_step(config, plan_of(alike[0]), settings, RandomWeights(device))

    def arrange(case: Row) -> Step:
        built.adopt(plan_of(case))
        tokens = case["sequence_length"]
        size = SequenceSize(tokens=tokens, target_tokens=tokens - 1)
        batch = sequences_of([size] * case["micro_batch"])
        return lambda index: float(built.run(batch, step=index, learning_rate=1e-5).loss)

    return arrange


def timed(step: Step, case: Row) -> Row:
    """Median seconds of a step after the first ones; the first one's apart."""
    seconds, losses = [], []
    for index in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        losses.append(step(index))  # reading the loss waits for the device
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_STEPS:])
    tokens = case["micro_batch"] * case["sequence_length"]
    found: Row = {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "first_step_seconds": seconds[0],
        "last_loss": losses[-1],
        "peak_reserved_bytes": None,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        # the card is ours alone: what is used and not the allocator's is the context
        found["context_bytes"] = outside
        found["process_bytes"] = found["peak_reserved_bytes"] + outside
    return found


def run_cases(asked: Sequence[Row], until: float, folder: Path) -> None:
    """Runs cases of one system one after another and prints a line of JSON for each."""
    key, arrange = None, None
    for case in asked:
        if time.time() > until:
            break
        try:
            wanted = (case["compute_dtype"], tuple(case.get("on_the_host", ())))
            if arrange is None or key != wanted:
                arrange = None  # one model at a time
                _give_back()
                arrange, key = _arranger(case, asked, folder), wanted
            _give_back()
            found = timed(arrange(case), case)
        except Exception as error:  # a row that says so, and the next case
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({**case, **found}), flush=True)


def _arranger(case: Row, asked: Sequence[Row], folder: Path) -> Callable[[Row], Step]:
    if case["system"] == "fitlora":
        same = ("compute_dtype", "on_the_host")
        return build_fitlora([other for other in asked if all(other[k] == case[k] for k in same)])
    peer = build(case["system"], case["model"], case["sequence_length"], folder)
    return lambda case: peer(case["micro_batch"], bool(case["recomputed_share"]))


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- all of them -----------------------------------------------------------------------------------


def in_process(asked: Sequence[Row], until: float, folder: Path) -> Iterator[Row]:
    """The rows of cases that share a process, as they come; it is ended a minute after `until`."""
    command = [
        sys.executable, "-m", "benchmarks.step_speed", "--cases", json.dumps(asked),
        "--until", str(until), "--folder", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ending = threading.Timer(max(0.0, until - time.time()) + 60, process.kill)
        ending.start()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        ending.cancel()


def best_within(rows: Sequence[Row]) -> list[Row]:
    """For each budget, system and dtype the fastest row that stays within it."""
    found = []
    kinds = sorted({(row["system"], row["compute_dtype"]) for row in rows})
    for budget in BUDGETS_GIB:
        for system, dtype in kinds:
            within = [
                row
                for row in rows
                if (row["system"], row["compute_dtype"]) == (system, dtype)
                and row.get("process_bytes") is not None
                and row["process_bytes"] <= budget * GIB
            ]
            if within:
                best = max(within, key=lambda row: row["tokens_per_second"])
                found.append({"budget_gib": budget, **best})
    return found


def case_of(row: Row) -> Row:
    """What was asked, of a row."""
    keys = (
        "system", "model", "sequence_length", "micro_batch", "compute_dtype", "recomputed_share",
        "recompute_keeps", "on_the_host",
    )  # fmt: skip
    return {key: row.get(key) for key in keys}


def merged(rows: Sequence[Row], new: Row) -> list[Row]:
    """The measured rows with `new` in the place of the one of the same case; no rows of budgets.

    A case that failed now and was measured before keeps what was measured.
    """
    asked = case_of(new)
    old = [row for row in rows if "budget_gib" not in row]
    if "error" in new and any(case_of(row) == asked and "error" not in row for row in old):
        return old
    return [*(row for row in old if case_of(row) != asked), new]


def line(row: Row) -> str:
    """A row for the terminal."""
    start = f"{row['system']:>10} {row['compute_dtype']:>8} micro-batch {row['micro_batch']}, "
    if "error" in row:
        return start + row["error"]
    layout = f"{row.get('recompute_keeps', '')} {row.get('on_the_host', '')}"
    return (
        f"{start}recomputed {row['recomputed_share']:4.0%} {layout}: "
        f"{row['tokens_per_second']:9,.0f} tokens/s, {(row.get('process_bytes') or 0) / GIB:5.2f} GiB, "
        f"first step {row['first_step_seconds']:.1f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--dtypes", nargs="+", default=[_BF16, _FP8])
    parser.add_argument("--micro-batches", nargs="+", type=int)
    parser.add_argument("--shares", nargs="+", type=float, help="of the layers that are recomputed")
    parser.add_argument(
        "--limit-seconds", type=float, default=3600, help="start no case after this"
    )
    parser.add_argument("--json", type=Path, help="result file; rows of other cases in it stay")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cases is not None:
        run_cases(json.loads(args.cases), args.until, args.folder)
        return
    until = time.time() + args.limit_seconds
    path = args.json or ROOT / "benchmarks" / "results" / f"step_speed.{device_label()}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    lacking = {system: found for system in args.systems if (found := missing(system))}
    for system, packages in lacking.items():
        print(f"{system}: left out, {', '.join(packages)} not installed", flush=True)
    asked = [case for case in cases(args) if case["system"] not in lacking]
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    with tempfile.TemporaryDirectory() as folder:
        for _, together in groupby(asked, key=process_of):
            if time.time() > until:
                print("the time is up", flush=True)
                break
            for row in in_process(list(together), until, Path(folder) / args.model):
                rows = merged(rows, {**row, **stamp})
                print(line(row), flush=True)
                write_result(path, "step_speed", [*rows, *best_within(rows)])
    for row in best_within(rows):
        print(
            f"{row['budget_gib']:>3} GiB {row['system']:>10} {row['compute_dtype']:>8} "
            f"{row['tokens_per_second']:9,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
