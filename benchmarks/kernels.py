"""How fast the step's kernels run, beside what the device can do and beside the libraries'.

    python -m benchmarks.kernels --json benchmarks/results/kernels.h200.json

Shapes are those of Llama-3-8B with 8,192 tokens. A kernel that moves bytes is held against a copy of
1 GiB on the same device; bytes are those it must read and write, each once. Medians, with the L2 cache
cleared between runs; compiling is not in them. A kernel that fails is reported and the others run.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import SHAPES, write_result
from fitlora.quantization.layout import nested_code
from fitlora.step import float8, ops, pointwise  # noqa: F401  (define the operators)

_8B = SHAPES["llama-3-8b"]
TOKENS, HIDDEN, MIDDLE = 8192, _8B["hidden_size"], _8B["intermediate_size"]
HEADS, KV_HEADS = _8B["num_attention_heads"], _8B["num_key_value_heads"]
HEAD = HIDDEN // HEADS
VOCABULARY, LOSS_ROWS = _8B["vocab_size"], 1024
BLOCK_SIZE = 64

fitlora = torch.ops.fitlora


@dataclass(frozen=True)
class Case:
    """Something to time: its bytes read and written, or its floating-point operations."""

    run: Callable[[], Any]
    bytes: int = 0
    flop: int = 0


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- pointwise -----------------------------------------------------------------------------------


def rms_norm() -> Case:
    x, weight, out = random(TOKENS, HIDDEN), random(HIDDEN), random(TOKENS, HIDDEN)
    return Case(lambda: fitlora.rms_norm(x, weight, 1e-5, 0.0, out), size(x, out))


def torch_rms_norm() -> Case:
    x, weight = random(TOKENS, HIDDEN), random(HIDDEN)
    norm = torch.nn.functional.rms_norm
    return Case(lambda: norm(x, (HIDDEN,), weight, 1e-5), size(x, x))


def add_rms_norm() -> Case:
    a, b, out = (random(TOKENS, HIDDEN) for _ in range(3))
    weight = random(HIDDEN)
    run = fitlora.add_rms_norm
    return Case(lambda: run(a, b, weight, 1e-5, 0.0, a, out), size(a, b, a, out))


def rms_norm_backward() -> Case:
    dy, x, residual = (random(TOKENS, HIDDEN) for _ in range(3))
    weight, dx = random(HIDDEN), random(TOKENS, HIDDEN)
    run = fitlora.rms_norm_backward
    return Case(lambda: run(dy, x, weight, 1e-5, 0.0, residual, dx), size(dy, x, residual, dx))


def head_norm() -> Case:
    x, weight, out = random(TOKENS, HEADS, HEAD), random(HEAD), random(TOKENS, HEADS, HEAD)
    return Case(lambda: fitlora.rms_norm(x, weight, 1e-5, 0.0, out), size(x, out))


def head_norm_backward() -> Case:
    dy, x = random(TOKENS, HEADS, HEAD), random(TOKENS, HEADS, HEAD)
    weight = random(HEAD)
    run = fitlora.rms_norm_backward
    return Case(lambda: run(dy, x, weight, 1e-5, 0.0, None, dy), size(dy, x, dy))


def rope() -> Case:
    fused = random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD)
    q = fused[:, :HIDDEN].view(TOKENS, HEADS, HEAD)
    k = fused[:, HIDDEN : HIDDEN + KV_HEADS * HEAD].view(TOKENS, KV_HEADS, HEAD)
    angle = random(TOKENS, HEAD // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    return Case(lambda: fitlora.rope(q, k, cos, sin, False), size(q, q, k, k, cos, sin))


def glu() -> Case:
    gate, up = random(TOKENS, 2 * MIDDLE).chunk(2, dim=1)
    out = random(TOKENS, MIDDLE)
    return Case(lambda: fitlora.glu(gate, up, "silu", out), size(gate, up, out))


def glu_backward() -> Case:
    gate, up = random(TOKENS, 2 * MIDDLE).chunk(2, dim=1)
    dm = random(TOKENS, MIDDLE)
    return Case(lambda: fitlora.glu_backward(dm, gate, up, "silu"), 2 * size(dm, gate, up))


def gelu_backward() -> Case:
    gate, up = random(TOKENS, 2 * MIDDLE).chunk(2, dim=1)
    dm = random(TOKENS, MIDDLE)
    return Case(lambda: fitlora.glu_backward(dm, gate, up, "gelu_tanh"), 2 * size(dm, gate, up))


def _cross_entropy(softcap: float) -> Case:
    logits, losses = random(LOSS_ROWS, VOCABULARY), random(LOSS_ROWS, dtype=torch.float32)
    targets = torch.randint(VOCABULARY, (LOSS_ROWS,), device="cuda")
    run = fitlora.cross_entropy
    # two passes of reading and one of writing
    return Case(lambda: run(logits, targets, 1.0, softcap, losses, True), 3 * size(logits))


def cross_entropy() -> Case:
    return _cross_entropy(0.0)


def cross_entropy_softcap() -> Case:
    return _cross_entropy(30.0)


def dropout() -> Case:
    x, out = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN)
    tokens = torch.arange(TOKENS, device="cuda")
    keys = ops.row_keys(0, 0, tokens, tokens)
    return Case(lambda: fitlora.dropout(x, keys, 1, 0.1, out, False), size(x, out))


# --- 4-bit weights -------------------------------------------------------------------------------


def packed_weight() -> tuple[Tensor, ...]:
    """Random: packed, absmax, nested_absmax, nested_code, nested_offset, scales."""
    numel = MIDDLE * HIDDEN
    blocks = numel // BLOCK_SIZE
    packed, absmax = (
        torch.randint(256, (n,), device="cuda", dtype=torch.uint8) for n in (numel // 2, blocks)
    )
    nested = torch.rand(blocks // 256, device="cuda")
    offset = torch.tensor(2.0, device="cuda")
    return packed, absmax, nested, nested_code().cuda(), offset, torch.empty(blocks, device="cuda")


def _dequantize(lookup: str) -> Case:
    from fitlora.step.dequantize_kernel import dequantize_4bit

    weight, out = packed_weight(), torch.empty(MIDDLE, HIDDEN, device="cuda", dtype=torch.bfloat16)
    run = dequantize_4bit
    return Case(
        lambda: run(*weight, out, BLOCK_SIZE, "nf4", lookup), size(*weight[:2], out)
    )  # fmt: skip


def dequantize() -> Case:
    return _dequantize("load")


def dequantize_select() -> Case:
    return _dequantize("select")


def bitsandbytes_dequantize() -> Case:
    """As QLoRA calls it: the scales, their offset, and the weight."""
    packed, absmax, nested, code, offset, scales = packed_weight()
    out = torch.empty(MIDDLE, HIDDEN, device="cuda", dtype=torch.bfloat16)
    bnb = torch.ops.bitsandbytes

    def run() -> None:
        bnb.dequantize_blockwise.out(absmax, nested, code, 256, torch.float32, out=scales)
        scales.add_(offset)
        bnb.dequantize_4bit.out(
            packed, scales, BLOCK_SIZE, "nf4", out.shape, torch.bfloat16, out=out
        )

    return Case(run, size(packed, absmax, out))


# --- fp8 -----------------------------------------------------------------------------------------

E4M3 = torch.float8_e4m3fn


def _quantize_rows(features: int, scaled: bool) -> Case:
    x, factor = random(TOKENS, features), random(features, dtype=torch.float32)
    out = torch.empty(TOKENS, features, device="cuda", dtype=E4M3)
    scales = torch.empty(TOKENS, 1, device="cuda")
    column_scale = factor if scaled else None
    return Case(lambda: fitlora.quantize_rows(x, column_scale, out, scales), size(x, out))


def quantize_rows() -> Case:
    return _quantize_rows(HIDDEN, False)


def quantize_rows_scaled() -> Case:
    return _quantize_rows(MIDDLE, True)


def _dequantize_float8(transposed: bool) -> Case:
    *weight, _ = packed_weight()
    shape = (HIDDEN, MIDDLE) if transposed else (MIDDLE, HIDDEN)
    out, scales = torch.empty(shape, device="cuda", dtype=E4M3), torch.empty(MIDDLE, device="cuda")
    run = fitlora.dequantize_float8
    return Case(
        lambda: run(*weight, scales, out, transposed, BLOCK_SIZE, "nf4"), size(*weight[:2], out)
    )


def dequantize_float8() -> Case:
    return _dequantize_float8(False)


def dequantize_float8_transposed() -> Case:
    return _dequantize_float8(True)


# --- products ------------------------------------------------------------------------------------


def product_bf16() -> Case:
    a, b = random(TOKENS, HIDDEN), random(MIDDLE, HIDDEN)
    out = torch.empty(TOKENS, MIDDLE, device="cuda", dtype=torch.bfloat16)
    return Case(lambda: torch.mm(a, b.t(), out=out), flop=2 * TOKENS * HIDDEN * MIDDLE)


def product_float8() -> Case:
    a, b = random(TOKENS, HIDDEN).to(E4M3), random(MIDDLE, HIDDEN).to(E4M3)
    a_scales, b_scales = torch.rand(TOKENS, 1, device="cuda"), torch.rand(MIDDLE, device="cuda")
    out = torch.empty(TOKENS, MIDDLE, device="cuda", dtype=torch.bfloat16)
    run = fitlora.scaled_product
    return Case(lambda: run(a, a_scales, b, b_scales, out), flop=2 * TOKENS * HIDDEN * MIDDLE)


CASES: tuple[Callable[[], Case], ...] = (
    rms_norm, torch_rms_norm, add_rms_norm, rms_norm_backward, head_norm, head_norm_backward, rope,
    glu, glu_backward, gelu_backward, cross_entropy, cross_entropy_softcap, dropout,
    dequantize, dequantize_select, bitsandbytes_dequantize,
    quantize_rows, quantize_rows_scaled, dequantize_float8, dequantize_float8_transposed,
    product_bf16, product_float8,
)  # fmt: skip


# --- timing --------------------------------------------------------------------------------------


def copy_bytes_per_second() -> float:
    """What a copy of 1 GiB on the device reads and writes."""
    from triton.testing import do_bench

    a, b = (torch.empty(1 << 30, device="cuda", dtype=torch.uint8) for _ in range(2))
    return (2 << 30) / (do_bench(lambda: b.copy_(a), return_mode="median") / 1000)


def measure(copy: float) -> Iterator[dict[str, Any]]:
    from triton.testing import do_bench

    for make in CASES:
        try:
            case = make()
            case.run()  # compiles
            torch.cuda.synchronize()
            ms = do_bench(case.run, warmup=10, rep=100, return_mode="median")
        except Exception as error:
            yield {"kernel": make.__name__, "error": f"{type(error).__name__}: {error}"[:2000]}
            continue
        row: dict[str, Any] = {"kernel": make.__name__, "ms": round(ms, 4)}
        if case.bytes:
            row["gb_per_s"] = round(case.bytes / ms / 1e6)
            row["of_copy"] = round(case.bytes / ms * 1000 / copy, 3)
        if case.flop:
            row["tflop_per_s"] = round(case.flop / ms / 1e9)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    args = parser.parse_args()
    copy = copy_bytes_per_second()
    print(f"copy of 1 GiB: {copy / 1e9:.0f} GB/s read and written")
    rows = []
    for row in measure(copy):
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        write_result(args.json, "benchmarks.kernels", rows, copy_gb_per_s=round(copy / 1e9))


if __name__ == "__main__":
    main()
