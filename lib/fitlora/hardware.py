"""What the machine is, how fast its parts are, and how much of it may be used.

Two kinds of facts come together in one artifact. What a thing is (name, capability, memory) is read
from the driver, torch and the kernel. How fast it is, and what CUDA takes beside PyTorch's
allocator, cannot be looked up, so it is measured, in a few seconds. The trade-off is precision
against stability: every later stage may depend on these facts, so a measured one is rounded
coarsely and keeps its former value while it stays close (`keep_stable`). Free memory, clocks and
times change from minute to minute and never enter the artifact; they are only said.

The GPU is measured in a process of its own. A context grows with each kernel that it loads, so only
a fresh one tells what a training process will take, and the caller's process stays free of it.

What the measurements leave out: kernels that training loads and the warm step does not, several
links used at once, and a disk whose own cache lies behind the page cache.
"""

import gc
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Literal

import psutil
import pynvml
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from fitlora.artifacts import Gpu, Hardware, Rates, Record
from fitlora.console import say
from fitlora.device import device_used_bytes, gpu_uuid, nvml_session, process_used_bytes, why_no_gpu
from fitlora.errors import UserError
from fitlora.params import HardwareParams
from fitlora.units import GIB, MIB, format_bytes, parse_bytes

Device = Literal["cuda", "cpu"]

HOST_STEP_BYTES = 256 * MIB  # kernels of one version differ by a few MiB in what they call total
STABLE_SHARE = 0.15  # a measured fact this close to its former value keeps it

DISK_BYTES = 256 * MIB
DISK_CHUNK_BYTES = 16 * MIB
DISK_SECONDS = 1.5  # for each of writing and reading, so that a slow disk is measured on less
COPY_BYTES = 256 * MIB  # well above any GPU's L2 cache
COPY_SECONDS = 0.2
PRODUCT_SECONDS = 0.6
GPU_PRODUCT_SIZE = 4096
GPU_PRODUCTS = 8  # in one timing, so that launching and waiting are about 1% of it
CPU_PRODUCT_SIZE = 384  # about 1 ms, which fits between other processes' turns on the core
CHILD_SECONDS = 120

# What a context can be. A difference beyond it is another process's coming or going.
LEAST_CONTEXT_BYTES = 64 * MIB
MOST_CONTEXT_BYTES = 2 * GIB

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

_CHILD = (
    "import json, sys; from fitlora.hardware import measure_gpu; "
    "print(measure_gpu(sys.argv[1], json.loads(sys.argv[2])).model_dump_json())"
)


class GpuMeasurement(Record):
    """What a fresh process found out about the first GPU."""

    context_bytes: int
    context_source: str
    workspace_bytes: int
    rates: Rates


# Facts that are looked up


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


# NVML


def _used_bytes_if_told(uuid: str) -> int | None:
    try:
        with nvml_session() as nvml:
            return device_used_bytes(nvml, uuid)
    except pynvml.NVMLError:
        return None  # the caller has a way without it, and says which way it took


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


# Measuring


def round_rate(value: float) -> int:
    """A rate per second, to two significant digits."""
    if value <= 0:
        return 0
    step: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return round(value / step) * step


