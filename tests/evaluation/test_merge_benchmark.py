"""The benchmark of merging: a model of one drawn layer is whole, and what is complete is emptied."""

import json
from pathlib import Path

import torch

from benchmarks import merge
from fitlora.checkpoint import Checkpoint


def test_every_layer_is_there_and_what_was_merged_is_counted(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert merge.make_folders("tiny", tmp_path, cpu, layers=3, original=False) == 3
    quantized = Checkpoint(tmp_path / "quantized")
    layers = {name.split(".")[2] for name in quantized.shards if name.startswith("model.layers.")}
    assert layers == {"0", "1", "2"}
    first, last = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2))
    assert torch.equal(quantized.tensor(first), quantized.tensor(last))
    assert json.loads((tmp_path / "original/config.json").read_text())["num_hidden_layers"] == 1

    found = merge.merge_once(tmp_path, "dequantized", 16, cpu)
    assert found["host_peak_bytes"] > 0
    merged = Checkpoint(tmp_path / "merged")
    assert not torch.equal(merged.tensor(first), merged.tensor(last)), "adapters differ by layer"
    size = merge.bytes_of(tmp_path / "merged")
    assert merge.discard(tmp_path) == size
    assert merge.discard(tmp_path) == merge.bytes_of(tmp_path / "merged") == 0
