"""The stage: what it reads, what it writes, and that it writes nothing when its inputs are wrong."""

import json
from pathlib import Path

import pytest
import torch

from fitlora import artifacts
from fitlora.adapter import WEIGHTS, adapter_config, save_adapter
from fitlora.artifacts import Evaluation, Hardware, PlanArtifact, Rates
from fitlora.errors import ArtifactError
from fitlora.params import LoraParams
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from stages import merge_and_evaluate
from tests.tiny_models import make_checkpoint

PARAMS = """\
model: {id: original}
data: {validation: validation.jsonl, max_length: 128}
lora: {r: 2, alpha: 4.0, target_modules: [q_proj]}
evaluate: {rows: 2, max_new_tokens: 4, samples: 1}
"""


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project whose first five stages have run."""
    monkeypatch.chdir(tmp_path)
    original = make_checkpoint(Path("original"), "llama")
    quantize_checkpoint(
        original, artifacts.QUANTIZED_MODEL, spec=QuantSpec(), device=torch.device("cpu")
    )
    lora = LoraParams(r=2, alpha=4.0)
    state = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.default.weight": torch.full(shape, 0.1)
        for layer in range(2)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    described = adapter_config(lora, ["q_proj"], base_model="original", revision=None)
    save_adapter(artifacts.ADAPTER, state, described)
    plan = Plan(
        device="cpu",
        effective_batch_size=2,
        micro_batch_size=1,
        evaluation_batch_size=2,
        sequence_length=64,
        compute_dtype="float32",
        optimizer="adamw",
        loss_chunk_tokens=64,
    )
    PlanArtifact(plan=plan, reasons={}).write(artifacts.PLAN)
    Hardware(
        device="cpu",
        gpus=(),
        cpu_name="any",
        cpu_cores=1,
        host_memory_bytes=2**30,
        host_budget_bytes=2**30,
        budget_bytes=2**30,
        context_bytes=0,
        workspace_bytes=0,
        rates=Rates(
            host_to_device_bytes_per_second=None,
            device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=None,
            disk_read_bytes_per_second=None,
            product_flops_per_second={},
        ),
        target=None,
    ).write(artifacts.HARDWARE)
    lines = []
    for prompt in ("one", "two", "three"):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns}))
    Path("validation.jsonl").write_text("\n".join(lines))
    Path("params.yaml").write_text(PARAMS)
    return tmp_path


def test_merges_and_evaluates(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_and_evaluate.main()
    found = Evaluation.read(artifacts.EVALUATION)
    assert found.rows == 2
    assert [sample.prompt for sample in found.samples] == ["one"]
    assert found.merged.loss == pytest.approx(found.adapter.loss, abs=0.02)
    assert found.adapter.loss != found.quantized_base.loss
    assert (artifacts.MERGED_MODEL / "model.safetensors").is_file()
    said = capsys.readouterr().out
    assert [line[:6] for line in said.splitlines()[-4:]] == ["base  ", "4-bit ", "adapte", "merged"]


def test_same_inputs_give_the_same_bytes(project: Path) -> None:
    merge_and_evaluate.main()
    first = artifacts.EVALUATION.read_bytes()
    merge_and_evaluate.main()
    assert artifacts.EVALUATION.read_bytes() == first


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        (artifacts.PLAN, "find_batch_size"),
        (artifacts.HARDWARE, "profile_hardware"),
        (artifacts.QUANTIZED_MODEL / "config.json", "quantize_model"),
        (artifacts.ADAPTER / WEIGHTS, "train_adapters"),
    ],
)
def test_missing_input_names_its_stage_before_anything_is_written(
    project: Path, path: Path, stage: str
) -> None:
    path.unlink()
    with pytest.raises(ArtifactError, match=stage):
        merge_and_evaluate.main()
    assert not artifacts.MERGED_MODEL.exists()
    assert not artifacts.EVALUATION.exists()
