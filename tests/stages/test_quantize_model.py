"""The quantize stage: from params.yaml to artifacts/quantized_model, whatever the hardware."""

import json
from pathlib import Path

import pytest
import torch

from fitlora.console import run
from stages.quantize_model import main
from tests.tiny_models import make_checkpoint, read_tensors


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "model", "llama")
    return tmp_path


def write_params(project: Path, quantization: str, model: str = "model") -> None:
    (project / "params.yaml").write_text(
        f"model: {{id: {project / model}}}\nquantization: {{{quantization}}}\n"
    )


def test_params_become_the_artifact(project: Path) -> None:
    write_params(project, "type: fp4, double: false, block_size: 128, keep_in_16_bits: [o_proj]")
    main()
    tensors = read_tensors(project / "artifacts/quantized_model")
    states = {n: json.loads(bytes(t.tolist())) for n, t in tensors.items() if "quant_state" in n}
    assert len(states) == 12  # 7 linear layers in each of 2, without o_proj
    for state in states.values():
        assert state["quant_type"] == "fp4"
        assert state["blocksize"] == 128
        assert "nested_offset" not in state


def test_sixteen_bits(project: Path) -> None:
    write_params(project, "bits: 16")
    main()
    found = read_tensors(project / "artifacts/quantized_model")
    source = read_tensors(project / "model")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_a_mistake_ends_in_a_message_and_status_2(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "model/model.safetensors").unlink()
    write_params(project, "bits: 4")
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert "a config and no weights" in capsys.readouterr().err
    assert not (project / "artifacts").exists()
