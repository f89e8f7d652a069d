"""What only a GPU can show: its kernels against their twins on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fitlora.params import LoraParams
from fitlora.quantization.layout import nested_code
from fitlora.step import ops
from tests.step import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("features", [64, 1000, 4097])
@pytest.mark.parametrize("accumulate", [False, True])
def test_dropout_masks_are_those_of_the_cpu(features: int, accumulate: bool) -> None:
    x = torch.randn(37, features)
    keys = ops.row_keys(5, 9, torch.arange(37) // 10, torch.arange(37) % 10)
    out = torch.randn(37, features)
    expected, found = out.clone(), out.cuda()
    torch.ops.fitlora.dropout(x, keys, 11, 0.1, expected, accumulate)
    torch.ops.fitlora.dropout(x.cuda(), keys.cuda(), 11, 0.1, found, accumulate)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [-1, 5])
def test_attention_agrees_with_the_cpu(
    dtype: torch.dtype, bound: float, kv_heads: int, window: int
) -> None:
    lengths = [33, 1, 64, 7]
    total = sum(lengths)
    starts = torch.tensor([0, 33, 34, 98, 105], dtype=torch.int32)
    make = torch.Generator().manual_seed(0)
    q, g = (torch.randn(total, 4, 64, generator=make) for _ in range(2))
    k, v = (torch.randn(total, kv_heads, 64, generator=make) for _ in range(2))

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        a = [t.to(device, dtype) for t in (q, k, v)]
        s = starts.to(device)
        out, lse, rng, unused = torch.ops.fitlora.attention(*a, s, lengths, 0.125, window)
        back = torch.ops.fitlora.attention_backward(
            g.to(device, dtype), *a, out, lse, rng, unused, s, lengths, 0.125, window
        )
        return [t.float().cpu() for t in (out, lse, *back)]

    for found, expected in zip(run("cuda", dtype), run("cpu", torch.float32), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [3, 16, 48])
def test_gradients_are_added_in_float32(dtype: torch.dtype, rank: int) -> None:
    a, b = torch.randn(517, rank), torch.randn(517, 96)
    a, b = a.to(dtype), b.to(dtype)
    whole = torch.randn(rank * 96 + 64)
    out = whole[64:].view(rank, 96)
    expected = out.double() + 0.3 * a.double().t() @ b.double()
    found = whole.cuda()
    ops.add_product(a.cuda(), b.cuda(), 0.3, found[64:].view(rank, 96))
    torch.testing.assert_close(
        found[64:].view(rank, 96).cpu().double(), expected, rtol=1e-5, atol=1e-4
    )
    assert torch.equal(found[:64].cpu(), whole[:64])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 256])
def test_dequantizing_is_that_of_the_cpu(double: bool, dtype: torch.dtype, block_size: int) -> None:
    import bitsandbytes.functional as F

    weight = torch.randn(256, 1024).cuda()
    packed, state = F.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double, quant_type="nf4"
    )

    def run(device: str) -> torch.Tensor:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
        scales = torch.empty(state.absmax.numel(), dtype=torch.float32, device=device)
        nested = (
            (state.state2.absmax, nested_code().to(device), state.offset)
            if double
            else (None, None, None)
        )
        absmax, code, offset = (t if t is None else t.to(device) for t in nested)
        torch.ops.fitlora.dequantize_4bit(
            packed.to(device), state.absmax.to(device), absmax, code, offset, scales, out,
            block_size, "nf4",
        )  # fmt: skip
        return out.cpu()

    assert torch.equal(run("cuda"), run("cpu"))


def test_a_step_in_bf16_is_near_the_cpus() -> None:
    batch = steps.sequences(7)
    on_cpu = steps.gradients(steps.step(), batch)
    plan = steps.plan(device="cuda", compute_dtype="bfloat16", micro_batch_size=3)
    for layers in ((), (0, 1)):
        made = steps.step(plan.replace(recompute_layers=layers), device="cuda")
        # the noise of the CPU's weights, so that both have the same model
        on_gpu = steps.gradients(steps.same_weights(made, steps.step()), batch)
        for name, expected in on_cpu.items():
            error = (on_gpu[name].cpu() - expected).norm() / expected.norm()
            assert float(error) < 0.06, name


@pytest.mark.parametrize("attention", ["flash", "plain"])
def test_a_step_in_float16_is_near_the_cpus_in_float32(attention: str) -> None:
    assert steps.error_in_float16(attention, device="cuda") < 0.01


@pytest.mark.parametrize(
    "where", [{}, {"optimizer_device": "host"}, {"recompute_layers": (0, 1)}], ids=str
)
def test_biases_and_whole_modules_learn_as_on_the_cpu(where: dict[str, Any]) -> None:
    """In float32, as some of their gradients nearly cancel; and in bf16 they learn."""
    ends = ("embed_tokens", "lm_head", "norm")
    whole = LoraParams(r=4, dropout=0.1, bias="all", modules_to_save=ends)
    settings = replace(steps.settings(), lora=whole)
    shape = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    plan = steps.plan(device="cuda", micro_batch_size=3, **where)
    cpu, batch = steps.step(the_settings=settings, **shape), steps.sequences(7)
    made = steps.same_weights(steps.step(plan, settings, device="cuda", **shape), cpu)
    assert steps.distance(steps.gradients(made, batch), steps.gradients(cpu, batch)) < 1e-3
    made = steps.step(plan.replace(compute_dtype="bfloat16"), settings, device="cuda", **shape)
    losses = [float(made.run(batch, step=i, learning_rate=1e-2).loss) for i in range(4)]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains(optimizer: str) -> None:
    plan = steps.plan(
        device="cuda", compute_dtype="bfloat16", micro_batch_size=3, optimizer=optimizer
    )
    made = steps.step(plan, device="cuda")
    batch = steps.sequences(7)
    losses = [float(made.run(batch, step=i, learning_rate=2e-2).loss) for i in range(6)]
    assert losses[-1] < losses[0] - 0.05
