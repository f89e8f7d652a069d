"""Numbers for `auto`: from the rows and the budget, written down once and read by the later stages."""

from pathlib import Path
from typing import Any

import pytest

from fitlora import rates
from fitlora.artifacts import Found, Hardware
from fitlora.errors import UserError
from fitlora.hardware import profile
from fitlora.model import load_config
from fitlora.params import Params, check_params, with_found
from fitlora.planner.parameters import HIGHEST_RANK, LOWEST_RANK, find_parameters

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "sample_model"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    lines = (ROOT / "assets/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:8]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(lines[8:10]), encoding="utf-8")
    return {"train": f"{folder}/train.jsonl", "validation": f"{folder}/held_out.jsonl"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hardware:
    monkeypatch.setattr(rates, "disk_read_rate", lambda folder: 10**9)
    monkeypatch.setattr(rates, "product_rate", lambda *arguments: 10**11)
    return profile(Params().hardware.model_copy(update={"device": "cpu"}), tmp_path)


def params_of(rows: dict[str, str], **sections: Any) -> Params:
    auto = {"data": {**rows, "max_length": "auto"}, "lora": {"r": "auto", "alpha": "auto"}}
    merged = {key: {**auto.get(key, {}), **sections.get(key, {})} for key in {**auto, **sections}}
    return check_params({"model": {"id": str(MODEL)}, **merged})


def find(params: Params, machine: Hardware, **limits: Any) -> Found:
    found = find_parameters(params, MODEL, load_config(MODEL), machine, **limits)
    assert found is not None
    return found


def test_with_room_everything_is_as_high_as_it_goes(
    rows: dict[str, str], machine: Hardware, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find(params_of(rows), machine)
    assert found.lora_r == HIGHEST_RANK
    assert found.lora_alpha == 2 * HIGHEST_RANK
    assert found.max_length % 8 == 0
    assert found.max_length < 200, "no more than the longest row needs"
    said = capsys.readouterr().out
    assert f"data.max_length {found.max_length}: as the longest row needs" in said
    assert f"lora.r {HIGHEST_RANK}: the highest considered" in said
    less = find(params_of(rows), machine, highest_rank=8, longest=72)
    assert (less.lora_r, less.max_length) == (8, 72)


def test_what_has_a_number_keeps_it(rows: dict[str, str], machine: Hardware) -> None:
    numbers = Params()
    assert find_parameters(numbers, MODEL, load_config(MODEL), machine) is None
    assert with_found(numbers, None, "plan.json") is numbers
    params = params_of(rows, lora={"r": 5})
    found = find(params, machine)
    settled = with_found(params, found, "plan.json")
    assert (settled.lora.r, settled.lora.alpha) == (5, 10.0)
    assert settled.data.max_length == found.max_length
    params = params_of(rows, lora={"alpha": 7.0}, data={"max_length": 96})
    settled = with_found(params, find(params, machine), "plan.json")
    assert (settled.lora.alpha, settled.data.max_length) == (7.0, 96)
    assert settled.lora.r == HIGHEST_RANK


@pytest.mark.slow
def test_rank_goes_before_length_and_both_go_down(rows: dict[str, str], machine: Hardware) -> None:
    params = params_of(rows)
    whole = find(params, machine)
    seen = []
    for mib in (12, 9, 7, 5):
        small = machine.model_copy(update={"budget_bytes": mib * 2**20})
        found = find(params, small)
        seen.append((found.max_length, found.lora_r))
    assert seen == sorted(seen, reverse=True)
    ranks = [rank for length, rank in seen if length == whole.max_length]
    assert len(set(ranks)) > 1
    assert all(rank == LOWEST_RANK for length, rank in seen if length < whole.max_length)


def test_an_artifact_made_for_numbers_is_told(rows: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"params say auto.*plan\.json was made for numbers.*dvc repro"
    ):
        with_found(params_of(rows), None, "plan.json")


def test_an_adapter_to_go_on_from_has_its_rank(rows: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"lora\.r auto.*train\.from_adapter has its own"):
        params_of(rows, train={"from_adapter": "my/adapter"})


def test_rows_have_no_length_without_a_tokenizer(
    rows: dict[str, str], machine: Hardware, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"data\.max_length auto .*has no tokenizer.*give a number"):
        find_parameters(params_of(rows), tmp_path, load_config(tmp_path), machine)
