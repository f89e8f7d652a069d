"""`fitlora compare`: what tells two runs apart, from folders and from revisions."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fitlora.artifacts import EVALUATION, PLAN, TRAINING_LOG, PlanArtifact
from fitlora.cli import main
from fitlora.report.comparison import compare_runs
from tests.report.runs import make_evaluation, make_metrics, make_plan, write_facts, write_log


def write_run(root: Path, params: str = "lora: {r: 16}\n") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    write_facts(root)
    write_log(root)
    make_evaluation().write(root / EVALUATION)
    (root / "params.yaml").write_text(params)
    return root


def compare(*runs: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, runs)])


def lines_of(result: Result) -> set[str]:
    assert result.exit_code == 0, result.output
    return {" ".join(line.split()) for line in result.output.splitlines()}


def test_runs_are_told_apart(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", "lora: {r: 16, alpha: 32.0}\n")
    two = write_run(tmp_path / "two", "lora: {r: 8, alpha: 32.0, target_modules: [q_proj]}\n")
    plan = make_plan(micro_batch_size=4, recompute_layers=(0, 1))
    PlanArtifact(plan=plan, reasons={}).write(two / PLAN)
    write_log(two, seconds=122.8, measured_peak_bytes=99 * 2**20)
    make_evaluation(adapter=make_metrics(0.06, 0.5)).write(two / EVALUATION)
    lines = lines_of(compare(one, two))
    for line in (
        "lora.r 16 8",
        "lora.target modules – ['q_proj']",
        "micro batch size 8 4",
        "recompute layers [] [0, 1]",
        "accumulation 4 8",
        "measured peak 198.00 MiB 99.00 MiB -50.0%",
        "predicted peak 200.00 MiB 200.00 MiB",
        "seconds 61.4 122.8 +100.0%",
        "adapter: exact match 97.5% 50.0% -47.5 points",
        "adapter: loss 0.03 0.06 +100.0%",
        "merge: KL divergence 2.5e-08 2.5e-08",
    ):
        assert line in lines, line
    assert not any(line.startswith(("lora.alpha", "optimizer")) for line in lines)  # the same


def test_json_has_every_figure(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    result = compare(one, two, "--json")
    content = json.loads(result.output)
    assert content["runs"] == [str(one), str(two)]
    found = {(row["section"], row["name"]): row["values"] for row in content["rows"]}
    assert found["params", "lora.r"] == [16, 16]
    assert found["plan", "optimizer"] == ["adamw", "adamw"]
    assert found["memory", "measured_peak_bytes"] == [198 * 2**20] * 2
    assert found["quality", "adapter: exact match"] == [0.975, 0.975]
    assert {section for section, _ in found} == {"params", "plan", "memory", "speed", "quality"}


def test_what_a_run_does_not_have_is_left_open(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    (two / EVALUATION).unlink()
    (two / TRAINING_LOG).unlink()
    rows = {row.name: row.values for row in compare_runs([str(one), str(two)]).rows}
    assert rows["adapter: exact match"] == (0.975, None)
    assert rows["tokens_per_second"] == (1006.5, None)
    assert rows["budget_bytes"] == (2**30, 2**30)
    assert "adapter: exact match 97.5% –" in lines_of(compare(one, two))


def test_what_is_no_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = write_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    for runs, message in (
        ((one, "empty"), "empty has no params.yaml and no artifacts; it is not a run's folder"),
        ((one, "nowhere"), "nowhere is neither a folder nor a revision here"),
        ((one,), "name at least two runs to compare"),
    ):
        result = compare(*runs)
        assert result.exit_code == 2
        assert result.stderr == f"error: {message}\n"


@pytest.mark.slow
def test_revisions_whose_artifacts_dvc_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=n", "-c", "user.email=e@e"]
        subprocess.run(["git", *name, *arguments], check=True, capture_output=True)

    def dvc(*arguments: str) -> None:
        subprocess.run(["dvc", *arguments], check=True, capture_output=True)

    git("init")
    dvc("init")
    write_run(tmp_path, "lora: {r: 4}\n")
    dvc("add", "artifacts")
    git("add", ".")
    git("commit", "-m", "one")
    write_log(tmp_path, seconds=100.0)
    (tmp_path / "params.yaml").write_text("lora: {r: 9}\n")
    rows = {row.name: row.values for row in compare_runs(["HEAD", "."]).rows}
    assert rows["lora.r"] == (4, 9)
    assert rows["seconds"] == (61.4, 100.0)
    result = compare("HEAD~7", ".")
    assert result.stderr == "error: HEAD~7 is neither a folder nor a revision here\n"
