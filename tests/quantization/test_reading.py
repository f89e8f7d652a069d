"""Pieces of tensors, in order and whole, however many buffers there are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError
from fitlora.quantization.reading import piece_count, read_ahead


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    tensors = {
        "a": torch.randn(37, 29, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "long": torch.arange(1000, dtype=torch.float32),
        "scalar": torch.tensor(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("size", [64, 100, 1 << 20])
def test_pieces_make_up_the_tensors(tensors: dict[str, Tensor], tmp_path: Path, size: int) -> None:
    pieces = read_ahead(Checkpoint(tmp_path), list(tensors), size)
    for tensor in tensors.values():
        count = piece_count(tensor.numel(), size)
        found = [next(pieces).clone() for _ in range(count)]
        assert all(piece.numel() == size for piece in found[:-1])
        whole = torch.cat(found) if found else torch.empty(0)
        assert whole.dtype == tensor.dtype
        assert torch.equal(whole, tensor.view(-1))
    assert next(pieces, None) is None


def test_a_file_that_shrinks_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    pieces = read_ahead(checkpoint, ["long"], 64)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2500])
    with pytest.raises(ArtifactError, match=r"model\.safetensors ends within long"):
        list(pieces)


def test_leaving_early_stops_the_threads(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    pieces = read_ahead(Checkpoint(tmp_path), ["long", "a"], 8)
    next(pieces)
    pieces.close()
    assert next(pieces, None) is None
