"""The loop: when it validates, what it keeps, when it stops, and that ranks add up to one process."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.step.training_step import TrainingStep
from fitlora.training.batches import Batches
from fitlora.training.log import RunLog
from fitlora.training.loop import Outcome
from fitlora.training.parallel import Ranks
from tests.step import steps
from tests.training.runs import FakeStep, Records, in_ranks, make_run

# What sums in another order come to, relative, after steps that take the loss from 4.9 to 0.8.
ROUNDING = 2e-4


def run_fake(
    folder: Path, step: FakeStep, *, rows: int = 4, **train: Any
) -> tuple[Outcome, Records]:
    run = make_run(folder, step, validation=steps.sequences(rows), **train)
    return run(), run.log.records


def validated(records: Records) -> list[int]:
    return [r["step"] for r in records if r["event"] == "evaluation"]


@pytest.mark.parametrize(
    ("every", "total", "at"),
    [(3, 10, [3, 6, 9, 10]), (5, 10, [5, 10]), (20, 10, [10]), (None, 10, [10]), (1, 2, [1, 2])],
)
def test_validation_every_n_steps_and_at_the_end(
    every: int | None, total: int, at: list[int], tmp_path: Path
) -> None:
    step = FakeStep([1.0] * len(at))
    outcome, records = run_fake(tmp_path, step, evaluate_every=every, max_steps=total)
    assert validated(records) == at
    assert outcome.steps == total
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, total + 1))


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    step = FakeStep([3.0, 1.0, 2.0, 1.0, 4.0])
    outcome, records = run_fake(tmp_path, step, evaluate_every=2)
    assert outcome.last == {"a": 10}
    assert outcome.best == {"a": 4}  # the first of two that are alike
    assert (outcome.best_step, outcome.best_loss) == (4, 1.0)
    assert not outcome.stopped_early
    assert [r["validation_loss"] for r in records if r["event"] == "evaluation"] == [3, 1, 2, 1, 4]


def test_a_validation_that_was_counted_alone_is_no_step_s_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, FakeStep([1.0]), max_steps=2)
    plain, found = run.tracker.update, iter(["evaluation", "backward"])

    def update(step: int) -> dict[str, Any]:
        counted = {"phases": {next(found): 7}, "components": {"weights": 7}}
        return {**plain(step), "peak_allocated_bytes": 7, **counted}

    monkeypatch.setattr(run.tracker, "update", update)
    run()
    assert [
        (r["allocated_bytes"], r["component_bytes"], r["phase_bytes"])
        for r in run.log.records
        if r["event"] == "step"
    ] == [(None, {}, {"evaluation": 7}), (7, {"weights": 7}, {"backward": 7})]


def test_without_validation_rows_the_last_is_the_best(tmp_path: Path) -> None:
    outcome, records = run_fake(tmp_path, FakeStep(), rows=0, evaluate_every=2)
    assert validated(records) == []
    assert outcome.best == outcome.last == {"a": 10}
    assert (outcome.best_step, outcome.best_loss) == (10, None)


@pytest.mark.parametrize(
    ("losses", "patience", "stops_after"),
    [
        ([5.0, 4.0, 4.5, 4.4, 4.3], 2, 4),
        ([5.0, 4.0, 4.5, 3.0, 3.5, 3.5], 2, 6),  # a better one starts the count again
        ([5.0, 5.0], 1, 2),  # alike is not better
        ([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 5, 10),
        ([5.0] * 10, 9, 10),  # out of patience at the end is no early stop
    ],
)
def test_early_stopping(
    losses: list[float], patience: int, stops_after: int, tmp_path: Path
) -> None:
    outcome, records = run_fake(
        tmp_path, FakeStep(losses), evaluate_every=1, early_stopping=patience
    )
    assert validated(records) == list(range(1, stops_after + 1))
    assert outcome.stopped_early == (stops_after < 10)
    assert outcome.last == {"a": stops_after}
    assert outcome.best == {"a": losses.index(min(losses)) + 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of step 3 is (nan|inf).*train\.learning_rate"):
        run_fake(tmp_path, FakeStep(train=[1.0, 1.0, value, 1.0]))
    with pytest.raises(UserError, match=r"validation loss after step 4 is (nan|inf)"):
        run_fake(tmp_path, FakeStep([1.0, value]), evaluate_every=2)


def test_the_schedule_ends_with_the_run(tmp_path: Path) -> None:
    step = FakeStep([1.0])
    run_fake(tmp_path, step, warmup_steps=2, schedule="linear", learning_rate=8.0)
    assert step.rates[2] == 8.0 == max(step.rates)
    assert step.rates[-1] == pytest.approx(1.0)  # the next would be 0
    step = FakeStep([1.0])
    outcome, _ = run_fake(tmp_path, step, max_steps=None, epochs=3)
    assert outcome.steps == len(step.rates) == 6


def test_curves_have_the_same_keys_at_every_point(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new" / "training.jsonl") as log:
        log.write({"event": "step", "step": 2, "loss": 1.0, "learning_rate": 0.1, "tokens": 5})
        log.write({"event": "evaluation", "step": 2, "validation_loss": 2.0, "seconds": 1.0})
        log.write({"event": "step", "step": 1, "loss": 3.0, "allocated_bytes": None})
        lines = (tmp_path / "new" / "training.jsonl").read_text().splitlines()
        assert len(lines) == 3, "lines are there at once"
        log.write({"event": "end", "steps": 2})
    rest = {"tokens_per_second": None, "allocated_bytes": None}
    assert log.curves == [
        {"step": 1, "loss": 3.0, "validation_loss": None, "learning_rate": None, **rest},
        {"step": 2, "loss": 1.0, "validation_loss": 2.0, "learning_rate": 0.1, **rest},
    ]
    assert len({tuple(point) for point in log.curves}) == 1
    assert json.loads(lines[1]) == {
        "event": "evaluation", "step": 2, "validation_loss": 2.0, "seconds": 1.0,
    }  # fmt: skip


def test_a_rank_beside_the_first_writes_no_log() -> None:
    with RunLog(None) as log:
        log.write({"event": "step", "step": 1, "loss": 3.0})
    assert [point["loss"] for point in log.curves] == [3.0]


# --- ranks, on a real step ---------------------------------------------------------------------------

TRAIN = {
    "max_steps": 4, "warmup_steps": 0, "learning_rate": 2e-2, "evaluate_every": 2,
    "effective_batch_size": 5,
}  # fmt: skip


def real_step(devices: int) -> TrainingStep:
    plan = steps.plan(
        devices=devices,
        effective_batch_size=5,
        micro_batch_size=min(2, -(-5 // devices)),
        evaluation_batch_size=2,
    )
    return steps.step(plan, steps.settings(dropout=0.1, **TRAIN))


def run_real(folder: Path, step: TrainingStep, ranks: Ranks) -> tuple[Outcome, list[float]]:
    """Four steps of five sequences; training and validation losses, and the gradients' norms."""
    run = make_run(
        folder,
        step,
        batches=Batches(steps.sequences(12), 5, seed=0),
        validation=steps.sequences(7, seed=1),
        ranks=ranks,
        **TRAIN,
    )
    outcome = run()
    records = [r for r in run.log.records if r["event"] in ("step", "evaluation")]
    losses = [r.get("loss", r.get("validation_loss")) for r in records]
    norms = [r["gradient_norm"] for r in records if r["event"] == "step"]
    return outcome, [*losses, *norms]


