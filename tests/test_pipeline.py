"""The pipeline as a user runs it: DVC's own commands in a scratch clone, with a run of a few steps.

One run of all six stages serves every test here; each test then asks DVC what it would do next.
Nothing may ask the network: every way out is closed by a proxy that is not there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from fitlora import artifacts
from fitlora.artifacts import Evaluation, PlanArtifact

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    "profile_hardware",
    "estimate_memory",
    "find_batch_size",
    "quantize_model",
    "train_adapters",
    "merge_and_evaluate",
]
PROFILE_ONLY = ["profile_hardware"]

# Every stage does all that it does, over as little as possible.
TINY = {
    "data": {"max_length": 256},
    "lora": {"r": 4},
    "train": {
        "effective_batch_size": 4,
        "max_steps": 3,
        "warmup_steps": 1,
        "evaluate_every": 2,
        "learning_rate": 1.0e-3,
    },
    "evaluate": {"rows": 8, "max_new_tokens": 4, "samples": 1},
}
ROWS = {"train": 32, "validation": 8}


class Clone:
    """A copy of the repository in which DVC and git run offline and away from the user's settings."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        nowhere = "http://127.0.0.1:9"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "lib"),  # before what the environment has installed
            "DVC_SITE_CACHE_DIR": str(home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "HF_HUB_OFFLINE": "1",
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
            **{
                f"GIT_{who}_{what}": value
                for who in ("AUTHOR", "COMMITTER")
                for what, value in (("NAME", "test"), ("EMAIL", "test@example.org"))
            },
        }

    def run(self, *command: str) -> str:
        """Runs a command to its end; its standard output. Fails the test with all it printed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def ran(self, *command: str) -> list[str]:
        """Runs a command of DVC's; the stages that it ran, in order."""
        return re.findall(r"^Running stage '(\w+)':", self.run("dvc", *command), re.MULTILINE)

    def dirty(self) -> set[str]:
        """What git calls changed or new, less dvc.lock: a measured rate may have moved by more than
        is forgiven, which changes the profile's own entry there and nothing else."""
        lines = self.run("git", "status", "--porcelain").splitlines()
        return {line[3:] for line in lines} - {"dvc.lock"}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="session")
def clone(home: Path) -> Clone:
    """The working tree as it is, tiny params, and one run of everything, committed and pushed."""
    clone = Clone(home / "first", home)
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone.folder / name)
    _make_tiny(clone.folder)
    clone.run("git", "init", "--quiet")
    clone.run("dvc", "remote", "add", "--default", "shelf", str(home / "remote"))
    clone.run("git", "add", "--all")
    clone.run("git", "commit", "--quiet", "--message", "tiny")
    assert clone.ran("repro") == STAGES
    clone.run("git", "add", "dvc.lock")
    clone.run("git", "commit", "--quiet", "--message", "run")
    clone.run("dvc", "push")
    return clone


def _make_tiny(folder: Path) -> None:
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    for section, changes in TINY.items():
        params[section].update(changes)
    yaml.dump(params, folder / "params.yaml")
    for split, rows in ROWS.items():
        path = folder / params["data"][split]
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:rows]), encoding="utf-8")


def test_run_leaves_every_artifact_and_only_those(clone: Clone) -> None:
    left = {path.relative_to(clone.folder) for path in (clone.folder / "artifacts").iterdir()}
    named = {
        value
        for value in vars(artifacts).values()
        if isinstance(value, Path) and value.parts[0] == "artifacts"
    }
    assert left - {Path("artifacts/.gitignore")} == named
    assert clone.dirty() == set()


def test_artifacts_can_be_read(clone: Clone) -> None:
    evaluation = Evaluation.read(clone.folder / artifacts.EVALUATION)
    assert evaluation.rows == TINY["evaluate"]["rows"]
    plan = PlanArtifact.read(clone.folder / artifacts.PLAN).plan
    assert plan.effective_batch_size == TINY["train"]["effective_batch_size"]


def test_summary_shows_the_run(clone: Clone) -> None:
    summary = json.loads(clone.run("fitlora", "summary", "--json"))
    assert summary["steps"] == TINY["train"]["max_steps"]
    assert set(summary["models"]) == {"base", "quantized_base", "adapter", "merged"}
    for place in summary["places"].values():
        assert (clone.folder / place).exists(), place


def test_second_run_profiles_the_hardware_and_nothing_else(clone: Clone) -> None:
    assert clone.ran("repro") == PROFILE_ONLY
    assert clone.dirty() == set()


def test_metrics_and_plots_are_shown(clone: Clone) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json"))
    evaluation = shown[""]["data"]["artifacts/evaluation.json"]["data"]
    assert set(evaluation["adapter"]) == {"loss", "perplexity", "exact_match"}
    plots = json.loads(clone.run("dvc", "plots", "show", "--json"))
    assert not plots.get("errors"), plots["errors"]
    assert set(plots["data"]) == {"loss", "learning_rate", "speed", "memory"}
    loss = plots["data"]["loss"][0]["content"]["data"]["values"]
    drawn = [point for point in loss if point["field"] == "loss"]
    assert [point["step"] for point in drawn] == [1, 2, 3]
    assert any(
        point["field"] == "validation_loss" and point["validation_loss"] is not None
        for point in loss
    )
    clone.run("dvc", "plots", "show")
    assert (clone.folder / "dvc_plots" / "index.html").is_file()
    assert clone.dirty() == set()


def test_second_machine_restores_everything_and_runs_nothing(clone: Clone, home: Path) -> None:
    other = Clone(home / "second", home / "other")
    clone.run("git", "clone", "--quiet", str(clone.folder), str(other.folder))
    other.run("dvc", "pull")
    assert other.ran("repro") == PROFILE_ONLY
    assert other.dirty() == set()
    one, two = (each.folder / artifacts.EVALUATION for each in (clone, other))
    assert one.read_bytes() == two.read_bytes()


def test_other_learning_rate_trains_and_evaluates_again(clone: Clone, home: Path) -> None:
    """In a clone of its own, which takes what did not change from the remote."""
    other = Clone(home / "experiment", home / "experiment-home")
    clone.run("git", "clone", "--quiet", str(clone.folder), str(other.folder))
    other.run("dvc", "pull")
    ran = other.ran("exp", "run", "-S", "train.learning_rate=3.0e-4")
    assert ran == ["profile_hardware", "train_adapters", "merge_and_evaluate"]
    (change,) = json.loads(other.run("dvc", "params", "diff", "--json"))["params.yaml"].items()
    assert change[0] == "train.learning_rate"
    assert (change[1]["old"], change[1]["new"]) == (1.0e-3, 3.0e-4)
    metrics = json.loads(other.run("dvc", "metrics", "diff", "--json"))
    assert "adapter.loss" in metrics["artifacts/evaluation.json"]
