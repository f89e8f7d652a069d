"""Templates of params.yaml: they are complete, they say why, and they hold on cards of that size."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fitlora.cli import main
from fitlora.errors import UserError
from fitlora.params import Params, keys, read_params
from fitlora.presets import PRESETS, params_text, preset_params, preset_text, yaml_value
from fitlora.units import GIB, parse_bytes

NAMES = [None, *PRESETS]


def write(folder: Path, name: str | None, *changes: str) -> Params:
    file = folder / "params.yaml"
    params = preset_params(name, changes, folder)
    file.write_text(preset_text(name, params), encoding="utf-8")
    assert read_params(file) == params
    return params


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_there_with_its_meaning(tmp_path: Path, name: str | None) -> None:
    params = write(tmp_path, name)
    lines = [
        line
        for line in (tmp_path / "params.yaml").read_text().splitlines()
        if line.startswith("  ")
    ]
    assert len(lines) == len(list(keys()))
    assert all("  # " in line for line in lines)
    # A reader of YAML 1.1, as other tools have, finds the same.
    plain = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert plain == params.model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "rank", "budget"),
    [("8gb", 8, 8 * GIB), ("16gb", 16, 16 * GIB), ("24gb", 16, 24 * GIB), ("multi-gpu", 32, None)],
)
def test_presets_are_the_seeds_templates(
    tmp_path: Path, name: str, rank: int, budget: int | None
) -> None:
    params = write(tmp_path, name)
    assert (params.quantization.bits, params.quantization.type) == (4, "nf4")
    assert params.quantization.double
    assert params.lora.r == rank
    assert params.lora.alpha == 2 * rank
    assert (params.plan.micro_batch_size, params.plan.recompute) == ("auto", "auto")
    assert params.model.revision is not None
    if budget is None:
        assert params.hardware.memory_budget is None
    else:
        assert params.hardware.memory_budget is not None
        assert 0.9 * budget < parse_bytes(params.hardware.memory_budget) < budget


def test_what_the_seed_says_that_does_not_hold_is_said(tmp_path: Path) -> None:
    for name in PRESETS:
        assert "never released" in preset_text(name, preset_params(name))
    assert "An RTX 4090 has 24 GB" in preset_text("16gb", preset_params("16gb"))
    assert "several GPUs" in preset_text("multi-gpu", preset_params("multi-gpu"))
    assert "kept in host memory" in preset_text("8gb", preset_params("8gb"))


def test_init_writes_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["init", "--preset", "8gb", "--set", "lora.r=4"])
    assert done.exit_code == 0, done.output
    first = Path("params.yaml").read_bytes()
    assert read_params(Path("params.yaml")).lora.r == 4
    assert CliRunner().invoke(main, ["init"]).exit_code == 2
    assert Path("params.yaml").read_bytes() == first
    assert CliRunner().invoke(main, ["init", "--force"]).exit_code == 0
    assert Path("params.yaml").read_bytes() != first


def test_init_outside_the_repository_names_the_shipped_samples(tmp_path: Path) -> None:
    params = write(tmp_path, None)
    assert Path(params.model.id).is_dir()
    assert Path(params.data.train).is_file()
    (tmp_path / "assets/sample_model").mkdir(parents=True)
    assert write(tmp_path, None) == Params()


def test_wrong_changes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.rr: no such key"):
        preset_params("8gb", ["lora.rr=8"])


@pytest.mark.parametrize(
    "value",
    [0.0, 1e-8, 2e-4, 1.5e300, 0.1, 3, True, None, "8GiB", "null", "yes", "012345", "6f60e3", "a b",
     'quo"te', "back\\slash", "two\nlines", "ünicode", "x # y", "C:\\data", "- x", "", [], ["a", "b c"]],
)  # fmt: skip
def test_values_read_back_the_same(value: Any) -> None:
    text = f"key: {yaml_value(tuple(value) if isinstance(value, list) else value)}  # why"
    from fitlora.params import parse_yaml

    assert parse_yaml(text, "test") == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_a_target_reads_back_the_same(tmp_path: Path) -> None:
    target = '{name: RTX 4060, memory: 8GiB, compute_capability: "8.9"}'
    params = preset_params(None, [f"hardware.target={target}"])
    (tmp_path / "params.yaml").write_text(params_text(params))
    assert read_params(tmp_path / "params.yaml").hardware.target == params.hardware.target


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].planned])
def test_what_a_preset_says_of_its_plan_is_the_planners_answer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the described card, with sequences that are full; the models are behind a licence."""
    from fitlora import machine
    from fitlora.hardware import profile
    from fitlora.known_models import SHAPES, config_of
    from fitlora.memory.estimate import Load
    from fitlora.planner.find import find_plan
    from fitlora.planner.task import Task

    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 16 * GIB)
    preset = PRESETS[name]
    params = preset_params(name, [f"hardware.target={{name: {preset.card}}}"])
    assert params.data.max_length != "auto"
    load = Load.uniform(params.train.effective_batch_size, params.data.max_length)
    hardware = profile(params.hardware, tmp_path)
    choice, _ = find_plan(Task(config_of(SHAPES["llama-3-8b"]), params, load, hardware))
    assert choice.estimate.fits
    assert choice.plan.describe() == preset.planned
    text = " ".join(preset_text(name, params).replace("\n#", " ").split())
    assert preset.planned in text
