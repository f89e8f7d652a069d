"""From a tiny model to a proven Plan, on the CPU: estimate, probe, and what follows an overflow."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fitlora.artifacts import Estimate, Hardware, Rates
from fitlora.errors import UserError
from fitlora.memory.estimate import OWN_HOST_MIB, Load, estimate, rehearse
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner import find
from fitlora.planner.find import MAX_PROBES, _faster, _in_turn, find_plan
from fitlora.planner.probe import ProbeResult, Stopwatch, probe, time_step, write_log
from fitlora.planner.search import Choice, Search
from fitlora.planner.size import ModelSize
from fitlora.planner.task import Task
from fitlora.report.memory import plan_lines
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from fitlora.units import GIB, MIB, format_bytes
from tests.planner.test_rivals import Truth, make
from tests.planner.test_search import NO_HOST, Linear, hardware
from tests.planner.test_search import estimate as fake_estimate
from tests.planner.test_speed import NOT_MEASURED
from tests.step import steps

CONFIG = steps.config()
LOAD = Load.uniform(6, 60)
FAST = Rates(
    host_to_device_bytes_per_second=None,
    device_to_host_bytes_per_second=None,
    device_copy_bytes_per_second=10**12,
    disk_read_bytes_per_second=None,
    product_flops_per_second={"bfloat16": 10**14},
)


def params(**plan: Any) -> Params:
    return check_params(
        {"train": {"effective_batch_size": 6}, "lora": {"r": 4, "dropout": 0.1}, "plan": plan}
    )


def cpu(budget: int = GIB, **changes: Any) -> Hardware:
    return hardware(budget, device="cpu", gpus=(), **changes)


def run(here: Hardware, asked: Params | None = None, **options: Any) -> Any:
    return find_plan(Task(CONFIG, asked or params(), LOAD, here), **options)


def fake_probe(monkeypatch: pytest.MonkeyPatch, fits: list[bool]) -> list[ProbeResult]:
    """Probes that fit as listed, one as fast as the other; those made are in what comes back."""
    made: list[ProbeResult] = []

    @contextmanager
    def prober(*question: Any) -> Iterator[Callable[[Plan], ProbeResult]]:
        yield answer

    def answer(plan: Plan) -> ProbeResult:
        found = ProbeResult(plan, False, why=f"reason {len(made)}")
        if fits[len(made)]:
            found = ProbeResult(plan, True, 1, None, 1.0, 1.0)
        made.append(found)
        return found

    monkeypatch.setattr(find, "Prober", prober)
    return made


def fake_estimates(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Estimates by a formula, for a model of 32 layers."""

    def estimator(plan: Plan) -> Estimate:
        return fake_estimate(plan, Linear()(plan), budget)

    monkeypatch.setattr(Task, "estimator", staticmethod(estimator))
    monkeypatch.setattr(Task, "size", ModelSize(32, 32_000))


def find_large(budget: int, **options: Any) -> Any:
    """`find_plan` on the formula: 32 sequences of 1024 tokens."""
    asked = check_params({"plan": {**NO_HOST, **options.pop("plan", {})}})
    return find_plan(Task(CONFIG, asked, Load.uniform(32, 1024), hardware(budget, **options)))


def test_the_probe_takes_what_was_estimated() -> None:
    choice, probes = run(cpu())
    assert choice.plan.micro_batch_size == 6
    assert choice.plan.device == "cpu"
    assert choice.plan.compute_dtype == "float32"
    assert choice.plan.sequence_length == 60
    (made,) = probes
    assert made.plan == choice.plan
    assert made.fits
    assert made.peak_allocated_bytes == choice.estimate.peak_allocated_bytes
    assert made.peak_reserved_bytes is None
    assert made.step_seconds is not None
    assert made.tokens_per_second == pytest.approx(6 * 60 / made.step_seconds)


def test_a_tight_budget_is_kept_by_estimate_and_probe() -> None:
    asked = params(micro_batch_size=2)
    whole, _ = run(cpu(), asked)
    budget = whole.estimate.process_bytes - 1
    choice, (made,) = run(cpu(budget), asked, known=[whole.estimate])
    assert choice.plan == whole.plan.replace(recompute_layers=(0,))
    assert choice.estimate.process_bytes <= budget
    assert made.fits
    assert made.peak_allocated_bytes == choice.estimate.peak_allocated_bytes


