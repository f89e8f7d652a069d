"""A model larger than the memory it trains in: how much of the resident speed is left.

    python -m benchmarks.offload --list                  the rows, and the seconds that each takes
    python -m benchmarks.offload --rows 2 5-9 --json benchmarks/results/offload.h100.json
    python -m benchmarks.offload --plans FILE            each row's plan, without a GPU
    python -m benchmarks.offload --planned FILE          with these plans, and no time spent on them
    python -m benchmarks.offload --tiny --json /tmp/x    all of it on the CPU, in seconds

One process measures all rows, with the allocator held to each row's budget less CUDA's context; where
it fails or takes too long, another goes on with the next row; where two rows fail alike, all ends. The
layout is the first of `LAYOUTS`
whose estimate fits, with the fewest streamed layers; all are chosen before anything is measured, as an
optimizer on the host wants the cores for itself.

The floor of a plan is the time that it cannot be faster than: over forward and backward, the longer of
what the computation takes and what its bytes take on the link, and the update. The computation is
timed in a resident run of the same work in the same process, its fastest step, without a budget and
with the optimizer on the device; the link by copying 1 GiB. A row whose resident run does not fit the
device, or is not asked for, has no floor.

A throttled link sends every byte several times, so that it is as busy as the slower one would be. Where
a row has less host memory than its weights take, some layers are read from disk, and the kernel is told
to keep nothing of the file, as a host of that size could not. Rows that an earlier run left in the file
stay, unless this one makes them anew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.common import ROOT, commit, device_label, shape_config, write_result
from fitlora.artifacts import Hardware, SequenceSize, write_text_atomically
from fitlora.device import give_back_memory, limit_memory
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load, sequences_of
from fitlora.offload import disk, residency
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.residency import streaming
from fitlora.offload.transport import CudaTransport, HostTransport, Transport, copy
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import MLP_CHUNK_TOKENS, loss_chunk
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from fitlora.units import GIB, MIB

GB = 10**9
LINK_BYTES = 2**30
CARD = {"name": "H200", "memory": "139GiB", "compute_capability": "9.0"}
CARD_CONTEXT_BYTES = 760 * MIB  # as results/offload.h200.json has it, more than is documented
WORKER = ("-m", "benchmarks.offload", "--worker")

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what is asked, and what is to be reached where something is.

    seconds: what it took or is expected to take on an H200, its resident run with it where no row
    before it has the same one. resident: whether it has one.
    """

    model: str
    budget_gib: float
    micro_batch: int = 1
    sequence_length: int = 2048
    accumulation: int = 1
    micro_batches_per_pass: int = 1
    throttle_gb_per_second: float | None = None  # 12 is a desktop's PCIe 3
    host_gib: float | None = None  # host memory that may be used; None for all
    share_of_floor_to_reach: float | None = None
    tokens_per_second_to_reach: float | None = None
    warm_steps: int = 2
    timed_steps: int = 5
    resident: bool = True
    seconds: int = 10

    @property
    def work(self) -> tuple[Any, ...]:
        """What a resident run depends on; it has the same passes, to be compared phase by phase."""
        step = self.accumulation, self.micro_batches_per_pass
        return self.model, self.micro_batch, self.sequence_length, *step

    @property
    def sequences(self) -> int:
        """Of an optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.sequences * self.sequence_length


def _shared(
    model: str, budget_gib: float, sequences: int, seconds: int, **options: Any
) -> list[Case]:
    """A step of few tokens: a pass for each sequence, one for all of them, and one micro-batch of all.

    seconds: of one pass, or so, over the whole run.
    """
    ways = ((1, sequences, 1), (1, sequences, sequences), (sequences, 1, 1))
    return [
        Case(model=model, budget_gib=budget_gib, sequence_length=512, micro_batch=micro,
             accumulation=count, micro_batches_per_pass=together, warm_steps=1, timed_steps=3,
             seconds=(4 + count // together) * seconds, **options)
        for micro, count, together in ways
    ]  # fmt: skip


_SHORT = (("llama-3-70b", 8, 50), ("llama-2-13b", 5, 15), ("llama-3-8b", 3, 15))
CASES = (
    Case(model="llama-3-70b", budget_gib=8, share_of_floor_to_reach=0.95,
         tokens_per_second_to_reach=1000, seconds=60),
    Case(model="llama-3-70b", budget_gib=6, share_of_floor_to_reach=0.90, seconds=40),
    Case(model="llama-3-70b", budget_gib=4, seconds=40),
    *(
        Case(model="llama-3-70b", budget_gib=24, micro_batch=size, share_of_floor_to_reach=0.98,
             tokens_per_second_to_reach=1140, timed_steps=3, seconds=30 + 20 * size)
        for size in (1, 2, 4)
    ),
    Case(model="llama-2-13b", budget_gib=5, share_of_floor_to_reach=0.95, seconds=15),
    Case(model="llama-3-8b", budget_gib=3, share_of_floor_to_reach=0.95, seconds=15),
    Case(model="llama-3-8b", budget_gib=2),
    *(
        Case(model=model, budget_gib=budget, sequence_length=tokens, seconds=seconds)
        for model, budget, seconds in _SHORT
        for tokens in (512, 1024)
    ),
    *(
        Case(model=model, budget_gib=budget, throttle_gb_per_second=12, timed_steps=3,
             seconds=2 * seconds)
        for model, budget, seconds in _SHORT
    ),
    Case(model="llama-3-8b", budget_gib=8, sequence_length=32768, warm_steps=1, timed_steps=2,
         seconds=70),
    Case(model="llama-3-8b", budget_gib=24, sequence_length=131072, warm_steps=1, timed_steps=1,
         resident=False, seconds=260),
    Case(model="llama-3-70b", budget_gib=8, host_gib=24, warm_steps=1, timed_steps=2, seconds=150),
    *_shared("llama-3-8b", 3, 4, 4),
    *_shared("llama-3-8b", 3, 4, 4, throttle_gb_per_second=12),
    *_shared("llama-3-8b", 2, 8, 4, throttle_gb_per_second=12),  # no room for the large micro-batch
    *_shared("llama-3-70b", 8, 4, 20, throttle_gb_per_second=12),
)  # fmt: skip


TINY = (
    Case(model="tiny", budget_gib=1, micro_batch=2, sequence_length=64),
    Case(model="tiny", budget_gib=0.003, sequence_length=64),
    Case(model="tiny", budget_gib=0.001, sequence_length=64),
    Case(model="tiny", budget_gib=0.003, sequence_length=64, accumulation=3,
         micro_batches_per_pass=2),
)  # fmt: skip


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


class Uncached(disk.DiskRing):
    """Weights on disk that the kernel keeps no copy of."""

    read_bytes = 0
    _written = False

    def _fill(self, flat: Tensor, number: int) -> None:
        if not self._written:
            os.fsync(self._file)  # what is still to be written cannot be dropped
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            self._written = True
        super()._fill(flat, number)
        Uncached.read_bytes += self._sizes[number]
        start = self._starts[number]
        os.posix_fadvise(self._file, start, self._sizes[number], os.POSIX_FADV_DONTNEED)


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


def timed_steps(
    step: TrainingStep,
    batch: Sequence[Any],
    watch: Stopwatch,
    case: Case,
    typical: Callable[[Sequence[float]], float],
) -> dict[str, Any]:
    """What is `typical` of the seconds of a step and of its phases; the peaks of all steps."""
    seconds: list[float] = []
    phases: dict[int, list[Part]] = defaultdict(list)
    cuda = step.device.type == "cuda"
    for index in range(case.warm_steps + case.timed_steps):
        start = time.perf_counter()
        step.run(batch, step=index, learning_rate=1e-5)
        if cuda:
            torch.cuda.synchronize(step.device)
        elapsed, parts = time.perf_counter() - start, watch.parts()
        if index >= case.warm_steps:
            seconds.append(elapsed)
            for number, part in enumerate(parts):
                phases[number].append(part)
    parts = [
        Part(found[0].phase, typical([p.seconds for p in found]), found[-1].uploaded_bytes)
        for found in phases.values()
    ]
    peaks = {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else None,
    }
    return {
        "step_seconds": typical(seconds),
        "all_step_seconds": seconds,
        "phases": [asdict(part) for part in parts],
        **peaks,
    }


# --- the plan of a case --------------------------------------------------------------------------


def settings_of() -> StepSettings:
    """LoRA on all linear layers, rank 16; NF4 with double quantization."""
    lora = {"r": 16, "alpha": 32, "dropout": 0.0}
    return StepSettings.of(check_params({"lora": lora, "train": {}}))


def hardware_of(case: Case, described: Hardware) -> Hardware:
    """The machine with the case's budgets."""
    changes = {"budget_bytes": int(case.budget_gib * GIB)}
    if case.host_gib is not None:
        changes["host_budget_bytes"] = int(case.host_gib * GIB)
    return described.model_copy(update=changes)


