"""Rungs that put more on the host: the step is made anew, and nobody can tell from the result."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.offload.host_memory import HostMemoryShort
from fitlora.plan import Plan
from fitlora.planner import ladder
from fitlora.step.training_step import TrainingStep
from fitlora.training import recovery
from fitlora.training.batches import Batches
from fitlora.training.loop import Run
from fitlora.training.recovery import WAITS, NothingSmaller
from tests.step import steps
from tests.training.runs import FakeStep, make_run, size

OVERFLOW = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
TRAIN: dict[str, Any] = {
    "max_steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "warmup_steps": 1,
    "learning_rate": 2e-2, "effective_batch_size": 2,
}  # fmt: skip
HOSTED = ("embedding", "checkpoints", "head", "optimizer_device")
# The smallest plan with nothing on the host: what is left of the ladder is that.
SMALL: dict[str, Any] = {
    "effective_batch_size": 2, "micro_batch_size": 1, "evaluation_batch_size": 1,
    "recompute_layers": (0, 1), "loss_chunk_tokens": 64,
}  # fmt: skip

Fits = Callable[[Plan, int], bool]
Predict = Callable[[Plan, bool], int | None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "give_back_memory", lambda: None)


def on_host(plan: Plan) -> set[str]:
    found = {name for name in HOSTED if getattr(plan, name) == "host"}
    return found | ({"layers"} if plan.streamed_layers else set())


class Maker:
    """Makes real steps that overflow as they are told. fits: of a plan, and the steps done."""

    def __init__(self, fits: Fits, phase: str = "backward") -> None:
        self.fits, self.phase = fits, phase
        self.made: list[weakref.ref[TrainingStep]] = []
        self.plans: list[Plan] = []
        self.alive: list[int] = []  # earlier steps that were still there when another was made

    def __call__(self, plan: Plan) -> TrainingStep:
        gc.collect()
        self.alive.append(sum(made() is not None for made in self.made))
        settings = steps.settings(dropout=0.2, bits=16, **TRAIN)
        step = steps.step(plan, settings, tie_word_embeddings=False)
        plain = step.network.train if self.phase == "backward" else step.network.loss
        network: Any = step.network
        owner = weakref.ref(step)

        def short(*arguments: Any, **options: Any) -> Any:
            found = plain(*arguments, **options)
            made = owner()
            assert made is not None
            if not self.fits(made.plan, self.done):
                raise OVERFLOW.__class__(str(OVERFLOW))
            return found

        setattr(network, "train" if self.phase == "backward" else "loss", short)
        self.made.append(owner)
        self.plans.append(plan)
        return step

    run: Run | None = None

    @property
    def done(self) -> int:
        return 0 if self.run is None else self.run.progress.done


def real_run(folder: Path, maker: Maker, **options: Any) -> Run:
    plan = steps.plan(**{**SMALL, **options.pop("plan", {})})
    first = type("First", (), {"plan": plan})
    maker.run = make_run(
        folder,
        first,
        batches=Batches(steps.sequences(6), 2, seed=0),
        validation=steps.sequences(2, seed=1),
        anew=maker,
        host=True,
        **{**TRAIN, **options},
    )
    return maker.run


def always(plan: Plan, done: int) -> bool:
    return True


def records(run: Run, *events: str) -> list[dict[str, Any]]:
    return [record for record in run.log.records if record["event"] in events]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Run]:
    run = real_run(tmp_path_factory.mktemp("whole"), Maker(always))
    return run(), run


def assert_same(found: Any, run: Run, undisturbed: tuple[Any, Run]) -> None:
    """The same micro-batches in the same order: to the bit, but for a head on the host, which sums
    its logits in another order."""
    expected, whole = undisturbed
    exact = run.step.plan.head == "device"
    for name, tensor in expected.last.items():
        for mine, theirs in ((found.last[name], tensor), (found.best[name], expected.best[name])):
            # where a gradient is about nothing, AdamW's first steps take its sign
            assert torch.equal(mine, theirs) if exact else close(mine, theirs), name
    for mine, theirs in zip(
        records(run, "step", "evaluation"), records(whole, "step", "evaluation"), strict=True
    ):
        for key in ("event", "step", "tokens", "learning_rate"):
            assert mine.get(key) == theirs.get(key)
        for key in ("loss", "validation_loss"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=0.0 if exact else 1e-4)


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((mine - theirs).abs().quantile(0.99)) < 1e-4


def without_head(plan: Plan, evaluation: bool) -> int | None:
    """A host that has no room for the head's table."""
    return None if plan.head == "host" else size(plan, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("predict", [without_head, size])
def test_more_and_more_on_the_host_changes_nothing(
    predict: Predict, undisturbed: tuple[Any, Run], tmp_path: Path
) -> None:
    """Every rung there is, down to the last; without the head it is the same to the bit."""
    maker = Maker(lambda plan, done: done < 1 or "optimizer_device" in on_host(plan))
    run = real_run(tmp_path, maker, predict=predict)
    assert_same(run(), run, undisturbed)
    left = set() if predict is size else {"head"}
    assert on_host(run.step.plan) == {*HOSTED, "layers"} - left
    assert not any(maker.alive), "its memory is what the next one wants"
    events = records(run, "plan")
    assert {event["step"] for event in events} == {2}
    pairs = [(Plan.model_validate(e["before"]), Plan.model_validate(e["after"])) for e in events]
    for before, after in pairs:
        assert on_host(before) < on_host(after) or before.streamed_layers < after.streamed_layers
        assert after.effective_batch_size == before.effective_batch_size


def test_an_evaluation_moves_things_to_the_host_as_well(
    undisturbed: tuple[Any, Run], tmp_path: Path
) -> None:
    maker = Maker(lambda plan, done: bool(plan.streamed_layers), "evaluation")
    run = real_run(tmp_path, maker)
    assert_same(run(), run, undisturbed)
    assert records(run, "plan")[0]["step"] == 2


def test_back_up_from_the_host(
    undisturbed: tuple[Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "CALM_STEPS", 1)
    maker = Maker(lambda plan, done: done != 1 or "embedding" in on_host(plan))
    run = real_run(tmp_path, maker)
    assert_same(run(), run, undisturbed)
    assert [event["step"] for event in records(run, "plan")] == [2, 4]
    assert on_host(run.step.plan) == set()
    assert not any(maker.alive)


def test_a_step_that_cannot_be_made_either_is_made_smaller(
    undisturbed: tuple[Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading overflows too: the optimizer's states, which are put back, are part of it."""
    maker = Maker(lambda plan, done: done < 1 or bool(on_host(plan)))
    plain = TrainingStep.load_optimizer_state

    def load(self: TrainingStep, *states: Any) -> None:
        plain(self, *states)
        if "checkpoints" not in on_host(self.plan):
            raise torch.OutOfMemoryError("CUDA out of memory")

    run = real_run(tmp_path, maker)
    monkeypatch.setattr(TrainingStep, "load_optimizer_state", load)
    assert_same(run(), run, undisturbed)
    causes = [event["cause"] for event in records(run, "plan")]
    assert causes[0].startswith("out of memory in backward")
    assert causes[-1].startswith("out of memory in loading")
    assert on_host(run.step.plan) == {"embedding", "checkpoints"}
    assert not any(maker.alive)


def test_the_end_of_the_ladder_while_loading_is_saved(
    undisturbed: tuple[Any, Run], tmp_path: Path
) -> None:
    waited: list[float] = []
    maker = Maker(lambda plan, done: done < 1)
    run = real_run(tmp_path, maker, wait=waited.append)
    plain = run.recovery._build

    def build(plan: Plan) -> TrainingStep:
        if maker.done == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(plan)

    run.recovery._build = build
    with pytest.raises(NothingSmaller, match=r"out of memory in loading of step 2"):
        run()
    assert waited == list(WAITS)
    snapshot = run.checkpoints.newest()
    assert snapshot is not None
    assert snapshot.progress.done == 1
    again = real_run(tmp_path, Maker(always))
    assert again.begin()
    assert again.step.plan == snapshot.rung.plan
    assert on_host(again.step.plan) == {*HOSTED, "layers"}
    assert_same(again(), again, undisturbed)


def test_a_host_without_room_is_an_overflow_but_for_the_first_plan(
    undisturbed: tuple[Any, Run], tmp_path: Path
) -> None:
    maker = Maker(lambda plan, done: done < 1 or "checkpoints" in on_host(plan))
    run = real_run(tmp_path, maker)
    plain = run.recovery._build

    def build(plan: Plan) -> TrainingStep:
        if on_host(plan) == {"embedding"}:
            raise HostMemoryShort("vocabulary tables needs 1.00 GiB of host memory")
        return plain(plan)

    run.recovery._build = build
    assert_same(run(), run, undisturbed)
    assert "vocabulary tables needs 1.00 GiB" in records(run, "plan")[1]["cause"]
    with pytest.raises(UserError, match="vocabulary tables"):
        make_run(
            tmp_path / "first",
            type("First", (), {"plan": steps.plan(**SMALL, embedding="host")}),
            anew=build,
        )


def test_a_run_goes_on_from_a_rung_on_the_host(
    undisturbed: tuple[Any, Run], tmp_path: Path
) -> None:
    maker = Maker(lambda plan, done: done < 1 or bool(on_host(plan)))
    run = real_run(tmp_path, maker)

    class Cut(Exception):
        pass

    def cut(snapshot: Any) -> Any:
        plain(snapshot)
        if snapshot.progress.done == 2:
            raise Cut

    plain, run.checkpoints.save = run.checkpoints.save, cut  # type: ignore[method-assign]
    with pytest.raises(Cut):
        run()
    again_maker = Maker(maker.fits)
    again = real_run(tmp_path, again_maker)
    assert again.begin()
    assert on_host(again.step.plan) == {"embedding"}
    assert len(again_maker.plans) == 2, "the second one is the rung's"
    assert_same(again(), again, undisturbed)


def test_what_was_left_is_told_its_phases(tmp_path: Path) -> None:
    made: list[FakeStep] = []

    def anew(plan: Plan) -> FakeStep:
        step = FakeStep(plan=plan, overflows=lambda at, plan: None if plan.uses_host else OVERFLOW)
        made.append(step)
        return step

    first = FakeStep(plan=steps.plan(**{**SMALL, "effective_batch_size": 2}))
    run = make_run(tmp_path, first, anew=anew, host=True, validation=[], max_steps=3)
    run()
    assert len(made) == 2
    assert run.step is made[1]
    assert made[1].phase is not None
    assert [record["step"] for record in records(run, "step")] == [1, 2, 3]
