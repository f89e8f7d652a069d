"""The draw that the estimate is held to: always the same, all choices in it; and its summary."""

import argparse
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import estimate_accuracy as accuracy
from fitlora.memory.estimate import sequences_of
from fitlora.step.batch import PackedSequence
from fitlora.units import GIB, MIB
from tests.memory.test_estimate import hardware


@pytest.fixture(scope="module")
def cases() -> list[accuracy.Case]:
    return accuracy.draw_cases(fit=False, tiny=False)


def test_the_draw_is_the_seeds(cases: list[accuracy.Case]) -> None:
    assert cases == accuracy.draw_cases(fit=False, tiny=False)
    assert cases != accuracy.draw_cases(fit=True, tiny=False)[: len(cases)]


def test_every_case_is_a_plan_and_every_choice_is_among_them(cases: list[accuracy.Case]) -> None:
    plans = [accuracy.plan_of(case, "cuda") for case in cases]
    assert len(cases) >= 60
    configs = [accuracy.config_of(case.model, tiny=False) for case in cases]
    assert len({config.model_type for config in configs}) >= 6
    assert {plan.optimizer for plan in plans} == set(accuracy.CHOICES["optimizer"])
    assert {plan.micro_batch_size for plan in plans} == {1, 2, 4, 8}
    assert {plan.sequence_length for plan in plans if plan.micro_batch_size == 1} >= {512, 16384}
    assert {case.rank for case in cases} == set(accuracy.CHOICES["rank"])
    assert {case.storage for case in cases} == {"nf4", "fp4", "16 bits"}
    assert {case.targets for case in cases} == {"all-linear", "attention"}
    assert {plan.recompute_keeps for plan in plans} == {(), ("attention",)}
    assert {plan.compute_dtype for plan in plans} == {"bfloat16", "float8"}
    for part in ("checkpoints", "embedding", "head", "optimizer_device"):
        assert {getattr(plan, part) for plan in plans} == {"device", "host"}
    shares = {
        (not plan.recompute_layers, len(plan.recompute_layers) == config.num_hidden_layers)
        for plan, config in zip(plans, configs, strict=True)
    }
    assert shares == {(True, False), (False, False), (False, True)}
    assert any(plan.streamed_layers for plan in plans)


def test_sequences_are_what_a_case_says(cases: list[accuracy.Case]) -> None:
    assert {case.packed for case in cases} == {False, True}
    for case in (next(c for c in cases if c.packed == packed) for packed in (False, True)):
        load = accuracy.load_of(case)
        for size, made in zip(load.train, sequences_of(load.train), strict=True):
            assert isinstance(made, PackedSequence) == case.packed
            assert len(made.tokens) == size.tokens
            assert made.target_tokens == size.target_tokens


def test_families_of_the_fitting_draw_leave_two_unseen() -> None:
    def families(models: tuple[str, ...]) -> set[str]:
        return {accuracy.config_of(model, tiny=False).model_type for model in models}

    assert len(families(accuracy.MODELS) - families(accuracy.FIT_MODELS)) >= 2


def row(number: int, predicted: int, measured: int | None, **more: Any) -> dict[str, Any]:
    asked = {"case": number, "family": "llama", "model": "tiny"}
    found = {"predicted_allocated_bytes": predicted, "measured_allocated_bytes": measured, **more}
    return accuracy.make_row({**asked, **found}, hardware())


def test_a_summary_has_mean_and_worst_and_counts_failures() -> None:
    rows = [
        row(
            0, 101, 100, safe_peak_bytes=110, measured_reserved_bytes=100, estimate_cpu_seconds=2.0
        ),
        row(1, 97, 100, safe_peak_bytes=99, measured_reserved_bytes=100, estimate_cpu_seconds=4.0),
        row(2, 50, None, error="OutOfMemoryError: "),
    ]
    found = accuracy.summarize(rows)
    assert found["allocated_mean_error"] == pytest.approx(0.02)
    assert found["allocated_worst_error"] == pytest.approx(0.03)
    assert found["safe_least_margin"] == pytest.approx(-0.01)
    assert found["safe_most_margin"] == pytest.approx(0.10)
    assert found["estimate_cpu_seconds_most"] == 4.0
    assert (found["cases"], found["failed"]) == (3, 1)
    assert rows[2]["allocated_error"] is None


