"""The checkpoint that loading is timed on, and the process that times it."""

import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import loading, offload
from benchmarks.common import make_checkpoint
from fitlora.checkpoint import Checkpoint
from fitlora.params import check_params
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("loading") / "tiny-4bit"
    size = loading.write_checkpoint("tiny", folder, CPU)
    assert size == sum(Checkpoint(folder).info(name).bytes for name in Checkpoint(folder).shards)
    assert os.listdir(folder.parent) == [folder.name], "what it was made from is gone"
    return folder


def test_the_checkpoint_is_as_the_quantizer_writes_one(written: Path, tmp_path: Path) -> None:
    make_checkpoint("tiny", tmp_path / "whole", CPU)
    spec = QuantSpec.of(check_params({}).quantization)
    quantize_checkpoint(tmp_path / "whole", tmp_path / "real", spec=spec, device=CPU)
    real, found = Checkpoint(tmp_path / "real"), Checkpoint(written)
    assert found.shards.keys() == real.shards.keys()
    layouts = [
        {
            name: (one.info(name).dtype, one.info(name).shape)
            for name in one.shards
            if ".quant_state." not in name
        }
        for one in (real, found)
    ]
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("budget_gib", [1.0, 0.003])
def test_a_step_is_made_of_it_in_any_layout(written: Path, budget_gib: float) -> None:
    case = offload.Case(model="tiny", budget_gib=budget_gib, sequence_length=64)
    card = offload.described_card().model_copy(
        update={
            "device": "cpu",
            "gpus": (),
            "context_bytes": 0,
            "workspace_bytes": 0,
            "target": None,
        }
    )
    planned = offload.plan_case(case, card)
    task = {
        "case": asdict(case),
        "plan": planned["plan"],
        "hardware": offload.hardware_of(case, card).model_dump(mode="json"),
        "folder": str(written),
        "started": time.time(),
    }
    found = loading.load(task)
    assert (found["host_pinned_bytes"] > 0) is (budget_gib < 1)
    assert 7 < found["loss"] < 9  # the logarithm of 2,048 tokens is 7.6
    assert 0 < found["ready_seconds"] <= found["from_start_seconds"]
