"""The stage that estimates: from rows, and from a config alone."""

import json
import shutil
from pathlib import Path

import pytest

from fitlora.artifacts import DATASET, HARDWARE, Dataset, Hardware, MemoryEstimate, Rates
from fitlora.params import check_params
from fitlora.pipeline.estimate_memory import estimate_memory, read_dataset
from fitlora.units import GIB, MIB

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Hardware(
        device="cpu", gpus=(), cpu_name="", cpu_cores=2, host_memory_bytes=GIB,
        host_budget_bytes=GIB, budget_bytes=GIB, context_bytes=0, workspace_bytes=0,
        rates=Rates(
            host_to_device_bytes_per_second=None, device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None, disk_read_bytes_per_second=None,
            product_flops_per_second={},
        ),
        target=None,
    ).write(tmp_path / HARDWARE)  # fmt: skip
    return tmp_path


def test_a_config_alone_is_enough(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = root / "model"
    model.mkdir()
    config = json.loads((ROOT / "assets/sample_model/config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    params = check_params(
        {
            "model": {"id": str(model)},
            "data": {"train": "nowhere.jsonl", "validation": "nowhere.jsonl", "max_length": 32},
            "train": {"effective_batch_size": 4},
        }
    )
    result = estimate_memory(params, root)
    dataset = Dataset.read(root / DATASET)
    assert dataset.train is None
    assert [size.tokens for size in dataset.longest_train] == [32] * 4
    assert result.default.plan.sequence_length == 32
    assert result.default.components.total == result.default.peak_allocated_bytes > 0
    highest = max(moment.components.total for moment in result.over_step)
    assert highest == result.default.peak_allocated_bytes
    assert MemoryEstimate.read(root / "artifacts/memory_estimate.json") == result
    assert "planning for sequences of 32 tokens" in capsys.readouterr().out
    # a CPU's run is told of GPUs too, which have a context
    assert [card.gib for card in result.cards] == [8, 12, 16, 24, 40, 48, 80]
    smallest = result.cards[0]
    assert smallest.plan is not None
    assert smallest.process_bytes is not None
    assert smallest.plan.endswith("bfloat16, adamw on cuda")
    assert smallest.process_bytes > 620 * MIB


def test_the_longest_rows_are_planned_for(tmp_path: Path) -> None:
    lines = (ROOT / "assets/data/train.jsonl").read_text().splitlines()[:50]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    params = check_params(
        {
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "validation.jsonl"),
            },
            "train": {"effective_batch_size": 8},
        }
    )
    dataset = read_dataset(params, ROOT / "assets/sample_model", 1536)
    assert dataset.train is not None
    assert dataset.train.rows == 50
    tokens = [size.tokens for size in dataset.longest_train]
    assert tokens == sorted(tokens, reverse=True)
    assert len(tokens) == 8
    assert tokens[0] == dataset.train.length.maximum
    assert 0 < dataset.longest_train[0].target_tokens < tokens[0]
