"""Records what bitsandbytes' CUDA kernels write, and compares it with `fitlora.quantization`.

    python -m tests.quantization.record_vectors OUT.safetensors

on a machine with a CUDA device. The file holds inputs and outputs, named by what was asked; tests read
it on any machine. Beside it, larger sets are compared on the spot, on the CPU and on the device, and
so is the reciprocal of every mantissa, of which the file keeps a hash.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from torch import Tensor

from fitlora.quantization import codes
from fitlora.quantization.codes import quantize_4bit, quantize_8bit
from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantType, nested_code
from fitlora.quantization.reciprocal import reciprocal
from fitlora.quantization.weight import exact_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: tuple[QuantType, ...] = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES = (1, 2, 3, 31, 33, 63, 65, 127, 129, 1000, 1023)
_LIMITS = (*codes._NF4_LIMITS, *codes._FP4_LIMITS, *(-x for x in codes._FP4_LIMITS))


def _near(numbers: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """The numbers of `dtype` next to each of `numbers`, up to `steps` away: (2 * steps + 1, n)."""
    found = [numbers.to(dtype)]
    for toward in (-torch.inf, torch.inf):
        at = found[0]
        for _ in range(steps):
            at = torch.nextafter(at, torch.full_like(at, toward))
            found.append(at)
    return torch.stack(found)


def ties(dtype: torch.dtype, blocks: int, seed: int = 0) -> Tensor:
    """Blocks of 64 whose elements lie at a limit times the scale, and next to it."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor(_LIMITS, dtype=torch.float32)
    scales = torch.exp2(torch.empty(blocks).uniform_(-6, 3, generator=generator)).to(dtype)
    scales[:4] = torch.tensor([1.0, 2.0, 0.5, 1.0])
    choice = torch.randint(len(limits), (blocks, 64), generator=generator)
    near = _near(limits[choice] * scales.float()[:, None], dtype, 2)
    pick = torch.randint(5, (blocks, 64), generator=generator)
    values = near.gather(0, pick[None])[0]
    limit = scales[:, None].expand_as(values)
    values = torch.where(values.abs() > limit, limit, values)
    values[:, 17] = scales
    return values.reshape(-1)


def extremes(dtype: torch.dtype) -> Tensor:
    """Blocks of 64 of zeros, subnormal, tiny, huge and infinite numbers."""
    generator = torch.Generator().manual_seed(1)
    info = torch.finfo(dtype)
    noise = torch.empty(64).uniform_(-1, 1, generator=generator)
    tops = [0.0, info.max, info.tiny, info.tiny * 0.75, info.smallest_normal * 3, 1.0, info.max / 2]
    if dtype != torch.float16:
        tops += [2.0**126, 2.0**126 * 1.5, 2.0**127, 2.0**-120, 2.0**-110, 2.0**100, 2.0**-149]
    rows = [(noise.double() * top).to(dtype) for top in tops]
    mixed = rows[0].clone()
    mixed[:8] = torch.tensor([1.0, -info.tiny, -info.tiny / 2, info.tiny / 2, -0.0, 0.0, 0.5, -1.0])
    small = (noise.double() * info.tiny * 4).to(dtype)
    for top in (2.0, 2.0**-3, 2.0**-8, 2.0**10):
        row = small.clone()
        row[5] = top
        rows.append(row)
    infinite = noise.to(dtype)
    infinite[3], infinite[40] = torch.inf, -torch.inf
    rows += [mixed, -mixed, infinite, torch.full((64,), -0.0, dtype=dtype)]
    return torch.cat([row.to(dtype) for row in rows])


def noise(dtype: torch.dtype, count: int, seed: int = 2) -> Tensor:
    """Normal numbers, every 64 with a scale of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(-(-count // 64), 64, generator=generator)
    rows *= torch.exp2(torch.empty(len(rows), 1).uniform_(-8, 2, generator=generator))
    return rows.reshape(-1)[:count].to(dtype)


def scales(count: int, seed: int = 3) -> Tensor:
    """Numbers as scales less their mean are, blocks of 256 with ties, of zeros and of one value."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 0.02
    limits = codes._dynamic_limits()
    tied = _near(limits * 0.0625, torch.float32, 1).reshape(-1)
    top = torch.full((1,), 0.0625)
    pieces = [values, *(torch.cat([top, part])[:256] for part in tied.split(255))]
    pieces = [pieces[0], *(torch.nn.functional.pad(p, (0, 256 - len(p))) for p in pieces[1:])]
    return torch.cat([*pieces, torch.zeros(256), torch.full((255,), -3.0e-5)])


def inputs() -> Iterator[tuple[str, Tensor]]:
    for name, dtype in DTYPES.items():
        yield f"ties.{name}", ties(dtype, 64)
        yield f"extremes.{name}", extremes(dtype)
        yield f"noise.{name}", noise(dtype, 4096 + 101)


def cases() -> Iterator[tuple[str, str, int, QuantType, int]]:
    """Input, case's name, elements (0: all), kind, block size."""
    for kind in KINDS:
        for dtype in DTYPES:
            for what in ("ties", "extremes", "noise"):
                for size in BLOCK_SIZES if what != "extremes" else (32, 64):
                    yield f"{what}.{dtype}", f"{what}.{dtype}.{kind}.{size}", 0, kind, size
            for count in SIZES:
                yield f"noise.{dtype}", f"noise{count}.{dtype}.{kind}.64", count, kind, 64


def kernel_4bit(values: Tensor, block_size: int, kind: QuantType) -> tuple[Tensor, Tensor]:
    """What bitsandbytes writes on the tensor's device, on the CPU."""
    packed, state = functional.quantize_4bit(values, blocksize=block_size, quant_type=kind)
    return packed.view(-1).cpu(), state.absmax.cpu()


