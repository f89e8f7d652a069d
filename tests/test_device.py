"""What counts as running out of memory."""

import pytest
import torch

from fitlora.device import is_overflow


@pytest.mark.parametrize(
    ("error", "overflow"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_overflow(error: RuntimeError, overflow: bool) -> None:
    assert is_overflow(error) is overflow
