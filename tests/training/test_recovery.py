"""Running out of memory: the same samples again in a smaller plan, and the end where there is none."""

import gc
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator, Load
from fitlora.plan import Plan
from fitlora.planner.ladder import CALM_STEPS
from fitlora.training import recovery
from fitlora.training.agreement import Done, Overflow, attempt
from fitlora.training.batches import Batches
from fitlora.training.loop import Run
from fitlora.training.recovery import WAITS, HalfUpdated
from fitlora.units import format_bytes
from tests.step import steps
from tests.training.runs import FakeStep, make_run
from tests.training.test_run import HARDWARE

OVERFLOW = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
Overflows = Callable[[int, Plan], BaseException | None]


@pytest.fixture(autouse=True)
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was being handled each time that memory was given back: nothing, or tensors would stay."""
    handled: list[object] = []
    monkeypatch.setattr(recovery, "give_back_memory", lambda: handled.append(sys.exc_info()[0]))
    return handled


def small_plan(**changes: Any) -> Plan:
    base = {"effective_batch_size": 4, "micro_batch_size": 4, "evaluation_batch_size": 4}
    return steps.plan(**{**base, **changes})


def run_of(folder: Path, overflows: Overflows, **options: Any) -> tuple[FakeStep, Run]:
    step = FakeStep([1.0] * 20, overflows=overflows, plan=small_plan())
    batches = Batches(steps.sequences(9), 4, seed=0)
    return step, make_run(folder, step, batches=batches, **options)


def once(at: int, error: BaseException = OVERFLOW) -> Overflows:
    left = [error]
    return lambda step, plan: left.pop() if step == at and left else None


def fits(micro_batch_size: int) -> Overflows:
    return lambda step, plan: None if plan.micro_batch_size <= micro_batch_size else OVERFLOW


def samples(total: int) -> list[tuple[int, ...]]:
    batches = Batches(steps.sequences(9), 4, seed=0)
    return [tuple(s.sample for s in batches.batch(step)) for step in range(total)]


def plans(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.log.records if record["event"] == "plan"]


def test_attempt_tells_an_overflow_from_an_error() -> None:
    assert attempt(lambda: 3) == Done(3)

    def fails(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert attempt(fails(OVERFLOW)) == Overflow("CUDA out of memory. Tried to allocate 2 GiB")
    assert attempt(fails(MemoryError())) == Overflow("MemoryError")
    for error in (ValueError("out of memory"), RuntimeError("shapes"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            attempt(fails(error))


def test_an_attempt_leaves_no_tensor_behind() -> None:
    """A traceback would hold what was computed before the overflow."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(1000)
        seen.append(weakref.ref(large))
        raise OVERFLOW.__class__("CUDA out of memory")

    found = attempt(work)
    gc.collect()
    assert isinstance(found, Overflow)
    assert seen[0]() is None


def test_the_same_samples_again_in_a_smaller_plan(tmp_path: Path, given_back: list[object]) -> None:
    step, run = run_of(tmp_path, once(3))
    outcome = run()
    assert outcome.steps == 10
    assert step.seen == samples(10), "none lost, none twice"
    (event,) = plans(run)
    assert event["step"] == 4
    assert event["cause"].startswith("out of memory in backward: CUDA out of memory.")
    before, after = Plan.model_validate(event["before"]), Plan.model_validate(event["after"])
    assert before == small_plan()
    assert after == step.plan == small_plan(micro_batch_size=2)
    assert step.abandoned == 1
    assert given_back == [None], "outside of the handler"
    assert [r["step"] for r in run.log.records if r["event"] == "step"] == list(range(1, 11))


def test_several_rungs_at_once(tmp_path: Path) -> None:
    step, run = run_of(tmp_path, fits(1))
    run()
    assert step.plan.micro_batch_size == 1
    assert [Plan.model_validate(e["after"]).micro_batch_size for e in plans(run)] == [2, 1]
    assert step.seen == samples(10)


def test_an_overflow_in_an_evaluation_makes_that_smaller(tmp_path: Path) -> None:
    step, run = run_of(tmp_path, lambda step, plan: None, max_steps=2)
    plain = step.evaluate
    sizes: list[int] = []

    def evaluate(sequences: Any) -> Any:
        sizes.append(len(sequences))
        if step.plan.evaluation_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(sequences)

    step.evaluate = evaluate  # type: ignore[method-assign]
    outcome = run()
    assert outcome.best_loss == 1.0
    assert step.plan.evaluation_batch_size == 1
    assert step.plan.micro_batch_size == 4, "training is as large as before"
    assert [e["step"] for e in plans(run)] == [2, 2]
    assert sizes == [4, 4, 4]


def test_back_up_once_when_it_is_calm(tmp_path: Path) -> None:
    total = 2 * CALM_STEPS
    step, run = run_of(tmp_path, once(5), max_steps=total)
    run()
    down, up = plans(run)
    assert (down["step"], up["step"]) == (6, 6 + CALM_STEPS + 1)
    assert up["cause"] == "a calm stretch"
    assert step.plan == small_plan()
    assert step.seen == samples(total)


