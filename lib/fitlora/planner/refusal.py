"""What to say where nothing fits: the least budget that would do, and what else would help, in bytes.

Each way out differs from what was asked in one thing, and its figure is the estimate of the smallest
layout of its step, traced like any other. Of lengths, ranks and models, which take ever less, the
nearest that fits is told; where none does, the last, which shows what they can do at most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.known_models import SHAPES, config_of
from fitlora.params import PlanParams
from fitlora.plan import Side
from fitlora.planner.search import least_of
from fitlora.planner.speed import Shape
from fitlora.planner.task import LOWEST_RANK, Task
from fitlora.units import GIB, format_bytes

LENGTHS, LENGTH_STEP = 16, 64  # how many lengths are looked at, in multiples of so many tokens
BUDGETS_PER_GIB = 4


@dataclass(frozen=True)
class WayOut:
    """What to set, and what the smallest layout then takes."""

    change: str
    found: Estimate
    enough: bool


def refused(task: Task, least: Estimate) -> str:
    """The whole message, a line for each way out. least: the smallest plan that a search looked at."""
    hardware = task.hardware
    either = [least, _smallest(task)]
    with_room = [one for one in either if one.host_bytes <= hardware.host_budget_bytes]
    least = least_of(with_room or either)
    ways = sorted(ways_out(task, least), key=lambda way: way.found.process_bytes)
    width = max(len(way.change) for way in ways)
    lines = (
        f"  {way.change:<{width}}  {_figures(way.found)}{'' if way.enough else ', still too much'}"
        for way in ways
    )
    there = format_bytes(hardware.budget_bytes)
    if least.host_bytes:
        there += f" and {format_bytes(hardware.host_budget_bytes)} of the host's memory"
    return "\n".join(
        [
            f"nothing fits {there}: the smallest plan tried ({least.plan.describe()}) needs "
            f"{_figures(least)}; weights are {format_bytes(least.components.weights)} of it. Ways out, "
            "each with the least that it needs:",
            *lines,
        ]
    )


def _figures(found: Estimate) -> str:
    pinned = found.host_bytes
    host = f" and {format_bytes(pinned)} of the host's memory" if pinned else ""
    return f"{format_bytes(found.process_bytes)}{host}"


def ways_out(task: Task, least: Estimate) -> Iterator[WayOut]:
    """Each way out with its figure. least: the smallest plan of what was asked."""
    params, longest = task.params, task.load.train[0].tokens
    yield from _budgets(task, least)
    fixed = {name: value for name, value in params.plan if value != "auto"}
    fixed.pop("compute_dtype", None)
    if fixed:
        yield _way(f"auto for plan.{', plan.'.join(fixed)}", _unbound(task))
    step = -(-longest // LENGTHS // LENGTH_STEP) * LENGTH_STEP
    lengths = range((longest - 1) // step * step, 0, -step)
    head = least.plan.head
    shorter = [_Less(n, f"data.max_length {n}", _cut(task, n), head) for n in lengths]
    yield from _nearest(least, longest, shorter, task.hardware)
    rank = params.lora.r
    assert rank != "auto", "with_found has the number"
    if params.train.from_adapter is None:  # which has its rank
        halves = [rank >> n for n in range(1, rank.bit_length()) if rank >> n >= LOWEST_RANK]
        lower = [_Less(n, f"lora.r {n}", _with(task, "lora", r=n), head) for n in halves]
        yield from _nearest(least, rank, lower, task.hardware)
    if params.lora.modules_to_save:
        yield _way("lora.modules_to_save []", _with(task, "lora", modules_to_save=()))
    if params.quantization.bits == 16:
        yield _way("quantization.bits 4", _with(task, "quantization", bits=4))
    if task.shape is not None:
        models = list(_smaller_models(task, task.shape))
        yield from _nearest(least, _at_work(task.shape, longest), models, task.hardware)


def _budgets(task: Task, least: Estimate) -> Iterator[WayOut]:
    """What `least` lacks, and what the plan that takes the least of the device does."""
    budget, host = task.hardware.budget_bytes, task.hardware.host_budget_bytes
    for found in {one.plan: one for one in (least, task.smallest(host=True))}.values():
        lacking = []
        if found.process_bytes > budget:
            lacking.append(f"a budget of {_rounded_up(found.process_bytes)}")
        if found.host_bytes > host:
            more = _rounded_up(found.host_bytes)
            lacking.append(f"hardware.host_memory_budget {more}")
        if lacking:
            yield WayOut(" and ".join(lacking), found, enough=True)


def _rounded_up(count: int) -> str:
    """`2415919104` -> `"2.25GiB"`."""
    return f"{-(-count * BUDGETS_PER_GIB // GIB) / BUDGETS_PER_GIB:.2f}GiB"


def _with(task: Task, section: str, **values: Any) -> Task:
    """The task with some keys of a section of params changed."""
    changed = getattr(task.params, section).model_copy(update=values)
    return replace(task, params=task.params.model_copy(update={section: changed}))


def _unbound(task: Task) -> Task:
    """The task with a layout that is the planner's to choose."""
    plan = PlanParams(compute_dtype=task.params.plan.compute_dtype)
    return replace(task, params=task.params.model_copy(update={"plan": plan}))