def test_training_learns_and_validation_sees_it(tmp_path: Path) -> None:
    outcome, losses = run_real(tmp_path, real_step(1), Ranks())
    assert len(losses) == 4 + 2 + 4
    assert outcome.best_loss == pytest.approx(min(losses[2], losses[5]))
    assert any(not torch.equal(outcome.last[n], outcome.best[n]) for n in outcome.last) == (
        outcome.best_step < 4
    )


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_ranks_add_up_to_one_process(devices: int, tmp_path: Path) -> None:
    made = [real_step(devices) for _ in range(devices)]  # modules are not made in threads
    found = in_ranks(devices, lambda ranks: run_real(tmp_path, made[ranks.rank], ranks))
    whole, losses = run_real(tmp_path, real_step(1), Ranks())
    for outcome, others in found:
        assert others == pytest.approx(losses, rel=ROUNDING)
        for name, tensor in whole.last.items():
            torch.testing.assert_close(outcome.last[name], tensor, rtol=1e-3, atol=ROUNDING)


@pytest.mark.parametrize("place", ["backward", "update", "evaluation"])
def test_one_rank_out_of_memory_has_all_of_them_begin_again(place: str, tmp_path: Path) -> None:
    """Before the gradients are summed nothing is lost; after it, all go back to what is saved.

    Either way all of them go down to the same plan.
    """
    whole, losses = run_real(tmp_path, real_step(1), Ranks())
    made = [real_step(2) for _ in range(2)]
    step, left = made[1], [True]
    owner, name = {
        "backward": (step.network, "train"),
        "update": (step.optimizer, "step"),
        "evaluation": (step.network, "loss"),
    }[place]
    plain = getattr(owner, name)
    calls = iter(range(100))

    def fails(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2 and left:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*arguments, **options)

    setattr(owner, name, fails)
    found = in_ranks(2, lambda ranks: run_real(tmp_path / "two", made[ranks.rank], ranks))
    assert not left
    assert made[0].plan == made[1].plan
    assert (made[0].plan != real_step(2).plan) == (place != "update")
    for outcome, others in found:
        assert others == pytest.approx(losses, rel=ROUNDING)
        for name, tensor in whole.last.items():
            torch.testing.assert_close(outcome.last[name], tensor, rtol=1e-3, atol=ROUNDING)


def test_one_rank_asked_to_stop_stops_all(tmp_path: Path) -> None:
    made = [real_step(2) for _ in range(2)]
    ends: dict[int, BaseException] = {}

    def work(ranks: Ranks) -> int:
        run = make_run(
            tmp_path,
            made[ranks.rank],
            batches=Batches(steps.sequences(12), 5, seed=0),
            ranks=ranks,
            **{**TRAIN, "max_steps": 6},
        )
        plain = run.record

        def record(content: dict[str, Any]) -> None:
            plain(content)
            if ranks.rank == 1 and content["step"] == 3:
                run.stop.asked = signal.SIGINT

        run.record = record
        try:
            run()
        except (KeyboardInterrupt, SystemExit) as end:
            ends[ranks.rank] = end
        return run.progress.done

    assert in_ranks(2, work) == [3, 3]
    assert isinstance(ends[1], KeyboardInterrupt)
    assert isinstance(ends[0], SystemExit)
    again = make_run(
        tmp_path, real_step(2), batches=Batches(steps.sequences(12), 5, seed=0), **TRAIN
    )
    assert again.begin()
    assert again.progress.done == 3
