"""Runs that freeze: which layers, what becomes of them, and that a run goes on with them to the bit."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.step.training_step import TrainingStep
from fitlora.training import recovery
from fitlora.training.batches import Batches
from fitlora.training.loop import Run
from fitlora.training.parallel import Ranks
from tests.step import steps
from tests.training.runs import in_ranks, make_run
from tests.training.test_resume import cut_at, untimed

LAYERS = 4
TRAIN: dict[str, Any] = {
    "max_steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "warmup_steps": 0,
    "learning_rate": 2e-2, "effective_batch_size": 5, "freeze": "memory",
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {
    "resident": {"micro_batch_size": 2},
    "8-bit states": {"micro_batch_size": 5, "optimizer": "adamw_8bit"},
    "streamed": {
        "micro_batch_size": 2, "streamed_layers": (0, 1, 3), "recompute_layers": (0, 1, 2, 3),
        "checkpoints": "host", "embedding": "host", "head": "host", "optimizer_device": "host",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "give_back_memory", lambda: None)


def steps_of(
    devices: int,
    where: str = "resident",
    frozen: tuple[int, ...] = (1, 2),
    dtype: str = "float32",
    **changes: Any,
) -> TrainingStep:
    plan = steps.plan(
        devices=devices, compute_dtype=dtype, effective_batch_size=5, evaluation_batch_size=2,
        frozen_layers=frozen, **PLANS[where],
    )  # fmt: skip
    settings = steps.settings(dropout=0.2, bits=16, **{**TRAIN, **changes})
    return steps.step(plan, settings, num_hidden_layers=LAYERS)


def around(folder: Path, step: TrainingStep, **options: Any) -> Run:
    return make_run(
        folder,
        step,
        batches=Batches(steps.sequences(12), 5, seed=0),
        validation=steps.sequences(3, seed=1),
        layers=LAYERS,
        **{**TRAIN, **options},
    )


def make(
    folder: Path,
    where: str = "resident",
    frozen: tuple[int, ...] = (1, 2),
    predict: Any = None,
    dtype: str = "float32",
    **changes: Any,
) -> Run:
    step = steps_of(1, where, frozen, dtype, **changes)
    return around(folder, step, predict=predict, **changes)


def choices(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.log.records if record["event"] == "freeze"]


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


@pytest.mark.parametrize("where", PLANS)
def test_the_least_gradients_are_frozen_and_the_others_learn(where: str, tmp_path: Path) -> None:
    run = make(tmp_path, where)
    before = run.step.adapter_state()
    # the lower half of the stack hardly matters to this model's loss
    with torch.no_grad():
        for name, parameter in run.step.adapters.items():
            if "lora_B" in name and layer_of(name) in (0, 3):
                parameter.mul_(4.0)
    changed = run.step.adapter_state()
    outcome = run()
    (choice,) = choices(run)
    shares = choice["gradient_shares"]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    least = sorted(sorted(range(LAYERS), key=lambda layer: shares[layer])[:2])
    assert choice["frozen_layers"] == least == list(run.step.plan.frozen_layers)
    for name, tensor in outcome.last.items():
        assert torch.equal(tensor, changed[name]) == (layer_of(name) in least), name
    assert outcome.last.keys() == before.keys(), "frozen adapters are saved too"
    tensors, _ = run.step.optimizer_state()
    assert {layer_of(name) for name in tensors} == set(range(LAYERS)) - set(least)


@pytest.mark.parametrize("where", PLANS)
def test_it_goes_on_to_the_bit(where: str, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", where)
    expected = whole()
    cut_at(make(tmp_path / "cut", where), 3)
    again = make(tmp_path / "cut", where)
    assert again.begin()
    found = again()
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)
    assert untimed(again) == untimed(whole)


def test_where_the_parts_lie_changes_no_choice(tmp_path: Path) -> None:
    runs = [make(tmp_path / where, where) for where in PLANS]
    for run in runs:
        run()
    shares = [choices(run)[0]["gradient_shares"] for run in runs]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    assert shares[0] == pytest.approx(shares[2], abs=1e-5)


def test_the_first_steps_are_counted_though_others_were_surveyed(tmp_path: Path) -> None:
    """They are the heaviest, and have the optimizer's states; a survey has none."""
    run = make(tmp_path)
    run()
    counted = [r["component_bytes"] for r in run.log.records if r["event"] == "step"][:2]
    assert all(parts["optimizer_states"] > 0 for parts in counted[1:])
    assert all(parts["gradients"] > 0 for parts in counted)


