"""One weight to 4 bits: bitsandbytes' own parts, whatever the chunks."""

from fractions import Fraction

import pytest
import torch
from bitsandbytes import functional

from fitlora.errors import UserError
from fitlora.quantization import weight as module
from fitlora.quantization.codes import quantize_4bit, quantize_8bit
from fitlora.quantization.layout import (
    QuantSpec,
    decode_state,
    encode_state,
    find_state,
    part_names,
    spec_of,
)
from fitlora.quantization.weight import exact_mean, quantize_weight, require_finite
from tests.tiny_models import dequantized

CPU = torch.device("cpu")
SPECS = [
    QuantSpec("nf4", 64, double=True),
    QuantSpec("nf4", 256, double=False),
    QuantSpec("fp4", 64, double=False),
    QuantSpec("fp4", 4096, double=True),
]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (95, 63), (3, 7)], ids=str)
def test_parts_are_laid_out_as_bitsandbytes_does(
    spec: QuantSpec, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = noise(*shape, dtype=dtype)
    parts = quantize_weight("w", weight, spec, CPU)
    packed, state = functional.quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double, quant_type=spec.type
    )
    expected = {"w": packed} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert parts.keys() == expected.keys() == set(part_names("w", spec))
    key = find_state(parts, "w")
    assert key is not None
    for name, part in parts.items():
        assert part.dtype == expected[name].dtype
        if name == key:
            ours, theirs = decode_state(part), decode_state(expected[name])
            assert list(ours) == list(theirs)  # their order too
            assert ours.pop("nested_offset", 0) == pytest.approx(theirs.pop("nested_offset", 0))
            assert ours == theirs
        else:
            assert part.shape == expected[name].shape
    assert torch.equal(parts["w.quant_map"], expected["w.quant_map"])
    if not spec.double:  # which no kernel rounds
        assert torch.equal(parts["w.absmax"], expected["w.absmax"])
    assert spec_of(decode_state(parts[key])) == spec
    assert parts[key].tolist() == encode_state(decode_state(parts[key])).tolist()


def test_codes_and_scales_are_put_together_from_blocks() -> None:
    weight, spec = noise(95, 63, dtype=torch.bfloat16), QuantSpec("nf4", 64, double=True)
    parts = quantize_weight("w", weight, spec, CPU)
    packed, absmax = quantize_4bit(weight.view(-1), 64, "nf4")
    assert torch.equal(parts["w"][:, 0], packed)
    scales, nested = quantize_8bit(absmax - exact_mean(absmax), 256)
    assert torch.equal(parts["w.absmax"], scales)
    assert torch.equal(parts["w.nested_absmax"], nested)


def test_the_mean_is_rounded_once() -> None:
    values = noise(10_007).abs() * torch.exp2(noise(10_007).mul(9).round())
    exact = sum(map(Fraction, values.tolist())) / len(values)
    mean = exact_mean(values)
    assert mean.dtype == torch.float32
    assert mean.item() == torch.tensor(float(exact), dtype=torch.float64).float().item()
    assert torch.equal(mean, exact_mean(values.flip(0)))
    # float32 sums and even float64 sums in order lose what is small beside the rest
    huge = torch.tensor([3.0e38, 1.0, 3.0e38, 2.0**-126] * 3)
    assert exact_mean(huge).item() == huge.double().mean().float().item()
    assert torch.isinf(huge.sum())
    assert exact_mean(torch.zeros(5)).item() == 0.0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_chunks_change_nothing(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noise(403, 101)
    whole = quantize_weight("w", weight, spec, CPU)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 8192)
    monkeypatch.setattr(module, "_CACHED_ELEMENTS", 4096)
    monkeypatch.setattr(module, "_CHUNK_SCALES", 256)
    assert len(module.chunks(weight)) == 5
    pieces = quantize_weight("w", weight, spec, CPU)
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_the_error_is_within_the_code_book_s_widest_gap(spec: QuantSpec) -> None:
    weight = noise(95, 63)
    parts = quantize_weight("w.weight", weight, spec, CPU)
    error = (dequantized(parts)["w.weight"] - weight).abs().view(-1)
    book = parts["w.weight.quant_map"].sort().values
    gap = float((book[1:] - book[:-1]).max())
    peaks = torch.stack([block.abs().max() for block in weight.view(-1).split(spec.block_size)])
    blocks = torch.arange(error.numel()) // spec.block_size
    slack = 1.03 if spec.double else 1.0001  # the scales' own 8 bits
    assert (error <= peaks[blocks] * gap / 2 * slack + (slack - 1) * peaks.max()).all()


def test_values_that_are_not_finite_are_named() -> None:
    weight = noise(64, 64)
    for value in (float("nan"), float("inf"), -float("inf")):
        weight[3, 5] = value
        with pytest.raises(
            UserError, match=r"model\.q\.weight has values that are not finite, 1 of"
        ):
            quantize_weight("model.q.weight", weight, QuantSpec(), CPU)


def test_large_values_are_finite_though_their_sum_is_not() -> None:
    largest = torch.full((64,), torch.finfo(torch.float32).max)
    assert not torch.isfinite(largest.sum())
    require_finite("w", largest)
