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
from fitlora.units import MIB

Device = Literal["cuda", "cpu"]

HOST_STEP_BYTES = 256 * MIB  # kernels of one version differ by a few MiB in what they call total

# A context for a GPU that is not here. 620 MiB: measured on an H100 (capability 9.0, 132
# multiprocessors, CUDA 13). Most of a context grows with the multiprocessors, and no GPU of an
# earlier generation has more, so it is taken for them as an upper bound. From 10.0 on the largest
# has 170: 620 MiB in that proportion, which is not measured.
CONTEXT_BYTES = 620 * MIB
CONTEXT_BYTES_FROM_10_0 = 800 * MIB

# cuBLAS's workspace for each pair of thread and stream: parseChosenWorkspaceSize in PyTorch's
# aten/src/ATen/cuda/CublasHandlePool.cpp, `:4096:2:16:8` (KiB, count) or 32 MiB. Capabilities 10.x
# and 12.x have 32 MiB in some releases from 2.12 on, and the larger one is taken for them.
CUBLAS_BYTES = (2 * 4096 + 8 * 16) * 1024
CUBLAS_BYTES_LARGE = 32 * MIB
CUBLAS_LARGE_MAJORS = (9, 10, 12)
CUBLAS_THREADS = 2  # the main thread, and autograd's thread for the backward pass


def parse_capability(text: str) -> tuple[int, int]:
    """`"12.0"` -> (12, 0), which compares rightly where the text and a float would not."""
    major, minor = text.split(".")
    return int(major), int(minor)


def describe_gpu(name: str, capability: str, memory_bytes: int) -> Gpu:
    """A GPU's record: bf16 products from capability 8.0 on, fp8 from 8.9 on (CUDA's own table)."""
    version = parse_capability(capability)
    return Gpu(
        name=name,
        compute_capability=capability,
        memory_bytes=memory_bytes,
        bf16=version >= (8, 0),
        fp8=version >= (8, 9),
    )


def documented_context_bytes(capability: str) -> int:
    """The context to expect on a GPU that cannot be measured; `CONTEXT_BYTES` has its source."""
    return CONTEXT_BYTES if parse_capability(capability) < (10, 0) else CONTEXT_BYTES_FROM_10_0


def documented_workspace_bytes(capability: str) -> int:
    """What cuBLAS keeps in the allocator on a GPU that cannot be measured; see `CUBLAS_BYTES`."""
    large = parse_capability(capability)[0] in CUBLAS_LARGE_MAJORS
    return CUBLAS_THREADS * (CUBLAS_BYTES_LARGE if large else CUBLAS_BYTES)


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
