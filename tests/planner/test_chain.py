"""The chain of plans from the fastest to the smallest: its order, and who may walk it."""

from typing import Any

import pytest

from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner import search
from fitlora.planner.chain import Freedom, less, segments, smallest
from fitlora.planner.size import ModelSize
from fitlora.planner.speed import guess_bytes, guess_host_bytes
from tests.planner.test_speed import LAYERS, plan, shape

ALL = {"embedding", "checkpoints", "head", "optimizer_device"}


def freedom(
    start: Plan | None = None, *, by_hand: bool = True, tied: bool = False, **asked: Any
) -> Freedom:
    moves = asked.get("head") != "device"
    model = ModelSize(LAYERS, 128_256, tied=tied, head_moves=moves, by_hand=by_hand)
    return search.freedom(check_params({"plan": asked}), model, start or plan())


def hosted(found: Plan) -> set[str]:
    return {name for name in ALL if getattr(found, name) == "host"}


def chain(start: Plan, free: Freedom) -> list[Plan]:
    return [start, *(p for part in segments(start, free).values() for p in part)]


def test_each_link_takes_less_of_the_device_and_more_of_the_host() -> None:
    plans = chain(plan(), freedom())
    bytes_of = [guess_bytes(p, shape(), 8192) for p in plans]
    assert bytes_of == sorted(bytes_of, reverse=True)
    pinned = [guess_host_bytes(p, shape(), 8192) for p in plans]
    assert pinned == sorted(pinned)
    assert len(set(plans)) == len(plans) == 1 + 1 + LAYERS + LAYERS + 2


def test_from_what_costs_nothing_to_what_costs_most() -> None:
    parts = segments(plan(), freedom())
    assert list(parts) == ["recompute", "stream", "head", "optimizer"]
    assert hosted(parts["recompute"][0]) == {"embedding"}
    assert hosted(parts["recompute"][1]) == {"embedding", "checkpoints"}
    assert not any(p.streamed_layers for p in parts["recompute"])
    assert [len(p.streamed_layers) for p in parts["stream"]] == list(range(1, LAYERS + 1))
    assert {len(p.recompute_layers) for p in parts["stream"]} == {LAYERS}
    last = smallest(plan(), freedom())
    assert last == parts["optimizer"][-1]
    assert hosted(last) == ALL


def test_what_params_fix_is_left_alone() -> None:
    start = plan(recompute_layers=range(5), streamed_layers=(30,))
    fixed = freedom(
        start, recompute=5, stream_layers=1, checkpoints="device", embedding="device",
        head="device", optimizer_device="device",
    )  # fmt: skip
    assert segments(start, fixed) == {}
    assert smallest(start, fixed) == start
    assert list(segments(start, freedom(start, recompute=5))) == [
        "embedding", "checkpoints", "stream", "head", "optimizer",
    ]  # fmt: skip


def test_one_table_for_both_ends_moves_once() -> None:
    parts = segments(plan(), freedom(tied=True))
    assert hosted(parts["stream"][-1]) == {"checkpoints"}
    assert hosted(parts["head"][0]) == {"checkpoints", "embedding", "head"}
    half = freedom(tied=True, embedding="device")
    assert not half.head
    assert not half.embedding


def test_models_that_are_not_done_by_hand() -> None:
    """Only recomputed layers stream, and checkpoints stay."""
    parts = segments(plan(), freedom(by_hand=False))
    for found in (p for part in parts.values() for p in part):
        assert set(found.streamed_layers) <= set(found.recompute_layers)
        assert found.checkpoints == "device"
    assert smallest(plan(), freedom(by_hand=False)).streamed_layers
    assert not freedom(by_hand=False, recompute="none").stream
    assert freedom(by_hand=True, recompute="none").stream


@pytest.mark.parametrize("recompute", ["auto", "all"])
def test_where_the_device_is_the_host_nothing_is_moved(recompute: str) -> None:
    here = plan(device="cpu", compute_dtype="float32")
    for found in chain(here, freedom(here, recompute=recompute)):
        assert not found.uses_host
        assert found.optimizer_device == "device"


def test_an_optimizer_with_pages_or_kernels_of_its_own_stays() -> None:
    eight = plan(optimizer="adamw_8bit")
    assert not freedom(eight).optimizer
    assert freedom().optimizer


def test_less_room_on_the_host() -> None:
    free = freedom()
    assert len(segments(plan(), less(free, "stream", 7))["stream"]) == 7
    assert "stream" not in segments(plan(), less(free, "stream", 0))
    without = less(free, "recompute", 0)
    assert hosted(segments(plan(), without)["recompute"][-1]) == {"embedding"}
    assert hosted(segments(plan(), less(without, "recompute", 0))["recompute"][-1]) == set()
    assert "head" not in segments(plan(), less(free, "head", 0))
