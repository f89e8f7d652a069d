"""Where a step's time goes: every kernel of one optimizer step, by name, against the floor.

    python -m benchmarks.step_profile --model llama-3-8b --micro-batch 4 --recompute none

The floor is the products of frozen weights alone (4 FLOP a parameter and token, 6 with full
recomputation) at the rate that one large bf16 product reaches on the same device in the same run.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SHAPES, shape_config, write_result
from fitlora.artifacts import SequenceSize
from fitlora.memory.estimate import sequences_of
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights


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


def kernels(step: TrainingStep, batch: Sequence[Any]) -> dict[str, tuple[float, int]]:
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--recompute", choices=["all", "none"], default="none")
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config = shape_config(args.model)
    device = torch.device("cuda")
    layers = config.num_hidden_layers
    plan = Plan(
        device="cuda",
        effective_batch_size=args.micro_batch,
        micro_batch_size=args.micro_batch,
        evaluation_batch_size=args.micro_batch,
        sequence_length=args.tokens,
        recompute_layers=tuple(range(layers)) if args.recompute == "all" else (),
        compute_dtype="bfloat16",
        optimizer="adamw",
        loss_chunk_tokens=loss_chunk(config.vocab_size),
    )
    settings = StepSettings.of(check_params({"lora": {"dropout": 0.0}}))
    step = build_step(config, plan, settings, RandomWeights(device))
    size = SequenceSize(tokens=args.tokens, target_tokens=args.tokens - 1)
    batch = sequences_of([size] * args.micro_batch)
    seconds = []
    for index in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.run(batch, step=index, learning_rate=0.0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[3:])
    tokens = args.micro_batch * args.tokens
    rate = product_flops_per_second(device)
    frozen = sum(
        m.in_features * m.out_features
        for m in step.model.modules()
        if hasattr(m, "spec") and hasattr(m, "in_features")
    ) + config.vocab_size * config.hidden_size  # fmt: skip
    floor = tokens * frozen * (6 if args.recompute == "all" else 4) / rate
    table = kernels(step, batch)
    total = sum(ms for ms, _ in table.values())
    print(
        f"{median * 1000:.1f} ms, {tokens / median:,.0f} tokens/s, kernels {total:.1f} ms, "
        f"floor {floor * 1000:.1f} ms ({tokens / floor:,.0f} tokens/s) at {rate / 1e12:.0f} TFLOP/s; "
        f"reserved {torch.cuda.max_memory_reserved() / 2**20:,.0f} MiB"
    )
    for name, (ms, calls) in list(table.items())[: args.top]:
        print(f"{ms:9.2f} ms {calls:6d} x  {name[:110]}")
    if args.json is not None:
        rows = [{"kernel": n[:200], "ms": ms, "calls": calls} for n, (ms, calls) in table.items()]
        write_result(
            args.json, "step_profile", rows, asked=json.loads(json.dumps(vars(args), default=str)),
            step_seconds=median, tokens_per_second=tokens / median, floor_seconds=floor,
        )  # fmt: skip


if __name__ == "__main__":
    main()
