"""What CUDA takes beside PyTorch's allocator, and how fast the GPU is: measured in a fresh process.

A context grows with each kernel that it loads, so only a process of its own tells what a training
process will take, and the caller's stays free of it. Left out: kernels that training loads and the
warm step does not.
"""

import gc
import os
from pathlib import Path

import pynvml
import torch
import torch.nn.functional as F

from fitlora.artifacts import Gpu, Rates, Record
from fitlora.device import device_used_bytes, nvml_session, process_used_bytes
from fitlora.errors import UserError
from fitlora.gpu_facts import documented_context_bytes
from fitlora.machine import visible_gpus
from fitlora.rates import disk_read_rate, measure_gpu_rates
from fitlora.units import GIB, MIB
from fitlora.worker import Lost, Worker

CHILD_SECONDS = 120

# What a context can be. A difference beyond it is another process's coming or going.
LEAST_CONTEXT_BYTES = 64 * MIB
MOST_CONTEXT_BYTES = 2 * GIB


class GpuMeasurement(Record):
    """What a fresh process found out about the first GPU."""

    context_bytes: int
    context_source: str
    workspace_bytes: int
    rates: Rates


def round_size(size_bytes: int) -> int:
    """A size, up to the next MiB and from 100 MiB on to two significant digits of MiB.

    Up, because what is measured too small here is memory that the planner spends twice.
    """
    mebibytes = -(-size_bytes // MIB)
    step: int = 10 ** max(0, len(str(mebibytes)) - 2)
    return -(-mebibytes // step) * step * MIB


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
        rates=measure_gpu_rates(device, gpu),
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


def measure_gpu_in_child(
    gpu: Gpu, uuid: str, used_before: int | None, disk: Path
) -> GpuMeasurement:
    """`measure_gpu` in a fresh process, and the disk of a folder while that process gets ready.

    The process's errors go to the terminal, and end in a UserError.
    """
    try:
        with Worker(expected=measure_gpu) as worker:
            disk_rate = disk_read_rate(disk)
            found = worker.call(measure_gpu, uuid, used_before, seconds=CHILD_SECONDS)
    except Lost as error:
        raise UserError(
            f"measuring {gpu.name} {error}; see that the GPU has about 2 GiB free and that torch "
            f"{torch.__version__} supports its compute capability {gpu.compute_capability}, "
            "or set hardware.device to cpu"
        ) from None
    speeds = found.rates.model_copy(update={"disk_read_bytes_per_second": disk_rate})
    return found.model_copy(update={"rates": speeds})
