"""`fitlora summary`: everything it shows comes from the artifacts, and a gap names its stage."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fitlora.artifacts import (
    EVALUATION,
    PLAN,
    TRAINING_LOG,
    PlanArtifact,
    dump_line,
)
from fitlora.cli import main
from tests.report.runs import make_evaluation, make_plan

END = {
    "event": "end",
    "steps": 150,
    "seconds": 61.4,
    "predicted_peak_bytes": 209715200,
    "measured_peak_bytes": 207618048,
    "measured_reserved_bytes": None,
    "best_step": 100,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a finished run leaves."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").touch()

    make_evaluation().write(EVALUATION)
    PlanArtifact(plan=make_plan(), reasons={}).write(PLAN)
    TRAINING_LOG.write_text(dump_line({"event": "step", "step": 1}) + dump_line(END))
    return tmp_path


def test_table_shows_each_model_the_memory_and_the_places(run: Path) -> None:
    result = CliRunner().invoke(main, ["summary"])
    assert result.exit_code == 0, result.output
    lines = {" ".join(line.split()) for line in result.output.splitlines()}
    assert "200 held-out rows" in lines
    assert "model loss perplexity exact match 95% interval" in lines
    assert "base 2.5000 2.000 0.0% 0.0% to 0.5%" in lines
    assert "4-bit base 2.5312 2.000 0.5% 0.0% to 1.0%" in lines
    assert "adapter 0.0300 2.000 97.5% 96.5% to 98.0%" in lines
    assert "merged 0.0300 2.000 97.0% 96.0% to 97.5%" in lines
    assert "merge KL 2.5e-08 nats from the adapter, top-1 agreement 99.95%" in lines
    assert (
        "peak memory predicted 200.00 MiB, measured 198.00 MiB (live tensors); off by +1.0%"
    ) in lines
    assert "adapter artifacts/adapter" in lines
    assert "merged model artifacts/merged_model" in lines
    assert "\x1b" not in result.output


def test_weights_that_stay_in_16_bits_are_called_so(run: Path) -> None:
    make_evaluation(base_bits=16).write(EVALUATION)
    lines = [line.split() for line in CliRunner().invoke(main, ["summary"]).output.splitlines()]
    assert [line[2] for line in lines if line[:2] == ["16-bit", "base"]] == [
        "2.5312", "artifacts/quantized_model",
    ]  # fmt: skip
    assert not any("4-bit" in line for line in lines)


def test_json_is_for_programs(run: Path) -> None:
    result = CliRunner().invoke(main, ["summary", "--json"])
    content = json.loads(result.output)
    assert content["models"]["adapter"]["exact_match"] == 0.975
    assert content["measured_peak_bytes"] == END["measured_peak_bytes"]


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        (EVALUATION, "merge_and_evaluate"),
        (PLAN, "find_batch_size"),
        (TRAINING_LOG, "train_adapters"),
    ],
)
def test_missing_artifact_names_its_stage(run: Path, path: Path, stage: str) -> None:
    path.unlink()
    result = CliRunner().invoke(main, ["summary"])
    assert result.exit_code == 2
    assert result.stderr == f"error: {path} is missing; make it with: dvc repro {stage}\n"


@pytest.mark.parametrize("text", ["", "{", '{"event": "step", "step": 3}\n', "[]\n"])
def test_log_of_a_run_that_was_cut_short(run: Path, text: str) -> None:
    TRAINING_LOG.write_text(text)
    result = CliRunner().invoke(main, ["summary"])
    assert result.exit_code == 2
    assert "cut short; make it again with: dvc repro --force train_adapters" in result.stderr
