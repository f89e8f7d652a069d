"""A model larger than the memory it trains in: how much of the resident speed is left.

    python -m benchmarks.offload --json benchmarks/results/offload.h100.json
    python -m benchmarks.offload --models llama-3-70b --budgets 8 6 --throttle-gb-per-second 12 --json …

Each case runs in a process of its own, with the allocator held to the budget less CUDA's context, and
a time limit. The layout is the first of `LAYOUTS` whose estimate fits, with the fewest streamed layers.

The floor of a plan is the time that it cannot be faster than: over forward and backward, the longer of
what the computation takes and what its bytes take on the link, and the update. The computation is
timed in a resident run of the same work, without a budget and with the optimizer on the device, and
the link by copying 1 GiB. A row whose resident run does not fit the device has no floor.

A throttled link sends every byte several times, so that it is as busy as the slower one would be. Rows
that an earlier run left in the file stay, unless this one makes them anew.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, SHAPES, device_label, shape_config, write_result
from fitlora.artifacts import Hardware, SequenceSize
from fitlora.device import limit_memory, torch_device
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load, sequences_of
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.residency import spread
from fitlora.offload.transport import CudaTransport, HostTransport, Transport, copy
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights

GB = 10**9
LINK_BYTES = 2**30
WARM_STEPS, TIMED_STEPS = 3, 5

# From what costs least to what costs most; in each, as few layers as possible are streamed.
_PARTS = ("checkpoints", "embedding", "head", "optimizer_device")
LAYOUTS: tuple[dict[str, str], ...] = tuple(
    {part: "host" if part in hosted else "device" for part in _PARTS}
    for hosted in (
        (),
        ("checkpoints", "embedding"),
        ("checkpoints", "embedding", "head"),
        ("checkpoints", "embedding", "optimizer_device"),
        _PARTS,
    )
)


@dataclass(frozen=True)
class Case:
    """One row: what is asked, and what is to be reached where something is."""

    model: str
    budget_gib: float
    micro_batch: int
    sequence_length: int
    share_of_floor_to_reach: float | None = None
    tokens_per_second_to_reach: float | None = None


CASES = (
    Case("llama-3-70b", 8, 1, 2048, 0.95, 1000),
    Case("llama-3-70b", 6, 1, 2048, 0.90),
    Case("llama-3-70b", 4, 1, 2048),
    *(Case("llama-3-70b", 24, size, 2048, 0.98, 1140) for size in (1, 2, 4, 8)),
    Case("llama-2-13b", 5, 1, 2048, 0.95),
    Case("llama-3-8b", 3, 1, 2048, 0.95),
    Case("llama-3-8b", 2, 1, 2048),
    *(
        Case(model, budget, 1, tokens)
        for model, budget in (("llama-3-70b", 8), ("llama-2-13b", 5), ("llama-3-8b", 3))
        for tokens in (512, 1024)
    ),
    Case("llama-3-8b", 8, 1, 32768),
    Case("llama-3-8b", 24, 1, 131072),
    Case("tiny", 1, 1, 64),
)


# --- the link ------------------------------------------------------------------------------------


class Throttled(CudaTransport):
    """A link that is `times` slower: every copy is made so many times, the last in part."""

    times = 1.0

    def _copy(self, destination: Tensor, source: Tensor) -> None:
        for _ in range(int(self.times)):
            super()._copy(destination, source)
        part = int((self.times % 1) * destination.numel())
        super()._copy(destination.view(-1)[:part], source.view(-1)[:part])


def make_transport(device: torch.device, memory: HostMemory, times: float) -> Transport:
    if device.type == "cpu":
        return HostTransport(device, memory)
    transport = Throttled(device, memory)
    transport.times = times
    return transport


def link_bytes_per_second(device: torch.device) -> float:
    """From pinned host memory to the device: the median of ten copies of 1 GiB."""
    count = LINK_BYTES if device.type == "cuda" else LINK_BYTES // 64
    transport = make_transport(device, HostMemory(), 1.0)
    source = transport.reserve(count, "measuring the link")
    transport.pin()
    destination = torch.empty(count, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        if device.type == "cuda":
            transport.finish(transport.upload(destination, source))
        else:
            copy(destination, source)
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds[2:])


# --- one step's time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A phase of a step: its seconds, and what it asked the link to bring."""

    phase: str
    seconds: float
    uploaded_bytes: int


