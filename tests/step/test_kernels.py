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

from fitlora import step
from fitlora.quantization.layout import nested_code
from fitlora.step import float8, ops, pointwise  # noqa: F401  (define the operators)

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
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
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1.0), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("shape", [(1, 2), (3, 100), (2, 1024), (5, 3, 16), (11, 2, 20)])
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
    logits = random((3, vocabulary), dtype) * 4 + 2000
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


def dequantized(
    kernel: Callable[..., None], weight: tuple[Tensor | None, ...], like: Tensor, *how: Any
) -> Tensor:
    """What a kernel makes of a packed weight, in the shape and type of `like`."""
    absmax, out = weight[1], torch.full_like(like, torch.nan)
    assert absmax is not None
    kernel(*weight, torch.empty_like(absmax, dtype=torch.float32), out, *how)
    return out


@interpreted
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size", "quant_type", "lookup"),
    [
        ((1, 1), 64, "nf4", "load"),
        ((3, 13), 32, "fp4", "select"),
        ((15, 300), 64, "nf4", "load"),
        ((2, 4096), 4096, "nf4", "load"),
    ],
)
def test_dequantizing(
    shape: tuple[int, int], block_size: int, quant_type: Any, lookup: str, double: bool
) -> None:
    from fitlora.step.dequantize_kernel import dequantize_4bit

    weight = packed_weight(shape[0] * shape[1], block_size, double)
    # a view of something larger may lie on no boundary of words
    assert weight[0] is not None
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), weight[0].view(-1)])[1:]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        like, how = torch.empty(shape, dtype=dtype), (block_size, quant_type)
        expected = dequantized(torch.ops.fitlora.dequantize_4bit, weight, like, *how)
        near = 1e-6 if dtype == torch.float32 else 2**-6
        for part in (weight, (shifted, *weight[1:])):
            found = dequantized(dequantize_4bit, part, like, *how, lookup)
            torch.testing.assert_close(found, expected, rtol=near, atol=1e-9)


# --- fp8 ----------------------------------------------------------------------------------------


E4M3 = torch.float8_e4m3fn
# The interpreter (3.7) loses the carry where rounding to fp8 reaches the exponent: 127.9 becomes 64.
# So there the kernels leave float32 and PyTorch rounds it; on a GPU they round themselves.
NOT_ROUNDED = torch.float32


