"""What is known of a GPU that need not be here, by its capability.

This module imports no torch.
"""

from fitlora.artifacts import Gpu
from fitlora.units import MIB

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
