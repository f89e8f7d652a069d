"""Proving a Plan: the real step on the real device, with noise for weights.

Nothing is read from disk and nothing is learned, but every kernel runs and every byte is allocated:
what an estimate traces (`rehearse`) is what runs here, and the copies of a checkpoint beside it. On the
CPU, which has no allocator to ask, the same trace counts real tensors.

On a GPU plans are probed in a process of their own (`Prober`). It has the context that the run will
have, and the caller has none that would count against a small card. What an overflow leaves behind, a
driver's fault, and the kernel's way with a host that is out of memory end it, and not the caller. Plans
that fit follow one another in one process, as starting it takes longer than a probe. On the CPU there
is no context, memory goes back with its last tensor, and a plan is held to the count that estimated it:
the caller's own process does it, in the milliseconds that a small model takes.
"""

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fitlora.artifacts import Hardware, write_text_atomically
from fitlora.device import give_back_memory, is_overflow, limit_memory, torch_device
from fitlora.memory.estimate import (
    Load,
    accept_any,
    rehearse,
    rehearse_save,
    sequences_of,
    trace_step,
)
from fitlora.offload.host_memory import HostMemory, HostMemoryShort, HostPeak
from fitlora.offload.transport import make_transport, tensor_bytes
from fitlora.plan import Plan
from fitlora.planner.search import Choice
from fitlora.step.build import build_step
from fitlora.step.devices import next_devices
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from fitlora.units import format_bytes
from fitlora.worker import Lost, Worker

# A probe's passes, three to six, take seconds, and minutes where a large model is streamed.
MOST_SECONDS = 3600.0
# A step that takes this long is timed as it is rehearsed: noise, and the watch over the host's memory,
# are a small part of it.
LONG_SECONDS = 3.0


@dataclass(frozen=True)
class ProbeResult:
    """What a probe measured; None is not known, as reserved bytes and the host's are on the CPU.

    step_seconds: of an effective batch, as far as one device has it, of its heaviest micro-batches.
    host_peak_bytes: of the host's memory, pinned or not, with what a process had before; files aside.
    Where several of a run are there, of all: one is probed, and others have what it has for itself.
    why: it does not fit. host_over_bytes: where that is for the host's memory, by how much at least.
    """

    plan: Plan
    fits: bool
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    host_peak_bytes: int | None = None
    why: str | None = None
    host_over_bytes: int | None = None


@dataclass
class Prober:
    """Probes plans for one model, load and machine: a context, at whose end no process is left.

    seconds: that a probe may take on a GPU.
    """

    config: Any
    settings: StepSettings
    load: Load
    hardware: Hardware
    seconds: float = MOST_SECONDS
    _worker: Worker | None = field(default=None, init=False)

    def __enter__(self) -> "Prober":
        if self._elsewhere:
            self._worker = Worker(expected=probe)  # it gets ready while a plan is looked for
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end()

    def __call__(self, plan: Plan) -> ProbeResult:
        """What `probe` finds. On a GPU a plan that ends its process on the way does not fit either, and
        none that does not fit leaves its process to another."""
        question = (self.config, plan, self.settings, self.load, self.hardware)
        if not self._elsewhere:
            return probe(*question)
        self._worker = self._worker or Worker()
        try:
            found = self._worker.call(probe, *question, seconds=self.seconds)
        except Lost as error:
            over = 0 if error.by == signal.SIGKILL else None
            found = ProbeResult(plan, False, why=f"its process {error}", host_over_bytes=over)
        if not found.fits:
            self._end()
        return found

    @property
    def _elsewhere(self) -> bool:
        return self.hardware.device == "cuda"

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def probe(
    config: Any, plan: Plan, settings: StepSettings, load: Load, hardware: Hardware
) -> ProbeResult:
    """Runs the plan's heaviest steps in this process, and measures their peak.

    A plan that overflows the budget of the device or of the host gives `fits=False`, with the reason.
    """
    device = torch_device(hardware)
    devices = next_devices(device, plan.devices_of_process)
    limit_memory(hardware, devices)
    if device.type == "cpu":
        peak = trace_step(config, plan, settings, load, RandomWeights(device)).peak_bytes
        if peak > hardware.budget_bytes:
            over = format_bytes(peak - hardware.budget_bytes)
            return ProbeResult(plan, False, peak, why=f"it took {over} more than its budget")
        # once more without the trace, which takes longer than a small model's operators
        seconds, tokens = time_step(build_step(config, plan, settings, RandomWeights(device)), load)
        return ProbeResult(plan, True, peak, None, seconds, tokens / seconds)
    try:
        processes = hardware.processes_here(plan.devices)
        budget = hardware.host_budget_bytes
        return _probe_cuda(config, plan, settings, load, devices, budget, processes)
    except (HostMemoryShort, MemoryError) as error:
        why = str(error) or "the host is out of memory"
        return ProbeResult(plan, False, why=why, host_over_bytes=0)
    except RuntimeError as error:
        if not is_overflow(error):
            raise
        return ProbeResult(plan, False, why=f"it overflowed: {error}".splitlines()[0])


