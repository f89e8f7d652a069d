"""Precision that switches: which steps count, what follows, and that nothing else changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.plan import Plan
from fitlora.training import recovery
from fitlora.training.batches import Batches
from fitlora.training.loop import Outcome, Run
from fitlora.training.parallel import Ranks
from fitlora.training.precision import CALM_STEPS, FIRST_SCALE, PrecisionState
from tests.step import steps
from tests.training.runs import FakeStep, in_ranks, make_run
from tests.training.test_resume import cut_at, untimed

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "give_back_memory", lambda: None)


def switches(run: Run) -> list[tuple[int, str, str]]:
    return [
        (r["step"], r["before"], r["after"]) for r in run.log.records if r["event"] == "precision"
    ]


class Script(FakeStep):
    """Losses by what the layers compute in, one after the other; 1.0 where there are none left."""

    def __init__(self, dtype: str, **losses: list[float]) -> None:
        super().__init__(plan=steps.plan(compute_dtype=dtype))
        self.losses = losses
        self.scales: list[float] = []

    def run(self, sequences: Any, *, step: int, learning_rate: float, **options: Any) -> Any:
        mine = self.losses.get(self.plan.layer_dtype or self.plan.compute_dtype, [])
        self.train = [1.0] * step + [mine.pop(0) if mine else 1.0]
        self.scales.append(options["loss_scale"])
        return super().run(sequences, step=step, learning_rate=learning_rate, **options)


def run_script(folder: Path, step: Script, steps_: int, precision: str = "dynamic") -> Run:
    run = make_run(folder, step, validation=[], max_steps=steps_, precision=precision)
    run()
    assert step.done == steps_
    return run


def test_a_step_that_overflows_is_done_again_one_wider_at_a_time(tmp_path: Path) -> None:
    step = Script("float8", float8=[1.0, NAN], bfloat16=[INF])
    run = run_script(tmp_path, step, 4)
    assert switches(run) == [(2, "float8", "bfloat16"), (2, "bfloat16", "float32")]
    assert run.log.records[1]["cause"] == "the loss is nan"
    assert [r["step"] for r in run.log.records if r["event"] == "step"] == [1, 2, 3, 4]
    assert step.plan.layer_dtype == "float32"
    assert step.plan.compute_dtype == "float8"


def test_a_fixed_precision_ends_with_every_weight_as_it_was(tmp_path: Path) -> None:
    step = Script("bfloat16", bfloat16=[1.0, NAN])
    with pytest.raises(UserError, match=r"loss of step 2 is nan.*train\.precision"):
        run_script(tmp_path, step, 4, "fixed")
    assert step.done == 1


def test_nothing_is_wider_than_float32(tmp_path: Path) -> None:
    step = Script("float32", float32=[1.0, NAN])
    with pytest.raises(UserError, match="loss of step 2 is nan"):
        run_script(tmp_path, step, 4)


def test_after_a_calm_stretch_it_goes_back_and_the_stretch_doubles(tmp_path: Path) -> None:
    step = Script("bfloat16", bfloat16=[NAN, 1.0, NAN])
    run = run_script(tmp_path, step, 4 * CALM_STEPS)
    assert switches(run) == [
        (1, "bfloat16", "float32"),
        (CALM_STEPS + 1, "float32", "bfloat16"),
        (CALM_STEPS + 2, "bfloat16", "float32"),
        (3 * CALM_STEPS + 2, "float32", "bfloat16"),
    ]


def test_a_spike_counts_only_if_it_is_one_in_wider_numbers_too(tmp_path: Path) -> None:
    calm = [1.0] * 12
    step = Script("float8", float8=[*calm, 9.0, 1.0, 9.0], bfloat16=[1.0, 1.0, 1.0])
    run = run_script(tmp_path / "own", step, 16)
    assert switches(run) == [(13, "float8", "bfloat16")]
    assert "a spike: the loss is 9.0000" in run.log.records[12]["cause"]

    step = Script("float8", float8=[*calm, 9.0], bfloat16=[9.0])
    run = run_script(tmp_path / "data", step, 16)
    assert switches(run) == [(13, "float8", "bfloat16"), (14, "bfloat16", "float8")]
    assert [r["loss"] for r in run.log.records if r["event"] == "step"][12] == 9.0


def test_few_losses_have_no_spikes(tmp_path: Path) -> None:
    assert switches(run_script(tmp_path, Script("float8", float8=[1.0, 1.0, 50.0]), 4)) == []


class Overflows(Script):
    """Gradients that are too large in all but small scales."""

    most = 2.0**13

    def run(self, sequences: Any, *, step: int, learning_rate: float, **options: Any) -> Any:
        accept = options["accept"]
        fits = options["loss_scale"] <= self.most

        def scaled(loss: float, norm: float) -> bool:
            return bool(accept(loss, norm if fits else INF))

        return super().run(
            sequences, step=step, learning_rate=learning_rate, **{**options, "accept": scaled}
        )


def test_float16_finds_its_scale_whether_or_not_precision_is_dynamic(tmp_path: Path) -> None:
    for precision in ("fixed", "dynamic"):
        step = Overflows("float16")
        run = run_script(tmp_path / precision, step, 3, precision)
        assert step.scales == [FIRST_SCALE / 2**n for n in (0, 1, 2, 3, 3, 3)]
        assert switches(run) == [(1, "float16", "float16")] * 3
        assert run.precision.state.loss_scale == Overflows.most


def test_a_scale_of_one_is_the_least(tmp_path: Path) -> None:
    step = Overflows("float16")
    step.most = 0.0
    with pytest.raises(UserError, match="in float32 first"):
        run_script(tmp_path, step, 3, "fixed")
    assert step.scales[-1] == 1.0


def test_other_precisions_have_no_scale(tmp_path: Path) -> None:
    step = Script("bfloat16")
    run_script(tmp_path, step, 2)
    assert step.scales == [1.0, 1.0]


# --- on the real step --------------------------------------------------------------------------------

TRAIN: dict[str, Any] = {
    "max_steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "warmup_steps": 1,
    "learning_rate": 2e-2, "effective_batch_size": 5, "precision": "dynamic",
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {
        "streamed_layers": (0, 1), "recompute_layers": (0, 1), "checkpoints": "host",
        "embedding": "host", "head": "host", "optimizer_device": "host",
    },
}  # fmt: skip


def real_run(
    folder: Path, dtype: str = "bfloat16", overflow: bool = True, **plan: Any
) -> tuple[Run, list[str | None]]:
    """A run of several micro-batches; with `overflow`, one of float16 that its weights overflow.

    Returns it with the precision of each attempt.
    """
    made = steps.plan(
        effective_batch_size=5, micro_batch_size=2, evaluation_batch_size=2, compute_dtype=dtype,
        **plan,
    )  # fmt: skip
    settings = steps.settings(dropout=0.2, bits=16, **TRAIN)
    step = steps.step(made, settings)
    run = make_run(
        folder,
        step,
        batches=Batches(steps.sequences(12), 5, seed=0),
        validation=steps.sequences(3, seed=1),
        **TRAIN,
    )
    tried: list[str | None] = []
    plain = step.network.train

    def train(batches: Any, **options: Any) -> list[torch.Tensor]:
        tried.append(step.plan.layer_dtype)
        losses = plain(batches, **options)
        narrow = step.plan.activation_dtype != "float32"
        overflows = overflow and run.progress.done == 3 and narrow
        return [loss * NAN for loss in losses] if overflows else losses

    step.network.train = train  # type: ignore[method-assign]
    return run, tried


@pytest.mark.parametrize("where", PLANS)
def test_a_refused_step_changes_nothing_and_adapters_outlive_the_switch(
    where: str, tmp_path: Path
) -> None:
    run, tried = real_run(tmp_path, **PLANS[where])
    before: list[dict[str, torch.Tensor]] = []
    turn = run.recovery.turn

    def look(**decisions: Any) -> None:
        for _ in range(2):
            before.append({**run.step.adapter_state(), **run.step.optimizer_state()[0]})
            if len(before) == 1:
                turn(**decisions)

    run.recovery.turn = look  # type: ignore[method-assign]
    outcome = run()
    assert len(before) == 2
    assert all(torch.equal(before[0][name], before[1][name]) for name in before[0])
    assert tried == [None] * 12 + ["float32"] * 9, "three micro-batches a step"
    assert switches(run) == [(4, "bfloat16", "float32")]
    assert all(bool(t.isfinite().all()) for t in outcome.last.values())


@pytest.mark.parametrize("where", PLANS)
def test_a_run_that_switched_goes_on_to_the_bit(where: str, tmp_path: Path) -> None:
    whole, _ = real_run(tmp_path / "whole", **PLANS[where])
    expected = whole()
    cut_at(real_run(tmp_path / "cut", **PLANS[where])[0], 5)
    again, _ = real_run(tmp_path / "cut", **PLANS[where])
    assert again.begin()
    found = again()
    for name, tensor in expected.last.items():
        assert torch.equal(found.last[name], tensor)
    assert untimed(again) == untimed(whole)
    assert again.precision.state == whole.precision.state != PrecisionState()


def test_where_one_process_overflows_all_of_them_switch(tmp_path: Path) -> None:
    plan = steps.plan(
        devices=2, effective_batch_size=5, micro_batch_size=2, evaluation_batch_size=2,
        compute_dtype="bfloat16",
    )  # fmt: skip
    made = [steps.step(plan, steps.settings(dropout=0.2, bits=16, **TRAIN)) for _ in range(2)]
    plain = made[1].network.train

    def work(ranks: Ranks) -> Run:
        run = make_run(
            tmp_path,
            made[ranks.rank],
            batches=Batches(steps.sequences(12), 5, seed=0),
            validation=steps.sequences(3, seed=1),
            ranks=ranks,
            **TRAIN,
        )

        def train(batch: Any, **options: Any) -> list[torch.Tensor]:
            narrow = run.step.plan.activation_dtype != "float32"
            spoiled = NAN if run.progress.done == 3 and narrow else 1.0
            return [loss * spoiled for loss in plain(batch, **options)]

        if ranks.rank == 1:
            made[1].network.train = train  # type: ignore[method-assign]
        run()
        return run

    runs = in_ranks(2, work)
    assert [switches(run) for run in runs] == [[(4, "bfloat16", "float32")]] * 2
    first, second = (run.step.adapter_state() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def losses(outcome: Outcome, run: Run) -> list[float]:
    return [r["loss"] for r in run.log.records if r["event"] == "step"]


def test_float16_learns_what_float32_does(tmp_path: Path) -> None:
    run, _ = real_run(tmp_path / "16", dtype="float16", overflow=False)
    exact, _ = real_run(tmp_path / "32", dtype="float32", overflow=False)
    found, expected = losses(run(), run), losses(exact(), exact)
    assert found == pytest.approx(expected, rel=1e-2)
    assert found[-1] < found[0]


def test_small_gradients_are_not_lost_in_float16() -> None:
    """A scale keeps what lies under float16's smallest number, 6e-8."""
    batch = steps.sequences(3)
    with_it, without = (
        steps.gradients(
            steps.step(steps.plan(compute_dtype="float16"), steps.settings(dropout=0.0)),
            batch,
            total_target_tokens=10**6,
            loss_scale=scale,
        )
        for scale in (2.0**16, 1.0)
    )
    exact = steps.gradients(
        steps.step(steps.plan(), steps.settings(dropout=0.0)), batch, total_target_tokens=10**6
    )

    def error(found: dict[str, Any], scale: float) -> float:
        flat, reference = (torch.cat([d[n].flatten() for n in exact]) for d in (found, exact))
        return float((flat / scale - reference).norm() / reference.norm())

    assert error(with_it, 2.0**16) < 0.01
    assert error(without, 1.0) > 0.05


@pytest.mark.parametrize("layer_dtype", ["float32", "bfloat16"])
def test_layers_in_another_precision_are_as_near_as_it_is(layer_dtype: Any) -> None:
    """bf16 weights computed in fp32 are those weights in fp32; fp8 turned off is bf16."""
    batch = steps.sequences(5)
    wide = steps.settings(dropout=0.0)

    def found(plan: Plan) -> dict[str, Any]:
        return steps.gradients(steps.step(plan, wide), batch)

    reference = found(steps.plan(compute_dtype=layer_dtype))
    turned = found(steps.plan(compute_dtype="float8", layer_dtype=layer_dtype))
    narrow = found(steps.plan(compute_dtype="float8"))
    flat, near, far = (
        torch.cat([d[n].flatten() for n in reference]) for d in (reference, turned, narrow)
    )
    assert float((near - flat).norm()) <= 0.2 * float((far - flat).norm())
