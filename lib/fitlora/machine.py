"""What the machine is: names, memory and capabilities, read from the driver, torch and the kernel.

Nothing here takes time or memory worth the name; what can only be measured is in `rates` and
`gpu_measurement`.
"""

import os
import platform
from pathlib import Path
from typing import Literal

import psutil
import torch

from fitlora.artifacts import Gpu
from fitlora.device import why_no_gpu
from fitlora.errors import UserError
from fitlora.gpu_facts import describe_gpu
from fitlora.units import MIB

Device = Literal["cuda", "cpu"]

HOST_STEP_BYTES = 256 * MIB  # kernels of one version differ by a few MiB in what they call total


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch may use, in its order; memory is what CUDA can hand out."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(describe_gpu(p.name, f"{p.major}.{p.minor}", p.total_memory) for p in found)


def cpu_name() -> str:
    """The processor's model, or its architecture where the system has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_memory_limit(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The lowest memory limit of this process's control groups, in bytes; None without one.

    Reads version 2 (`memory.max`) and version 1 (`memory/…/memory.limit_in_bytes`), in the group
    and in all above it: any of them may be the one that ends the process. In a container the path
    may be the host's, which is not there; the mount's own root is the container's group then.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        while True:
            limits += _read_limit(group / name)
            if group == root:
                break
            group = group.parent
    return min(limits, default=None)


def _read_limit(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return [] if text == "max" else [int(text)]


def host_memory_bytes() -> int:
    """Memory that this process can have on the host, rounded down to 256 MiB."""
    total = psutil.virtual_memory().total
    limit = cgroup_memory_limit()
    usable = total if limit is None else min(total, limit)
    return usable // HOST_STEP_BYTES * HOST_STEP_BYTES


def choose_device(wanted: Literal["auto", "cuda", "cpu"]) -> tuple[Device, str]:
    """The device and why; raises UserError where cuda is wanted and torch has none."""
    if wanted == "cpu":
        return "cpu", "hardware.device is cpu"
    if torch.cuda.is_available():
        return "cuda", "torch can use a GPU"
    reason = why_no_gpu()
    if wanted == "cuda":
        raise UserError(f"hardware.device is cuda, but {reason}; set it to auto or cpu")
    return "cpu", reason
