"""The search, on estimators that are formulas: what it prefers, and how few estimates it makes."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from fitlora.artifacts import Components, Estimate, Gpu, Hardware, Rates
from fitlora.errors import UserError
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner.search import (
    BUSY_TOKENS,
    NEAR,
    Choice,
    Search,
    attention_kernel,
    compute_dtype,
    default_plan,
    device_count,
    loss_chunk,
    neighbours,
)
from fitlora.planner.size import ModelSize
from fitlora.units import GIB, MIB, format_bytes

LAYERS = 32
TOKENS = 1024  # of every sequence: four keep the device busy
Bytes = Callable[[Plan], int]
# What keeps every part of the step on the device.
NO_HOST = {
    "stream_layers": 0, "checkpoints": "device", "embedding": "device", "head": "device",
    "optimizer_device": "device",
}  # fmt: skip


def hardware(budget: int = 8 * GIB, **changes: Any) -> Hardware:
    gpu = Gpu(
        name="NVIDIA Test", compute_capability="8.0", memory_bytes=budget, bf16=True, fp8=False
    )
    rates = Rates(
        host_to_device_bytes_per_second=None,
        device_to_host_bytes_per_second=None,
        device_copy_bytes_per_second=None,
        disk_read_bytes_per_second=None,
        product_flops_per_second={},
    )
    base: dict[str, Any] = {
        "device": "cuda", "gpus": (gpu,), "cpu_name": "", "cpu_cores": 1, "context_bytes": 0,
        "host_memory_bytes": 1, "host_budget_bytes": 2**40, "budget_bytes": budget,
        "workspace_bytes": 0, "rates": rates, "target": None,
    }  # fmt: skip
    return Hardware.model_validate({**base, **changes})


@dataclass(frozen=True)
class Linear:
    """Bytes of a plan: weights, a base for each token, and what each kept layer adds to it.

    floor: what some other instant of the step takes; it bends the line.
    """

    weights: int = 4 * GIB
    token: int = MIB // 4
    kept: int = MIB // 16
    floor: int = 0

    def __call__(self, plan: Plan) -> int:
        tokens = plan.micro_batch_size * TOKENS
        layers = LAYERS - len(plan.recompute_layers)
        return max(self.weights + tokens * (self.token + layers * self.kept), self.floor)


def estimate(plan: Plan, process_bytes: int, budget: int) -> Estimate:
    return Estimate(
        plan=plan,
        peak_allocated_bytes=process_bytes,
        process_bytes=process_bytes,
        fits=process_bytes <= budget,
        instant="",
        phase_peak_bytes={},
        components=Components(
            weights=process_bytes, adapters=0, gradients=0, optimizer_states=0, activations=0,
            temporary_buffers=0, library_workspaces=0,
        ),
    )  # fmt: skip


def search(
    bytes_of: Bytes,
    budget: int,
    effective: int = 32,
    *,
    known: list[Estimate] | None = None,
    train: dict[str, Any] | None = None,
    **plan: Any,
) -> Search:
    """A search whose `calls` are the plans it had estimated. plan: keys of params' plan section."""
    params = check_params(
        {
            "train": {"effective_batch_size": effective, **(train or {})},
            "plan": {**NO_HOST, **plan},
        }
    )
    here = hardware(budget)
    model = ModelSize(LAYERS, 32_000)

    def tokens(micro: int) -> int:
        return micro * TOKENS

    calls: list[Plan] = []

    def estimator(candidate: Plan) -> Estimate:
        assert candidate not in calls, "the same plan is estimated once"
        calls.append(candidate)
        return estimate(candidate, bytes_of(candidate), budget)

    start = default_plan(params, here, model, tokens, sequence_length=TOKENS)
    made = Search(params, here, model, start, estimator, tokens, list(known or []))
    made.calls = calls  # type: ignore[attr-defined]
    return made


def first(made: Search) -> Choice:
    return next(made.fitting())


def calls(made: Search) -> int:
    return len(made.calls)  # type: ignore[attr-defined]


def shape(plan: Plan) -> tuple[int, int]:
    return plan.micro_batch_size, len(plan.recompute_layers)