def test_the_end_of_the_ladder_is_saved_and_told_in_figures(tmp_path: Path) -> None:
    waited: list[float] = []
    step, run = run_of(
        tmp_path, lambda step, plan: OVERFLOW if step >= 3 else None, wait=waited.append
    )
    with pytest.raises(UserError, match=r"out of memory in backward of step 4.*smallest") as caught:
        run()
    assert waited == list(WAITS), "what took the memory may have gone"
    for words in ("GiB are free", "same command", "data.max_length", step.plan.describe()):
        assert words in str(caught.value)
    assert step.plan.micro_batch_size == 1
    assert step.plan.recompute_layers == (0, 1)
    snapshot = run.checkpoints.newest()
    assert snapshot is not None
    assert snapshot.progress.done == 3
    assert snapshot.rung.plan == step.plan

    again, rerun = run_of(tmp_path, lambda step, plan: None)
    assert rerun.begin()
    assert again.plan == step.plan
    assert rerun().steps == 10
    assert again.seen == samples(10)[3:]


def test_waiting_may_help_the_smallest_plan(tmp_path: Path) -> None:
    waited: list[float] = []
    step, run = run_of(
        tmp_path, lambda step, plan: OVERFLOW if len(waited) < 2 else None, wait=waited.append
    )
    run()
    assert step.seen == samples(10)
    assert len(waited) == 2


def test_a_half_done_update_goes_back_to_what_is_saved(tmp_path: Path) -> None:
    step, run = run_of(tmp_path, lambda step, plan: None, checkpoint_every=2)
    plain, left = step.run, [1]

    def half(sequences: Any, *, step: int, **options: Any) -> Any:
        if step == 5 and left:
            left.pop()
            fake.half_updated = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(sequences, step=step, **options)

    fake, step.run = step, half  # type: ignore[method-assign]
    run()
    assert step.seen == samples(10)
    assert not step.half_updated
    (event,) = plans(run)
    assert "update of step 6" in event["cause"]
    assert "back to step 4" in event["cause"]
    assert [r["step"] for r in run.log.records if r["event"] == "step"] == list(range(1, 11))


def test_an_update_that_never_has_memory_ends(tmp_path: Path) -> None:
    step, run = run_of(tmp_path, lambda step, plan: None)

    def half(*_: Any, **__: Any) -> Any:
        step.half_updated = True
        raise torch.OutOfMemoryError("CUDA out of memory")

    step.run = half  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"update of step 1, again and again"):
        run()


def test_half_updated_is_not_done_again(tmp_path: Path) -> None:
    step, run = run_of(tmp_path, fits(0))
    step.half_updated = True

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(HalfUpdated):
        run.recovery.carry_out(work, step=1)


def test_what_no_plan_makes_smaller_is_waited_for(tmp_path: Path) -> None:
    waited: list[float] = []
    _, run = run_of(tmp_path, lambda step, plan: None, wait=waited.append)
    left = [1, 2]

    def work() -> str:
        if left:
            left.pop()
            raise MemoryError
        return "saved"

    assert run.recovery.insist(work, "a checkpoint") == "saved"
    assert waited == list(WAITS[:2])
    left += [1] * 10
    with pytest.raises(UserError, match=r"no memory for a checkpoint \(MemoryError\).* are free"):
        run.recovery.insist(work, "a checkpoint")


def test_a_gpu_that_is_gone_ends_the_run_with_its_name(tmp_path: Path) -> None:
    gone = RuntimeError("CUDA error: unspecified launch failure\nand more")
    _, run = run_of(tmp_path, once(5, gone), checkpoint_every=2)
    with pytest.raises(UserError, match=r"GPU was lost in step 6.*from step 4") as caught:
        run()
    assert "and more" not in str(caught.value)


def test_another_error_is_not_hidden(tmp_path: Path) -> None:
    _, run = run_of(tmp_path, once(2, RuntimeError("mat1 and mat2 shapes")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()


def test_the_ladder_asks_the_estimate() -> None:
    found = Estimate.model_construct(
        process_bytes=100, phase_peak_bytes={"evaluation": 30, "forward": 90}, host_pinned_bytes=50
    )
    hardware = Hardware.model_construct(context_bytes=7, host_budget_bytes=50)
    predict = recovery.predictor(lambda plan: found, hardware)  # type: ignore[arg-type]
    assert predict(small_plan(), False) == 100
    assert predict(small_plan(), True) == 37
    less = hardware.model_copy(update={"host_budget_bytes": 49})
    predict = recovery.predictor(lambda plan: found, less)  # type: ignore[arg-type]
    assert predict(small_plan(), False) is None, "the host has no room for it"


def test_room_is_what_is_there_and_no_more_than_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardware = Hardware.model_construct(context_bytes=7, budget_bytes=100)
    for available, expected in ((None, None), (50, 57), (500, 100)):
        monkeypatch.setattr(recovery, "available_bytes", lambda device, found=available: found)
        assert recovery.room_on([torch.device("cpu")], hardware)() == expected
    both = {"cuda:0": 60, "cuda:1": 40}
    monkeypatch.setattr(recovery, "available_bytes", lambda device: both[str(device)])
    assert recovery.room_on([torch.device(name) for name in both], hardware)() == 47


def test_the_end_suggests_shorter_rows_in_figures() -> None:
    settings = steps.settings(bits=16)
    hardware = HARDWARE.model_copy(update={"context_bytes": 3})
    estimator = Estimator(steps.config(), settings, Load.uniform(4, 64), hardware)
    plan = small_plan(sequence_length=64)
    text = recovery.shorter_rows(estimator)(plan)
    found = re.fullmatch(r" \(32 would take (.*)\)", text)
    assert found is not None
    half = Estimator(steps.config(), settings, Load.uniform(4, 32), hardware)
    assert found[1] == format_bytes(half(plan.replace(sequence_length=32)).process_bytes)
    assert found[1] != format_bytes(estimator(plan).process_bytes)
