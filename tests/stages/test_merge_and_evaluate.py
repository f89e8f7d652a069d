"""The stage: what it reads, what it writes, and that it writes nothing when its inputs are wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fitlora import artifacts
from fitlora.adapter import WEIGHTS, adapter_config, save_adapter
from fitlora.artifacts import Evaluation, PlanArtifact, RunFigures
from fitlora.errors import ArtifactError
from fitlora.evaluation import merge as merging
from fitlora.evaluation.gate import MergeRejected
from fitlora.params import LoraParams
from fitlora.plan import Plan
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from stages import merge_and_evaluate
from tests.report.runs import write_facts, write_log
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
    write_facts(Path())
    write_log(Path())
    PlanArtifact(plan=plan, reasons={}).write(artifacts.PLAN)
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
    assert artifacts.REPORT.read_text().startswith("<!doctype html>")
    assert RunFigures.read(artifacts.RUN).tokens_per_second == 1006.5
    assert said.splitlines()[-1] == f"report: {artifacts.REPORT}"
    lines = [line[:10] for line in said.splitlines()[-6:-1]]
    assert lines == ["adapter   ", "merged    ", "base      ", "4-bit base", "on 16-bit "]


@pytest.mark.parametrize("after", ["float16", "float32"])
def test_what_float16_could_not_hold_is_not_evaluated_in_it(
    after: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A switch to the same is of the loss scale alone."""
    plan = PlanArtifact.read(artifacts.PLAN).plan.replace(compute_dtype="float16")
    PlanArtifact(plan=plan, reasons={}).write(artifacts.PLAN)
    switch = {"before": "float16", "after": after, "cause": "the loss is nan", "loss_scale": 1.0}
    write_log(Path(), {"event": "precision", "step": 2, **switch})
    merge_and_evaluate.main()
    found = Evaluation.read(artifacts.EVALUATION)
    assert found.devices["adapter"] == f"cpu, {after}"
    assert ("evaluated in float32" in capsys.readouterr().out) is (after == "float32")


def test_a_merge_that_fails_the_gate_leaves_the_adapter_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in artifacts.ADAPTER.iterdir() if p.is_file()}
    merge_and_evaluate.main()
    assert artifacts.MERGED_MODEL.is_dir()
    plain = merging.read_adapter
    spoiled = {n: replace(u, scale=50 * u.scale) for n, u in plain(artifacts.ADAPTER).items()}
    monkeypatch.setattr(merging, "read_adapter", lambda folder: spoiled)
    with pytest.raises(MergeRejected, match=r"agrees at .*% of the tokens, under the"):
        merge_and_evaluate.main()
    assert not artifacts.MERGED_MODEL.exists()  # not even the one that was there
    left = {p.name for p in artifacts.MERGED_MODEL.parent.iterdir()}
    assert not any("candidate" in name or "partial" in name for name in left)
    assert before == {p.name: p.read_bytes() for p in artifacts.ADAPTER.iterdir() if p.is_file()}


def test_merges_into_4_bits(project: Path) -> None:
    changes = "\nmerge: {bits: 4, base: original, min_top1_agreement: 0.0}\n"
    Path("params.yaml").write_text(PARAMS + changes)
    merge_and_evaluate.main()
    found = Evaluation.read(artifacts.EVALUATION)
    assert (found.gate.bits, found.gate.against) == (4, "adapter_on_original")
    assert found.fidelity["merged"].kl_divergence > 1e-5  # of rounding to 4 bits
    config = json.loads((artifacts.MERGED_MODEL / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]


def test_same_inputs_give_the_same_bytes(project: Path) -> None:
    merge_and_evaluate.main()
    first = [path.read_bytes() for path in (artifacts.EVALUATION, artifacts.REPORT)]
    merge_and_evaluate.main()
    assert [path.read_bytes() for path in (artifacts.EVALUATION, artifacts.REPORT)] == first


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        (artifacts.PLAN, "find_batch_size"),
        (artifacts.HARDWARE, "profile_hardware"),
        (artifacts.DATASET, "estimate_memory"),
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
    assert not artifacts.REPORT.exists()