def test_a_probe_says_where_the_budget_is_passed() -> None:
    asked = params()
    settings, plan = StepSettings.of(asked), steps.plan(effective_batch_size=6, micro_batch_size=6)
    peak = estimate(CONFIG, plan, settings, LOAD, cpu()).peak_allocated_bytes
    for budget, fits in ((peak, True), (peak - 1, False)):
        found = probe(CONFIG, plan, settings, LOAD, cpu(budget))
        assert found.fits is fits
        assert found.peak_allocated_bytes == peak
        assert (found.tokens_per_second is not None) is fits


def test_what_freezing_buys_is_said_before_the_run(tmp_path: Path) -> None:
    """Without a speed where the device's rates are not known, and with one where they are."""
    asked = check_params({**params().model_dump(), "train": {"freeze": "speed"}})
    quick = hardware(GIB, target="a card").model_copy(update={"rates": FAST})
    for here, speed in ((cpu(), ""), (quick, r" and \d+% of speed")):
        choice, probes = run(here, asked)
        assert choice.plan.frozen_layers == (0,)
        lines = list(plan_lines(choice, GIB, probes))
        saved = choice.all_learn.peak_allocated_bytes - choice.estimate.peak_allocated_bytes
        assert saved > 0
        bought = f"freezing buys  {re.escape(format_bytes(saved))} of the peak{speed}, against"
        assert sum(re.match(bought, line) is not None for line in lines) == 1
        assert any(
            re.match(r"frozen_layers +1 layers +train\.freeze_share", line) for line in lines
        )
    write_log(tmp_path / "probe.json", choice, probes)
    logged = json.loads((tmp_path / "probe.json").read_text())["with_all_layers_trained"]
    assert logged["tokens_per_second"] < choice.forecast.tokens_per_second


def test_estimates_of_what_params_do_not_ask_for_are_no_plans_to_choose() -> None:
    frozen = check_params({**params().model_dump(), "train": {"freeze": "speed"}})
    whole = run(cpu())[0].estimate
    mine = run(cpu(), frozen)[0].estimate
    wide = mine.model_copy(update={"plan": mine.plan.in_precision("bfloat16")})
    choice, _ = run(cpu(), frozen, known=[whole, wide])
    others = [other.plan for other in choice.considered]
    assert choice.plan == mine.plan
    assert whole.plan not in others
    assert wide.plan not in others


def test_a_gpu_that_is_not_here_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_probe(monkeypatch, [])
    choice, probes = run(hardware(GIB, target="RTX of a friend"))
    assert probes == made == []
    assert choice.plan.device == "cuda"
    assert choice.plan.compute_dtype == "bfloat16"


def test_after_an_overflow_the_next_plan_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 10 * GIB
    fake_estimates(monkeypatch, budget)
    made = fake_probe(monkeypatch, [False, False, True])
    choice, probes = find_large(budget)
    assert probes == made
    assert [p.fits for p in probes] == [False, False, True]
    assert choice.plan == probes[-1].plan
    sizes = [Linear()(p.plan) for p in probes]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.95 * budget


def test_overflow_after_overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_estimates(monkeypatch, 10 * GIB)
    made = fake_probe(monkeypatch, [False] * 100)
    with pytest.raises(UserError, match=r"3 plan\(s\) that should fit 10\.00 GiB did not") as told:
        find_large(10 * GIB)
    assert len(made) == MAX_PROBES
    for number, one in enumerate(made):
        assert f"  {one.plan.describe()}: reason {number}\n" in str(told.value)


def test_an_overflow_of_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_estimates(monkeypatch, 10 * GIB)
    fake_probe(monkeypatch, [False] * 100)
    with pytest.raises(UserError, match=r"^1 plan\(s\) that should fit"):
        find_large(10 * GIB, plan={"micro_batch_size": 2, "recompute": "all"})


def test_what_the_host_lacks_the_next_plan_does_not_take() -> None:
    search = make(Truth(), 4, rates=NOT_MEASURED, micro_batch_size=1)
    probes: list[ProbeResult] = []
    asked = SimpleNamespace(params=search.params, size=search.model)
    choices = _in_turn(asked, search, probes)
    first = next(choices)
    assert not first.plan.disk_layers
    over = first.estimate.host_bytes // 8
    probes.append(ProbeResult(first.plan, False, host_over_bytes=over))
    second = next(choices)
    assert 0 < second.estimate.host_bytes < first.estimate.host_bytes - over
    assert second.estimate.process_bytes <= 4 * GIB
    assert second.plan.disk_layers
    probes.append(ProbeResult(second.plan, False, host_over_bytes=0))
    third = next(choices)
    assert third.estimate.host_bytes < second.estimate.host_bytes
    probes.append(ProbeResult(third.plan, False, host_over_bytes=64 * GIB))
    assert list(choices) == []


