"""What the memory tracker costs a training step.

    python -m benchmarks.tracker_cost --json benchmarks/results/tracker_cost.cpu.json
    python -m benchmarks.tracker_cost --model llama-3-8b --json OUT     (on a GPU)

Two parts. What the tracker does by itself, at the ends of phases and for each line, is timed with
nothing inside the phases: `own_share`. On the CPU it also counts the tensors of some steps; what that
adds to a step is the median difference between steps that take turns with and without it,
`count_share`, and what is left of it, as a run counts so seldom, is in `cost_share`. On the CPU CPU time
is taken, as wall time there says more about other processes; on a GPU wall time, and there
`difference_share` is that between whole steps with and without the tracker, to the end of their work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHAPES, shape_config, write_result
from fitlora.artifacts import SequenceSize
from fitlora.memory.estimate import sequences_of
from fitlora.memory.tracker import MemoryTracker, counted_every
from fitlora.model import load_config
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights


@dataclass
class Steps:
    """A step that is run again and again on the same batch."""

    step: TrainingStep
    batch: Sequence[Any]
    tracker: MemoryTracker
    done: int = 0

    def seconds(self, work: Callable[[], None]) -> float:
        """What some work takes: CPU time on the CPU, wall time on a GPU."""
        clock = time.process_time if self.step.device.type == "cpu" else time.perf_counter
        start = clock()
        work()
        return clock() - start

    def plain(self) -> None:
        """A step that nobody follows."""
        self._run()

    def tracked(self) -> None:
        """The same with the tracker, which counts the CPU's tensors."""
        self.step.phase = self.tracker.phase
        with self.tracker.watch(self.step.tensors()):
            self._run()
        self.step.phase = lambda name: nullcontext()
        self.tracker.update(step=self.done)

    def tracker_alone(self) -> None:
        """What the tracker does in a step, without the step."""
        for name in ("forward", "backward", "optimizer"):
            with self.tracker.phase(name):
                pass
        self.tracker.update(step=self.done)

    def _run(self) -> None:
        found = self.step.run(self.batch, step=self.done, learning_rate=1e-4)
        float(found.loss)  # as a run reads it, which waits for the device
        self.done += 1


def median_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error as of a normal distribution with the same quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, 1.2533 * (high - low) / 1.349 / len(values) ** 0.5


def measure(name: str, micro_batch: int, tokens: int, rounds: int, work: Path) -> dict[str, Any]:
    """A row. name: a shape, or "sample" for the shipped model. rounds: steps of each kind."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = (
        load_config(ROOT / "assets" / "sample_model") if name == "sample" else shape_config(name)
    )
    plan = Plan(
        device="cuda" if device.type == "cuda" else "cpu",
        effective_batch_size=micro_batch,
        micro_batch_size=micro_batch,
        evaluation_batch_size=micro_batch,
        sequence_length=tokens,
        compute_dtype="bfloat16" if device.type == "cuda" else "float32",
        optimizer="adamw",
        loss_chunk_tokens=loss_chunk(config.get_text_config().vocab_size),
    )
    step = build_step(config, plan, StepSettings.of(check_params({})), RandomWeights(device))
    batch = sequences_of([SequenceSize(tokens=tokens, target_tokens=tokens - 1)] * micro_batch)
    steps = Steps(step, batch, MemoryTracker(work, device))
    on_cpu = device.type == "cpu"
    for _ in range(2):  # kernels are chosen, and the optimizer's states made
        steps.plain()
    plain, more = [], []
    for _ in range(rounds):
        plain.append(steps.seconds(steps.plain))
        more.append(steps.seconds(steps.tracked) - plain[-1])
    alone = [steps.seconds(steps.tracker_alone) for _ in range(100)]
    seconds, _ = median_and_error(plain)
    own, own_error = (value / seconds for value in median_and_error(alone))
    share, error = (value / seconds for value in median_and_error(more))
    row: dict[str, Any] = {
        "model": name,
        "micro_batch": micro_batch,
        "sequence_length": tokens,
        "rounds": rounds,
        "clock": "CPU time" if on_cpu else "wall time",
        "step_seconds": seconds,
        "own_share": own,
        "own_share_error": own_error,
    }
    if not on_cpu:
        return {**row, "difference_share": share, "difference_share_error": error}
    every = counted_every(share)
    return {
        **row,
        "count_share": share,
        "count_share_error": error,
        "counted_every": every,
        "cost_share": own + share / every,
        "cost_share_error": own_error + error / every,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sample", *SHAPES], default="sample")
    parser.add_argument("--micro-batch", type=int, help="32 of the sample, else 4")
    parser.add_argument("--tokens", type=int, help="80 of the sample, else 2,048")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    sample = args.model == "sample"
    micro_batch = args.micro_batch or (32 if sample else 4)
    tokens = args.tokens or (80 if sample else 2048)
    with tempfile.TemporaryDirectory() as work:
        row = measure(args.model, micro_batch, tokens, args.rounds, Path(work))
    print(row)
    if args.json is not None:
        write_result(args.json, "tracker_cost", [row])


if __name__ == "__main__":
    main()
