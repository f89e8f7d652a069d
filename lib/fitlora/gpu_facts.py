"""What is known of a GPU that need not be here, by its name or its capability.

This module imports no torch.
"""

import difflib
import re
from dataclasses import dataclass

from fitlora.artifacts import Gpu, Rates
from fitlora.errors import UserError
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


def has_flash_attention(capability: str) -> bool:
    """Whether PyTorch's FlashAttention, with which 16-bit types train, has kernels for the GPU."""
    return parse_capability(capability) >= (8, 0)


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


# --- cards by name ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    memory: what the driver tells of it. gb_per_second: of its memory. tflops: of dense 16-bit products
    that are summed in fp32. link_gb_per_second: of its PCIe, each way.
    """

    capability: str
    memory: str
    gb_per_second: float
    tflops: float
    link_gb_per_second: float


_PCIE_3_X16, _PCIE_4_X8, _PCIE_4_X16, _PCIE_5_X16 = 15.75, 15.75, 31.5, 63.0  # of the standard

# Sources: NVIDIA's architecture papers, each with its tables of specifications (Turing; Ampere GA102,
# version 2; Ada, version 2; RTX Blackwell), and the others' data sheets. GeForce cards since Ampere do
# 16-bit products with fp32 sums at twice their rate of fp32.
CARDS = {
    "RTX 2080 Ti": Card("7.5", "11GiB", 616, 53.8, _PCIE_3_X16),
    "RTX 3060": Card("8.6", "12GiB", 360, 25.5, _PCIE_4_X16),
    "RTX 3060 Ti": Card("8.6", "8GiB", 448, 32.4, _PCIE_4_X16),
    "RTX 3070": Card("8.6", "8GiB", 448, 40.6, _PCIE_4_X16),
    "RTX 3070 Ti": Card("8.6", "8GiB", 608, 43.5, _PCIE_4_X16),
    "RTX 3080": Card("8.6", "10GiB", 760, 59.5, _PCIE_4_X16),
    "RTX 3080 Ti": Card("8.6", "12GiB", 912, 68.2, _PCIE_4_X16),
    "RTX 3090": Card("8.6", "24GiB", 936, 71.2, _PCIE_4_X16),
    "RTX 3090 Ti": Card("8.6", "24GiB", 1008, 80.0, _PCIE_4_X16),
    "RTX 4060": Card("8.9", "8GiB", 272, 30.2, _PCIE_4_X8),
    "RTX 4060 Ti": Card("8.9", "8GiB", 288, 44.1, _PCIE_4_X8),
    "RTX 4060 Ti 16GB": Card("8.9", "16GiB", 288, 44.1, _PCIE_4_X8),
    "RTX 4070": Card("8.9", "12GiB", 504, 58.3, _PCIE_4_X16),
    "RTX 4070 Ti": Card("8.9", "12GiB", 504, 80.2, _PCIE_4_X16),
    "RTX 4080": Card("8.9", "16GiB", 717, 97.5, _PCIE_4_X16),
    "RTX 4090": Card("8.9", "24GiB", 1008, 165.2, _PCIE_4_X16),
    "RTX 5070": Card("12.0", "12GiB", 672, 61.7, _PCIE_5_X16),
    "RTX 5070 Ti": Card("12.0", "16GiB", 896, 87.9, _PCIE_5_X16),
    "RTX 5080": Card("12.0", "16GiB", 960, 112.6, _PCIE_5_X16),
    "RTX 5090": Card("12.0", "32GiB", 1792, 209.5, _PCIE_5_X16),
    "T4": Card("7.5", "15GiB", 320, 65, _PCIE_3_X16),
    "A10": Card("8.6", "22GiB", 600, 125, _PCIE_4_X16),
    "RTX A6000": Card("8.6", "48GiB", 768, 154.8, _PCIE_4_X16),
    "A100 40GB": Card("8.0", "40GiB", 1555, 312, _PCIE_4_X16),
    "A100 80GB": Card("8.0", "80GiB", 2039, 312, _PCIE_4_X16),
    "L4": Card("8.9", "22GiB", 300, 121, _PCIE_4_X16),
    "L40S": Card("8.9", "45GiB", 864, 362, _PCIE_4_X16),
    "H100": Card("9.0", "79GiB", 3350, 989, _PCIE_5_X16),
    "H100 PCIe": Card("9.0", "79GiB", 2000, 756, _PCIE_5_X16),
    "H200": Card("9.0", "139GiB", 4800, 989, _PCIE_5_X16),
}

# What an H200 reaches of the same figures: 770 TFLOP/s, 4,000 GB/s and 55 GB/s
# (hardware of benchmarks/results/three_ways.h200.json).
_PRODUCT_SHARE, _COPY_SHARE, _LINK_SHARE = 0.78, 0.83, 0.87


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def find_card(name: str) -> Card | None:
    """The card of that name in `CARDS`, however it is written; None where there is none."""
    return next((card for known, card in CARDS.items() if _plain(known) == _plain(name)), None)


def known_card(name: str) -> Card:
    """The same; raises UserError, with the names that are most alike, where there is none."""
    found = find_card(name)
    if found is None:
        plain = {_plain(known): known for known in CARDS}
        alike = [
            plain[match] for match in difflib.get_close_matches(_plain(name), plain, cutoff=0.5)
        ]
        like = f" (like it: {', '.join(alike)})" if alike else ""
        raise UserError(
            f"{name} is not among the GPUs that are known{like}; say what it has with hardware.target: "
            f'{{name: {name}, memory: 8GiB, compute_capability: "8.6"}}'
        )
    return found


def documented_rates(card: Card | None) -> Rates:
    """What to expect of a card that cannot be measured; nothing is known of one that is None."""

    def bytes_per_second(gigabytes: float) -> int:
        return round(gigabytes * 10**9)

    if card is None:
        return Rates(
            host_to_device_bytes_per_second=None,
            device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None,
            disk_read_bytes_per_second=None,
            product_flops_per_second={},
        )
    link = bytes_per_second(_LINK_SHARE * card.link_gb_per_second)
    product = round(_PRODUCT_SHARE * card.tflops * 10**12)
    dtypes = ["bfloat16", "float16"] if parse_capability(card.capability) >= (8, 0) else ["float16"]
    return Rates(
        host_to_device_bytes_per_second=link,
        device_to_host_bytes_per_second=link,
        device_copy_bytes_per_second=bytes_per_second(_COPY_SHARE * card.gb_per_second),
        disk_read_bytes_per_second=None,
        product_flops_per_second=dict.fromkeys(dtypes, product),
    )