def test_why_a_plan_did_not_fit_is_said_and_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_estimates(monkeypatch, 10 * GIB)
    fake_probe(monkeypatch, [False, True])
    choice, probes = find_large(10 * GIB)
    lines = list(plan_lines(choice, 10 * GIB, probes))
    assert f"probe          {probes[0].plan.describe()}: reason 0" in lines
    write_log(tmp_path / "probe.json", choice, probes)
    logged = json.loads((tmp_path / "probe.json").read_text())["probes"]
    assert [one["why"] for one in logged] == ["reason 0", None]


def test_nothing_fits_before_anything_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_estimates(monkeypatch, 1024)
    made = fake_probe(monkeypatch, [])
    with pytest.raises(UserError, match=r"nothing fits 1\.00 KiB"):
        find_large(1024)
    assert made == []


@dataclass
class Measured:
    """A search with rates, its first choice, and a prober by which each plan has a rate."""

    first: Choice
    search: Search
    rates: dict[Plan, float | None] = field(default_factory=dict)

    def chosen(self, share: float) -> tuple[Choice, list[ProbeResult]]:
        """What is chosen where the first plan reaches this share of its forecast."""
        rate = share * forecast_of(self.first)
        probes = [self._result(self.first.plan, rate)]
        return _faster(self.search, self.first, probes, self.probe), probes

    def probe(self, plan: Plan) -> ProbeResult:
        return self._result(plan, self.rates.get(plan))

    def _result(self, plan: Plan, rate: float | None) -> ProbeResult:
        return ProbeResult(plan, rate is not None, 1, 1, rate and 1.0, rate)


def forecast_of(choice: Choice) -> float:
    assert choice.forecast is not None
    return choice.forecast.tokens_per_second


@pytest.fixture
def measured() -> Measured:
    search = make(Truth(), 9)
    return Measured(next(search.fitting()), search)


def test_a_plan_that_is_as_fast_as_promised_is_probed_alone(measured: Measured) -> None:
    choice, probes = measured.chosen(0.97)
    assert choice is measured.first
    assert len(probes) == 1


@pytest.mark.parametrize(("gain", "changes"), [(1.04, False), (1.06, True)])
def test_a_probe_changes_the_plan_only_for_a_clear_gain(
    measured: Measured, gain: float, changes: bool
) -> None:
    second = next(measured.search.instead(measured.first))
    share = 0.9 * forecast_of(second) / forecast_of(measured.first)
    measured.rates[second.plan] = gain * share * forecast_of(measured.first)
    choice, probes = measured.chosen(share)
    assert choice.plan == (second if changes else measured.first).plan
    assert len(probes) > 1
    assert any("as probes measured it" in why for why in choice.reasons.values()) is changes


def test_the_fastest_that_was_probed_is_taken_after_no_more_probes_than_allowed(
    measured: Measured,
) -> None:
    others = [other.plan for other in measured.search.instead(measured.first)]
    assert len(others) >= MAX_PROBES
    for number, plan in enumerate(others):
        measured.rates[plan] = (0.5 + 0.01 * number) * forecast_of(measured.first)
    choice, probes = measured.chosen(0.4)
    assert [made.plan for made in probes[1:]] == others[: MAX_PROBES - 1]
    assert choice.plan == others[MAX_PROBES - 2]
    lines = list(plan_lines(choice, 9 * GIB, probes))
    assert sum(line.startswith("probed peak") for line in lines) == MAX_PROBES


def test_another_plan_that_overflows_changes_nothing(measured: Measured) -> None:
    choice, probes = measured.chosen(0.5)
    assert choice is measured.first
    assert [made.fits for made in probes] == [True, False, False]


def test_after_an_overflow_no_other_plan_is_tried(measured: Measured) -> None:
    probes = [ProbeResult(measured.first.plan, False)]
    probes.append(ProbeResult(measured.first.plan, True, 1, 1, 1.0, 1.0))
    assert _faster(measured.search, measured.first, probes, measured.probe) is measured.first
    assert len(probes) == 2