def _cut(task: Task, tokens: int) -> Task:
    return replace(task, load=task.load.cut_to(tokens))


def _smallest(task: Task, head: Side | None = None) -> Estimate:
    """With all on the host that may be there; with nothing, where the host has no room for that."""
    moved = task.smallest(host=True, head=head)
    if moved.host_bytes <= task.hardware.host_budget_bytes:
        return moved
    return task.smallest(host=False)


def _way(change: str, task: Task, head: Side | None = None) -> WayOut:
    found = _smallest(task, head)
    return WayOut(change, found, found.fits)


@dataclass(frozen=True)
class _Less:
    """A task that asks for less of something. amount: of that."""

    amount: float
    change: str
    task: Task
    head: Side | None = None  # where its head is best, as far as that is known

    def way(self) -> WayOut:
        return _way(self.change, self.task, self.head)


def _nearest(
    least: Estimate, asked: float, options: Sequence[_Less], hardware: Hardware
) -> Iterator[WayOut]:
    """The first of `options`, which ask for ever less, that fits; the last where none does.

    least: what `asked` of it takes. Memory is nearly a convex function of the amount, so that what lies
    under the straight line between two of them takes no more than the line says.
    """
    if not options:
        return
    end = options[-1].way()
    if end.enough:
        room = hardware.budget_bytes - end.found.process_bytes
        saved = least.process_bytes - end.found.process_bytes
        most = options[-1].amount + (asked - options[-1].amount) * room / max(1, saved)
        near = next(option for option in options if option.amount <= most)
        if near is not options[-1]:
            way = near.way()
            end = way if way.enough else end
    yield end


def _at_work(shape: Shape, tokens: int) -> int:
    """What of a model tells how small its smallest layout is: a layer, and one at work beside it."""
    return 2 * shape.layer_bytes + shape.working_bytes(tokens, tokens)


def _smaller_models(task: Task, shape: Shape) -> Iterator[_Less]:
    """Known models that take less: of the same family, or else of all; the largest first."""
    family, longest = task.config.get_text_config().model_type, task.load.train[0].tokens
    found = []
    for name, keys in SHAPES.items():
        config = config_of(keys)
        known = Shape.of(config, bits=task.params.quantization.bits, rank=1)
        assert known is not None, name
        found.append((_at_work(known, longest), name, config))
    found = [one for one in found if one[0] < _at_work(shape, longest)]
    same = [one for one in found if one[2].model_type == family]
    for amount, name, config in sorted(same or found, key=lambda one: -one[0]):
        other = replace(_unbound(task), config=config)
        if not same:  # whose layers have other names
            other = _with(other, "lora", target_modules="all-linear")
        if config.tie_word_embeddings:  # and one table for both cannot be trained
            other = _with(other, "lora", modules_to_save=())
        yield _Less(amount, f"a smaller model, like {name}", other)
