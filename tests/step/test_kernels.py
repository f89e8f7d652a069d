"""The Triton kernels against their twins: in Triton's interpreter on the CPU, and on a GPU.

The interpreter has to be chosen before Triton is imported, so one test runs this file's others in a
process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fitlora.quantization.layout import nested_code
from fitlora.step import ops, pointwise  # noqa: F401  (define the operators)

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers in rows that lie further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn((*shape[:-1], shape[-1] + 3), generator=generator).to(dtype)
    return wide[..., : shape[-1]]


def both(
    name: str, kernel: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs an operator on the CPU and its kernel on copies; yields (kernel's, twin's) tensors."""
    copies: dict[int, Tensor] = {}

    def copy(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        if id(argument) not in copies:  # one tensor twice is one tensor there too
            there = argument.new_empty((*argument.shape[:-1], argument.shape[-1] + 5))
            there = there[..., : argument.shape[-1]] if argument.dim() > 1 else argument.clone()
            copies[id(argument)] = there.copy_(argument)
        return copies[id(argument)]

    kernel(*[copy(argument) for argument in arguments])
    getattr(torch.ops.fitlora, name)(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield copies[id(argument)], argument


def check(name: str, kernel: Callable[..., None], *arguments: Any) -> None:
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    pairs = list(both(name, kernel, arguments))
    for found, expected in pairs:
        # the interpreter cuts bf16 off where a GPU rounds
        near = 2**-6 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
    assert any(not torch.equal(a, b) for a, (_, b) in zip(before, pairs, strict=True))


def kernels() -> Any:
    from fitlora.step import pointwise_kernels

    return pointwise_kernels


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 100), (2, 1024), (5, 3, 16), (11, 2, 20)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    x, y, z = (random(shape, dtype, seed) for seed in range(3))
    weight, out = random(shape[-1:], dtype, 3), random(shape, dtype, 4)
    norm = (weight, 1e-6, offset)
    check("rms_norm", kernels().rms_norm, x, *norm, out)
    check("add_rms_norm", kernels().add_rms_norm, x, y, *norm, z, out)
    check("add_rms_norm", kernels().add_rms_norm, x, y, *norm, x, out)
    check("rms_norm_backward", kernels().rms_norm_backward, y, x, *norm, None, out)
    check("rms_norm_backward", kernels().rms_norm_backward, y, x, *norm, z, y)
    check("rms_norm_backward", kernels().rms_norm_backward, y, x, *norm, z, z)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "turned"),
    [(1, 1, 1, 2, 2), (4, 4, 2, 16, 16), (3, 5, 1, 24, 10), (2, 40, 3, 128, 128)],
)
def test_rope(
    tokens: int, heads: int, kv_heads: int, size: int, turned: int, dtype: torch.dtype
) -> None:
    q, k = random((tokens, heads, size), dtype), random((tokens, kv_heads, size), dtype, 1)
    angle = random((tokens, turned // 2), torch.float32, 2)
    for backward in (False, True):
        check("rope", kernels().rope, q, k, angle.cos(), angle.sin(), backward)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (2, 1100)])
def test_gated_units(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    gate, up, dm, out = (random(shape, dtype, seed) for seed in range(4))
    gate = gate * 3
    check("glu", kernels().glu, gate, up, kind, out)
    check("glu_backward", kernels().glu_backward, dm, gate, up, kind)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("vocabulary", [1, 300, 8200])
def test_cross_entropy(vocabulary: int, softcap: float, dtype: torch.dtype) -> None:
    logits = random((3, vocabulary), dtype) * 4 + 20
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    for gradient in (False, True):
        losses = torch.zeros(3)
        arguments = (logits.clone(), targets, 0.5, softcap, losses, gradient)
        if vocabulary > 1:
            check("cross_entropy", kernels().cross_entropy, *arguments)
        else:
            for found, expected in both("cross_entropy", kernels().cross_entropy, arguments):
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("features", [5, 1100])
def test_dropout(features: int, accumulate: bool, dtype: torch.dtype) -> None:
    from fitlora.step.dropout_kernel import dropout

    x, out = random((6, features), dtype), random((6, features), dtype, 1)
    keys = ops.row_keys(3, 5, torch.full((6,), 7), torch.arange(6))

    def kernel(x: Tensor, keys: Tensor, stream: int, p: float, *rest: Any) -> None:
        dropout(x, keys, stream, ops.keep_threshold(p), *rest)

    check("dropout", kernel, x, keys, 11, 0.1, out, accumulate)


# --- 4-bit weights -------------------------------------------------------------------------------


def packed_weight(
    numel: int, block_size: int, double: bool, device: str = "cpu"
) -> tuple[Tensor | None, ...]:
    """Random codes and scales: packed, absmax, nested_absmax, nested_code, nested_offset."""
    generator = torch.Generator().manual_seed(numel)
    blocks = -(-numel // block_size)

    def bytes_of(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).to(device)

    def floats(count: int) -> Tensor:
        return torch.rand(count, generator=generator).to(device) + 0.01

    packed = bytes_of((numel + 1) // 2)[:, None]
    if not double:
        return packed, floats(blocks), None, None, None
    nested = (floats(-(-blocks // 256)), nested_code().to(device), floats(1)[0] + 1.5)
    return packed, bytes_of(blocks), *nested


@interpreted
@pytest.mark.parametrize("lookup", ["load", "select"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size", "quant_type"),
    [((1, 1), 64, "nf4"), ((3, 13), 32, "fp4"), ((70, 300), 64, "nf4"), ((5, 4096), 4096, "nf4")],
)
def test_dequantizing(
    shape: tuple[int, int], block_size: int, quant_type: Any, double: bool, lookup: str
) -> None:
    from fitlora.step.dequantize_kernel import dequantize_4bit

    weight = packed_weight(shape[0] * shape[1], block_size, double)
    assert weight[1] is not None
    scales = torch.empty(weight[1].shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found, expected = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        # not aligned to words, as a view of something larger may be
        shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), weight[0].view(-1)])[1:]
        for packed in (weight[0], shifted):
            dequantize_4bit(
                packed,
                *weight[1:],
                scales,
                found,
                block_size,
                quant_type,
                lookup=lookup,
            )
            torch.ops.fitlora.dequantize_4bit(*weight, scales, expected, block_size, quant_type)
            near = 1e-6 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(found, expected, rtol=near, atol=1e-9)
