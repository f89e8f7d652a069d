"""The benchmark of the way to a proven plan: the checkpoints that it plans for."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import bfloat16

from benchmarks.common import INDEX, make_hollow_checkpoint
from fitlora.model import empty_model, load_config


def test_a_hollow_checkpoint_is_the_models_and_takes_no_disk(tmp_path: Path) -> None:
    make_hollow_checkpoint("llama-3-8b", tmp_path)
    model = empty_model(load_config(tmp_path), dtype=bfloat16)
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (it is no mapping)
                part = shard.get_slice(key)
                assert part.get_dtype() == "BF16"
                found[key] = part.get_shape()
    assert found == expected
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(expected)
    sizes = [(tmp_path / file).stat() for file in set(index["weight_map"].values())]
    assert index["metadata"]["total_size"] < sum(size.st_size for size in sizes) < 16.1e9
    assert sum(512 * size.st_blocks for size in sizes) < 2**20