@dataclass
class Timed:
    """A step of seven sequences, two in a pass: what it ran, and seconds of the first and others."""

    step: TrainingStep
    first: float = 4.0
    others: float = 4.0
    now: float = 0.0
    ran: list[int] = field(default_factory=list)

    def run(self, sequences: Any, **options: Any) -> None:
        self.now += self.others if self.ran else self.first
        self.ran.append(len(sequences))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    asked = params(micro_batch_size=2)
    plan = run(cpu(), asked)[0].plan.replace(effective_batch_size=7)
    step = build_step(CONFIG, plan, StepSettings.of(asked), RandomWeights(torch.device("cpu")))
    made = Timed(step)
    monkeypatch.setattr(step, "run", made.run)
    monkeypatch.setattr(step, "evaluate", lambda sequences: None)
    monkeypatch.setattr("fitlora.planner.probe.time.perf_counter", lambda: made.now)
    return made


def test_the_speed_is_that_of_the_whole_batch(timed: Timed) -> None:
    """Two passes of two sequences are timed, of the three that seven sequences take."""
    assert time_step(timed.step, Load.uniform(7, 60)) == (7.0, 7 * 60)
    assert timed.ran == [4]
    assert time_step(timed.step, Load.uniform(7, 60), rehearsed=2.9) == (7.0, 7 * 60)
    assert timed.ran == [4, 4]


def test_a_long_step_is_timed_as_it_is_rehearsed(timed: Timed) -> None:
    timed.first, timed.others = 100.0, 8.0
    load = Load.uniform(7, 60)
    rehearse(timed.step, load, watch := Stopwatch(timed.step))
    assert timed.ran == [2, 4]
    assert time_step(timed.step, load, watch.seconds) == (14.0, 7 * 60)
    assert timed.ran == [2, 4]


def test_the_log(tmp_path: Path) -> None:
    choice, probes = run(cpu())
    path = tmp_path / "logs" / "probe.json"
    write_log(path, choice, probes)
    content = json.loads(path.read_text())
    assert content["predicted"]["peak_allocated_bytes"] == choice.estimate.peak_allocated_bytes
    (made,) = content["probes"]
    assert made["plan"] == content["predicted"]["plan"] == choice.plan.model_dump(mode="json")
    assert made["peak_allocated_bytes"] == probes[0].peak_allocated_bytes
    assert made["fits"] is True
    assert made["tokens_per_second"] == probes[0].tokens_per_second
    assert [other["why"] for other in content["considered"]] == [o.why for o in choice.considered]


@pytest.mark.slow
def test_what_the_device_has_no_room_for_goes_to_the_host() -> None:
    """Traced truly: a budget beneath all that stays on the device.

    The parts are large beside the 20 MiB in which the allocator reserves.
    """
    config = steps.config(
        num_hidden_layers=4, hidden_size=2048, intermediate_size=8192, vocab_size=65536,
        tie_word_embeddings=False,
    )  # fmt: skip
    asked, load = params(), Load.uniform(6, 24)
    settings = StepSettings.of(asked)

    def plan_for(budget: int, host: int, **plan: Any) -> Any:
        here = hardware(budget, host_budget_bytes=host, target="a card")
        given = params(**plan) if plan else asked
        choice, _ = find_plan(Task(config, given, load, here))
        quick = estimate(config, choice.plan, settings, load, here)
        assert choice.estimate.peak_allocated_bytes == quick.peak_allocated_bytes
        assert choice.estimate.peak_reserved_bytes is not None
        return choice

    resident = {**NO_HOST, "micro_batch_size": 1, "recompute": "all"}
    alone = plan_for(GIB, 2 * GIB, **resident).estimate
    least, own = alone.process_bytes, alone.host_bytes
    choice = plan_for(least - 1, own + GIB, micro_batch_size=1)
    assert choice.estimate.process_bytes < least
    assert 0 < choice.estimate.host_pinned_bytes <= GIB
    assert choice.plan.embedding == "host"
    unstreamed = {"recompute": "all", "stream_layers": 0, "head": "device"}
    last = plan_for(
        GIB, own + GIB, micro_batch_size=1, embedding="host", checkpoints="host", **unstreamed
    )
    streams = plan_for(last.estimate.process_bytes - 1, own + GIB, micro_batch_size=1)
    assert streams.plan.streamed_layers
    with pytest.raises(UserError, match=r"larger hardware\.host_memory_budget|nothing fits"):
        # an optimizer on the host loads less there for what it puts there
        plan_for(least - 1, own - OWN_HOST_MIB["optimizer on the device"] * MIB, micro_batch_size=1)