def preferred(bytes_of: Bytes, budget: int, effective: int) -> tuple[int, int] | None:
    """What the preference says, by looking at every plan."""
    base = search(bytes_of, budget, effective).start
    sizes = sorted({-(-effective // n) for n in range(1, effective + 1)}, reverse=True)
    enough = min((s for s in sizes if s * TOKENS >= BUSY_TOKENS), default=sizes[0])
    order = [(s, 0) for s in sizes if s > enough]
    order += [(s, n) for s in sizes if s <= enough for n in range(LAYERS + 1)]
    for micro, layers in order:
        plan = base.replace(micro_batch_size=micro, recompute_layers=tuple(range(layers)))
        if bytes_of(plan) <= budget:
            return micro, layers
    return None


def test_the_whole_batch_when_it_fits() -> None:
    made = search(Linear(), 1000 * GIB)
    choice = first(made)
    assert shape(choice.plan) == (32, 0)
    assert choice.plan.evaluation_batch_size == 32
    assert choice.reasons["micro_batch_size"] == "the whole effective batch fits at once"
    assert calls(made) <= 2


def test_the_least_recompute_that_fits() -> None:
    bytes_of = Linear()
    made = search(bytes_of, 10 * GIB)
    plan = first(made).plan
    assert plan.micro_batch_size == 4
    assert 0 < len(plan.recompute_layers) < LAYERS
    assert plan.recompute_layers == tuple(range(len(plan.recompute_layers)))
    one_less = plan.replace(recompute_layers=plan.recompute_layers[:-1])
    assert bytes_of(plan) <= 10 * GIB < bytes_of(one_less)


def test_a_smaller_micro_batch_when_nothing_else() -> None:
    bytes_of = Linear()
    budget = bytes_of(
        search(bytes_of, GIB).start.replace(micro_batch_size=2, recompute_layers=range(LAYERS))
    )
    made = search(bytes_of, budget)
    choice = first(made)
    assert shape(choice.plan) == (2, LAYERS)
    assert choice.reasons["micro_batch_size"] == "the largest that fits the budget"
    assert "no layer" in choice.reasons["recompute_layers"]


def test_a_larger_micro_batch_is_not_worth_recomputation() -> None:
    """Between what 4 and 5 sequences take without recomputation, 4 are chosen, though 5 might fit."""
    bytes_of = Linear()
    four = search(bytes_of, GIB).start.replace(micro_batch_size=4)
    made = search(bytes_of, bytes_of(four))
    assert shape(first(made).plan) == (4, 0)


def draws(count: int, *, bent: bool) -> list[Any]:
    draw = random.Random(7)
    found = []
    for _ in range(count):
        linear = Linear(
            weights=draw.randrange(GIB, 8 * GIB),
            token=draw.randrange(MIB // 64, MIB),
            kept=draw.randrange(MIB // 64, MIB // 4),
            floor=draw.randrange(4 * GIB, 24 * GIB) if bent else 0,
        )
        found.append((linear, draw.randrange(2 * GIB, 96 * GIB), draw.randint(1, 130)))
    return found


@pytest.mark.parametrize(("bent", "most"), [(False, 8), (True, 12)])
def test_it_finds_what_a_look_at_every_plan_finds(bent: bool, most: int) -> None:
    kinds = set()
    for bytes_of, budget, effective in draws(300, bent=bent):
        made = search(bytes_of, budget, effective)
        expected = preferred(bytes_of, budget, effective)
        if expected is None:
            with pytest.raises(UserError):
                first(made)
            kinds.add("none")
        else:
            assert shape(first(made).plan) == expected
            kinds.add("recompute" if expected[1] else "keep")
        assert calls(made) <= most
    assert kinds == {"none", "recompute", "keep"}


def test_few_estimates_even_where_memory_is_no_line_at_all() -> None:
    """Monotonous and otherwise at random: each layer and each sequence weighs differently."""
    for seed in range(100):
        draw = random.Random(seed)
        layer = [draw.random() ** 4 for _ in range(LAYERS)]
        sequence = [draw.random() ** 4 + 0.01 for _ in range(32)]

        def bytes_of(plan: Plan, layer: Any = layer, sequence: Any = sequence) -> int:
            kept = 1 + sum(layer[len(plan.recompute_layers) :])
            return int(GIB * (1 + kept * sum(sequence[: plan.micro_batch_size])))

        budget = int(GIB * draw.uniform(1, 30))
        expected = preferred(bytes_of, budget, 32)
        made = search(bytes_of, budget)
        if expected is not None:
            assert shape(first(made).plan) == expected
        assert calls(made) <= 14


def test_the_product_covers_the_effective_batch_exactly() -> None:
    for bytes_of, budget, effective in draws(200, bent=False):
        try:
            plan = first(search(bytes_of, budget, effective)).plan
        except UserError:
            continue
        assert plan.effective_batch_size == effective
        parts = [
            min(plan.micro_batch_size, effective - start)
            for start in range(0, effective, plan.micro_batch_size)
        ]
        assert sum(parts) == effective
        assert len(parts) == plan.accumulation
        # no smaller micro-batch would need as few parts: the last one is as full as it can be
        assert -(-effective // plan.accumulation) == plan.micro_batch_size


def test_of_several_devices_each_has_its_share() -> None:
    plan = first(search(Linear(), 1000 * GIB, 30, train={"devices": 4})).plan
    assert (plan.devices, plan.micro_batch_size, plan.accumulation) == (4, 8, 1)


@pytest.mark.parametrize(
    ("asked", "gpus", "effective", "devices"),
    [
        ("auto", 0, 8, 1),
        ("auto", 4, 8, 4),
        ("auto", 4, 3, 3),
        (2, 4, 8, 2),
        (2, 0, 8, 2),
        (8, 4, 8, 8),
    ],
)
def test_every_gpu_with_a_share_is_used(
    asked: int | str, gpus: int, effective: int, devices: int
) -> None:
    """More than there are here are those of other hosts as well."""
    params = check_params({"train": {"devices": asked, "effective_batch_size": effective}})
    here = hardware(GIB)
    gpu = here.model_copy(update={"gpus": here.gpus[:1] * gpus})
    assert device_count(params, gpu) == devices


@pytest.mark.parametrize("micro", [1, 3, 7, 20])
def test_a_fixed_micro_batch_is_kept(micro: int) -> None:
    for budget in (6, 9, 12, 20, 40, 1000):
        made = search(Linear(), budget * GIB, micro_batch_size=micro)
        try:
            choice = first(made)
        except UserError:
            continue
        assert choice.plan.micro_batch_size == micro
        assert choice.reasons["micro_batch_size"] == "as params say"
        assert {p.micro_batch_size for p in made.calls} == {micro}  # type: ignore[attr-defined]
    assert len(choice.plan.recompute_layers) == 0  # the last budget


@pytest.mark.parametrize(("recompute", "layers"), [("none", 0), ("all", LAYERS), (5, 5), (0, 0)])
def test_fixed_recomputation_is_kept(recompute: Any, layers: int) -> None:
    seen = 0
    for budget in (6, 9, 12, 20, 40, 1000):
        made = search(Linear(), budget * GIB, recompute=recompute)
        try:
            choice = first(made)
        except UserError:
            continue
        seen += 1
        assert choice.plan.recompute_layers == tuple(range(layers))
        assert choice.reasons["recompute_layers"] == "as params say"
        assert calls(made) <= 6
    assert seen > 2


def test_with_fixed_recomputation_the_micro_batch_is_still_chosen() -> None:
    bytes_of = Linear()
    sizes = [
        first(search(bytes_of, b * GIB, recompute="none")).plan.micro_batch_size
        for b in (7, 9, 12, 40)
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


def test_a_fixed_evaluation_batch_is_kept() -> None:
    choice = first(search(Linear(), 10 * GIB, evaluation_batch_size=3))
    assert choice.plan.evaluation_batch_size == 3
    assert choice.plan.micro_batch_size == 4
    assert choice.reasons["evaluation_batch_size"] == "as params say"


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UserError, match=r"plan\.recompute is 33, and the model has 32 layers"):
        search(Linear(), 8 * GIB, recompute=33)


def test_nothing_fits() -> None:
    bytes_of = Linear()
    made = search(bytes_of, 4 * GIB)
    with pytest.raises(UserError) as caught:
        first(made)
    text = str(caught.value)
    least = bytes_of(made.start.replace(micro_batch_size=1, recompute_layers=range(LAYERS)))
    assert least == int(4.25 * GIB)
    assert "nothing fits 4.00 GiB" in text
    assert "needs 4.25 GiB" in text
    assert calls(made) <= 2
    assert first(search(bytes_of, least)).plan.micro_batch_size == 1  # the budget named is enough


def test_nothing_fits_of_what_the_user_allows() -> None:
    """A plan that the settings exclude is not named as one that fits, though it was estimated."""
    bytes_of = Linear()
    base = search(bytes_of, GIB, 32).start
    small = base.replace(micro_batch_size=1, recompute_layers=range(LAYERS))
    known = [estimate(small, bytes_of(small), 5 * GIB)]
    made = search(bytes_of, 5 * GIB, known=known, micro_batch_size=8, evaluation_batch_size=8)
    with pytest.raises(UserError) as caught:
        first(made)
    least = bytes_of(base.replace(micro_batch_size=8, recompute_layers=range(LAYERS)))
    assert f"needs {least / GIB:.2f} GiB" in str(caught.value)


def test_estimates_that_are_there_are_not_made_again() -> None:
    fresh = search(Linear(), 10 * GIB)
    expected = first(fresh)
    again = search(Linear(), 10 * GIB, known=fresh.seen)
    assert first(again) == expected
    assert calls(again) == 0


def test_after_an_overflow_the_next_plan_takes_less() -> None:
    made = search(Linear(), 10 * GIB)
    sizes = []
    for index, choice in enumerate(made.fitting()):
        sizes.append(choice.estimate.process_bytes)
        assert choice.estimate.fits
        if index == 3:
            break
    assert all(b <= 0.97 * a for a, b in itertools.pairwise(sizes))
    assert calls(made) <= 16
    *_, last = search(Linear(), 5 * GIB).fitting()  # and it comes to an end
    assert last.plan.micro_batch_size == 1


def test_dtypes() -> None:
    def chosen(asked: str, **changes: Any) -> str:
        return compute_dtype(check_params({"plan": {"compute_dtype": asked}}), hardware(**changes))[
            0
        ]

    old = hardware().gpus[0].model_copy(update={"bf16": False, "name": "Tesla T4"})
    assert chosen("auto") == "bfloat16"
    assert chosen("auto", gpus=(old,)) == "float16"
    assert chosen("auto", gpus=(hardware().gpus[0], old)) == "float16"  # all of them need it
    assert chosen("auto", device="cpu", gpus=()) == "float32"
    assert chosen("bfloat16", device="cpu", gpus=()) == "bfloat16"
    assert chosen("float16", gpus=(old,)) == "float16"
    with pytest.raises(UserError, match="bfloat16, which Tesla T4 lacks"):
        chosen("bfloat16", gpus=(old,))


def test_attention_is_what_every_gpu_has() -> None:
    here = hardware()
    old = here.gpus[0].model_copy(update={"compute_capability": "7.5", "name": "Tesla T4"})
    newest = here.gpus[0].model_copy(update={"compute_capability": "12.0"})
    mixed = hardware(gpus=(newest, old))
    assert attention_kernel(hardware(gpus=(newest,)))[0] == "flash"
    assert attention_kernel(mixed) == ("plain", "Tesla T4 has no FlashAttention")
    assert attention_kernel(hardware(device="cpu", gpus=()))[0] == "flash"
    made = search(Linear(), 10 * GIB)
    made.hardware = mixed
    asked = check_params({"plan": {"compute_dtype": "float16"}})
    made.start = default_plan(asked, mixed, made.model, made.tokens, sequence_length=TOKENS)
    choice = first(made)
    assert (choice.plan.compute_dtype, choice.plan.attention) == ("float16", "plain")
    assert choice.reasons["attention"] == "Tesla T4 has no FlashAttention"


def test_float8_is_taken_where_it_can_be() -> None:
    asked = check_params({"plan": {"compute_dtype": "float8"}})
    newest = hardware(gpus=[hardware().gpus[0].model_copy(update={"fp8": True})])
    assert compute_dtype(asked, newest)[0] == "float8"
    older = hardware(gpus=[hardware().gpus[0].model_copy(update={"fp8": False})])
    with pytest.raises(UserError, match=f"float8, which {older.gpus[0].name} lacks"):
        compute_dtype(asked, older)
    with pytest.raises(UserError, match="float8, which the CPU lacks"):
        compute_dtype(asked, hardware(device="cpu"))
    with pytest.raises(UserError, match="does by hand"):
        compute_dtype(asked, newest, by_hand=False)


@pytest.mark.parametrize("vocabulary", [100, 32_000, 128_256, 262_144, 10**7])
def test_loss_chunk(vocabulary: int) -> None:
    rows = loss_chunk(vocabulary)
    assert rows >= 64
    assert rows & (rows - 1) == 0
    if rows > 64:
        assert rows * vocabulary * 4 <= 256 * MIB < 2 * rows * vocabulary * 4


def test_the_default_plan_is_as_params_say() -> None:
    def start(effective: int = 32, length: int = TOKENS, **plan: Any) -> Plan:
        params = check_params({"train": {"effective_batch_size": effective}, "plan": plan})
        return default_plan(
            params,
            hardware(),
            ModelSize(LAYERS, 32_000),
            lambda m: m * length,
            sequence_length=length,
        )

    assert shape(start()) == (4, 0)
    assert shape(start(length=100_000)) == (1, 0)
    assert shape(start(effective=3)) == (3, 0)
    assert shape(start(length=1)) == (32, 0)
    fixed = start(micro_batch_size=5, recompute="all", evaluation_batch_size=9)
    assert shape(fixed) == (5, LAYERS)
    assert fixed.evaluation_batch_size == 9
    assert fixed.optimizer == Params().train.optimizer


@pytest.mark.parametrize("how", ["memory", "speed"])
def test_what_freezing_frees_is_used_and_told(how: str) -> None:
    budget, bytes_of = 10 * GIB, Linear()
    whole = first(search(bytes_of, budget))
    assert whole.all_learn is None

    def frees(plan: Plan) -> int:
        """Each frozen layer 64 MiB, and what layers without a backward would have kept."""
        kept = [
            layer for layer in range(plan.lowest_learning) if layer not in plan.recompute_layers
        ]
        without = plan.micro_batch_size * TOKENS * bytes_of.kept * len(kept)
        return bytes_of(plan) - without - 64 * MIB * len(plan.frozen_layers)

    frozen = first(search(frees, budget, train={"freeze": how, "freeze_share": 0.25}))
    assert len(frozen.plan.frozen_layers) == LAYERS // 4
    layers = [p.recompute_layers for p in (frozen.plan, whole.plan)]
    assert len(layers[0]) < len(layers[1]), "the plan is larger by as much"
    assert frees(frozen.plan) <= budget
    assert frozen.all_learn is not None
    saved = bytes_of(frozen.plan) - frees(frozen.plan)
    assert frozen.all_learn.peak_allocated_bytes - frozen.estimate.peak_allocated_bytes == saved > 0
    assert format_bytes(saved) in frozen.reasons["frozen_layers"]


def test_neighbours_differ_in_one_thing() -> None:
    plan = search(Linear(), 8 * GIB).start.replace(micro_batch_size=4, recompute_layers=(0, 1))
    found = {name: shape(other) for name, other in neighbours(plan, LAYERS).items()}
    assert found == {
        "half the micro-batch": (2, 2),
        "twice the micro-batch": (8, 2),
        "no layer recomputed": (4, 0),
        "every layer recomputed": (4, LAYERS),
    }
    edge = plan.replace(effective_batch_size=1, micro_batch_size=1, recompute_layers=())
    assert set(neighbours(edge, LAYERS)) == {"every layer recomputed"}
    frozen = neighbours(edge.replace(frozen_layers=(0, 1)), LAYERS)
    assert frozen["nothing frozen"] == edge
    eighths = edge.replace(compute_dtype="float8")
    assert neighbours(eighths, LAYERS).keys() == neighbours(edge, LAYERS).keys()
    switched = neighbours(eighths, LAYERS, dynamic=True)
    assert [switched[f"layers in {dtype}"].layer_dtype for dtype in ("bfloat16", "float32")] == [
        "bfloat16",
        "float32",
    ]
    assert "layers in float32" not in neighbours(
        edge.replace(compute_dtype="float32"), LAYERS, dynamic=True
    )


def test_other_plans_say_why_they_lost() -> None:
    budget = 10 * GIB
    choice = first(search(Linear(), budget))
    assert choice.considered
    for other in choice.considered:
        over = Linear()(other.plan) - budget
        assert other.fits is (over <= 0)
        assert (f"lacks {format_bytes(over)}" == other.why) is (over > 0)
    assert choice.plan not in [other.plan for other in choice.considered]
    near = [other.process_bytes <= NEAR * budget for other in choice.considered]
    assert near == sorted(near, reverse=True), "what is far off comes last"
