"""Several GPUs of one host: what they reach together, and what the host and each GPU hold for it.

    python -m benchmarks.several_gpus --json benchmarks/results/several_gpus.h200x2.json   # 1 and 2 GPUs
    python -m benchmarks.several_gpus --spread-only --json benchmarks/results/spread.h200x2.json
    python -m benchmarks.several_gpus --tiny --json benchmarks/results/several_gpus.cpu.json

Each number of devices is one launch, as training launches; the processes go through all cases. The
plan of a device is the same however many there are, so the effective batch grows with them. The last
case has one batch for all, and tells how far losses are from those of one device. Weights are noise.
Layers that are spread over the devices have a launch of one process: its rows are to be held against
data parallel's of the same model, and the last of them against one device's losses.

A row is written as soon as its case is done. What NCCL takes is the GPU's free memory before the
processes joined, less that after their first sum. On the CPU the processes share the cores, so that
speeds there say nothing of scaling.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import shape_config, write_result
from fitlora.artifacts import Hardware, SequenceSize
from fitlora.device import give_back_memory
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load, sequences_of
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import make_transport
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.planner.several import spread_layers
from fitlora.planner.speed import Shape
from fitlora.step.build import build_step
from fitlora.step.devices import next_devices
from fitlora.step.settings import StepSettings
from fitlora.step.weights import RandomWeights
from fitlora.training.agreement import Agreement
from fitlora.training.batches import share_of
from fitlora.training.launch import launch
from fitlora.training.parallel import Ranks, joined

RANK = 16
# What a strategy of several devices is held against where it has none of its own on one.
ON_ONE = {
    "layers spread": "data parallel, resident",
    "one batch, layers spread": "one batch for all",
}
ON_HOST = {"checkpoints": "host", "embedding": "host"}
ALL_ON_HOST = {**ON_HOST, "head": "host"}


@dataclass(frozen=True)
class Case:
    """A plan by what it has on the host. accumulation: micro-batches of a device in a step."""

    model: str
    strategy: str
    micro_batch: int
    tokens: int
    accumulation: int
    steps: int  # timed, after one that is not
    streamed: bool = False
    recompute: bool = False
    placed: dict[str, str] = field(default_factory=dict)
    same_batch: bool = False  # an effective batch that does not grow with the devices

    def plan(self, devices: int, device: str, *, spread_over: int = 1) -> Plan:
        """For so many processes, or for one that spreads the layers over so many devices."""
        config = shape_config(self.model)
        layers = tuple(range(config.num_hidden_layers))
        counts: tuple[int, ...] = ()
        if spread_over > 1:
            shape = Shape.of(config, bits=4, rank=RANK)
            assert shape is not None
            counts = spread_layers(shape, spread_over, tied=config.tie_word_embeddings)
        each = self.micro_batch * self.accumulation
        return Plan.model_validate(
            {
                "device": device,
                "devices": devices,
                "effective_batch_size": each if self.same_batch else each * devices,
                "micro_batch_size": self.micro_batch,
                "evaluation_batch_size": self.micro_batch,
                "sequence_length": self.tokens,
                "recompute_layers": layers if self.recompute else (),
                "streamed_layers": layers if self.streamed else (),
                "compute_dtype": "bfloat16" if device == "cuda" else "float32",
                "optimizer": "adamw",
                "loss_chunk_tokens": loss_chunk(config.vocab_size),
                "layers_per_device": counts,
                **self.placed,
            }
        )


CASES = (
    Case("llama-3-8b", "data parallel, resident", 4, 2048, 4, 4),
    Case("llama-3-8b", "data parallel, streamed", 4, 2048, 4, 4, True, True, ON_HOST),
    Case("llama-3-70b", "data parallel, streamed", 4, 2048, 1, 2, True, True, ALL_ON_HOST),
    Case("llama-3.2-1b", "one batch for all", 3, 512, 3, 5, same_batch=True),
)  # fmt: skip
SPREAD = (
    Case("llama-3-8b", "layers spread", 4, 2048, 4, 4),
    Case("llama-3-70b", "layers spread", 4, 2048, 1, 2, recompute=True),
    Case("llama-3.2-1b", "one batch, layers spread", 3, 512, 3, 5, same_batch=True),
)  # fmt: skip
TINY_SPREAD = (
    Case("tiny", "layers spread", 2, 64, 2, 3),
    Case("tiny", "one batch, layers spread", 3, 64, 3, 5, same_batch=True),
)
TINY = (
    Case("tiny", "data parallel, resident", 2, 64, 2, 3),
    Case("tiny", "data parallel, streamed", 2, 64, 2, 3, True, True, ALL_ON_HOST),
    Case("tiny", "one batch for all", 3, 64, 3, 5, same_batch=True),
)


def settings() -> StepSettings:
    """LoRA on all linear layers, rank 16, with dropout; NF4 with double quantization."""
    return StepSettings.of(check_params({"lora": {"r": RANK, "alpha": 32, "dropout": 0.05}}))


def measure(
    case: Case, ranks: Ranks, hardware: Hardware, *, spread_over: int = 1
) -> dict[str, Any]:
    """One case in this process, and what all of them found; alike on every process."""
    device = torch.device(hardware.device)
    cuda = device.type == "cuda"
    config = shape_config(case.model)
    plan = case.plan(ranks.devices, hardware.device, spread_over=spread_over)
    first = torch.device("cuda", torch.cuda.current_device()) if cuda else device
    devices = next_devices(first, spread_over)
    give_back_memory()
    if cuda:
        for each in devices:
            torch.cuda.reset_peak_memory_stats(each)
    shared = ranks.shared_memory(Agreement(ranks).meet) if plan.uses_host else None
    transport = make_transport(device, HostMemory(), shared)
    start = time.perf_counter()
    step = build_step(config, plan, settings(), RandomWeights(device), transport)
    ready = time.perf_counter() - start
    size = SequenceSize(tokens=case.tokens, target_tokens=case.tokens - 1)
    batch = sequences_of([size] * plan.effective_batch_size)
    mine = share_of(batch, ranks.rank, ranks.devices)
    losses, seconds = [], []
    for index in range(1 + case.steps):
        ranks.any(False)
        start = time.perf_counter()
        found = step.run(
            mine,
            step=index,
            learning_rate=1e-3,
            total_target_tokens=sum(s.target_tokens for s in batch),
            reduce_gradients=ranks.reduce if ranks.devices > 1 else None,
        )
        losses.append(float(found.loss))
        seconds.append(time.perf_counter() - start)
    step.network.begin()
    gradients = [g for held in step.network.gradients().values() for g in held]
    start = time.perf_counter()
    ranks.reduce(gradients)
    if cuda:
        for each in devices:
            torch.cuda.synchronize(each)
    summing = time.perf_counter() - start
    predicted = ranks.from_first(
        lambda: Estimator(
            config, settings(), Load.uniform(case.micro_batch, case.tokens), hardware
        )(plan)
    )
    peaks = [torch.cuda.max_memory_allocated(each) for each in devices] if cuda else None
    own = transport.pinned_bytes - transport.shared_bytes
    return {
        "model": case.model,
        "strategy": case.strategy,
        "devices": max(ranks.devices, spread_over),
        "layers_per_device": list(plan.layers_per_device) or None,
        "micro_batch": case.micro_batch,
        "sequence_length": case.tokens,
        "effective_batch": plan.effective_batch_size,
        "compute_dtype": plan.compute_dtype,
        "tokens_per_second": round(case.steps * len(batch) * case.tokens / sum(seconds[1:]), 1),
        "losses": losses,
        "sum_gradients_seconds": round(summing, 5),
        "gradient_bytes": sum(t.nbytes for t in gradients),
        "ready_seconds": round(ready, 2),
        "host_pinned_bytes": transport.shared_bytes + sum(ranks.gather(own)),
        "predicted_host_pinned_bytes": predicted.host_pinned_bytes,
        "predicted_allocated_bytes": predicted.peak_allocated_bytes,
        "predicted_device_bytes": list(predicted.device_peak_bytes) or None,
        "measured_allocated_bytes": (
            None if peaks is None else [peak for each in ranks.gather(peaks) for peak in each]
        ),
    }


def work(folder: Path, *, tiny: bool, spread_over: int = 1) -> None:
    """One process of a launch: all cases; the first one writes a line for each.

    spread_over: devices over which this process, which is then alone, spreads layers.
    """
    cases = TINY if tiny else CASES
    if spread_over > 1:
        cases = TINY_SPREAD if tiny else SPREAD
    hardware = Hardware.read(folder / "hardware.json")
    before = None
    if hardware.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device="cuda")  # the context
        before = torch.cuda.mem_get_info()[0]
    with joined(hardware.device) as ranks:
        taken = None
        if before is not None and ranks.devices > 1:
            ranks.reduce([torch.zeros(2**24, device="cuda")])
            give_back_memory()
            torch.cuda.synchronize()
            taken = max(ranks.gather(before - torch.cuda.mem_get_info()[0]))
        for case in cases:
            found = measure(case, ranks, hardware, spread_over=spread_over)
            row = {**found, "nccl_bytes": taken}
            if ranks.is_first:
                with (folder / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['model']}, {row['strategy']}, {row['devices']} devices: "
                      f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)  # fmt: skip


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with what one device had."""
    alone = {(r["model"], r["strategy"]): r for r in rows if r["devices"] == 1}
    found = []
    for row in rows:
        one = alone.get((row["model"], ON_ONE.get(row["strategy"], row["strategy"])))
        more: dict[str, Any] = {"one_device_tokens_per_second": None}
        if one is not None:
            more = {
                "one_device_tokens_per_second": one["tokens_per_second"],
                "speed_over_one_device": row["tokens_per_second"] / one["tokens_per_second"],
                "host_over_one_device": (
                    row["host_pinned_bytes"] / one["host_pinned_bytes"]
                    if one["host_pinned_bytes"]
                    else None
                ),
            }
            if row["strategy"].startswith("one batch"):
                pairs = zip(row["losses"], one["losses"], strict=True)
                more["losses_differ_by"] = max(abs(a / b - 1) for a, b in pairs)
        found.append({**row, **more})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument(
        "--spread-only", action="store_true", help="no data parallel on more than one device"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spread-over", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        work(args.worker, tiny=args.tiny, spread_over=args.spread_over)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = {"hardware": {"device": "cpu" if args.tiny else "cuda"}}
        profile(check_params(asked).hardware, folder).write(folder / "hardware.json")
        rows: list[dict[str, Any]] = []
        # processes, and devices over which each spreads layers
        launches = [(n, 1) for n in args.devices if n == 1 or not args.spread_only]
        launches += [(1, n) for n in args.devices if n > 1]
        for processes, devices in launches:
            options = ["--worker", name, "--spread-over", str(devices), *["--tiny"] * args.tiny]
            try:
                launch(processes, "benchmarks.several_gpus", options)
            finally:
                lines = folder / "rows.jsonl"
                if lines.is_file():
                    rows = [json.loads(line) for line in lines.read_text().splitlines()]
                if args.json is not None and rows:
                    write_result(args.json, "several_gpus", compared(rows))
    for row in compared(rows):
        print(json.dumps({k: row[k] for k in row if k != "losses"}))


if __name__ == "__main__":
    sys.exit(main())
