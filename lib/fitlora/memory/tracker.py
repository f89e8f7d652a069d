"""What a run takes, while it runs: allocated, reserved, the process, the host, phase by phase, to JSONL.

On a GPU the caching allocator is asked. On the CPU there is none, so live tensor storage is counted by
the same trace that makes an estimate; the size of the process stands apart, as most of it is Python
and libraries.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from fitlora.artifacts import dump_line
from fitlora.device import gpu_uuid, nvml_session, process_used_bytes
from fitlora.memory.trace import MemoryTrace

FILE = "memory.jsonl"


class MemoryTracker:
    """Tracks memory during training.

        tracker = MemoryTracker(log_dir="memory_logs")
        tracker.update(step=current_step)

    Each `update` appends a line to `log_dir/memory.jsonl`. Sizes are bytes; what the device does not
    have is None. `phase` may be entered around parts of a step to get each one's peak, and
    `watch` around a whole run on the CPU, where peaks are counted only inside it.
    """

    def __init__(self, log_dir: str | Path, device: torch.device | str | None = None) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.path = Path(log_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._process = psutil.Process()
        self._trace: MemoryTrace | None = None
        self._phases: dict[str, int] = {}
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes: int | None = 0 if self.device.type == "cuda" else None
        self._since = time.perf_counter()

    @contextmanager
    def watch(self, model: torch.nn.Module) -> Iterator[None]:
        """Counts the tensors of the CPU while inside; on a GPU the allocator counts anyway."""
        if self.device.type == "cuda":
            yield
            return
        with MemoryTrace() as trace:
            trace.watch([*model.parameters(), *model.buffers()])
            self._trace = trace
            try:
                yield
            finally:
                self._read_peak()
                self._trace = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the peak inside under `name`."""
        if self.device.type == "cuda":
            self._read_peak()
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self._phases[name] = max(self._phases.get(name, 0), self._read_peak())
        elif self._trace is not None:
            trace = self._trace
            trace.phase_peaks.pop(name, None)
            with trace.during(name):
                yield
            self._phases[name] = max(self._phases.get(name, 0), trace.phase_peaks.get(name, 0))
        else:
            yield

    def _read_peak(self) -> int:
        """The allocator's peak since it was last reset, taken into the run's."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            self.peak_reserved_bytes = max(self.peak_reserved_bytes or 0, reserved)
        else:
            peak = self._trace.peak.bytes if self._trace is not None else 0
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, peak)
        return peak

    def update(self, step: int | None = None) -> dict[str, Any]:
        """Measures, appends a line, and returns it."""
        peak = self._read_peak()
        cuda = self.device.type == "cuda"
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(time.perf_counter() - self._since, 3),
            "allocated_bytes": (
                torch.cuda.memory_allocated(self.device)
                if cuda
                else (self._trace.live_bytes if self._trace is not None else None)
            ),
            "peak_allocated_bytes": max([peak, *self._phases.values()]) or None,
            "reserved_bytes": torch.cuda.memory_reserved(self.device) if cuda else None,
            "process_bytes": self._process_bytes(),
            "host_bytes": self._process.memory_info().rss,
            "phases": dict(self._phases),
        }
        self._phases.clear()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._trace is not None:
            self._trace.reset_peak()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump_line(line))
        return line

    def _process_bytes(self) -> int | None:
        """What this process takes on the GPU, context included, as NVML tells; None where it cannot."""
        if self.device.type != "cuda":
            return None
        try:
            with nvml_session() as nvml:
                return process_used_bytes(nvml, gpu_uuid(self.device.index or 0), os.getpid())
        except pynvml.NVMLError:
            return None
