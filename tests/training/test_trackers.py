"""accelerate's trackers: where they write, what they are told, and what is said where they cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.params import Params, check_params
from fitlora.step.training_step import TrainingStep
from fitlora.training import run, trackers
from fitlora.training.trackers import start_accelerator
from tests.tiny_models import make_checkpoint
from tests.training.test_run import train_in

CPU = torch.device("cpu")


def wanting(*names: str) -> Params:
    return check_params({"train": {"trackers": list(names)}})


class Recorded:
    """Stands in for an Accelerator: keeps what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.options: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.told: list[tuple[int, dict[str, float]]] = []

    def init_trackers(
        self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]
    ) -> None:
        if self.error is not None:
            raise self.error
        self.config, self.options = config, init_kwargs

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def end_training(self) -> None:
        pass


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """As if every tracker were installed."""
    recorded = Recorded()
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: recorded)
    every = ["tensorboard", "wandb", "dvclive"]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: every)
    return recorded


def test_what_is_not_installed_is_named_with_the_way_to_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="pip install wandb dvclive, or take it out"):
        start_accelerator(wanting("tensorboard", "wandb", "dvclive"), CPU, tmp_path)


def test_trackers_write_below_their_folder_and_leave_the_pipeline_alone(
    installed: Recorded, tmp_path: Path
) -> None:
    start_accelerator(wanting("wandb", "dvclive"), CPU, tmp_path / "new")
    assert (tmp_path / "new").is_dir(), "W&B takes another where its own is not there"
    assert installed.options["wandb"]["dir"] == str(tmp_path / "new")
    live = installed.options["dvclive"]
    assert Path(live["dir"]).is_relative_to(tmp_path / "new")
    assert live["dvcyaml"] is None, "dvc.yaml is the pipeline's"
    assert not live["save_dvc_exp"]
    assert installed.config["train.trackers"] == '["wandb", "dvclive"]'
    assert installed.config["train.seed"] == 0


def test_a_tracker_that_does_not_start_is_named(installed: Recorded, tmp_path: Path) -> None:
    installed.error = OSError("no API key")
    with pytest.raises(UserError, match=r"wandb cannot be started \(no API key\)"):
        start_accelerator(wanting("wandb"), CPU, tmp_path)


def test_a_run_that_goes_on_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that curves have no gap, and nothing of steps that are done again."""
    made: list[Recorded] = []

    def start(params: Params, device: torch.device, folder: Path) -> Recorded:
        assert folder.parent.name == trackers.FOLDER
        made.append(Recorded())
        return made[-1]

    monkeypatch.setattr(run, "start_accelerator", start)
    checkpoint = make_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    plain = TrainingStep.run

    def cut(self: TrainingStep, sequences: Any, *, step: int, **options: Any) -> Any:
        if step == 3:
            raise EOFError
        return plain(self, sequences, step=step, **options)

    monkeypatch.setattr(TrainingStep, "run", cut)
    with pytest.raises(EOFError):
        train_in(tmp_path / "run", checkpoint, {"checkpoint_every": 2})
    monkeypatch.setattr(TrainingStep, "run", plain)
    train_in(tmp_path / "run", checkpoint, {"checkpoint_every": 2})
    first, second = (
        [(step, "loss" in values) for step, values in each.told if values] for each in made
    )
    assert first == [(1, True), (2, True), (2, False), (3, True)]
    assert second == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False), (5, True), (6, True),
        (6, False),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "dvclive"])
def test_one_that_is_here_writes_nowhere_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = make_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    places, _, _ = train_in(tmp_path / "run", checkpoint, {"max_steps": 2, "trackers": [name]})
    assert list((tmp_path / "here").iterdir()) == []
    written = [path for path in (places.scratch / trackers.FOLDER).rglob("*") if path.is_file()]
    assert written
