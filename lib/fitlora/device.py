"""The device that this process computes on, or the few: which, held to a budget, asking their driver.

Every stage that touches tensors needs this little; how the machine is measured is `fitlora.hardware`.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import pynvml
import torch

from fitlora.artifacts import Hardware
from fitlora.errors import UserError
from fitlora.units import format_bytes


@contextmanager
def nvml_session(library: Any = pynvml) -> Iterator[Any]:
    """NVML, initialised for the block; raises its NVMLError where there is no driver."""
    library.nvmlInit()
    try:
        yield library
    finally:
        library.nvmlShutdown()


def driver_gpu_names(nvml: Any) -> list[str]:
    """Every GPU that the driver knows, whether torch can use it or not."""
    return [
        nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
        for index in range(nvml.nvmlDeviceGetCount())
    ]


def device_used_bytes(nvml: Any, uuid: str) -> int:
    """Memory of a GPU that is allocated, by whomever, without the driver's own reserve."""
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)


def process_used_bytes(nvml: Any, uuid: str, pid: int) -> int | None:
    """Memory of a GPU that a process has; None where NVML does not tell.

    In a container NVML lists the host's process ids, so that one's own is usually not there.
    """
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        if process.pid == pid and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None


def gpu_uuid(index: int = 0) -> str:
    """The GPU's name for NVML, by torch's index."""
    # torch leaves NVML's prefix out
    return f"GPU-{str(torch.cuda.get_device_properties(index).uuid).removeprefix('GPU-')}"


def why_no_gpu() -> str:
    try:
        with nvml_session() as nvml:
            names = driver_gpu_names(nvml)
    except pynvml.NVMLError as error:
        return f"there is no NVIDIA driver to ask ({error})"
    if not names:
        return "the NVIDIA driver lists no GPU"
    listed = ", ".join(names)
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (the driver lists {listed})"
    return (
        f"torch {torch.__version__} cannot use what the driver lists ({listed}); "
        "CUDA_VISIBLE_DEVICES may hide it, or the driver may be too old"
    )


def torch_device(hardware: Hardware) -> torch.device:
    """Where this process computes: the CPU, or torch's current GPU (a rank may have set its own).

    Raises UserError where the artifact describes a GPU that is not here, or torch has none.
    """
    if hardware.device == "cpu":
        return torch.device("cpu")
    if hardware.target is not None:
        raise UserError(
            f"this artifact plans for GPU {hardware.target}, and training needs the machine "
            "itself; remove hardware.target from params.yaml and run: dvc repro"
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"this artifact was made with {hardware.gpus[0].name}, but {why_no_gpu()}; "
            "make it again here with: dvc repro --force profile_hardware"
        )
    return torch.device("cuda", torch.cuda.current_device())


def limit_memory(hardware: Hardware, devices: Sequence[torch.device] | None = None) -> None:
    """Holds this process within `budget_bytes`: PyTorch's allocator to what the context leaves.

    devices: those that the process computes on, if not the one of `torch_device`; each is held to that.

    An allocation beyond it raises torch.OutOfMemoryError, as on a GPU of that size. Call it before
    the first allocation: what is there already stays. On the CPU nothing is limited. Memory beside
    the allocator (paged optimizer states, kernels loaded later) is not held back by it.

    Raises UserError as `torch_device` does, and where the GPU is smaller than the budget.
    """
    first = torch_device(hardware)
    if first.type == "cpu":
        return
    for device in devices or [first]:
        _limit(device, hardware)
    # Segments that grow leave few holes, so that what is reserved stays near what is allocated.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _limit(device: torch.device, hardware: Hardware) -> None:
    # the total that the allocator multiplies the fraction by
    _, total_bytes = torch.cuda.mem_get_info(device)
    if hardware.budget_bytes > total_bytes:
        raise UserError(
            f"this artifact's budget is {format_bytes(hardware.budget_bytes)}, but "
            f"{torch.cuda.get_device_name(device)} has {format_bytes(total_bytes)}; "
            "make it again here with: dvc repro --force profile_hardware"
        )
    torch.cuda.set_per_process_memory_fraction(hardware.allocator_bytes / total_bytes, device)


# What PyTorch's allocators, cuBLAS, the CUDA driver, Triton and bitsandbytes say when memory is short.
_OVERFLOW = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "DefaultCPUAllocator: can't allocate memory",
)
# The CUDA runtime's words for a device that no later call will reach.
_LOST = (
    "busy or unavailable",
    "device is lost",
    "GPU is lost",
    "hardware stack error",
    "launch timed out",
    "no CUDA-capable device",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "unknown error",
    "unspecified launch failure",
)


def is_overflow(error: BaseException) -> bool:
    """Whether memory ran out: the device's, in PyTorch's allocator or a library's own, or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OVERFLOW)


def is_lost(error: BaseException) -> bool:
    """Whether the GPU has vanished under the process, which no later call will mend."""
    text = str(error)
    about_cuda = "CUDA" in text or "NVML" in text or "GPU" in text
    return isinstance(error, RuntimeError) and about_cuda and any(sign in text for sign in _LOST)


def available_bytes(device: torch.device) -> int | None:
    """What tensors of this process could take: what they have, and what is free. None on the CPU."""
    if device.type == "cpu":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)


def memory_now(*devices: torch.device) -> str:
    """What is free on each device, and who has the rest, in figures."""
    if len(devices) == 1:
        return _memory_now(devices[0])
    return "; ".join(f"{device}: {_memory_now(device)}" for device in devices)


def _memory_now(device: torch.device) -> str:
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return f"{format_bytes(memory.available)} of {format_bytes(memory.total)} are free"
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    others = total_bytes - free_bytes - ours
    return (
        f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} are free, this process has "
        f"{format_bytes(ours)}, and other processes and the driver {format_bytes(others)}"
    )


def give_back_memory() -> None:
    """Frees what nothing refers to, and hands the allocator's cached blocks back to the driver.

    After an overflow, call it outside the handler: the traceback holds tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