def round_size(size_bytes: int) -> int:
    """A size, up to the next MiB and from 100 MiB on to two significant digits of MiB.

    Up, because what is measured too small here is memory that the planner spends twice.
    """
    mebibytes = -(-size_bytes // MIB)
    step: int = 10 ** max(0, len(str(mebibytes)) - 2)
    return -(-mebibytes // step) * step * MIB


def fastest_seconds(
    work: Callable[[], object], finish: Callable[[], object], seconds: float
) -> float:
    """The fastest of the runs of `work` that begin within `seconds`, after one to warm up.

    The fastest, because what others do on the machine only adds. `finish` waits for the device.
    """
    work()
    finish()
    best = math.inf
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        finish()
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop >= end:
            return best


def disk_read_rate(folder: Path) -> int | None:
    """Bytes per second of reading a file in order from `folder`'s disk; None if it cannot be told.

    Writes up to `DISK_BYTES` to a file that has no name, so that nothing can be left behind; drops
    it from the page cache and reads it back, again and again, of which the fastest counts. Raises
    OSError where the folder cannot be written.
    """
    if not hasattr(os, "posix_fadvise"):  # without it the page cache would be measured
        return None
    if shutil.disk_usage(folder).free < 2 * DISK_BYTES:
        say(f"the disk is not measured: it has less than {format_bytes(2 * DISK_BYTES)} free")
        return None
    chunk = os.urandom(DISK_CHUNK_BYTES)  # what compresses would be read too fast
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        written = 0
        end = time.perf_counter() + DISK_SECONDS
        while written < DISK_BYTES and (written == 0 or time.perf_counter() < end):
            written += file.write(chunk)
            os.fdatasync(file.fileno())  # only clean pages can be dropped
        best = 0.0
        end = time.perf_counter() + DISK_SECONDS
        while best == 0 or time.perf_counter() < end:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            best = max(best, _read_once(file, end))
    return round_rate(best)


def _read_once(file: FileIO, end: float) -> float:
    buffer = bytearray(DISK_CHUNK_BYTES)
    file.seek(0)
    count = 0
    start = time.perf_counter()
    while size := file.readinto(buffer):
        count += size
        if time.perf_counter() >= end:
            break
    return count / (time.perf_counter() - start)


def product_rate(device: torch.device, dtype: torch.dtype, size: int, products: int) -> int:
    """Floating-point operations per second of square matrix products, `products` in one timing."""
    # a generator of its own: measuring must not move the caller's random numbers
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    b = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    out = torch.empty_like(a)

    def work() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    seconds = fastest_seconds(work, _waiting_for(device), PRODUCT_SECONDS)
    return round_rate(products * 2 * size**3 / seconds)


def copy_rate(source: torch.Tensor, target: torch.Tensor, moved_bytes: int) -> int:
    """Bytes per second of copying `source` to `target`, of which one at least is on the GPU."""
    device = target.device if target.is_cuda else source.device

    def work() -> None:
        target.copy_(source, non_blocking=True)

    seconds = fastest_seconds(work, _waiting_for(device), COPY_SECONDS)
    return round_rate(moved_bytes / seconds)


def _waiting_for(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def measure_cpu(folder: Path) -> Rates:
    """The rates that matter where the CPU computes; there are no links to a device.

    The product's is one thread's times torch's threads. All threads at once wait for the slowest,
    and where others use the cores too that measures the others (200 GFLOP/s or 4, from run to run,
    on two shared cores). What the threads take from each other (cache, clock) is left out.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = product_rate(torch.device("cpu"), torch.float32, CPU_PRODUCT_SIZE, 1)
    finally:
        torch.set_num_threads(threads)
    return Rates(
        host_to_device_bytes_per_second=None,
        device_to_host_bytes_per_second=None,
        device_copy_bytes_per_second=None,
        disk_read_bytes_per_second=disk_read_rate(folder),
        product_flops_per_second={"float32": round_rate(threads * product)},
    )


def measure_gpu(uuid: str, used_before: int | None) -> GpuMeasurement:
    """Measures torch's first GPU; only right in a fresh process that has used no GPU yet.

    `uuid` is NVML's name of that GPU, `used_before` what `device_used_bytes` said before this
    process touched it, None where NVML does not tell. The disk's rate is left None.
    """
    device = torch.device("cuda", 0)
    gpu = visible_gpus()[0]
    _warm_step(device, torch.bfloat16 if gpu.bf16 else torch.float16)
    torch.cuda.synchronize(device)
    gc.collect()
    workspace_bytes = torch.cuda.memory_allocated(device)  # the step's own tensors are gone
    context_bytes, source = choose_context(
        gpu.compute_capability,
        torch.cuda.memory_reserved(device),
        *_context_readings(device, uuid, used_before),
    )
    return GpuMeasurement(
        context_bytes=round_size(context_bytes),
        context_source=source,
        workspace_bytes=round_size(workspace_bytes),
        rates=_measure_gpu_rates(device, gpu),
    )


def _warm_step(device: torch.device, dtype: torch.dtype) -> None:
    """A small training step: products in both threads, attention, pointwise kernels, reductions.

    It makes CUDA load the kinds of kernels that a real step needs, and cuBLAS take its workspaces.
    Everything that it allocates is free when it returns, but for those.
    """
    embedding = (torch.randn(256, 256, device=device) * 0.05).to(dtype).requires_grad_()
    weight = (torch.randn(256, 256, device=device) * 0.05).to(dtype).requires_grad_()
    bias = torch.zeros(256, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.arange(256).pin_memory().to(device, non_blocking=True)  # (sequence,)
    x = F.silu(F.linear(embedding[tokens], weight, bias))  # (sequence, hidden)
    heads = x.view(1, 256, 4, 64).transpose(1, 2)  # (batch, heads, sequence, head)
    attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    x = x + attended.transpose(1, 2).reshape(256, 256) @ weight
    loss = F.cross_entropy((x @ embedding.T).float(), tokens)
    loss.backward()
    loss.item()


def _context_readings(
    device: torch.device, uuid: str, used_before: int | None
) -> tuple[int | None, int | None, int]:
    """What this process has by NVML's process list, what the device's use has grown by since
    `used_before`, and all that is used on the device by CUDA's account; None: NVML does not tell.
    """
    free, total = torch.cuda.mem_get_info(device)
    own = grown = None
    try:
        with nvml_session() as nvml:
            if used_before is not None:
                grown = device_used_bytes(nvml, uuid) - used_before
            own = process_used_bytes(nvml, uuid, os.getpid())
    except pynvml.NVMLError:
        pass  # one of the readings is always there
    return own, grown, total - free


def choose_context(
    capability: str,
    reserved_bytes: int,
    own_bytes: int | None,
    grown_bytes: int | None,
    device_bytes: int,
) -> tuple[int, str]:
    """The context's size in bytes, from the best of the readings that can be one, and its source.

    The context is a reading less what the allocator has reserved. The process list counts this
    process alone; the device's own figures are shared with all others on it.
    """
    shared = "if other processes come, go or work on the GPU, that is in it"
    readings = (
        (own_bytes, "what NVML lists for the process"),
        (grown_bytes, f"what the whole GPU's use grew by; {shared}"),
        (device_bytes, f"all that is used on the GPU; {shared}"),
    )
    for reading, source in readings:
        if reading is not None:
            context_bytes = reading - reserved_bytes
            if LEAST_CONTEXT_BYTES <= context_bytes <= MOST_CONTEXT_BYTES:
                return context_bytes, source
    return (
        documented_context_bytes(capability),
        "the documented size, since others are at work on the GPU and no reading can be a context",
    )


def _measure_gpu_rates(device: torch.device, gpu: Gpu) -> Rates:
    dtypes = [torch.float16, torch.float32]
    if gpu.bf16:
        dtypes.insert(0, torch.bfloat16)
    products = {
        str(dtype).removeprefix("torch."): product_rate(
            device, dtype, GPU_PRODUCT_SIZE, GPU_PRODUCTS
        )
        for dtype in dtypes
    }
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return Rates(
        host_to_device_bytes_per_second=copy_rate(pinned, here, COPY_BYTES),
        device_to_host_bytes_per_second=copy_rate(here, pinned, COPY_BYTES),
        device_copy_bytes_per_second=copy_rate(here, there, 2 * COPY_BYTES),  # read and written
        disk_read_bytes_per_second=None,
        product_flops_per_second=products,
    )


def _measure_gpu_in_child(gpu: Gpu, uuid: str, used_before: int | None) -> GpuMeasurement:
    """`measure_gpu` in a fresh process; its errors go to the terminal, and end in a UserError."""
    library = str(Path(__file__).resolve().parents[1])
    paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, uuid, json.dumps(used_before)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=CHILD_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
        )
        return GpuMeasurement.model_validate_json(child.stdout.rstrip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        found = f"had no end after {CHILD_SECONDS} s"
    except subprocess.CalledProcessError as error:
        found = f"ended with status {error.returncode}; its own error is above"
    except ValidationError as error:
        found = f"printed something else ({error.errors()[0]['msg']})"
    raise UserError(
        f"measuring {gpu.name} {found}; see that the GPU has about 2 GiB free and that torch "
        f"{torch.__version__} supports its compute capability {gpu.compute_capability}, "
        "or set hardware.device to cpu"
    )


# The profile


def profile(params: HardwareParams, disk: Path) -> Hardware:
    """What the machine is and how much of it may be used; takes seconds, and says what it notes.

    The first GPU is measured and all are listed. `disk` is a folder on the disk to measure, made
    if it is not there. Raises UserError where `params` asks for what is not here: cuda without a
    GPU, a target beside device cpu, a budget beyond the memory or within CUDA's context.
    """
    host_bytes = host_memory_bytes()
    host_budget_bytes = _budget(
        "hardware.host_memory_budget", params.host_memory_budget, host_bytes, "this host"
    )
    gpus, device = _find_gpus(params)
    if device == "cuda":
        whose, capacity_bytes = gpus[0].name, gpus[0].memory_bytes
    else:
        whose, capacity_bytes = "this host, as far as it may be used,", host_budget_bytes
    budget_bytes = _budget("hardware.memory_budget", params.memory_budget, capacity_bytes, whose)

    context_bytes = workspace_bytes = 0
    if params.target is not None:
        context_bytes = documented_context_bytes(params.target.compute_capability)
        workspace_bytes = documented_workspace_bytes(params.target.compute_capability)
        rates = Rates(
            host_to_device_bytes_per_second=None,
            device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None,
            disk_read_bytes_per_second=None,
            product_flops_per_second={},
        )
    else:
        disk.mkdir(parents=True, exist_ok=True)
        if device == "cuda":
            measured = _measure_first_gpu(gpus[0], budget_bytes)
            context_bytes = measured.context_bytes
            workspace_bytes = measured.workspace_bytes
            rates = measured.rates.model_copy(
                update={"disk_read_bytes_per_second": disk_read_rate(disk)}
            )
        else:
            rates = measure_cpu(disk)
    if budget_bytes <= context_bytes:
        raise UserError(
            f"a budget of {format_bytes(budget_bytes)} on {whose} leaves nothing to compute in: "
            f"CUDA's context alone takes {format_bytes(context_bytes)}; "
            "raise hardware.memory_budget"
        )
    return Hardware(
        device=device,
        gpus=gpus,
        cpu_name=cpu_name(),
        cpu_cores=cpu_cores(),
        host_memory_bytes=host_bytes,
        host_budget_bytes=host_budget_bytes,
        budget_bytes=budget_bytes,
        context_bytes=context_bytes,
        workspace_bytes=workspace_bytes,
        rates=rates,
        target=None if params.target is None else params.target.name,
    )


def _budget(key: str, size: str | None, capacity_bytes: int, whose: str) -> int:
    if size is None:
        return capacity_bytes
    wanted_bytes = parse_bytes(size)
    if wanted_bytes > capacity_bytes:
        raise UserError(
            f"{key} is {size} ({format_bytes(wanted_bytes)}), but {whose} has "
            f"{format_bytes(capacity_bytes)}; lower it, or set it to null to use all"
        )
    return wanted_bytes


def _find_gpus(params: HardwareParams) -> tuple[tuple[Gpu, ...], Device]:
    target = params.target
    if target is not None:
        if params.device == "cpu":
            raise UserError(
                f"hardware.target describes a GPU ({target.name}), but hardware.device is cpu; "
                "set one of them to null or auto"
            )
        gpu = describe_gpu(target.name, target.compute_capability, parse_bytes(target.memory))
        return (gpu,), "cuda"
    device, reason = choose_device(params.device)
    if device == "cpu":
        say(f"the CPU is the device: {reason}")
        return (), "cpu"
    gpus = visible_gpus()
    if len(set(gpus)) > 1:
        names = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in gpus)
        say(f"the GPUs differ: {names}; the first is profiled, and plans are made for it")
    return gpus, "cuda"


def _measure_first_gpu(gpu: Gpu, budget_bytes: int) -> GpuMeasurement:
    uuid = gpu_uuid()
    used_before = _used_bytes_if_told(uuid)
    if used_before is not None and used_before > max(64 * MIB, gpu.memory_bytes - budget_bytes):
        say(
            f"{format_bytes(used_before)} of {gpu.name} are in use by other processes, and the "
            f"budget of {format_bytes(budget_bytes)} counts on some of it; hardware.memory_budget "
            "can be lowered"
        )
    measured = _measure_gpu_in_child(gpu, uuid, used_before)
    say(f"CUDA's context is {measured.context_source}")
    return measured


def keep_stable(new: Hardware, old: Hardware) -> Hardware:
    """`new`, with the measured facts that are within 15% of their former value left as they were.

    So noise changes no hash of a later stage. Memory that is taken (context, workspace) may only
    have shrunk to be left: a growth, however small, is memory that a plan would spend twice. Facts
    of other devices, or of a described one, are no former values.
    """
    machine = ("device", "gpus", "cpu_name", "target")
    if new.target is not None or any(getattr(new, key) != getattr(old, key) for key in machine):
        return new
    rates, former = new.rates, old.rates
    links = {
        key: _keep_rate(getattr(rates, key), getattr(former, key))
        for key in Rates.model_fields
        if key != "product_flops_per_second"
    }
    products = {
        dtype: _keep_rate(value, former.product_flops_per_second.get(dtype))
        for dtype, value in rates.product_flops_per_second.items()
    }
    context_bytes = _keep_size(new.context_bytes, old.context_bytes)
    if context_bytes >= new.budget_bytes:  # the budget lies between the two
        context_bytes = new.context_bytes
    return new.model_copy(
        update={
            "rates": Rates.model_validate({**links, "product_flops_per_second": products}),
            "context_bytes": context_bytes,
            "workspace_bytes": _keep_size(new.workspace_bytes, old.workspace_bytes),
        }
    )


def _keep_rate(new: int | None, old: int | None) -> int | None:
    if new is None or old is None:
        return new
    return old if abs(new - old) <= STABLE_SHARE * old else new


def _keep_size(new: int, old: int) -> int:
    return old if (1 - STABLE_SHARE) * old <= new <= old else new


def describe(hardware: Hardware) -> list[str]:
    """What, how much and how fast, as lines for people."""
    lines = [
        f"host    {hardware.cpu_name}, {hardware.cpu_cores} cores, "
        f"{format_bytes(hardware.host_budget_bytes)} of "
        f"{format_bytes(hardware.host_memory_bytes)} may be used"
    ]
    if hardware.device == "cpu":
        lines.append(f"device  the CPU, {format_bytes(hardware.budget_bytes)} may be used")
    else:
        gpu = hardware.gpus[0]
        types = [name for name, has in (("bf16", gpu.bf16), ("fp8", gpu.fp8)) if has]
        count = f"{len(hardware.gpus)} x " if len(hardware.gpus) > 1 else ""
        role = "target" if hardware.target is not None else "device"
        lines.append(
            f"{role}  {count}{gpu.name}, {format_bytes(gpu.memory_bytes)}, compute capability "
            f"{gpu.compute_capability} ({', '.join(types) or 'neither bf16 nor fp8'})"
        )
        lines.append(
            f"budget  {format_bytes(hardware.budget_bytes)}, of which CUDA's context takes "
            f"{format_bytes(hardware.context_bytes)} and cuBLAS "
            f"{format_bytes(hardware.workspace_bytes)}"
        )
    rates = hardware.rates
    links = (
        ("host to GPU", rates.host_to_device_bytes_per_second),
        ("GPU to host", rates.device_to_host_bytes_per_second),
        ("GPU copy", rates.device_copy_bytes_per_second),
        ("disk read", rates.disk_read_bytes_per_second),
    )
    speeds = [f"{name} {format_bytes(rate)}/s" for name, rate in links if rate is not None]
    speeds += [
        f"{dtype} {rate / 10**12:g} TFLOP/s"
        for dtype, rate in rates.product_flops_per_second.items()
    ]
    lines.append(f"speed   {', '.join(speeds) or 'not measured: the GPU is not here'}")
    return lines
