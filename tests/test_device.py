"""What counts as running out of memory, and what as a GPU that is gone."""

import pytest
import torch

from fitlora.device import is_lost, is_overflow, memory_now


@pytest.mark.parametrize(
    ("error", "overflow"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4398046511104 bytes."
            ),
            True,
        ),
        (MemoryError(), True),
        (ValueError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_overflow(error: Exception, overflow: bool) -> None:
    assert is_overflow(error) is overflow


def test_overflow_as_the_cpu_tells_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float32)
    assert is_overflow(caught.value)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: unknown error"), True),
        (RuntimeError("no CUDA-capable device is detected"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("unknown error"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_a_gpu_that_is_gone(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost


def test_memory_is_told_in_figures() -> None:
    cpu = torch.device("cpu")
    assert "GiB are free" in memory_now(cpu)
    assert memory_now(cpu, cpu).count("cpu: ") == 2