def kernel_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    code = nested_code().to(values.device)
    found, state = functional.quantize_blockwise(values, code=code, blocksize=NESTED_BLOCK_SIZE)
    return found.cpu(), state.absmax.cpu()


def record(device: torch.device) -> dict[str, Tensor]:
    found = {f"input.{name}": value for name, value in inputs()}
    for source, case, count, kind, size in cases():
        values = found[f"input.{source}"]
        values = values[: count or len(values)]
        found[f"codes.{case}"], absmax = kernel_4bit(values.to(device), size, kind)
        found[f"absmax.{case}"] = absmax
    found["input.scales"] = scales(1000)
    found["codes.scales"], found["absmax.scales"] = kernel_8bit(found["input.scales"].to(device))
    digest = hashlib.sha256(all_reciprocals(device).cpu().numpy().tobytes()).digest()
    found["reciprocals.sha256"] = torch.tensor(list(digest), dtype=torch.uint8)
    return {name: value.contiguous() for name, value in found.items()}


def all_mantissas() -> Tensor:
    """Every float32 in [1, 2)."""
    return (torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000).view(torch.float32)


def all_reciprocals(device: torch.device) -> Tensor:
    """`rcp.approx.ftz.f32` of them, by the device: float32 (2**23,)."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, block: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * block + tl.arange(0, block)
        value = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [tl.load(x + at)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        tl.store(out + at, value)

    x = all_mantissas().to(device)
    out = torch.empty_like(x)
    kernel[(len(x) // 1024,)](x, out, 1024)
    return out


def compare(device: torch.device, million: int) -> Iterator[dict[str, object]]:
    """Ours against the kernels' on `million` * 2**20 elements of each sort, on both devices."""
    exact = all_reciprocals(device).cpu()
    for where in (torch.device("cpu"), device):
        differ = reciprocal(all_mantissas().to(where)).cpu() != exact
        yield {
            "compared": "reciprocal",
            "on": where.type,
            "of": len(exact),
            "differ": int(differ.sum()),
        }
    count = million << 20
    for name, dtype in DTYPES.items():
        sets = {"noise": noise(dtype, count + 5, seed=7), "ties": ties(dtype, count >> 6, seed=8)}
        for what, values in sets.items():
            for kind in KINDS:
                for size in BLOCK_SIZES:
                    packed, absmax = kernel_4bit(values.to(device), size, kind)
                    for where in (torch.device("cpu"), device):
                        if where.type == "cpu" and size not in (32, 64, 4096):
                            continue
                        ours, scale = quantize_4bit(values.to(where), size, kind)
                        yield {
                            "compared": f"{what} {kind} {size}", "input": name, "on": where.type,
                            "of": len(values),
                            "differ": int((ours.cpu() != packed).sum()),
                            "absmax_differ": int((scale.cpu() != absmax).sum()),
                        }  # fmt: skip
    values = torch.cat([scales(count >> 2, seed=seed) for seed in (9, 10)])
    packed, absmax = kernel_8bit(values.to(device))
    for where in (torch.device("cpu"), device):
        ours, scale = quantize_8bit(values.to(where), NESTED_BLOCK_SIZE)
        yield {
            "compared": "8 bits", "on": where.type, "of": len(values),
            "differ": int((ours.cpu() != packed).sum()),
            "absmax_differ": int((scale.cpu() != absmax).sum()),
        }  # fmt: skip
    # Double quantization: CUDA's mean against the exact one, on weights like a model's.
    changed = of = 0
    for seed in range(8):
        weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed)) * 0.02
        _, absmax = kernel_4bit(weight.bfloat16().to(device), 64, "nf4")
        theirs, _ = kernel_8bit(absmax.to(device) - absmax.to(device).mean())
        ours, _ = quantize_8bit(absmax - exact_mean(absmax), NESTED_BLOCK_SIZE)
        changed, of = changed + int((ours != theirs).sum()), of + len(ours)
    yield {
        "compared": "nested codes by CUDA's mean and by the exact one",
        "of": of,
        "differ": changed,
    }


def check(vectors: dict[str, Tensor], device: torch.device) -> dict[str, int]:
    """The recorded cases that come out otherwise, with how many bytes differ."""
    wrong = {}
    for source, case, count, kind, size in cases():
        values = vectors[f"input.{source}"]
        values = values[: count or len(values)].to(device)
        ours, absmax = quantize_4bit(values, size, kind)
        differ = int((ours.cpu() != vectors[f"codes.{case}"]).sum())
        differ += int((absmax.cpu() != vectors[f"absmax.{case}"]).sum())
        if differ:
            wrong[case] = differ
    ours, absmax = quantize_8bit(vectors["input.scales"].to(device), NESTED_BLOCK_SIZE)
    differ = int((ours.cpu() != vectors["codes.scales"]).sum())
    differ += int((absmax.cpu() != vectors["absmax.scales"]).sum())
    return wrong | ({"scales": differ} if differ else {})


def main() -> None:
    device = torch.device("cuda")
    vectors = record(device)
    save_file(vectors, sys.argv[1])
    print(f"{Path(sys.argv[1]).stat().st_size} bytes; wrong in them:", flush=True)
    for where in (torch.device("cpu"), device):
        print(where.type, json.dumps(check(vectors, where)), flush=True)
    rows = list(compare(device, million=4))
    for row in rows:
        if row["differ"] or row.get("absmax_differ"):
            print(json.dumps(row), flush=True)
    total = sum(int(str(row["of"])) for row in rows)
    print(f"{len(rows)} comparisons of {total} codes; those that differ are above")


if __name__ == "__main__":
    main()
