"""Going on where a run was cut short: to the bit, whatever the optimizer, and after a signal."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.step.training_step import TrainingStep
from fitlora.training import recovery
from fitlora.training.batches import Batches
from fitlora.training.loop import Run
from fitlora.training.stopping import Stop, StopAsked
from tests.step import steps
from tests.training.runs import FakeStep, make_run

TRAIN: dict[str, Any] = {
    "max_steps": 6, "evaluate_every": 2, "checkpoint_every": 2, "warmup_steps": 1,
    "learning_rate": 2e-2, "effective_batch_size": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "give_back_memory", lambda: None)


class Cut(Exception):
    """The process ends here."""


def real_run(folder: Path, optimizer: str = "adamw", **train: Any) -> Run:
    plan = steps.plan(
        effective_batch_size=5, micro_batch_size=3, evaluation_batch_size=2, optimizer=optimizer
    )
    settings = {**TRAIN, **train}
    step: TrainingStep = steps.step(plan, steps.settings(dropout=0.2, bits=16, **settings))
    return make_run(
        folder,
        step,
        batches=Batches(steps.sequences(12), 5, seed=0),
        validation=steps.sequences(3, seed=1),
        **settings,
    )


def cut_at(run: Run, cut: int) -> None:
    """Ends the run without a word, when `cut` steps are done."""
    plain = run.step.run

    def runs(*arguments: Any, **options: Any) -> Any:
        if run.progress.done == cut:
            raise Cut
        return plain(*arguments, **options)

    run.step.run = runs  # type: ignore[method-assign]
    with pytest.raises(Cut):
        run()


def untimed(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second", "allocated_bytes", "phase_bytes", "component_bytes")
    return [{k: v for k, v in r.items() if k not in times} for r in run.log.records]


def test_an_overflow_just_after_the_update_does_not_update_twice(tmp_path: Path) -> None:
    expected = real_run(tmp_path / "whole")()
    run = real_run(tmp_path / "after")
    plain, calls = run.step._drop_gradients, iter(range(100))

    def drop() -> None:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain()

    run.step._drop_gradients = drop  # type: ignore[method-assign]
    found = run()
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_run_cut_short_ends_as_if_it_had_not_been(
    optimizer: str, cut: int, tmp_path: Path
) -> None:
    whole = real_run(tmp_path / "whole", optimizer)
    expected = whole()
    cut_at(real_run(tmp_path / "cut", optimizer), cut)
    again = real_run(tmp_path / "cut", optimizer)
    assert again.begin()
    assert again.progress.done == cut - cut % 2, "no more than checkpoint_every steps are lost"
    found = again()
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)
        assert torch.equal(found.best[name], expected.best[name])
    assert (found.best_step, found.best_loss) == (expected.best_step, expected.best_loss)
    assert untimed(again) == untimed(whole)


def test_patience_goes_on_too(tmp_path: Path) -> None:
    losses = [1.0, 2.0, 3.0, 4.0, 5.0]
    settings = {"evaluate_every": 1, "early_stopping": 3, "checkpoint_every": 1}
    run = make_run(tmp_path, FakeStep(losses), **settings)
    cut_at(run, 3)
    step = FakeStep(losses[3:])
    again = make_run(tmp_path, step, **settings)
    assert again.begin()
    outcome = again()
    assert (outcome.steps, outcome.stopped_early, outcome.best_step) == (4, True, 1)


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, FakeStep([1.0]))
    assert not run.begin()
    run()
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["step-00000000"]
    other = make_run(tmp_path, FakeStep([1.0]), identity="another")
    assert not other.begin()


def test_checkpoints_every_n_steps(tmp_path: Path) -> None:
    saved: list[int] = []
    run = make_run(tmp_path, FakeStep([1.0]), checkpoint_every=3)
    plain = run.checkpoints.save

    def save(snapshot: Any) -> Path:
        saved.append(snapshot.progress.done)
        return plain(snapshot)

    run.checkpoints.save = save  # type: ignore[method-assign]
    run()
    assert saved == [0, 3, 6, 9]
    saved.clear()
    rest = make_run(tmp_path / "none", FakeStep([1.0]), checkpoint_every=None)
    rest.checkpoints.save = save  # type: ignore[method-assign]
    rest()
    assert saved == [0]


def test_an_update_stopped_half_way_is_undone(tmp_path: Path) -> None:
    """A real step whose optimizer ran out of memory half way: the states are those of the checkpoint."""
    whole = real_run(tmp_path / "whole")
    expected = whole()
    run = real_run(tmp_path / "half")
    assert run.step.optimizer is not None
    plain, calls = run.step.optimizer.step, iter(range(100))

    def step(*arguments: Any) -> Any:
        if next(calls) == 3:
            first = next(iter(run.step.adapters.values()))
            with torch.no_grad():
                first.add_(1.0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments)

    run.step.optimizer.step = step  # type: ignore[method-assign]
    found = run()
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)


# --- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "ending", "status"),
    [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)],
)
def test_a_signal_saves_and_ends(
    number: signal.Signals,
    ending: type[BaseException],
    status: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def hit(step: int, plan: Any) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    fake = FakeStep([1.0], overflows=hit)  # type: ignore[arg-type]
    run = make_run(tmp_path, fake, checkpoint_every=3)
    before = signal.getsignal(number)
    with run.stop, pytest.raises(ending) as caught:
        run()
    assert signal.getsignal(number) == before
    if status is not None:
        assert caught.value.code == status  # type: ignore[attr-defined]
    said = capsys.readouterr().out
    assert (
        f"stopped by {number.name} after step 5 of 10; the same command goes on from step 5" in said
    )
    again = make_run(tmp_path, FakeStep([1.0]), checkpoint_every=3)
    assert again.begin()
    assert again.progress.done == 5, "nothing is lost"


def test_a_signal_in_an_evaluation_loses_no_validation(tmp_path: Path) -> None:
    whole = real_run(tmp_path / "whole")
    expected = whole()
    run = real_run(tmp_path / "stopped")
    plain, calls = run.step.network.loss, iter(range(100))

    def loss(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            run.stop.asked = signal.SIGTERM
        return plain(*arguments, **options)

    run.step.network.loss = loss  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run()
    assert run.progress.done == 4
    assert run.progress.validated == 2
    again = real_run(tmp_path / "stopped")
    assert again.begin()
    found = again()
    assert found.best_loss == expected.best_loss
    assert untimed(again) == untimed(whole)


def test_the_second_signal_is_as_without_a_run() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    try:
        _stop_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_twice() -> None:
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopAsked):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with Stop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