def floor_seconds(
    resident: Sequence[Part], bytes_of: Sequence[Part], link_bytes_per_second: float
) -> float:
    """The least that a step can take whose phases compute as in `resident` and move `bytes_of`.

    Both have the same phases in the same order.
    """
    total = 0.0
    for computed, moved in zip(resident, bytes_of, strict=True):
        assert computed.phase == moved.phase
        seconds = computed.seconds
        if computed.phase in ("forward", "backward"):
            seconds = max(seconds, moved.uploaded_bytes / link_bytes_per_second)
        total += seconds
    return total


class Stopwatch:
    """Times the phases of a step on its device, without waiting inside it."""

    def __init__(self, step: TrainingStep, transport: Transport) -> None:
        self._cuda = step.device.type == "cuda"
        self._transport = transport
        self._laps: list[tuple[str, Any, Any, int]] = []
        step.phase = self._phase

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start, before = self._now(), self._transport.uploaded_bytes
        yield
        self._laps.append((name, start, self._now(), self._transport.uploaded_bytes - before))

    def parts(self) -> list[Part]:
        """The phases since the last call, in order; the device is done with them."""
        laps, self._laps = self._laps, []

        def seconds(start: Any, end: Any) -> float:
            return float(start.elapsed_time(end) / 1000 if self._cuda else end - start)

        return [Part(name, seconds(start, end), moved) for name, start, end, moved in laps]


def timed_steps(step: TrainingStep, batch: Sequence[Any], watch: Stopwatch) -> dict[str, Any]:
    """Median seconds of a step and of its phases; the peaks of all steps."""
    seconds: list[float] = []
    phases: dict[int, list[Part]] = defaultdict(list)
    cuda = step.device.type == "cuda"
    for index in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        step.run(batch, step=index, learning_rate=1e-5)
        if cuda:
            torch.cuda.synchronize(step.device)
        elapsed, parts = time.perf_counter() - start, watch.parts()
        if index >= WARM_STEPS:
            seconds.append(elapsed)
            for number, part in enumerate(parts):
                phases[number].append(part)
    median = [
        Part(
            found[0].phase,
            statistics.median(p.seconds for p in found),
            found[-1].uploaded_bytes,
        )
        for found in phases.values()
    ]
    peaks = {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }
    return {
        "step_seconds": statistics.median(seconds),
        "phases": [asdict(part) for part in median],
        **peaks,
    }


# --- one case ------------------------------------------------------------------------------------


