"""Proving a Plan: the real step on the real device, with noise for weights.

Nothing is read from disk and nothing is learned, but every kernel runs and every byte is allocated:
what an estimate traces (`rehearse`) is what runs here. On the CPU, which has no allocator to ask, the
same trace counts real tensors.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fitlora.artifacts import Hardware, write_text_atomically
from fitlora.device import give_back_memory, is_overflow, limit_memory, torch_device
from fitlora.memory.estimate import Load, rehearse, sequences_of, trace_step
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import make_transport
from fitlora.plan import Plan
from fitlora.planner.search import Choice
from fitlora.step.build import build_step
from fitlora.step.devices import next_devices
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights


@dataclass(frozen=True)
class ProbeResult:
    """What a probe measured. Rates are None where it did not fit, reserved bytes on the CPU too.

    step_seconds: of an effective batch, as far as one device has it, of its heaviest micro-batches.
    """

    plan: Plan
    fits: bool
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    step_seconds: float | None
    tokens_per_second: float | None


def probe(
    config: Any, plan: Plan, settings: StepSettings, load: Load, hardware: Hardware
) -> ProbeResult:
    """Runs the plan's heaviest steps and measures their peak.

    A plan that overflows the budget gives `fits=False`; its memory is given back either way.
    """
    device = torch_device(hardware)
    devices = next_devices(device, plan.devices_of_process)
    limit_memory(hardware, devices)
    if device.type == "cpu":
        peak = trace_step(config, plan, settings, load, RandomWeights(device)).peak_bytes
        if peak > hardware.budget_bytes:
            return ProbeResult(plan, False, peak, None, None, None)
        # once more without the trace, which takes longer than a small model's operators
        seconds, tokens = time_step(build_step(config, plan, settings, RandomWeights(device)), load)
        return ProbeResult(plan, True, peak, None, seconds, tokens / seconds)
    try:
        return _probe_cuda(config, plan, settings, load, hardware, devices)
    except RuntimeError as error:
        if not is_overflow(error):
            raise
        # the traceback holds tensors; leave the handler before giving memory back
    give_back_memory()
    return ProbeResult(plan, False, 0, None, None, None)


def _probe_cuda(
    config: Any,
    plan: Plan,
    settings: StepSettings,
    load: Load,
    hardware: Hardware,
    devices: Sequence[torch.device],
) -> ProbeResult:
    give_back_memory()
    for each in devices:
        torch.cuda.reset_peak_memory_stats(each)
    memory = HostMemory(hardware.host_budget_bytes)
    step = build_step(
        config, plan, settings, RandomWeights(devices[0]), make_transport(devices[0], memory)
    )
    rehearse(step, load)
    allocated = max(map(torch.cuda.max_memory_allocated, devices))
    reserved = max(map(torch.cuda.max_memory_reserved, devices))
    seconds, tokens = time_step(step, load)
    del step
    give_back_memory()
    return ProbeResult(plan, True, allocated, reserved, seconds, tokens / seconds)


def time_step(step: TrainingStep, load: Load) -> tuple[float, int]:
    """Seconds and tokens of an effective batch on this device; on a GPU the rehearsal warmed it up.

    Timed are as many passes as the rehearsal had, with an update, and taken for all of them: what an
    update waits for is counted once for two passes.
    """
    plan = step.plan
    batch = sequences_of(load.train[: plan.sequences_per_pass]) * min(2, plan.passes)
    _wait_for(step)
    start = time.perf_counter()
    step.run(batch, step=2, learning_rate=0.0)
    _wait_for(step)
    seconds, tokens = time.perf_counter() - start, sum(len(s.tokens) for s in batch)
    share = plan.sequences_per_device / len(batch)
    return seconds * share, round(tokens * share)


def _wait_for(step: TrainingStep) -> None:
    """Lets its GPUs finish what they were given; the CPU has."""
    for device in step.devices.all:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def write_log(path: Path, choice: Choice, probes: Sequence[ProbeResult]) -> None:
    """What was predicted for the chosen plan and the others, and what the probes measured."""
    content = {
        "predicted": choice.estimate.model_dump(mode="json"),
        "predicted_tokens_per_second": choice.forecast and choice.forecast.tokens_per_second,
        "limit": choice.limit,
        "with_all_layers_trained": choice.all_learn and asdict(choice.all_learn),
        "considered": [
            {**asdict(other), "plan": other.plan.model_dump(mode="json")}
            for other in choice.considered
        ],
        "probes": [{**asdict(p), "plan": p.plan.model_dump(mode="json")} for p in probes],
    }
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
