"""Where a step's time goes: every kernel of one optimizer step, by name, against the floor.

    python -m benchmarks.step_profile --shapes 1x512 1x2048 4x2048 --recompute none

The floor is the products of frozen weights alone (4 FLOP a parameter and token, 6 with full
recomputation) at the rate that one large bf16 product reaches on the same device in the same run. A
step that takes much longer than its kernels waits for their launches; how much of that CUDA graphs
could save is told by replaying its forward and backward as one, last of all, as a capture that fails
leaves the device unfit for more.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SHAPES, shape_config, write_result
from fitlora.artifacts import SequenceSize
from fitlora.memory.estimate import sequences_of
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.step.batch import TokenSequence
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights

Shape = tuple[int, int]  # micro-batch, tokens
Table = dict[str, tuple[float, int]]  # milliseconds and calls of each kernel


def product_flops_per_second(device: torch.device) -> float:
    """What one large bf16 product reaches: (8192, 8192) x (8192, 8192), median of 20."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / statistics.median(times[5:])


def kernels(step: TrainingStep, batch: Sequence[TokenSequence]) -> Table:
    """Milliseconds and calls of every kernel of one optimizer step, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step.run(batch, step=9, learning_rate=0.0)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time / 1000)
    rows = {name: (sum(values), len(values)) for name, values in times.items()}
    return dict(sorted(rows.items(), key=lambda item: -item[1][0]))


def replayed_seconds(step: TrainingStep, batch: Sequence[TokenSequence], runs: int = 5) -> float:
    """Median seconds of a micro-batch's forward and backward when no launch is waited for.

    They are captured as a CUDA graph once and replayed, which is what graphs could save at most.
    """
    batches = [step.micro_batch(batch)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    step.network.begin()
    with torch.cuda.graph(graph, stream=stream):
        step.network.train(batches, scale=1.0, phase=step.phase)
    seconds = timed(graph.replay, runs)
    step.abandon()
    return statistics.median(seconds)


def timed(run: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each run, waited for."""
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def batch_of(shape: Shape) -> Sequence[TokenSequence]:
    micro_batch, tokens = shape
    return sequences_of([SequenceSize(tokens=tokens, target_tokens=tokens - 1)] * micro_batch)


def profiled(step: TrainingStep, shape: Shape, product_rate: float) -> tuple[dict[str, Any], Table]:
    """What a step of this shape takes, beside its floor, and its kernels."""
    (micro_batch, tokens), batch = shape, batch_of(shape)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: step.run(batch, step=0, learning_rate=0.0), 8)
    reserved = torch.cuda.max_memory_reserved()
    table = kernels(step, batch)
    config = step.model.config
    frozen = sum(
        m.in_features * m.out_features
        for m in step.model.modules()
        if hasattr(m, "spec") and hasattr(m, "in_features")
    ) + config.vocab_size * config.hidden_size  # fmt: skip
    passes = 4 + 2 * len(step.plan.recompute_layers) / config.num_hidden_layers
    median = statistics.median(seconds[3:])
    found = {
        "micro_batch": micro_batch,
        "sequence_length": tokens,
        "recomputed_layers": len(step.plan.recompute_layers),
        "step_ms": median * 1000,
        "tokens_per_second": micro_batch * tokens / median,
        "kernels_ms": sum(ms for ms, _ in table.values()),
        "launches": sum(calls for _, calls in table.values()),
        "replayed_ms": None,
        "floor_ms": micro_batch * tokens * frozen * passes / product_rate * 1000,
        "product_flops_per_second": product_rate,
        "peak_reserved_bytes": reserved,
    }
    return found, table


def shape(text: str) -> Shape:
    """4x2048: a micro-batch of 4 samples of 2,048 tokens."""
    micro_batch, tokens = text.split("x")
    return int(micro_batch), int(tokens)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(1, 512), (1, 2048), (4, 2048)])
    parser.add_argument("--recompute", choices=["all", "none"], default="none")
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config = shape_config(args.model)
    largest = max(micro_batch for micro_batch, _ in args.shapes)
    plan = Plan(
        device="cuda",
        effective_batch_size=largest,
        micro_batch_size=largest,
        evaluation_batch_size=1,
        sequence_length=max(tokens for _, tokens in args.shapes),
        recompute_layers=tuple(range(config.num_hidden_layers)) if args.recompute == "all" else (),
        compute_dtype="bfloat16",
        optimizer="adamw",
        loss_chunk_tokens=loss_chunk(config.vocab_size),
    )
    settings = StepSettings.of(check_params({"lora": {"dropout": 0.0}}))
    step = build_step(config, plan, settings, RandomWeights(torch.device("cuda")))
    rate = product_flops_per_second(torch.device("cuda"))
    rows: list[dict[str, Any]] = []
    slowest: list[dict[str, Any]] = []
    for asked in args.shapes:
        found, table = profiled(step, asked, rate)
        print(
            f"{found['micro_batch']} x {found['sequence_length']}: {found['step_ms']:.1f} ms "
            f"({found['tokens_per_second']:,.0f} tokens/s), kernels {found['kernels_ms']:.1f} ms in "
            f"{found['launches']:,} launches, floor {found['floor_ms']:.1f} ms at "
            f"{rate / 1e12:.0f} TFLOP/s"
        )
        for name, (ms, calls) in list(table.items())[: args.top]:
            print(f"{ms:9.2f} ms {calls:6d} x  {name[:110]}")
        rows.append({"model": args.model, **found})
        slowest += [
            {"micro_batch": asked[0], "sequence_length": asked[1], "kernel": name[:200],
             "ms": ms, "calls": calls}
            for name, (ms, calls) in list(table.items())[: args.top]
        ]  # fmt: skip
        if args.json is not None:
            write_result(args.json, "step_profile", rows, slowest_kernels=slowest)
    for asked, row in zip(args.shapes, rows, strict=True):
        row["replayed_ms"] = replayed_seconds(step, batch_of(asked)) * 1000
        print(
            f"{row['micro_batch']} x {row['sequence_length']}: forward and backward replayed "
            f"{row['replayed_ms']:.1f} ms"
        )
        if args.json is not None:
            write_result(args.json, "step_profile", rows, slowest_kernels=slowest)


if __name__ == "__main__":
    main()
