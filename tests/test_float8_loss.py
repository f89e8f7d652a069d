"""The comparison of loss curves, and that it runs."""

import json
from pathlib import Path

import pytest

from benchmarks.float8_loss import WINDOW, compared, main


def test_curves_are_compared_by_windows() -> None:
    reference = [2.0] * WINDOW + [1.0] * WINDOW
    other = [2.0] * WINDOW + [1.03] * WINDOW
    found = compared(reference, other)
    assert found["first_window_share"] == 0.0
    assert found["last_window_share"] == pytest.approx(0.03)
    assert found["largest_window_share"] == pytest.approx(0.03)
    assert found["whole_curve_share"] == pytest.approx(0.01)


def test_below_the_reference_counts_as_much() -> None:
    assert compared([1.0] * WINDOW, [0.9] * WINDOW)["largest_window_share"] == pytest.approx(0.1)


@pytest.mark.slow
def test_it_runs_on_the_shipped_model(tmp_path: Path) -> None:
    main(["--steps", "2", "--json", str(tmp_path / "loss.json")])
    result = json.loads((tmp_path / "loss.json").read_text())
    plain, float8, again = result["rows"]
    assert float8["groups_in_float8"] == float8["groups"] > 0 == plain["groups_in_float8"]
    assert result["curves"]["float8"] != result["curves"]["bfloat16"]
    assert abs(float8["whole_curve_share"]) < 0.05
    assert abs(again["whole_curve_share"]) < 0.005
    assert all(len(curve) == 2 for curve in result["curves"].values())