def test_a_run_that_is_stopped_while_it_chooses_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make(tmp_path / "whole")()
    run = make(tmp_path / "cut")
    plain = run.step.survey
    surveys = []

    def survey(*arguments: Any, **options: Any) -> tuple[float, list[float]]:
        surveys.append(options["step"])
        if len(surveys) == 2:
            run.stop.asked = signal.SIGTERM
        return plain(*arguments, **options)

    run.step.survey = survey  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run()
    assert surveys == [0, 1]
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 0 of 4; nothing is saved yet" in said
    again = make(tmp_path / "cut")
    assert not again.begin(), "what has not chosen yet must not go on with nothing frozen"
    found = again()
    assert len(choices(again)) == 1
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)


def test_where_gradients_are_no_numbers_it_chooses_in_a_wider_precision(tmp_path: Path) -> None:
    run = make(tmp_path, precision="dynamic", dtype="float16")
    plain = run.step.survey

    def survey(*arguments: Any, **options: Any) -> tuple[float, list[float]]:
        loss, found = plain(*arguments, **options)
        narrow = run.step.plan.layers_compute_in == "float16"
        return (math.nan, [math.nan] * LAYERS) if narrow else (loss, found)

    run.step.survey = survey  # type: ignore[method-assign]
    run()
    (switch,) = [r for r in run.log.records if r["event"] == "precision"]
    assert switch["cause"] == "the loss is nan", "so no scale of it is to blame"
    assert (switch["step"], switch["before"], switch["after"]) == (1, "float16", "float32")
    assert len(choices(run)) == 1


def test_processes_choose_together_even_where_one_finds_no_memory(tmp_path: Path) -> None:
    """After their gradients were summed, which no weight has followed yet."""
    alone = make(tmp_path / "one")
    alone()
    made = [steps_of(2) for _ in range(2)]  # modules are not made in threads
    plain, left = made[1]._squared_norm, [True]

    def fails(parameter: torch.Tensor) -> float:
        if left:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(parameter)

    made[1]._squared_norm = fails  # type: ignore[method-assign]

    def work(ranks: Ranks) -> Run:
        run = around(tmp_path / "two", made[ranks.rank], ranks=ranks)
        run()
        return run

    runs = in_ranks(2, work)
    assert not left
    for run in runs:
        (choice,) = choices(run)
        assert choice["frozen_layers"] == choices(alone)[0]["frozen_layers"]
        assert choice["gradient_shares"] == pytest.approx(
            choices(alone)[0]["gradient_shares"], abs=1e-5
        )
        assert run.progress.done == TRAIN["max_steps"]


def test_where_memory_runs_out_more_layers_freeze(tmp_path: Path) -> None:
    run = make(
        tmp_path, frozen=(0,), freeze="speed",
        predict=lambda plan, evaluation: 1000 - 100 * len(plan.frozen_layers),
    )  # fmt: skip
    start = run.step.adapter_state()
    plain = run.step.network.train

    def train(batches: Any, **options: Any) -> list[torch.Tensor]:
        if run.progress.done == 2 and len(run.step.plan.frozen_layers) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(batches, **options)

    run.step.network.train = train  # type: ignore[method-assign]
    outcome = run()
    changes = [r["after"]["frozen_layers"] for r in run.log.records if r["event"] == "plan"]
    assert changes == [[0, 1], [0, 1, 2]]
    assert outcome.steps == TRAIN["max_steps"]
    learned = {layer_of(n) for n, t in outcome.last.items() if not torch.equal(t, start[n])}
    assert learned == {1, 2, 3}, "two of them until memory ran out"
    assert {layer_of(name) for name in run.step.optimizer_state()[0]} == {3}


def test_speed_freezes_the_lowest_without_a_survey(tmp_path: Path) -> None:
    run = make(tmp_path, frozen=(0, 1), freeze="speed")
    start = run.step.adapter_state()
    outcome = run()
    assert choices(run) == []
    still = {layer_of(n) for n, tensor in outcome.last.items() if torch.equal(tensor, start[n])}
    assert still == {0, 1}
    assert run.recovery.ladder.rung.freezes == (0, 1, 2, 3)