def params_of(case: Case, host_gib: float | None, *, budget: bool) -> Params:
    hardware: dict[str, Any] = {}
    if budget:
        hardware["memory_budget"] = f"{case.budget_gib}GiB"
    if host_gib is not None:
        hardware["host_memory_budget"] = f"{host_gib}GiB"
    return check_params(
        {"hardware": hardware, "lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "train": {}}
    )


def load_of(case: Case) -> Load:
    return Load.uniform(case.micro_batch, case.sequence_length)


def resident_plan(case: Case, device: str) -> Plan:
    """Everything on the device, all layers recomputed."""
    config = shape_config(case.model)
    return Plan.model_validate(
        {
            "device": device,
            "effective_batch_size": case.micro_batch,
            "micro_batch_size": case.micro_batch,
            "evaluation_batch_size": case.micro_batch,
            "sequence_length": case.sequence_length,
            "recompute_layers": tuple(range(config.num_hidden_layers)),
            "compute_dtype": "bfloat16" if device == "cuda" else "float32",
            "optimizer": "adamw",
            "loss_chunk_tokens": loss_chunk(config.vocab_size),
        }
    )


def least(low: int, high: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest number from `low` to `high` that is `enough`, as all above it are; None if none."""
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def choose_plan(plan: Plan, layers: int, fits: Callable[[Plan], bool]) -> Plan | None:
    """The first layout that fits, with the fewest streamed layers; None where none does."""
    for layout in LAYOUTS:

        def laid_out(count: int, layout: dict[str, str] = layout) -> Plan:
            return plan.replace(**layout, streamed_layers=spread(layers, count))

        count = least(0, layers, lambda count, make=laid_out: fits(make(count)))  # type: ignore[misc]
        if count is not None:
            return laid_out(count)
    return None


def measure(
    case: Case,
    plan: Plan,
    params: Params,
    device: torch.device,
    memory: HostMemory,
    times: float,
) -> dict[str, Any]:
    """Builds the step on noise and times it."""
    transport = make_transport(device, memory, times)
    start = time.perf_counter()
    step = build_step(
        shape_config(case.model),
        plan,
        StepSettings.of(params),
        RandomWeights(device),
        transport=transport,
    )
    ready = time.perf_counter() - start
    size = SequenceSize(tokens=case.sequence_length, target_tokens=case.sequence_length - 1)
    found = timed_steps(step, sequences_of([size] * case.micro_batch), Stopwatch(step, transport))
    return {**found, "ready_seconds": ready, "host_pinned_bytes": transport.pinned_bytes}


def run_resident(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The same work with everything on the device and no budget."""
    params = params_of(case, None, budget=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = resident_plan(case, device.type)
    return measure(case, plan, params, device, HostMemory(), 1.0)


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The case within its budget; `fits` is False where no layout is small enough."""
    params = params_of(case, args.host_gib, budget=True)
    hardware: Hardware = profile(params.hardware, args.work)
    limit_memory(hardware)
    device = torch_device(hardware)
    link = link_bytes_per_second(device)
    times = 1.0
    if args.throttle_gb_per_second is not None and device.type == "cuda":
        times = max(1.0, link / (args.throttle_gb_per_second * GB))
    config = shape_config(case.model)
    estimator = Estimator(config, StepSettings.of(params), load_of(case), hardware)
    asked = resident_plan(case, device.type).replace(streaming_slots=args.slots)
    if args.streamed is None:
        plan = choose_plan(asked, config.num_hidden_layers, lambda p: estimator(p).fits)
    else:
        which = spread(config.num_hidden_layers, args.streamed)
        plan = asked.replace(**LAYOUTS[-1], streamed_layers=which)
    if plan is None:
        return {"fits": False}
    found = measure(case, plan, params, device, HostMemory(hardware.host_budget_bytes), times)
    return {
        **found,
        "fits": True,
        "plan": plan.fingerprint(),
        "streamed_layers": len(plan.streamed_layers),
        **{part: getattr(plan, part) for part in _PARTS},
        "streaming_slots": plan.streaming_slots,
        "compute_dtype": plan.compute_dtype,
        "budget_bytes": hardware.budget_bytes,
        "context_bytes": hardware.context_bytes,
        "predicted_process_bytes": estimator(plan).process_bytes,
        "link_bytes_per_second": link / times,
    }


# --- all cases -----------------------------------------------------------------------------------


def in_process(case: Case, args: argparse.Namespace, *, resident: bool) -> dict[str, Any]:
    """The case in a process of its own: what it found, or why it found nothing."""
    command = [sys.executable, "-m", "benchmarks.offload", "--case", json.dumps(asdict(case))]
    command += ["--work", str(args.work)]
    for name in ("throttle_gb_per_second", "host_gib", "streamed", "slots"):
        value = getattr(args, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    if resident:
        command.append("--resident")
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=args.time_limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {args.time_limit_seconds:.0f} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or "nothing said").splitlines()[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_row(
    case: Case, found: dict[str, Any], resident: dict[str, Any], throttled: float | None
) -> dict[str, Any]:
    """The row of a case from what the two processes found."""
    row: dict[str, Any] = {**asdict(case), "throttle_gb_per_second": throttled}
    tokens = case.micro_batch * case.sequence_length
    speed = "tokens_per_second"
    row |= dict.fromkeys((speed, f"resident_{speed}", f"floor_{speed}", "share_of_floor"))
    row |= {key: value for key, value in found.items() if key != "phases"}
    if "error" in resident:
        row["resident_error"] = resident["error"]
    else:
        row[f"resident_{speed}"] = tokens / resident["step_seconds"]
    if "phases" in found:
        row[speed] = tokens / found["step_seconds"]
        moved = [Part(**part) for part in found["phases"]]
        row["uploaded_bytes"] = sum(part.uploaded_bytes for part in moved)
        if "phases" in resident:
            computed = [Part(**part) for part in resident["phases"]]
            floor = floor_seconds(computed, moved, found["link_bytes_per_second"])
            row[f"floor_{speed}"] = tokens / floor
            row["share_of_floor"] = floor / found["step_seconds"]
    return row


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one row from another."""
    asked = ("model", "budget_gib", "micro_batch", "sequence_length", "throttle_gb_per_second")
    return tuple(row[name] for name in asked)


def line(row: dict[str, Any]) -> str:
    """A row of the table that is printed."""

    def number(key: str, form: str) -> str:
        return "–" if row.get(key) is None else format(row[key], form)

    reached = ""
    if row["share_of_floor_to_reach"] is not None and row["share_of_floor"] is not None:
        enough = row["share_of_floor"] >= row["share_of_floor_to_reach"]
        wanted = row["tokens_per_second_to_reach"]
        enough = enough and (wanted is None or row["tokens_per_second"] >= wanted)
        reached = "reached" if enough else "missed"
    problem = row.get("error") or ("" if row.get("fits", True) else "does not fit")
    return (
        f"{row['model']:>12} {row['budget_gib']:>5} GiB {row['micro_batch']}x"
        f"{row['sequence_length']:<6} {number('tokens_per_second', ',.0f'):>7} tokens/s, resident "
        f"{number('resident_tokens_per_second', ',.0f'):>7}, floor "
        f"{number('floor_tokens_per_second', ',.0f'):>7} "
        f"({number('share_of_floor', '.1%')}) {reached}{problem}"
    )


def chosen(args: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in CASES
        if case.model in (args.models or {c.model for c in CASES} - {"tiny"})
        and (args.budgets is None or case.budget_gib in args.budgets)
        and (args.tokens is None or case.sequence_length in args.tokens)
        and (args.micro_batches is None or case.micro_batch in args.micro_batches)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--budgets", nargs="+", type=float, help="GiB")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--micro-batches", nargs="+", type=int)
    parser.add_argument("--throttle-gb-per-second", type=float, help="12 is a desktop's PCIe 3")
    parser.add_argument("--host-gib", type=float, help="host memory that may be used")
    parser.add_argument("--streamed", type=int, help="stream so many layers, and all else as well")
    parser.add_argument("--slots", type=int, default=2, help="streamed layers on the device")
    parser.add_argument("--time-limit-seconds", type=float, default=540.0, help="of each process")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "benchmark")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case is not None:
        case = Case(**json.loads(args.case))
        print(json.dumps((run_resident if args.resident else run_case)(case, args)))
        return
    path = args.json or ROOT / "benchmarks" / "results" / f"offload.{device_label()}.json"
    rows = {}
    if path.is_file():
        rows = {key_of(row): row for row in json.loads(path.read_text())["rows"]}
    residents: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in chosen(args):
        same = (case.model, case.micro_batch, case.sequence_length)
        if same not in residents:
            residents[same] = in_process(case, args, resident=True)
        found = in_process(case, args, resident=False)
        row = make_row(case, found, residents[same], args.throttle_gb_per_second)
        rows[key_of(row)] = row
        print(line(row), flush=True)
        write_result(path, "offload", list(rows.values()))


if __name__ == "__main__":
    main()
