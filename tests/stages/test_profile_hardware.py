"""The stage: what it reads, what it writes, and what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fitlora import artifacts, console, fingerprints, rates
from fitlora.artifacts import HARDWARE, SCRATCH, Hardware, ModelFacts
from stages import profile_hardware

MODEL = f"model:\n  id: {Path(__file__).parents[2] / 'assets/sample_model'}\n"
CPU = f"{MODEL}hardware:\n  device: cpu\n"


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty project for the CPU, measured in no time: a steady disk and 100 GFLOP/s."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(CPU)
    give_rates(monkeypatch, 10**9, 10**11)
    return tmp_path


def give_rates(monkeypatch: pytest.MonkeyPatch, disk: int, product: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(rates, "disk_read_rate", lambda folder: disk)
    monkeypatch.setattr(rates, "product_rate", lambda *arguments: product)


def test_writes_the_artifact_and_says_what_it_found(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_hardware.main()
    made = Hardware.read(HARDWARE)
    assert made.device == "cpu"
    assert made.rates.product_flops_per_second == {"float32": 10**11}
    said = capsys.readouterr().out
    for part in ("host", "device  the CPU", "disk read 953.67 MiB/s", "float32 0.1 TFLOP/s"):
        assert part in said
    assert "set aside" not in said
    assert {path.name for path in project.iterdir()} == {
        "params.yaml",
        HARDWARE.parent.name,
        SCRATCH.name,
    }


def test_noise_changes_no_byte_and_a_real_change_does(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_hardware.main()
    first = HARDWARE.read_bytes()
    give_rates(monkeypatch, 9 * 10**8, 11 * 10**10)
    profile_hardware.main()
    assert HARDWARE.read_bytes() == first
    give_rates(monkeypatch, 3 * 10**9, 10**11)
    profile_hardware.main()
    assert Hardware.read(HARDWARE).rates.disk_read_bytes_per_second == 3 * 10**9


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        ('{"kind": "plan", "version": 1}', "is not a FitLoRA hardware"),
        ('{"kind": "hardware", "version": 0}', "has version 0"),
        ('{"kind": "hardware", "version": 1}', "is damaged at device"),
    ],
)
def test_a_bad_earlier_profile_is_set_aside(
    project: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    HARDWARE.parent.mkdir()
    HARDWARE.write_text(content)
    profile_hardware.main()
    said = capsys.readouterr().out
    assert "the earlier profile is set aside" in said
    assert reason in said
    assert "dvc repro" not in said, "this very run makes it again"
    assert Hardware.read(HARDWARE).device == "cpu"


def test_a_wrong_wish_ends_in_a_message_and_leaves_the_artifact(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_hardware.main()
    before = HARDWARE.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("params.yaml").write_text(f"{MODEL}hardware:\n  device: cuda\n")
    with pytest.raises(SystemExit) as end:
        console.run(profile_hardware.main)
    assert end.value.code == 2
    assert "error: hardware.device is cuda, but" in capsys.readouterr().err
    assert HARDWARE.read_bytes() == before


def test_for_a_target_samples_of_the_weights_are_enough(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model's content takes longer to read than all of the planning."""
    hashed: list[str] = []
    digest = fingerprints._digest

    def noted(file: Path, advance: Callable[[int], None]) -> str:
        hashed.append(file.suffix)
        return digest(file, advance)

    monkeypatch.setattr(fingerprints, "_digest", noted)
    Path("params.yaml").write_text(f"{MODEL}hardware:\n  target: RTX 4090\n")
    profile_hardware.main()
    by_samples = ModelFacts.read(artifacts.MODEL)
    assert by_samples.weights is not None
    assert hashed
    assert ".safetensors" not in hashed
    Path("params.yaml").write_text(CPU)
    profile_hardware.main()
    whole = ModelFacts.read(artifacts.MODEL)
    assert whole.definition == by_samples.definition
    assert whole.weights not in (None, by_samples.weights)
    assert ".safetensors" in hashed
