"""The search with the host and the speed model, on estimators that know a plan's bytes by formula."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fitlora.artifacts import Estimate, Rates
from fitlora.errors import UserError
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.chain import segments
from fitlora.planner.rivals import Guesses, Rivals
from fitlora.planner.search import (
    LOSS_CHUNK_BYTES,
    MOST_RIVALS,
    NothingFits,
    Search,
    default_plan,
    smallest_plans,
)
from fitlora.planner.size import ModelSize
from fitlora.planner.speed import forecast, guess_bytes, guess_host_bytes
from fitlora.units import GIB
from tests.planner.test_search import estimate, hardware
from tests.planner.test_speed import H200, LAYERS, NOT_MEASURED, shape

TOKENS = 2048
PLACES = ("checkpoints", "embedding", "head", "optimizer_device")


@dataclass(frozen=True)
class Truth:
    """What plans take: the guess's own sum, off by what it leaves out and by shares of it."""

    left_out: int = GIB // 2
    share: float = 1.0
    of_tokens: float = 1.0  # what each sequence adds beyond the guess

    def __call__(self, plan: Plan) -> int:
        tokens = int(plan.micro_batch_size * TOKENS * self.of_tokens)
        return self.left_out + int(self.share * guess_bytes(plan, shape(), tokens))


def make(
    truth: Callable[[Plan], int],
    gib: float,
    *,
    rates: Rates = H200,
    host: int = 128 * GIB,
    model: ModelSize | None = None,
    train: dict[str, Any] | None = None,
    device: str = "cuda",
    **asked: Any,
) -> Search:
    params = check_params({"train": {"effective_batch_size": 8, **(train or {})}, "plan": asked})
    budget = int(gib * GIB)
    gpus = {} if device == "cuda" else {"gpus": ()}
    here = hardware(budget, rates=rates, host_budget_bytes=host, device=device, **gpus)
    size = model or ModelSize(LAYERS, 128_256)

    def tokens(micro: int) -> int:
        return micro * TOKENS

    def estimator(plan: Plan) -> Estimate:
        pinned = guess_host_bytes(plan, shape(), tokens(plan.micro_batch_size))
        taken = truth(plan)
        found = estimate(plan, taken, budget)
        # whatever is allocated, as much is lost between blocks
        beside = {"peak_allocated_bytes": max(1, taken - GIB), "peak_reserved_bytes": taken}
        return found.model_copy(update={"host_pinned_bytes": pinned, **beside})

    start = default_plan(params, here, size, tokens, sequence_length=TOKENS)
    return Search(params, here, size, start, estimator, tokens, shape=shape())


def first(made: Search) -> Plan:
    choice = next(made.fitting())
    assert choice.estimate.process_bytes <= made.hardware.budget_bytes
    assert choice.estimate.host_pinned_bytes <= made.hardware.host_budget_bytes
    return choice.plan


def hosted(plan: Plan) -> list[str]:
    return [name for name in PLACES if getattr(plan, name) == "host"]


def place(made: Search, plan: Plan) -> int:
    """Where along its chain a plan is, from what is fastest."""
    start = made._plan(plan.micro_batch_size)
    chain = [start, *(p for part in segments(start, made.free).values() for p in part)]
    return chain.index(plan)


@pytest.mark.parametrize("gib", [40, 24, 16, 12, 9, 8, 7, 6, 5, 4, 3, 2])
def test_without_rates_the_first_of_the_chain_that_fits(gib: int) -> None:
    truth = Truth()
    made = make(truth, gib, rates=NOT_MEASURED)
    plan = first(made)
    start = made._plan(plan.micro_batch_size)
    chain = [start, *(p for part in segments(start, made.free).values() for p in part)]
    assert plan == next(p for p in chain if truth(p) <= gib * GIB)
    assert len(made.seen) <= 14