def test_what_processes_have_of_the_host_is_fitted_by_what_they_do() -> None:
    """To rows that follow the rule, beside what the plan puts there, the rule is found again."""
    rule = dict(zip(accuracy.OWN_HOST_MIB, (1000, 120, 70, 90), strict=True))
    always, *some = rule
    subsets = [[], some[:1], some[1:2], some[2:], some[:2], some]
    rows = []
    for number, chosen in enumerate(subsets):
        parts = [always, *chosen]
        planned = {"pinned": 5 * number, "unpinned": 3, "copies": 2 * number}
        own = sum(rule[part] for part in parts) * MIB
        more = {f"predicted_host_{name}_bytes": count for name, count in planned.items()}
        more["measured_host_process_bytes"] = own + sum(planned.values())
        rows.append(row(number, 1, 1, host_own_parts=parts, **more))
    rows.append(row(9, 1, 1, measured_host_process_bytes=10**12))  # and not predicted yet
    assert accuracy.summarize(rows)["host_own_mib"] == rule
    assert "host_own_mib" not in accuracy.summarize(rows[:3])


def test_cases_share_a_gpu_as_far_as_it_has_room(
    cases: list[accuracy.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[accuracy.Case] = []
    together: list[tuple[int, int]] = []

    class Measuring:
        """Ends when it is asked for the third time; the last case's dies."""

        def __init__(self, case: accuracy.Case, args: argparse.Namespace) -> None:
            self.case, self.asked = case, 0
            running.append(case)
            together.append((len(running), sum(case.rough_bytes for case in running)))

        @property
        def ended(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                running.remove(self.case)
            return self.asked >= 3

        def result(self) -> dict[str, Any]:
            return {"of": self.case.number}

    monkeypatch.setattr(accuracy, "Measuring", Measuring)
    monkeypatch.setattr(accuracy, "SECONDS_BETWEEN_LOOKS", 0.0)
    here = hardware(budget_bytes=80 * GIB, host_budget_bytes=128 * GIB)
    args = argparse.Namespace(limit_seconds=60.0, at_once=6, work=tmp_path)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # and as they were after it
    found = {case.number: outcome for case, outcome in accuracy.measured(cases, here, args)}
    assert found == {case.number: {"of": case.number} for case in cases}
    assert max(count for count, _ in together) == 6
    assert max(size for _, size in together) <= 80 * GIB

    together.clear()
    args.at_once, small = 64, hardware(budget_bytes=1, host_budget_bytes=1)
    assert len(list(accuracy.measured(cases[:3], small, args))) == 3
    assert [count for count, _ in together] == [1, 1, 1]

    args.limit_seconds = 0.0
    assert not list(accuracy.measured(cases, here, args))


def test_where_three_cases_fail_alike_no_other_begins(
    cases: list[accuracy.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["no CUDA", "too large", "no CUDA", "too large", "no CUDA"]  # the third of a kind

    class Failing:
        ended = True

        def __init__(self, case: accuracy.Case, args: argparse.Namespace) -> None:
            pass

        def result(self) -> dict[str, Any]:
            return {"error": words.pop(0)}

    monkeypatch.setattr(accuracy, "Measuring", Failing)
    monkeypatch.setattr(accuracy, "SECONDS_BETWEEN_LOOKS", 0.0)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    args = argparse.Namespace(limit_seconds=60.0, at_once=1, work=tmp_path)
    assert len(list(accuracy.measured(cases, hardware(budget_bytes=80 * GIB), args))) == 5


@pytest.mark.slow
def test_a_case_that_dies_leaves_its_last_words(cases: list[accuracy.Case], tmp_path: Path) -> None:
    (tmp_path / "hardware.json").write_text("{")
    measuring = accuracy.Measuring(cases[0], argparse.Namespace(work=tmp_path, tiny=True))
    while not measuring.ended:
        time.sleep(0.01)
    assert "hardware.json" in measuring.result()["error"]


def test_a_row_tells_the_whole_plan(cases: list[accuracy.Case]) -> None:
    case = cases[0]
    plan = accuracy.plan_of(case, "cuda")
    asked = accuracy.asked_of(case, plan, accuracy.config_of(case.model, tiny=False))
    assert asked["plan"] == plan.fingerprint()
    assert asked["on_host"] == " ".join(
        name
        for name in ("checkpoints", "embedding", "head", "optimizer_device")
        if getattr(plan, name) == "host"
    )
    assert asked["tokens"] == sum(size[0] for size in case.sizes)


def test_a_picture_has_a_point_for_each_measured_case() -> None:
    def reserved(number: int, family: str, measured: int | None) -> dict[str, Any]:
        found = {"predicted_reserved_bytes": 2 << 30, "measured_reserved_bytes": measured}
        return accuracy.make_row({"case": number, "family": family, **found}, hardware())

    rows = [reserved(0, "llama", 2 << 30), reserved(1, "qwen2", 1 << 30), reserved(2, "phi3", None)]
    drawn = ElementTree.fromstring(accuracy.plot(rows))
    names = [text.text for text in drawn.findall(".//{*}text")]
    assert {"llama", "qwen2"} <= set(names)
    assert "phi3" not in names
    # both points and both of the legend
    points = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.findall(".//{*}circle")]
    assert len(points) == 4
    assert points[0][0] > points[1][0]
    assert points[0][1] == points[1][1]
