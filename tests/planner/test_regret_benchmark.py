"""The grid and the draw that the planner is held to, and what is made of the measurements."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planner_regret as regret
from fitlora.units import GIB


def test_every_plan_of_the_grid_is_a_plan_of_its_model() -> None:
    for key, layouts in regret.GRID.items():
        plans = [regret.grid_plan(key, layout, "cuda") for layout in layouts]
        assert len({plan.fingerprint() for plan in plans}) == len(layouts)
        assert {plan.sequence_length for plan in plans} == {key[1]}
    assert regret.GRID.keys() == regret.BUDGETS_GIB.keys()


def test_the_draw_is_the_seeds_and_has_sixty() -> None:
    cases = regret.draw_cases(tiny=False)
    assert cases == regret.draw_cases(tiny=False)
    assert [case.case for case in cases] == list(range(60))
    assert len({case.model for case in cases}) >= 10
    assert {case.rank for case in cases} == {4, 8, 16, 32, 64}
    assert len({case.sequence_length for case in cases}) == 5


def test_plans_share_a_step_where_a_step_can_adopt_them() -> None:
    key = ("llama-3-8b", 2048)
    tasks = [
        regret.Task(key[0], regret.grid_plan(key, layout, "cuda")) for layout in regret.GRID[key]
    ]
    resident = {task.built_with for task in tasks if not task.plan.uses_host}
    assert len(resident) == 1
    streamed = {task.built_with for task in tasks if task.plan.streamed_layers}
    assert not resident & streamed
    asked = regret.Question("llama-3-8b", 8, 2048)
    held = regret.Task(key[0], tasks[0].plan, asked=asked)
    assert held.built_with != tasks[0].built_with, "a limit is for one step alone"


CELL = ("llama-3-8b", 2048)
PLAN = regret.grid_plan(CELL, regret.GRID[CELL][0], "cuda")
ANSWER = {
    **asdict(regret.Question(CELL[0], 8.0, CELL[1])), "plan": PLAN.model_dump(mode="json"),
    "described": "mine", "search_seconds": 9.0, "search_cpu_seconds": 8.0,
    "predicted_tokens_per_second": 110.0, "predicted_process_bytes": 7 * GIB,
}  # fmt: skip


def measured(speed: float | None, gib: float, budget: float | None = None) -> dict[str, Any]:
    found = {"tokens_per_second": speed} if speed is not None else {}
    return {
        "model": "llama-3-8b", "sequence_length": 2048, "budget_gib": budget,
        "peak_reserved_bytes": int(gib * GIB), "described": f"{speed}",
        "key": regret.Task.of(ANSWER).key if budget else f"grid {speed}", **found,
    }  # fmt: skip


def test_a_cell_is_held_against_what_fits_its_budget() -> None:
    rows = [measured(100, 7, 8.0), measured(125, 7.5), measured(200, 7.9), measured(90, 3)]
    found = regret.cell_row(ANSWER, rows, GIB // 4)
    assert found is not None
    assert (found["best_tokens_per_second"], found["compared_with"]) == (125, 2)
    assert found["share_of_best"] == pytest.approx(0.8)
    assert found["speed_error"] == pytest.approx(0.1)


def test_a_chosen_plan_may_be_the_best_and_only_one() -> None:
    found = regret.cell_row(ANSWER, [measured(100, 7, 8.0)], 0)
    assert found is not None
    assert (found["share_of_best"], found["best"]) == (1.0, None)
    assert regret.cell_row(ANSWER, [measured(100, 7)], 0) is None
    once = {**measured(100, 7, 8.0), "key": f"None 8.0 {CELL[0]} {CELL[1]} 0123456789ab"}
    assert regret.cell_row(ANSWER, [once], 0) is None, "another plan was measured there"


def test_a_result_file_keeps_no_row_of_a_plan_that_is_no_answer_any_more(tmp_path: Path) -> None:
    hardware, device = regret.facts(argparse.Namespace(tiny=False, facts=regret.FACTS))
    table = regret.Table(tmp_path / "rows.json", hardware, device)
    table.answer(ANSWER)
    mine, grid = regret.Task.of(ANSWER), regret.Task(CELL[0], PLAN)
    for task in (mine, grid):
        table.measured(task, {"tokens_per_second": 100.0, "peak_reserved_bytes": 7 * GIB})
    assert [row["key"] for row in table.plans] == [mine.key, grid.key]
    assert len(table.rows()) == 1
    other = PLAN.replace(micro_batch_size=PLAN.micro_batch_size * 2)
    table.answer({**ANSWER, "plan": other.model_dump(mode="json")})
    assert [row["key"] for row in table.plans] == [grid.key]
    assert table.rows() == []


def test_an_overflow_is_told() -> None:
    mine = {**measured(None, 8, 8.0), "overflow": True}
    row = regret.cell_row(ANSWER, [mine], 0)
    assert row is not None
    assert (row["overflows"], row["share_of_best"]) == (1, None)
    trained = {
        "plan": {"micro_batch_size": 4}, "train_seconds": 1.0, "accelerate_micro_batch": 2,
        "search_seconds": 9.0, "probe_seconds": 1.0, "accelerate_seconds": 20.0,
        "largest_micro_batch": 8, "largest_seconds": 1.5,
    }  # fmt: skip
    larger = {**trained, "accelerate_micro_batch": 8, "accelerate_seconds": 30.0}
    overflowed = {"plan": {"micro_batch_size": 4}, "overflow": True, "accelerate_micro_batch": 1}
    found = regret.summarize([row], [trained, larger, overflowed, {"plan": None, "refused": "no"}])
    assert (found["cells_overflowed"], found["cases_trained"], found["cases_refused"]) == (1, 2, 1)
    assert found["cases_overflowed"] == 1
    assert found["micro_batch_at_least_accelerates"] == 1, "one that overflowed does not count"
    assert found["share_of_accelerates_time"] == pytest.approx(0.4)
    assert (found["largest_at_least_accelerates"], found["largest_seconds"]) == (2, 3.0)