def test_what_neither_memory_has_room_for_is_read_from_disk() -> None:
    """The device has room for the smallest plan alone, and the host not for all of its share."""
    ample = make(Truth(), 4, rates=NOT_MEASURED, micro_batch_size=1)
    whole = smallest_plans(ample.params, ample.model, ample.start, host=True)[0]
    gib, pinned = Truth()(whole) / GIB, guess_host_bytes(whole, shape(), TOKENS)
    for short, count in ((0, 0), (1, 4), (shape().layer_bytes + 1, 5)):
        made = make(Truth(), gib, rates=NOT_MEASURED, host=pinned - short, micro_batch_size=1)
        choice = next(made.fitting())
        assert choice.plan == whole.replace(disk_layers=count)
        assert ("disk_layers" in choice.reasons) == (count > 0)
    with pytest.raises(UserError, match="nothing fits"):
        first(make(Truth(), gib, rates=NOT_MEASURED, host=GIB // 8, micro_batch_size=1))


def test_ever_smaller_budgets_move_ever_more() -> None:
    places, seen = [], set()
    for gib in (30, 20, 12, 8, 6.5, 5, 4, 3.5, 3):
        made = make(Truth(), gib, rates=NOT_MEASURED)
        plan = first(made)
        places.append((-plan.micro_batch_size, place(made, plan)))
        seen |= set(hosted(plan))
    assert places == sorted(places)
    assert {"embedding", "checkpoints"} <= seen


def test_a_batch_is_offloaded_before_it_is_starved() -> None:
    plan = first(make(Truth(), 4.5, rates=NOT_MEASURED))
    assert plan.micro_batch_size * TOKENS >= 4096
    assert plan.streamed_layers


def all_plans(made: Search) -> list[Plan]:
    """Of a few sizes, recomputed and streamed layers and places, what params allow."""
    found = []
    for size in made._sizes():
        for recomputed in range(0, LAYERS + 1, 4):
            for streamed in ((), tuple(range(LAYERS))):
                for keeps in ((), ("attention",)) if recomputed else ((),):
                    for count in range(len(PLACES) + 1):
                        moved = ("embedding", "checkpoints", "head", "optimizer_device")[:count]
                        changes: dict[str, Any] = dict.fromkeys(moved, "host")
                        found.append(
                            made._plan(size).replace(
                                recompute_layers=range(recomputed), recompute_keeps=keeps,
                                streamed_layers=streamed, **changes,
                            )
                        )  # fmt: skip
    return found


@pytest.mark.parametrize("gib", [40, 24, 12, 8, 6, 4])
@pytest.mark.parametrize("truth", [Truth(), Truth(2 * GIB, 1.05), Truth(GIB, 0.9, 1.2)])
def test_by_speed_hardly_any_other_plan_is_faster(gib: int, truth: Truth) -> None:
    made = make(truth, gib)
    plan = first(made)

    def speed(of: Plan) -> float:
        told = forecast(of, shape(), H200, of.micro_batch_size * TOKENS)
        assert told is not None
        return told.tokens_per_second

    best = max(speed(p) for p in all_plans(made) if truth(p) <= gib * GIB)
    assert speed(plan) >= 0.99 * best
    assert len(made.seen) <= 12 + MOST_RIVALS


def test_what_is_fixed_is_kept_and_said_so() -> None:
    for name in PLACES:
        for side in ("device", "host"):
            made = make(Truth(), 12, **{name: side})
            choice = next(made.fitting())
            assert getattr(choice.plan, name) == side
            assert choice.reasons[name] == "as params say"
    made = make(Truth(), 12, stream_layers=7)
    choice = next(made.fitting())
    assert len(choice.plan.streamed_layers) == 7
    assert choice.reasons["streamed_layers"] == "as params say"


def test_every_decision_has_its_reason() -> None:
    for gib in (80, 12, 5, 3):
        choice = next(make(Truth(), gib).fitting())
        assert {"streamed_layers", *PLACES} <= set(choice.reasons) <= set(Plan.model_fields)


def test_what_cannot_fit_is_refused_with_the_least() -> None:
    made = make(Truth(), 5, stream_layers=0, embedding="device", head="device")
    with pytest.raises(NothingFits) as caught:
        first(made)
    assert caught.value.least.process_bytes > 5 * GIB
    made = make(Truth(), 80, host=GIB, stream_layers=LAYERS)
    with pytest.raises(NothingFits) as caught:
        first(made)
    assert caught.value.least.process_bytes < 80 * GIB
    assert caught.value.least.host_pinned_bytes > GIB


@pytest.mark.parametrize(
    ("asked", "model", "says"),
    [
        ({"stream_layers": 33}, {}, "plan.stream_layers is 33, and the model has 32 layers"),
        ({"head": "host", "embedding": "device"}, {"tied": True}, "one table for both"),
        ({"head": "host"}, {"head_moves": False}, "caps its logits"),
        (
            {"checkpoints": "host"},
            {"by_hand": False},
            "plan.checkpoints is host, which needs a family",
        ),
    ],
)
def test_what_the_model_cannot_do(asked: dict[str, Any], model: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(Truth(), 80, model=ModelSize(LAYERS, 128_256, **model), **asked)


def test_only_torchs_optimizer_goes_to_the_host() -> None:
    with pytest.raises(
        UserError, match=r"optimizer_device is host, and train\.optimizer adamw_8bit"
    ):
        make(Truth(), 80, train={"optimizer": "adamw_8bit"}, optimizer_device="host")


def test_one_table_is_in_one_place() -> None:
    tied = ModelSize(LAYERS, 128_256, tied=True)
    for asked in ({"head": "host"}, {"embedding": "host"}):
        plan = first(make(Truth(), 40, model=tied, **asked))
        assert (plan.embedding, plan.head) == ("host", "host")
    for gib in (40, 8, 5, 4, 3):
        plan = first(make(Truth(), gib, model=tied))
        assert plan.embedding == plan.head


def test_a_model_that_is_not_done_by_hand() -> None:
    general = ModelSize(LAYERS, 128_256, by_hand=False)
    for gib in (40, 8, 6, 5):
        plan = first(make(Truth(), gib, model=general))
        assert set(plan.streamed_layers) <= set(plan.recompute_layers)
        assert plan.checkpoints == "device"
        assert plan.recompute_keeps == ()
    plan = first(make(Truth(), 40, model=general, stream_layers=3))
    assert len(plan.recompute_layers) == LAYERS


@pytest.mark.parametrize("host", [0, GIB // 2, GIB, 2 * GIB, 4 * GIB])
def test_the_hosts_budget_is_kept(host: int) -> None:
    seen = 0
    for gib in (24, 8, 7, 6, 5, 4):
        try:
            plan = first(make(Truth(), gib, host=host))
        except UserError:
            continue
        seen += 1
        if host == 0:
            assert hosted(plan) == []
            assert plan.streamed_layers == ()
    assert seen > 1


def test_the_cpu_moves_nothing_by_itself() -> None:
    here = make(Truth(), 12, device="cpu")
    choice = next(here.fitting())
    assert not choice.plan.uses_host
    assert choice.reasons["streamed_layers"] == "the device is the host"


def test_drawn_budgets_never_pass_what_fits() -> None:
    draw = random.Random(3)
    for _ in range(12):
        truth = Truth(draw.randrange(4 * GIB), draw.uniform(0.8, 1.3), draw.uniform(0.8, 1.3))
        made = make(truth, draw.uniform(2, 60), host=draw.randrange(64 * GIB))
        try:
            first(made)  # which asserts it
        except UserError:
            least = make(truth, 1000)
            assert truth(least._plan(1)) > made.hardware.budget_bytes


def test_the_smallest_plan_with_the_host_and_without() -> None:
    made = make(Truth(), 40)
    (here,) = smallest_plans(made.params, made.model, made.start, host=False)
    moved, but_the_head = smallest_plans(made.params, made.model, made.start, host=True)
    assert here.micro_batch_size == moved.micro_batch_size == 1
    assert len(here.recompute_layers) == len(moved.streamed_layers) == LAYERS
    assert hosted(here) == []
    assert hosted(moved) == list(PLACES)
    assert but_the_head == moved.replace(head="device")
    large = replace(made.model, table_bytes=2 * LOSS_CHUNK_BYTES + 1)
    assert smallest_plans(made.params, large, made.start, host=True) == [moved]


def test_what_a_small_plan_loses_between_blocks_is_no_share_of_a_large_one() -> None:
    """Of 1 GiB that is allocated another half is lost; of 1.5 that are reserved 2% are set aside."""
    made = make(Truth(), 12)
    small = smallest_plans(made.params, made.model, made.start, host=True)[0]
    reserved = 3 * GIB // 2
    known = estimate(small, int(1.02 * reserved), 12 * GIB).model_copy(
        update={
            "peak_allocated_bytes": GIB,
            "peak_reserved_bytes": reserved,
            "safe_peak_bytes": int(1.02 * reserved),
        }
    )
    large = small.replace(streamed_layers=(), recompute_layers=())
    more = guess_bytes(large, shape(), TOKENS) - guess_bytes(small, shape(), TOKENS)
    assert more > 4 * GIB
    found = Guesses(shape(), made.tokens, [known]).process_bytes(large)
    assert found == pytest.approx(known.process_bytes + 1.02 * more, rel=1e-6)


def test_a_guess_is_of_the_most_alike() -> None:
    made = make(Truth(), 12)
    (here,) = smallest_plans(made.params, made.model, made.start, host=False)
    known = {
        name: estimate(plan, taken * GIB, 12 * GIB)
        for taken, (name, plan) in enumerate(
            {
                "one sequence": here,
                "two": here.replace(micro_batch_size=2),
                "two, on the host": here.replace(micro_batch_size=2, checkpoints="host"),
                "two, fewer layers": here.replace(micro_batch_size=2, recompute_layers=range(9)),
            }.items(),
            start=5,
        )
    }
    guesses = Guesses(shape(), made.tokens, list(known.values()))
    for plan, name in (
        (here.replace(micro_batch_size=4), "two"),
        (here.replace(micro_batch_size=4, recompute_layers=range(12)), "two, fewer layers"),
        (here.replace(micro_batch_size=2, checkpoints="host"), "two, on the host"),
        (here.replace(recompute_layers=range(9)), "one sequence"),
    ):
        like = known[name]
        change, before = (
            guess_bytes(p, shape(), made.tokens(p.micro_batch_size)) for p in (plan, like.plan)
        )
        assert guesses.process_bytes(plan) == like.process_bytes + change - before, name


def test_a_stack_may_be_half_recomputed_and_half_streamed() -> None:
    made = make(Truth(), 12)
    plan = first(made)
    rivals = Rivals(
        shape(), made.free, made.hardware, [made._plan(plan.micro_batch_size)], made.tokens
    )
    half = plan.replace(recompute_layers=range(LAYERS // 2), streamed_layers=())
    limit = int(0.9 * made._estimate(half).process_bytes)
    ((mixed, _),) = rivals._layouts(half, rivals.guesses(made.seen), limit)
    assert 0 < len(mixed.streamed_layers) < LAYERS
    assert len(mixed.recompute_layers) == LAYERS // 2


def test_micro_batches_share_a_pass_where_its_weights_are_waited_for() -> None:
    """On a slow link, with no room for a larger micro-batch; one sequence hides little of a layer."""
    slow = H200.model_copy(update={"host_to_device_bytes_per_second": 3 * 10**9})
    for asked in ({}, {"stream_layers": LAYERS}):
        made = make(Truth(), 3, rates=slow, micro_batch_size=1, **asked)
        choice = next(made.fitting())
        assert choice.plan.streamed_layers
        assert choice.plan.micro_batches_per_pass == 8
        assert "micro_batches_per_pass" in choice.reasons
    general = ModelSize(LAYERS, 128_256, by_hand=False)
    for free in (make(Truth(), 12), make(Truth(), 4, rates=slow, model=general)):
        choice = next(free.fitting())
        assert choice.plan.micro_batches_per_pass == 1
        assert "micro_batches_per_pass" not in choice.reasons


def test_a_choice_says_how_fast_it_is_and_what_holds_it_up() -> None:
    made = make(Truth(), 9)
    choice = next(made.fitting())
    told = forecast(choice.plan, shape(), H200, made.tokens(choice.plan.micro_batch_size))
    assert choice.forecast == told
    faster = [o for o in choice.considered if (o.tokens_per_second or 0) > told.tokens_per_second]
    assert choice.limit == "memory"
    assert faster
    assert all(not other.fits or "faster by a forecast" in other.why for other in faster)
