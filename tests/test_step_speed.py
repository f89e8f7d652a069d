"""The speed benchmark's rows: merged, chosen by budget, held against the baseline, and drawn."""

import json
from typing import Any

from benchmarks.common import ROOT
from benchmarks.speed_plot import (
    PLOT,
    README,
    SERIES,
    measured,
    not_beaten,
    plot_of,
    with_table,
)
from benchmarks.step_speed import SYSTEMS, best_within, case_of, merged, process_of
from fitlora.units import GIB

COMMITTED = json.loads((ROOT / "benchmarks/results/step_speed.h200.json").read_text())


def row(system: str, speed: float, gib: float, micro_batch: int = 1) -> dict[str, Any]:
    return {
        "system": system, "model": "llama-3-8b", "sequence_length": 2048,
        "micro_batch": micro_batch, "compute_dtype": "bfloat16", "recomputed_share": 1.0,
        "tokens_per_second": speed, "process_bytes": round(gib * GIB),
    }  # fmt: skip


def test_a_new_row_replaces_the_old_one_of_its_case() -> None:
    rows = [row("fitlora", 1.0, 5), row("peft", 2.0, 6), {**row("peft", 2.0, 6), "budget_gib": 8}]
    found = merged(rows, row("fitlora", 3.0, 7))
    assert found == [row("peft", 2.0, 6), row("fitlora", 3.0, 7)]


def test_a_failure_replaces_nothing_that_was_measured() -> None:
    failed = {**case_of(row("peft", 0, 0)), "error": "out of memory"}
    assert merged([row("peft", 2.0, 6)], failed) == [row("peft", 2.0, 6)]
    assert merged([], failed) == [failed]
    assert merged([failed], failed) == [failed]


def test_the_best_within_a_budget_is_the_fastest_that_fits() -> None:
    rows = [row("fitlora", 10.0, 7.9), row("fitlora", 30.0, 8.1), row("fitlora", 20.0, 11.9)]
    best = {r["budget_gib"]: r["tokens_per_second"] for r in best_within(rows)}
    assert best == {8: 10.0, 12: 30.0, 16: 30.0, 24: 30.0, 48: 30.0, 80: 30.0}


def test_a_baseline_is_beaten_by_one_case_that_is_both_faster_and_smaller() -> None:
    ours = [row("fitlora", 20.0, 10), row("fitlora", 5.0, 5)]
    beaten, slower_or_larger = row("peft", 20.0, 10), row("peft", 6.0, 6)
    assert not_beaten([*ours, beaten, slower_or_larger]) == [slower_or_larger]


def test_unsloth_checkpoints_in_a_process_of_its_own() -> None:
    kept = {**row("unsloth", 1.0, 1), "recomputed_share": 0.0}
    assert process_of(kept) != process_of(row("unsloth", 1.0, 1))
    assert process_of({**kept, "system": "peft"}) == process_of(row("peft", 1.0, 1))


def test_no_case_of_the_baseline_beats_ours() -> None:
    """Where both fit, ours is neither slower nor larger than transformers + peft."""
    assert any(r["system"] == "peft" for r in COMMITTED["rows"])
    assert not_beaten(COMMITTED["rows"]) == []


def test_every_system_that_was_measured_is_shown() -> None:
    kinds = {(r["system"], r["compute_dtype"]) for r in measured(COMMITTED["rows"])}
    assert kinds <= set(SERIES)
    assert {system for system, _ in SERIES} == set(SYSTEMS)


def test_the_readme_shows_the_committed_rows() -> None:
    document = README.read_text(encoding="utf-8")
    assert with_table(document, COMMITTED["rows"]) == document, "python -m benchmarks.speed_plot"
    assert PLOT.read_text(encoding="utf-8") == plot_of(COMMITTED), "python -m benchmarks.speed_plot"
    assert f"]({PLOT.relative_to(ROOT)})" in document
