"""Codes and scales are those that bitsandbytes' CUDA kernels wrote on an H200 (`record_vectors`)."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import Tensor

from fitlora.quantization import codes
from fitlora.quantization.codes import quantize_4bit, quantize_8bit
from fitlora.quantization.layout import NESTED_BLOCK_SIZE, QuantType, code_book, nested_code
from fitlora.quantization.reciprocal import reciprocal
from tests.quantization.record_vectors import BLOCK_SIZES, all_mantissas, cases, check

CPU = torch.device("cpu")
VECTORS = Path(__file__).parent / "h200.safetensors"


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(VECTORS)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_vectors_hold_every_case(vectors: dict[str, Tensor]) -> None:
    assert len(list(cases())) == 174
    assert {f"codes.{case[1]}" for case in cases()} | {"codes.scales"} == {
        name for name in vectors if name.startswith("codes.")
    }
    extremes = vectors["input.extremes.float32"]
    assert torch.isinf(extremes).any()
    assert ((extremes != 0) & (extremes.abs() < 2.0**-126)).any()
    # The vectors tell apart what is easily taken for the same: an exact quotient, ties the other way.
    blocks = vectors["input.ties.float32"].view(-1, 64)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)
    for count in (codes._count_above(scaled, codes._NF4_LIMITS), (scaled >= 0).to(torch.uint8)):
        packed = count.view(-1, 2)[:, 0] << 4 | count.view(-1, 2)[:, 1]
        assert (packed != vectors["codes.ties.float32.nf4.64"]).any()


@pytest.mark.parametrize("count", [1, 3])
def test_codes_and_scales_are_the_kernels(vectors: dict[str, Tensor], count: int) -> None:
    with threads(count):
        assert check(vectors, CPU) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_and_scales_on_a_gpu(vectors: dict[str, Tensor]) -> None:
    assert check(vectors, torch.device("cuda")) == {}


def test_every_reciprocal_is_the_chip_s(vectors: dict[str, Tensor]) -> None:
    found = reciprocal(all_mantissas())
    digest = hashlib.sha256(found.numpy().tobytes()).digest()
    assert list(digest) == vectors["reciprocals.sha256"].tolist()
    assert (found != 1 / all_mantissas()).float().mean() > 0.1


def test_reciprocals_at_the_ends_of_the_range() -> None:
    x = torch.tensor([0.0, 1.0e-39, 2.0**-126, 2.0, 2.0**126, 1.5 * 2.0**126, 2.0**127, torch.inf])
    expected = [torch.inf, torch.inf, 2.0**126, 0.5, 2.0**-126, 0.0, 0.0, 0.0]
    assert reciprocal(x).tolist() == expected
    scaled = reciprocal(torch.tensor([1.25, 1.25 * 2.0**-100, 1.25 * 2.0**100]))
    assert scaled.tolist() == [scaled[0].item() * 2.0**k for k in (0, 100, -100)]


def test_blocks_of_zeros_and_the_missing_half_byte() -> None:
    packed, absmax = quantize_4bit(torch.zeros(67), 64, "nf4")
    assert packed.tolist() == [0] * 34
    assert absmax.tolist() == [0.0, 0.0]
    packed, _ = quantize_4bit(torch.tensor([2.0]), 64, "nf4")
    assert packed.tolist() == [0xF7]  # 1.0 times the scale, and 0.0
    packed, _ = quantize_4bit(torch.tensor([-2.0]), 64, "fp4")
    assert packed.tolist() == [0xB0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_number_gets_the_nearest_of_the_book(kind: QuantType) -> None:
    values = torch.linspace(-1, 1, 4096)
    packed, _ = quantize_4bit(values, 4096, kind)
    book = code_book(kind)
    found = book[torch.stack((packed >> 4, packed & 15), dim=1).view(-1).long()]
    best = (values[:, None] - book).abs().amin(1)
    assert torch.allclose((values - found).abs(), best, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_book_is_that_of_bitsandbytes(kind: QuantType) -> None:
    theirs = functional.get_4bit_type(kind, device="cpu").float()
    assert code_book(kind).numpy().tobytes() == theirs.numpy().tobytes()


def test_the_8_bit_book_is_that_of_bitsandbytes() -> None:
    # with the digest that it has wherever CPUs multiply and add at once, as nearly all do
    assert hashlib.sha256(nested_code().numpy().tobytes()).hexdigest() == (
        "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    )
    theirs = functional.create_dynamic_map()
    assert torch.allclose(nested_code(), theirs, rtol=2e-7, atol=0)


@pytest.mark.slow
def test_the_8_bit_book_does_not_depend_on_the_cpu() -> None:
    program = (
        "import hashlib; from fitlora.quantization.layout import nested_code;"
        "print(hashlib.sha256(nested_code().numpy().tobytes()).hexdigest())"
    )
    plain = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert plain.stdout.strip() == hashlib.sha256(nested_code().numpy().tobytes()).hexdigest()


def test_a_scale_gets_the_nearest_8_bit_code(vectors: dict[str, Tensor]) -> None:
    values = vectors["input.scales"][:512]
    found, absmax = quantize_8bit(values, NESTED_BLOCK_SIZE)
    scaled = values.view(-1, 256) / absmax[:, None]
    best = (scaled[..., None] - nested_code()).abs().amin(-1)
    assert torch.allclose(
        (scaled - nested_code()[found.long()].view(-1, 256)).abs(), best, atol=1e-6
    )


def test_block_sizes_are_those_of_the_kernels() -> None:
    for size in BLOCK_SIZES:
        functional.quantize_4bit(torch.ones(8), blocksize=size, quant_type="nf4")
    with pytest.raises(ValueError, match="blocksize"):
        functional.quantize_4bit(torch.ones(8), blocksize=16, quant_type="nf4")
