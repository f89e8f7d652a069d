"""Pieces of tensors, in order and whole, however many buffers there are."""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError
from fitlora.quantization.reading import read_ahead


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
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        found = [piece.clone() for piece in read_ahead(checkpoint, name, size)]
        assert len(found) == -(-tensor.numel() // size)
        assert all(piece.numel() == size for piece in found[:-1])
        whole = torch.cat(found) if found else torch.empty(0)
        assert whole.dtype == tensor.dtype
        assert torch.equal(whole, tensor.view(-1))


def test_a_piece_stays_until_the_next_is_asked_for(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    start = 0
    for piece in read_ahead(Checkpoint(tmp_path), "long", 16):
        time.sleep(0.001)  # the threads have read all that they may
        assert torch.equal(piece, tensors["long"][start : start + 16])
        start += 16


def test_the_reading_threads_make_something_of_each_piece(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path)
    found = [p.clone() for p in read_ahead(checkpoint, "long", 64, then=lambda piece: piece * 2)]
    assert torch.equal(torch.cat(found), tensors["long"] * 2)

    def refuse(piece: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        next(read_ahead(checkpoint, "long", 64, then=refuse))


def test_a_file_that_shrinks_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.info("long")  # its header is known
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2500])
    with pytest.raises(ArtifactError, match=r"model\.safetensors ends within long"):
        list(read_ahead(checkpoint, "long", 64))


def test_leaving_early_stops_the_threads(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    before = threading.active_count()
    pieces = read_ahead(Checkpoint(tmp_path), "long", 8)
    next(pieces)
    assert threading.active_count() > before
    pieces.close()
    assert threading.active_count() == before
    assert next(pieces, None) is None