def float8_close(found: Tensor, expected: Tensor, share: float = 0.01) -> None:
    """The same numbers but for neighbours here and there, where a quotient was rounded otherwise."""
    found, expected = found.cpu().float(), expected.cpu().float()
    assert bool(((found - expected).abs() <= expected.abs() * 2**-3 + 2**-9).all())
    assert float((found != expected).float().mean()) <= share


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [1, 100, 1024])
def test_quantizing_rows(n: int, scaled: bool, dtype: torch.dtype) -> None:
    from fitlora.step.float8_kernels import quantize_rows

    x, factor = random((5, n), dtype) * 3, random((n,), torch.float32, 1) if scaled else None
    x[2] = 0
    x[3] *= 1e-38
    results = []
    for run, kind in ((quantize_rows, NOT_ROUNDED), (torch.ops.fitlora.quantize_rows, E4M3)):
        out, scales = torch.empty((5, n), dtype=kind), torch.zeros(5, 1)
        run(x, factor, out, scales)
        results.append((out.to(E4M3), scales))
    float8_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def weights_in_float8(
    run: Callable[..., None],
    weight: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    *how: Any,
    dtype: torch.dtype = E4M3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both layouts, as (out, in), and the scales of the rows."""
    assert weight[0] is not None
    device = weight[0].device
    straight = torch.empty(shape, dtype=dtype, device=device)
    turned = torch.empty(shape[::-1], dtype=dtype, device=device)
    row_scales = torch.zeros(shape[0], device=device)
    run(*weight, row_scales, turned, True, *how)
    row_scales.zero_()
    run(*weight, row_scales, straight, False, *how)
    return straight.to(E4M3), turned.t().to(E4M3), row_scales


@interpreted
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size", "quant_type"),
    [((1, 64), 64, "nf4"), ((130, 32), 32, "fp4"), ((5, 1152), 128, "nf4")],
)
def test_dequantizing_to_float8(
    shape: tuple[int, int], block_size: int, quant_type: str, double: bool
) -> None:
    from fitlora.step.float8_kernels import dequantize_float8

    weight = packed_weight(shape[0] * shape[1], block_size, double)
    twin = torch.ops.fitlora.dequantize_float8
    expected = weights_in_float8(twin, weight, shape, block_size, quant_type)
    how = (block_size, quant_type)
    found = weights_in_float8(dequantize_float8, weight, shape, *how, dtype=NOT_ROUNDED)
    float8_close(found[0], expected[0])
    assert torch.equal(found[1].float(), found[0].float())
    torch.testing.assert_close(found[2], expected[2])


# --- compiled, without a GPU ---------------------------------------------------------------------

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


def compile_launch(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """What Triton does at a kernel's first launch on an H100, short of loading it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    options = {k: v for k, v in keywords.items() if k in ("num_warps", "enable_fp_fusion")}
    values = dict(zip(names, arguments, strict=False))
    values |= {k: v for k, v in keywords.items() if k in names}
    signature, constants, divisible = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float) and name not in keywords:
            signature[name] = "fp32"
        elif isinstance(value, int) and name not in keywords and value != 1:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(function, signature, constants, divisible)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def forget_kernels() -> None:
    """Whether a kernel is interpreted is settled when its module is imported: let it be again."""
    for name in ("pointwise_kernels", "float8_kernels", "dequantize_kernel", "dropout_kernel"):
        sys.modules.pop(f"fitlora.step.{name}", None)
        vars(step).pop(name, None)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Launches only compile; gives the names of the kernels that were."""
    from triton.runtime.jit import JITFunction

    forget_kernels()
    compiled: set[str] = set()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        compile_launch(self, arguments, keywords)
        compiled.add(self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    yield compiled
    forget_kernels()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.skipif(sys.platform != "linux", reason="needs ptxas, which Triton has for Linux")
@pytest.mark.parametrize("n", [1, 4096])
def test_they_compile(n: int, compiling: set[str]) -> None:
    """The interpreter takes what the compiler refuses, such as a loop that changes a type."""
    from fitlora.step.dequantize_kernel import dequantize_4bit
    from fitlora.step.dropout_kernel import dropout
    from fitlora.step.float8_kernels import dequantize_float8, quantize_rows

    x = torch.zeros(3, n, dtype=torch.bfloat16)
    heads, weight, row = x.view(3, 1, n).expand(3, 7, n), x[0], torch.zeros(3)
    angle, targets = torch.zeros(3, n // 2 + 1), torch.zeros(3, dtype=torch.int64)
    run = kernels()
    for y in (x, heads):
        run.rms_norm(y, weight, 1e-5, 0.0, y)
        run.add_rms_norm(y, y, weight, 1e-5, 1.0, y, y)
        run.rms_norm_backward(y, y, weight, 1e-5, 0.0, None, y)
        run.rms_norm_backward(y, y, weight, 1e-5, 0.0, y, y)
    for backward in (False, True):
        run.rope(heads, heads[:, :1], angle, angle, backward)
    for kind in ("silu", "gelu_tanh"):
        run.glu(x, x, kind, x)
        run.glu_backward(x, x, x, kind)
    for softcap in (0.0, 30.0):
        for gradient in (False, True):
            run.cross_entropy(x, targets, 1.0, softcap, row, gradient)
    for accumulate in (False, True):
        dropout(x, targets.int(), 3, 5, x, accumulate)
    for double in (False, True):
        packed = packed_weight(3 * n, 64, double)
        for dtype in (torch.bfloat16, torch.float32):
            dequantized(dequantize_4bit, packed, x.to(dtype), 64, "nf4")
        dequantized(dequantize_4bit, packed, x, 64, "fp4", "select")
        weights_in_float8(
            dequantize_float8, packed_weight(192 * n, 64, double), (3, 64 * n), 64, "nf4"
        )
    for factor in (None, torch.ones(n)):
        quantize_rows(x, factor, x.to(E4M3), row[:, None])
    assert len(compiling) == 11, compiling


# --- on a GPU ------------------------------------------------------------------------------------


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    usable = torch.cuda.is_available() and not INTERPRETED
    skip = pytest.mark.skipif(not usable, reason="needs a CUDA device")
    marked: Callable[..., None] = pytest.mark.gpu(skip(test))
    return marked


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """fp32: a GPU's exponentials and roots are good to a few units in the last place.

    bf16: one rounding.
    """
    return (
        {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 5e-5, "atol": 5e-5}
    )


def check_on_gpu(name: str, *arguments: Any) -> None:
    """The operator on the device against its twin in float32 from the same numbers."""
    operator = getattr(torch.ops.fitlora, name)
    device = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    exact = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    operator(*device)
    operator(*exact)
    for found, expected in zip(device, exact, strict=True):
        if isinstance(found, Tensor):
            near = tolerance(found.dtype)
            torch.testing.assert_close(found.cpu().float(), expected.float(), **near)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 4096), (700, 5120), (300, 32, 128), (7, 3, 20), (1, 1)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_on_gpu(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    x, y, z = (random(shape, dtype, seed) for seed in range(3))
    weight, out = random(shape[-1:], dtype, 3), torch.zeros(shape, dtype=dtype)
    norm = (weight, 1e-6, offset)
    check_on_gpu("rms_norm", x, *norm, out)
    check_on_gpu("rms_norm_backward", y, x, *norm, None, out)
    check_on_gpu("rms_norm_backward", y, x, *norm, z, out)
    # in bf16 the sum is rounded before the norm, so the twin must round it too
    total, there = torch.zeros_like(x), torch.zeros(shape, dtype=dtype, device="cuda")
    torch.ops.fitlora.add_rms_norm(x, y, *norm, total, out)
    found = torch.zeros_like(there)
    torch.ops.fitlora.add_rms_norm(x.cuda(), y.cuda(), weight.cuda(), 1e-6, offset, there, found)
    assert torch.equal(there.cpu(), total)
    torch.testing.assert_close(found.cpu(), out, **tolerance(dtype))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_on_gpu_over_what_they_read(dtype: torch.dtype) -> None:
    x, dy, residual = (random((300, 4096), dtype, seed).cuda() for seed in range(3))
    weight, out = random((4096,), dtype, 3).cuda(), torch.empty_like(x)
    for target in (dy, residual):
        torch.ops.fitlora.rms_norm_backward(dy, x, weight, 1e-6, 0.0, residual, out)
        torch.ops.fitlora.rms_norm_backward(dy, x, weight, 1e-6, 0.0, residual, target)
        assert torch.equal(target, out)
    total = torch.empty_like(x)
    torch.ops.fitlora.add_rms_norm(x, dy, weight, 1e-6, 0.0, total, out)
    torch.ops.fitlora.add_rms_norm(x, dy, weight, 1e-6, 0.0, x, dy)
    assert torch.equal(x, total)
    assert torch.equal(dy, out)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "turned"),
    [(1000, 32, 8, 128, 128), (50, 5, 1, 96, 48), (3, 1, 1, 2, 2), (40, 71, 1, 64, 64)],
)
@pytest.mark.parametrize("backward", [False, True])
def test_rope_on_gpu(
    tokens: int, heads: int, kv_heads: int, size: int, turned: int, dtype: torch.dtype,
    backward: bool,
) -> None:  # fmt: skip
    q, k = random((tokens, heads, size), dtype), random((tokens, kv_heads, size), dtype, 1)
    angle = random((tokens, turned // 2), torch.float32, 2)
    check_on_gpu("rope", q, k, angle.cos(), angle.sin(), backward)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(300, 14336), (1000, 333), (1, 1)])
def test_gated_units_on_gpu(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    gate, up, dm = (random(shape, dtype, seed) * 2 for seed in range(3))
    check_on_gpu("glu", gate, up, kind, torch.zeros(shape, dtype=dtype))
    check_on_gpu("glu_backward", dm, gate, up, kind)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("vocabulary", [7, 32000, 128256, 262144])
def test_cross_entropy_on_gpu(vocabulary: int, softcap: float, dtype: torch.dtype) -> None:
    logits = random((9, vocabulary), dtype) * 3
    targets = torch.arange(9) * (vocabulary - 1) // 8
    for gradient in (False, True):
        losses = torch.zeros(9)
        check_on_gpu("cross_entropy", logits.clone(), targets, 1e3, softcap, losses, gradient)


@gpu
def test_cross_entropy_beyond_32_bits_of_offset() -> None:
    rows, vocabulary = 8200, 262144
    logits = torch.zeros((rows, vocabulary), dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 3.0
    targets, losses = torch.full((rows,), 5, device="cuda"), torch.zeros(rows, device="cuda")
    expected = torch.nn.functional.cross_entropy(
        logits[-2:].float(), targets[-2:], reduction="none"
    )
    torch.ops.fitlora.cross_entropy(logits, targets, 1.0, 0.0, losses, True)
    torch.testing.assert_close(losses[-2:], expected, rtol=1e-5, atol=1e-5)
    assert float(logits[-1, 5]) < -0.99


def bitsandbytes_gives(
    weight: tuple[Tensor | None, ...], like: Tensor, block_size: int, quant_type: str
) -> Tensor:
    bnb = torch.ops.bitsandbytes
    packed, absmax, nested_absmax, code, offset = weight
    if nested_absmax is not None:
        absmax = bnb.dequantize_blockwise(absmax, nested_absmax, code, 256, torch.float32) + offset
    found: Tensor = bnb.dequantize_4bit(
        packed, absmax, block_size, quant_type, list(like.shape), like.dtype
    )
    return found


@gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantizing_is_bitsandbytes(
    dtype: torch.dtype, block_size: int, double: bool, quant_type: str
) -> None:
    for shape in ((1024, 4096), (333, 1001), (1, 1), (1, 4095)):
        weight = packed_weight(shape[0] * shape[1], block_size, double, "cuda")
        like, how = torch.empty(shape, dtype=dtype, device="cuda"), (block_size, quant_type)
        found = dequantized(torch.ops.fitlora.dequantize_4bit, weight, like, *how)
        assert torch.equal(found, bitsandbytes_gives(weight, like, *how))


@gpu
def test_lookups_are_one_another() -> None:
    from fitlora.step.dequantize_kernel import dequantize_4bit

    weight = packed_weight(1000 * 1024, 64, True, "cuda")
    like = torch.empty((1000, 1024), dtype=torch.bfloat16, device="cuda")
    found = [dequantized(dequantize_4bit, weight, like, 64, "nf4", how) for how in LOOKUPS]
    assert torch.equal(*found)


LOOKUPS = ("load", "select")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 4096), (300, 14336), (7, 333), (1, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_quantizing_rows_on_gpu(shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    x = (random(shape, dtype) * 3).cuda()
    x[0] *= 1e-38
    factor = random(shape[1:], torch.float32, 1).cuda() if scaled else None
    out = torch.empty(shape, dtype=E4M3, device="cuda")
    scales = torch.zeros(shape[0], 1, device="cuda")
    torch.ops.fitlora.quantize_rows(x, factor, out, scales)
    expected, expected_scales = torch.empty(shape, dtype=out.dtype), torch.zeros(shape[0], 1)
    factor = factor.cpu() if factor is not None else None
    torch.ops.fitlora.quantize_rows(x.cpu(), factor, expected, expected_scales)
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-6, atol=0)
    float8_close(out, expected, 5e-3)


@gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((1024, 4096), 64), ((4096, 14336), 64), ((48, 4096), 4096), ((1, 32), 32)],
)
def test_dequantizing_to_float8_on_gpu(
    shape: tuple[int, int], block_size: int, double: bool, quant_type: str
) -> None:
    weight = packed_weight(shape[0] * shape[1], block_size, double)
    there = tuple(None if part is None else part.cuda() for part in weight)
    run, how = torch.ops.fitlora.dequantize_float8, (block_size, quant_type)
    expected = weights_in_float8(run, weight, shape, *how)
    found = weights_in_float8(run, there, shape, *how)
    float8_close(found[0], expected[0])
    assert torch.equal(found[1].float(), found[0].float())
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-6, atol=0)


@gpu
@pytest.mark.parametrize("rows", [1, 7, 100, 2048])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (4096, 4096), (1024, 14336), (4112, 208)])
def test_scaled_products_on_gpu(rows: int, n: int, k: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("has no fp8")
    run, parts = torch.ops.fitlora.scaled_product, []
    for count, seed in ((rows, 0), (n, 1)):
        out = torch.empty((count, k), dtype=E4M3, device="cuda")
        scales = torch.empty(count, 1, device="cuda")
        x = random((count, k), torch.float32, seed).cuda()
        torch.ops.fitlora.quantize_rows(x, None, out, scales)
        parts += [out, scales]
    a, a_scales, b, b_scales = parts
    found = torch.empty((rows, n), dtype=torch.bfloat16, device="cuda")
    run(a, a_scales, b, b_scales[:, 0].contiguous(), found)
    exact = (a.float() * a_scales) @ (b.float() * b_scales).t()
    # rounded to bf16, and sums of fast accumulation have 14 bits or so
    assert float((found.float() - exact).norm() / exact.norm()) < 5e-3