def load_of(case: Case) -> Load:
    return Load.uniform(case.sequences, case.sequence_length)


def resident_plan(case: Case, device: str) -> Plan:
    """Everything on the device, all layers recomputed."""
    config = shape_config(case.model)
    return Plan.model_validate(
        {
            "device": device,
            "effective_batch_size": case.sequences,
            "micro_batch_size": case.micro_batch,
            "micro_batches_per_pass": case.micro_batches_per_pass,
            "evaluation_batch_size": case.micro_batch,
            "sequence_length": case.sequence_length,
            "recompute_layers": tuple(range(config.num_hidden_layers)),
            "compute_dtype": "bfloat16" if device == "cuda" else "float32",
            "optimizer": "adamw",
            "loss_chunk_tokens": loss_chunk(config.vocab_size),
            "mlp_chunk_tokens": MLP_CHUNK_TOKENS,
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
            return plan.replace(**layout, **streaming(layers, count))

        count = least(0, layers, lambda count, make=laid_out: fits(make(count)))  # type: ignore[misc]
        if count is not None:
            return laid_out(count)
    return None


def read_from_disk(plan: Plan, fits: Callable[[Plan], bool]) -> Plan | None:
    """The plan with as few layers on disk as make it fit the host; None where none do."""
    most = len(plan.streamed_layers)
    count = least(0, most, lambda count: fits(plan.replace(disk_layers=count)))
    return None if count is None else plan.replace(disk_layers=count)


def plan_case(case: Case, described: Hardware) -> dict[str, Any]:
    """The case's plan and what it is predicted to take; `fits` is False where no layout does."""
    torch.set_num_threads(1)
    hardware, config = hardware_of(case, described), shape_config(case.model)
    estimator = Estimator(config, settings_of(), load_of(case), hardware)
    asked, layers = resident_plan(case, hardware.device), config.num_hidden_layers
    plan = choose_plan(asked, layers, lambda p: estimator(p).process_bytes <= hardware.budget_bytes)
    if plan is not None:
        room = hardware.host_budget_bytes
        plan = read_from_disk(plan, lambda p: estimator(p).host_bytes <= room)
    if plan is None:
        smallest = asked.replace(**LAYOUTS[-1], **streaming(layers, layers))
        return {"fits": False, "predicted_process_bytes": estimator(smallest).process_bytes}
    found = estimator(plan)
    return {
        "fits": True,
        "plan": plan.model_dump(mode="json"),
        "predicted_process_bytes": found.process_bytes,
        "predicted_host_pinned_bytes": found.host_pinned_bytes,
    }


# --- measuring, in a process of its own ----------------------------------------------------------


def measure(
    case: Case, plan: Plan, hardware: Hardware | None, link_bytes_per_second: float
) -> dict[str, Any]:
    """Builds the step on noise and times it; hardware: None for the resident run, without a budget."""
    cuda = plan.device == "cuda"
    device = torch.device(plan.device)
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()
        give_back_memory()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # as with a budget
        torch.cuda.set_per_process_memory_fraction(1.0)
    if hardware is not None:
        limit_memory(hardware)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    times = 1.0
    if hardware is not None and case.throttle_gb_per_second is not None:
        times = max(1.0, link_bytes_per_second / (case.throttle_gb_per_second * GB))
    memory = HostMemory(None if hardware is None else hardware.host_budget_bytes)
    transport = make_transport(device, memory, times)
    transport.folder = ROOT / ".fitlora" / "benchmark"
    cast(Any, residency).DiskRing = Uncached
    Uncached.read_bytes = 0
    start = time.perf_counter()
    config = shape_config(case.model)
    step = build_step(config, plan, settings_of(), RandomWeights(device), transport=transport)
    ready = time.perf_counter() - start
    size = SequenceSize(tokens=case.sequence_length, target_tokens=case.sequence_length - 1)
    typical: Callable[[Sequence[float]], float] = min if hardware is None else statistics.median
    batch = sequences_of([size] * case.sequences)
    found = timed_steps(step, batch, Stopwatch(step, transport), case, typical)
    return {
        **found,
        "ready_seconds": ready,
        "host_pinned_bytes": transport.pinned_bytes,
        "read_bytes": Uncached.read_bytes // (case.warm_steps + case.timed_steps),
        "allocated_before_bytes": before,
        "link_bytes_per_second": link_bytes_per_second / times,
    }


def answer_tasks() -> None:
    """Measures what lines of standard input ask for; a line each, and the end where one fails."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where messages go
    link = None
    for text in sys.stdin:
        task = json.loads(text)
        hardware = (
            None if task["hardware"] is None else Hardware.model_validate_json(task["hardware"])
        )
        plan = Plan.model_validate_json(task["plan"])
        link = link or link_bytes_per_second(torch.device(plan.device))
        found = measure(Case(**task["case"]), plan, hardware, link)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


class Measuring:
    """The process that measures; made again after it has failed."""

    def __init__(self, log: Path, limit_seconds: float) -> None:
        self._log, self.limit_seconds = log, limit_seconds
        self._process: subprocess.Popen[str] | None = None
        self._reader = ThreadPoolExecutor(1)

    def ask(self, case: Case, plan: Plan, hardware: Hardware | None) -> dict[str, Any]:
        """What it found, or why it found nothing."""
        if self._process is None:
            command = [sys.executable, *WORKER]
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    text=True,
                )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        task = {
            "case": asdict(case),
            "plan": plan.model_dump_json(),
            "hardware": None if hardware is None else hardware.model_dump_json(),
        }
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        waiting = self._reader.submit(process.stdout.readline)
        try:
            text = waiting.result(self.limit_seconds)
        except TimeoutError:
            self.end()
            return {"error": f"more than {self.limit_seconds:g} s"}
        if not text:
            self.end()
            words = self._log.read_text().strip().splitlines()
            return {"error": (words[-1] if words else "nothing said")[:300]}
        found: dict[str, Any] = json.loads(text)
        return found

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_NOT_IN_ROWS = ("warm_steps", "timed_steps", "resident", "seconds")


# --- all cases -----------------------------------------------------------------------------------


def make_row(
    case: Case,
    planned: dict[str, Any],
    found: dict[str, Any],
    resident: dict[str, Any],
    hardware: Hardware,
) -> dict[str, Any]:
    """The row of a case: what was asked, the plan, and what both runs found."""
    row = {key: value for key, value in asdict(case).items() if key not in _NOT_IN_ROWS}
    tokens, speed = case.tokens, "tokens_per_second"
    row |= dict.fromkeys((speed, f"resident_{speed}", f"floor_{speed}", "share_of_floor"))
    row |= found
    row |= {key: value for key, value in planned.items() if key != "plan"}
    row |= {"budget_bytes": int(case.budget_gib * GIB), "context_bytes": hardware.context_bytes}
    if "plan" in planned:
        plan = Plan.model_validate_json(json.dumps(planned["plan"]))
        row |= {
            "plan": plan.fingerprint(),
            "streamed_layers": len(plan.streamed_layers),
            **{part: getattr(plan, part) for part in _PARTS},
            "streaming_slots": plan.streaming_slots,
            "disk_layers": plan.disk_layers,
            "mlp_chunk_tokens": plan.mlp_chunk_tokens,
            "compute_dtype": plan.compute_dtype,
        }
    if "error" in resident:
        row["resident_error"] = resident["error"]
    elif resident:
        row[f"resident_{speed}"] = tokens / resident["step_seconds"]
        row["resident_phases"] = resident["phases"]
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
    passes = row.get("accumulation", 1), row.get("micro_batches_per_pass", 1)
    return (*(row[name] for name in asked), row.get("host_gib"), *passes)


def asked_in_words(row: dict[str, Any]) -> str:
    words = (
        f"{row['model']:>12} {row['budget_gib']:>5} GiB {row['micro_batch']}x"
        f"{row['sequence_length']:<6}"
    )
    if row.get("accumulation", 1) > 1:
        words += f" x{row['accumulation']}, {row['micro_batches_per_pass']} in a pass"
    if row["throttle_gb_per_second"] is not None:
        words += f" at {row['throttle_gb_per_second']} GB/s"
    if row.get("host_gib") is not None:
        words += f" of a host's {row['host_gib']} GiB"
    return words


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
        f"{asked_in_words(row)} {number('tokens_per_second', ',.0f'):>7} tokens/s, resident "
        f"{number('resident_tokens_per_second', ',.0f'):>7}, floor "
        f"{number('floor_tokens_per_second', ',.0f'):>7} "
        f"({number('share_of_floor', '.1%')}) {reached}{problem}"
    )


def chosen(texts: Sequence[str] | None, *, tiny: bool = False) -> list[Case]:
    """The rows that texts like 3 or 5-9 name; all of them by default."""
    if tiny:
        return list(TINY)
    if texts is None:
        return list(CASES)
    numbers: list[int] = []
    for text in texts:
        first, _, last = text.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [CASES[number] for number in numbers]


def described_card() -> Hardware:
    """`CARD`, with a host that has as much memory as any row asks for."""
    content = {"hardware": {"target": CARD, "host_memory_budget": "1GiB"}}
    card = profile(check_params(content).hardware, Path())
    return card.model_copy(
        update={"host_budget_bytes": 128 * GIB, "context_bytes": CARD_CONTEXT_BYTES}
    )


def show_plans(cases: Sequence[Case], path: Path) -> None:
    """Each row's plan, without a GPU; into a file that a run can take them from."""
    card = described_card()
    content: dict[str, Any] = {}
    for case in cases:
        planned = content[str(CASES.index(case))] = plan_case(case, card)
        write_text_atomically(path, json.dumps(content))
        needs = planned["predicted_process_bytes"] / GIB
        pinned = planned.get("predicted_host_pinned_bytes", 0) / GIB
        plan = "nothing fits"
        if planned["fits"]:
            plan = Plan.model_validate_json(json.dumps(planned["plan"])).describe()
        print(
            f"{CASES.index(case):>3} {asked_in_words(asdict(case))}: {needs:.2f} GiB, "
            f"{pinned:.1f} GiB pinned; {plan}",
            flush=True,
        )


def plans_of(cases: Sequence[Case], hardware: Hardware) -> list[dict[str, Any]]:
    """All cases' plans, a process for each."""
    workers = max(1, min(len(cases), len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(plan_case, described=hardware), cases))


def run(cases: Sequence[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each case's row as it is known."""
    asked = {"device": "cpu"} if args.tiny else {}
    hardware = profile(check_params({"hardware": asked}).hardware, args.work)
    measuring = Measuring(args.work / "offload.log", args.time_limit_seconds)
    residents: dict[tuple[Any, ...], dict[str, Any]] = {}
    if args.planned:
        content = json.loads(args.planned.read_text())
        plans = [content[str(CASES.index(case))] for case in cases]
    else:
        plans = plans_of(cases, hardware)
    try:
        for case, planned in zip(cases, plans, strict=True):
            found: dict[str, Any] = {}
            resident: dict[str, Any] = {}
            if planned["fits"]:
                if case.resident and case.work not in residents:
                    everything = resident_plan(case, hardware.device)
                    residents[case.work] = measuring.ask(case, everything, None)
                resident = residents.get(case.work, {}) if case.resident else {}
                plan = Plan.model_validate_json(json.dumps(planned["plan"]))
                found = measuring.ask(case, plan, hardware_of(case, hardware))
            yield make_row(case, planned, found, resident, hardware)
    finally:
        measuring.end()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", help="which, as --list numbers them: 3 or 5-9")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--plans", type=Path, help="write the rows' plans to this file and end")
    parser.add_argument("--planned", type=Path, help="a file of plans, in place of planning")
    parser.add_argument("--tiny", action="store_true", help="tiny rows, on the CPU")
    parser.add_argument("--time-limit-seconds", type=float, default=400.0, help="of each run")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "benchmark")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        answer_tasks()
        return
    cases = chosen(args.rows, tiny=args.tiny)
    if args.list:
        for case in cases:
            words = asked_in_words(asdict(case))
            print(f"{CASES.index(case):>3} {words}: about {case.seconds} s")
        print(f"{sum(case.seconds for case in cases)} s in all")
        return
    if args.plans:
        show_plans(cases, args.plans)
        return
    path = args.json or ROOT / "benchmarks" / "results" / f"offload.{device_label()}.json"
    rows = {}
    if path.is_file():
        rows = {key_of(row): row for row in json.loads(path.read_text())["rows"]}
    stamp, error = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}, None
    for row in run(cases, args):
        rows[key_of(row)] = {**row, **stamp}
        print(line(row), flush=True)
        write_result(path, "offload", list(rows.values()))
        if row.get("error") is not None and row["error"] == error:
            break
        error = row.get("error")


if __name__ == "__main__":
    main()
