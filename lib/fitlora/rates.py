"""How fast the machine's parts are: disk, links and products, each measured in a second or two.

Left out: several links used at once, and a disk whose own cache lies behind the page cache.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import torch

from fitlora.artifacts import Gpu, Rates
from fitlora.console import say
from fitlora.units import MIB, format_bytes

DISK_BYTES = 256 * MIB
DISK_CHUNK_BYTES = 16 * MIB
DISK_SECONDS = 1.5  # for each of writing and reading, so that a slow disk is measured on less
COPY_BYTES = 256 * MIB  # well above any GPU's L2 cache
COPY_SECONDS = 0.2
PRODUCT_SECONDS = 0.6
GPU_PRODUCT_SIZE = 4096
GPU_PRODUCTS = 8  # in one timing, so that launching and waiting are about 1% of it
CPU_PRODUCT_SIZE = 384  # about 1 ms, which fits between other processes' turns on the core


def round_rate(value: float) -> int:
    """A rate per second, to two significant digits."""
    if value <= 0:
        return 0
    step: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return round(value / step) * step


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


def measure_gpu_rates(device: torch.device, gpu: Gpu) -> Rates:
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
