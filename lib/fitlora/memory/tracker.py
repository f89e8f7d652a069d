"""What a run takes, while it runs: allocated, reserved, the process, the host, phase by phase, to JSONL.

On a GPU the caching allocator is asked. On the CPU there is none, so live tensor storage is counted by
the same trace that makes an estimate; the size of the process stands apart, as most of it is Python
and libraries. That trace looks at every operator, so a run has only some of its steps counted: the
first, which are the heaviest, and one now and then, as seldom as its cost asks for. What is dear to ask
(the driver, the host) is asked every half minute. Together that keeps a run within 0.5% of its speed.

What a counted step's peak is made of is measured as well, in the estimate's terms: what the step holds
as the phase of the peak begins is asked of the step; activations are what a forward leaves behind; and
temporary buffers are the rest, with what libraries keep.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from fitlora.artifacts import dump_line
from fitlora.console import say
from fitlora.device import gpu_uuid, nvml_session, process_used_bytes
from fitlora.memory.advice import Edge
from fitlora.memory.trace import MemoryTrace, rounded

FILE = "memory.jsonl"
COUNTED_FIRST, COUNTED_EVERY = 2, 25  # of each kind of work; the latter at the most
MOST_SLOWER = 0.005  # by counting, in the long run
SECONDS_BETWEEN_QUESTIONS = 30.0

Parts = Callable[[], Mapping[str, Iterable[torch.Tensor]]]


def counted_every(more: float) -> int:
    """Of how many times one may be counted. more: what that adds to one, as a share of it."""
    return max(COUNTED_EVERY, math.ceil(more / MOST_SLOWER))


@dataclass
class _Pace:
    """When work of one kind is counted, by how long it takes with and without."""

    done: int = 0
    due: int = COUNTED_EVERY
    plain_seconds: float = 0.0  # of the last one that was not counted

    @property
    def is_due(self) -> bool:
        return self.done < COUNTED_FIRST or self.done >= self.due

    def take(self, seconds: float, *, counted: bool) -> None:
        """Takes in how long one has taken."""
        if not counted:
            self.plain_seconds = seconds
        elif self.done >= COUNTED_FIRST:
            more = seconds / self.plain_seconds - 1 if self.plain_seconds else 0.0
            self.due = self.done + counted_every(more)
        self.done += 1


class MemoryTracker:
    """Tracks memory during training.

        tracker = MemoryTracker(log_dir="memory_logs")
        tracker.update(step=current_step)

    Each `update` appends a line to `log_dir/memory.jsonl`. Sizes are bytes; what the device does not
    have, or was not asked for, is None. `phase` may be entered around parts of a step to get each
    one's peak, and `watch` (or `measuring`, for some of many times) around work on the CPU, where
    peaks are counted only inside it.

    edge: what the run is expected to take and may take; `warn` is told when it comes near. clock: in
    seconds, for what counting costs; CPU time, as other processes have their share of any other.
    """

    def __init__(
        self,
        log_dir: str | Path,
        device: torch.device | str | None = None,
        *,
        edge: Edge | None = None,
        warn: Callable[[str], None] = say,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.path = Path(log_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._process = psutil.Process()
        self._trace: MemoryTrace | None = None
        self._left: int | None = None  # alive at the end of a watch, until the next update tells it
        self._phases: dict[str, int] = {}
        self._parts: Parts | None = None  # asked in steps that are counted
        self._floor = 0  # alive when the last forward began
        self._components: dict[str, int] = {}  # of the highest phase since the last update
        self._edge, self._warn, self._clock = edge or Edge(), warn, clock
        self._paces: defaultdict[str, _Pace] = defaultdict(_Pace)
        self._since = time.perf_counter()
        self._asked = -SECONDS_BETWEEN_QUESTIONS
        self.phase_peaks: dict[str, int] = {}
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes: int | None = None
        if self.device.type == "cuda":
            self.peak_reserved_bytes = 0
            torch.cuda.reset_peak_memory_stats(self.device)  # another run here may have had its own
        self.warnings: list[str] = []
        self.own_seconds = 0.0  # what the tracker itself took, counting on the CPU aside

    @contextmanager
    def watch(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Counts the tensors of the CPU while inside; on a GPU the allocator counts anyway.

        tensors: those that are there already.
        """
        if self.device.type == "cuda":
            del tensors  # a step that is put away inside must be able to go
            yield
            return
        with MemoryTrace() as trace:
            trace.watch(tensors)
            self._trace = trace
            try:
                yield
            finally:
                self._read_peak()
                self._left, self._trace = trace.live_bytes, None

    @contextmanager
    def measuring(self, kind: str, parts: Parts) -> Iterator[None]:
        """`watch`, the first times that work of this kind is done and now and then after.

        parts: gives the tensors that are held, by what they are for. What the peak is made of is then
        measured too, on a GPU as well.
        """
        pace, start = self._paces[kind], self._clock()
        counted = pace.is_due
        if counted:
            with self._counting(parts):
                yield
        else:
            yield
        pace.take(self._clock() - start, counted=counted)

    @contextmanager
    def _counting(self, parts: Parts) -> Iterator[None]:
        self._parts = parts
        try:
            with self.watch(tensor for held in parts().values() for tensor in held):
                yield
        finally:
            self._parts = None

    def also(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were made unseen while a watch was on."""
        if self._trace is not None:
            self._trace.watch(tensors)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the peak inside under `name`."""
        if self.device.type == "cuda":
            with self._on_own_time():
                self._read_peak()
                torch.cuda.reset_peak_memory_stats(self.device)
                held = self._held(name)
            yield
            with self._on_own_time():
                self._book(name, self._read_peak(), held)
        elif self._trace is not None:
            trace = self._trace
            trace.phase_peaks.pop(name, None)
            held = self._held(name)
            with trace.during(name):
                yield
            self._book(name, trace.phase_peaks.get(name, 0), held)
        else:
            yield

    def take_over(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes in the peaks of a run's earlier parts. records: of its log, of which steps have them."""
        for record in records:
            phases = record.get("phase_bytes") or {}
            for name, peak in phases.items():
                self.phase_peaks[name] = max(self.phase_peaks.get(name, 0), peak)
            peaks = (record.get("allocated_bytes") or 0, *phases.values())
            self.peak_allocated_bytes = max(self.peak_allocated_bytes, *peaks)
            if self.peak_reserved_bytes is not None:
                reserved = record.get("reserved_bytes") or 0
                self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved)

    def _held(self, phase: str) -> dict[str, int]:
        """Bytes that are held on the device as a phase begins, by what for; empty where none asks.

        What a forward leaves is its backward's activations: all that came since the forward began.
        """
        if self._parts is None:
            return {}
        found = {name: self._bytes_of(tensors) for name, tensors in self._parts().items()}
        alive = self._alive()
        if phase != "backward":
            self._floor = alive
        return {**found, "activations": alive - self._floor}

    def _bytes_of(self, tensors: Iterable[torch.Tensor]) -> int:
        """What the tensors' storages take of the device, each once, as its allocator counts."""
        here = (t.untyped_storage() for t in tensors if self._has(t))
        return sum({storage.data_ptr(): rounded(storage.nbytes()) for storage in here}.values())

    def _has(self, tensor: torch.Tensor) -> bool:
        """Whether it is on this device, which without a number is the only one of its type."""
        there, here = tensor.device, self.device
        return there.type == here.type and here.index in (None, there.index)

    def _alive(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        assert self._trace is not None
        return self._trace.live_bytes

    def _book(self, name: str, peak: int, held: dict[str, int]) -> None:
        if peak > max(self._phases.values(), default=0):
            if held and name == "forward":
                held["activations"] = self._alive() - self._floor
            rest = {"temporary_buffers": peak - sum(held.values())} if held else {}
            self._components = {**held, **rest}
        for peaks in (self._phases, self.phase_peaks):
            peaks[name] = max(peaks.get(name, 0), peak)

    @contextmanager
    def _on_own_time(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.own_seconds += time.perf_counter() - start

    def _read_peak(self) -> int:
        """The allocator's peak since it was last reset, taken into the run's."""
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats_as_nested_dict(self.device)
            peak = int(stats["allocated_bytes"]["all"]["peak"])
            reserved = int(stats["reserved_bytes"]["all"]["peak"])
            self.peak_reserved_bytes = max(self.peak_reserved_bytes or 0, reserved)
        else:
            peak = self._trace.peak.bytes if self._trace is not None else 0
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, peak)
        return peak

    def update(self, step: int | None = None) -> dict[str, Any]:
        """Measures, appends a line, and returns it."""
        with self._on_own_time():
            return self._update(step)

    def _update(self, step: int | None) -> dict[str, Any]:
        peak = self._read_peak()
        cuda = self.device.type == "cuda"
        seconds = time.perf_counter() - self._since
        process_bytes, free_share = None, None
        if seconds - self._asked >= SECONDS_BETWEEN_QUESTIONS:
            self._asked = seconds
            process_bytes = self._process_bytes()
            host = psutil.virtual_memory()
            free_share = host.available / host.total
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(seconds, 3),
            "allocated_bytes": self._live_bytes(),
            "peak_allocated_bytes": max([peak, *self._phases.values()]) or None,
            "reserved_bytes": torch.cuda.memory_reserved(self.device) if cuda else None,
            "process_bytes": process_bytes,
            "host_bytes": self._process.memory_info().rss,
            "phases": dict(self._phases),
            "components": self._components,
        }
        found = self._edge.look(
            step,
            peak_bytes=line["peak_allocated_bytes"],
            live_bytes=line["allocated_bytes"],
            host_bytes=line["host_bytes"],
            host_free_share=free_share,
        )
        if found:
            line["warnings"] = found
            self.warnings += found
            for warning in found:
                self._warn(f"memory: {warning}")
        self._phases.clear()
        self._components = {}
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._trace is not None:
            self._trace.reset_peak()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump_line(line))
        return line

    def _live_bytes(self) -> int | None:
        """What is allocated now; on the CPU, inside a watch or at the end of one since the last time."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        left, self._left = self._left, None
        return left if self._trace is None else self._trace.live_bytes

    def _process_bytes(self) -> int | None:
        """What this process takes on the GPU, context included, as NVML tells; None where it cannot."""
        if self.device.type != "cuda":
            return None
        try:
            with nvml_session() as nvml:
                return process_used_bytes(nvml, gpu_uuid(self.device.index or 0), os.getpid())
        except pynvml.NVMLError:
            return None
