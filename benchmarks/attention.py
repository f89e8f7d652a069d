"""The step's attention beside cuDNN's: time, memory taken inside, and what a new shape costs.

    python -m benchmarks.attention --json benchmarks/results/attention.h200.json

Sequences of a micro-batch have the same length, as cuDNN wants them, and heads are those of the named
shapes. `flash` is the step's own operator (FlashAttention 2 over sequences that lie behind each other),
`cudnn` PyTorch's operator on the same memory, seen as a batch. The error is that of out, dq, dk and dv
together against float32 on the same numbers; the extra bytes are what a call has at its peak beyond
its inputs, its outputs among them; the first call has what planning or compiling takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import SHAPES, shape_config, write_result
from fitlora.step import ops
from fitlora.step.attention import _PlainAttention, _Rule

Backward = Callable[[], tuple[Tensor, ...]]
Forward = Callable[[], tuple[Tensor, Backward]]
# model, micro-batch, tokens
CASES = (
    ("llama-3-8b", 1, 512), ("llama-3-8b", 4, 512), ("llama-3-8b", 1, 2048), ("llama-3-8b", 3, 2048),
    ("llama-3-8b", 4, 2048), ("llama-3-8b", 1, 2000), ("llama-3-8b", 1, 8192),
    ("qwen2.5-0.5b", 4, 2048), ("llama-2-13b", 4, 2048), ("llama-3-70b", 1, 2048),
)  # fmt: skip
_ERROR_TOKENS = 2048  # beyond, the reference's scores would not fit


def flash(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, batch: int) -> Forward:
    """q: (tokens, heads, d), k and v: (tokens, kv heads, d), of all sequences."""
    length = len(q) // batch
    starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    rest = (starts, [length] * batch, q.shape[-1] ** -0.5, -1)

    def forward() -> tuple[Tensor, Backward]:
        kept = ops.attention(q, k, v, *rest)
        return kept[0], lambda: ops.attention_backward(dout, q, k, v, *kept, *rest)

    return forward


def cudnn(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, batch: int) -> Forward:
    """The same, without a copy: (tokens, heads, d) is (batch, heads, length, d) by strides."""
    aten = torch.ops.aten
    bq, bk, bv, bdout = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(len(q), -1, x.shape[-1])

    def forward() -> tuple[Tensor, Backward]:
        out, lse, starts_q, starts_k, most_q, most_k, seed, offset, _ = (
            aten._scaled_dot_product_cudnn_attention(
                bq, bk, bv, None, True, 0.0, True, False, scale=scale
            )
        )

        def backward() -> tuple[Tensor, ...]:
            found = aten._scaled_dot_product_cudnn_attention_backward(
                bdout, bq, bk, bv, out, lse, seed, offset, None, starts_q, starts_k, most_q, most_k,
                0.0, True, scale=scale,
            )  # fmt: skip
            return tuple(map(flat, found))

        return flat(out), backward

    return forward


def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, batch: int) -> list[Tensor]:
    """out, dq, dk, dv in float32."""
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    out = _PlainAttention.apply(
        *wide, [len(q) // batch] * batch, _Rule(q.shape[-1] ** -0.5, -1, None)
    )
    return [out.detach(), *torch.autograd.grad(out, wide, dout.float())]


def inside(run: Callable[[], Any]) -> tuple[Any, int, float]:
    """What a call gives, its bytes at their peak beyond those before it, and its seconds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before, time.perf_counter() - start


def milliseconds(run: Callable[[], Any]) -> float:
    """Median over calls, each timed on the device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=60, return_mode="median"))


def measure(kind: str, model: str, batch: int, tokens: int) -> dict[str, Any]:
    config = shape_config(model)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    make = torch.Generator("cuda").manual_seed(0)

    def random(count: int) -> Tensor:
        shape = (batch * tokens, count, size)
        return torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16)

    whole = random(heads + 2 * kv_heads)  # queries, keys and values are slices of one tensor
    q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
    dout = random(heads)
    forward = (flash if kind == "flash" else cudnn)(q, k, v, dout, batch)
    (out, backward), _, first_forward = inside(forward)
    _, _, first_backward = inside(backward)
    del out, backward
    (out, backward), forward_bytes, _ = inside(forward)
    gradients, backward_bytes, _ = inside(backward)
    found = {
        "kernel": kind, "model": model, "micro_batch": batch, "sequence_length": tokens,
        "heads": heads, "kv_heads": kv_heads, "head_size": size,
        "forward_ms": milliseconds(forward), "backward_ms": milliseconds(backward),
        "forward_extra_bytes": forward_bytes, "backward_extra_bytes": backward_bytes,
        "first_forward_seconds": first_forward, "first_backward_seconds": first_backward,
        "relative_error": None,
    }  # fmt: skip
    if batch * tokens <= _ERROR_TOKENS:
        expected = reference(q, k, v, dout, batch)
        errors = [
            float((a.float() - b).norm() / b.norm())
            for a, b in zip((out, *gradients), expected, strict=True)
        ]
        found["relative_error"] = statistics.mean(errors)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for model, batch, tokens in CASES:
        if args.models is not None and model not in args.models:
            continue
        for kind in ("flash", "cudnn"):
            try:
                row = measure(kind, model, batch, tokens)
            except RuntimeError as error:  # a shape that a library has no kernel for
                row = {
                    "kernel": kind, "model": model, "micro_batch": batch,
                    "sequence_length": tokens, "error": str(error)[:300],
                }  # fmt: skip
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if args.json is not None:
                write_result(args.json, "attention", rows)


if __name__ == "__main__":
    main()