def _probe_cuda(
    config: Any,
    plan: Plan,
    settings: StepSettings,
    load: Load,
    devices: Sequence[torch.device],
    host_budget_bytes: int,
    processes: int = 1,
) -> ProbeResult:
    """processes: of a run like this one, which have the host together."""
    give_back_memory()
    for each in devices:
        torch.cuda.reset_peak_memory_stats(each)
    with HostPeak() as host:
        transport = make_transport(devices[0], HostMemory(host_budget_bytes))
        step = build_step(config, plan, settings, RandomWeights(devices[0]), transport)
        rehearse(step, load, second := Stopwatch(step))
        saved = rehearse_save(step)
    # every process keeps the best adapter, and one of them has a checkpoint's copies beside it
    checkpoint = sum(tensor_bytes(t) for state in saved[1:] for t in state.values())
    del saved
    host_bytes = host.bytes + (processes - 1) * (host.bytes - transport.shared_bytes - checkpoint)
    allocated = max(map(torch.cuda.max_memory_allocated, devices))
    reserved = max(map(torch.cuda.max_memory_reserved, devices))
    found = ProbeResult(plan, True, allocated, reserved, host_peak_bytes=host_bytes)
    over = host_bytes - host_budget_bytes
    if over > 0:
        held, allowed = format_bytes(host_bytes), format_bytes(host_budget_bytes)
        why = f"it took {held} of the host, and {allowed} may be used"
        return replace(found, fits=False, why=why, host_over_bytes=over)
    seconds, tokens = time_step(step, load, second.seconds)
    return replace(found, step_seconds=seconds, tokens_per_second=tokens / seconds)


class Stopwatch:
    """The seconds that a step's devices take for what is done while inside."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        _wait_for(self._step)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        _wait_for(self._step)
        self.seconds = time.perf_counter() - self._start


def time_step(step: TrainingStep, load: Load, rehearsed: float = 0.0) -> tuple[float, int]:
    """Seconds and tokens of an effective batch on this device; on a GPU the rehearsal warmed it up.

    Timed are as many passes as the rehearsal had, with an update, and taken for all of them: what an
    update waits for is counted once for two passes. rehearsed: seconds of the rehearsal's second step,
    the same work, which is not done again where it took long.
    """
    plan = step.plan
    batch = sequences_of(load.train[: plan.sequences_per_pass]) * min(2, plan.passes)
    seconds = rehearsed
    if seconds < LONG_SECONDS:
        with Stopwatch(step) as watch:
            step.run(batch, step=2, learning_rate=0.0, accept=accept_any)
        seconds = watch.seconds
    tokens = sum(len(s.tokens) for s in batch)
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
