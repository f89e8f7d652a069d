"""From a model and a machine to a proven Plan: search by estimates, then probe what was found.

The first plan that fits in truth is the Plan, unless its probe says that it is slower than another one
promises to be. Then that one is probed as well, and takes its place only where it is faster by `SWITCH`:
a Plan should not change with a measurement's noise.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from fitlora.artifacts import Estimate
from fitlora.errors import UserError
from fitlora.plan import Plan
from fitlora.planner.probe import Prober, ProbeResult
from fitlora.planner.refusal import refused
from fitlora.planner.search import STEP_BACK, Choice, NothingFits, Search, default_plan
from fitlora.planner.several import can_spread, spread_forecast, spread_layers, ways
from fitlora.planner.task import Task
from fitlora.units import format_bytes

# Probes of one search. Where so many overflow, the estimate does not hold on this machine.
MAX_PROBES = 3
# How much faster than the first plan another has to be measured to take its place.
SWITCH = 0.05

Prove = Callable[[Plan], ProbeResult]


def find_plan(task: Task, *, known: Sequence[Estimate] = ()) -> tuple[Choice, list[ProbeResult]]:
    """The preferred plan that fits by its estimate and then in truth, and the probes made.

    known: estimates that were made already. A GPU that is described and not here is planned for
    without a probe. Raises UserError where nothing fits, with what would, or where nothing that is
    probed does, with what each plan came to.
    """
    try:
        return _find(task, known)
    except NothingFits as refusal:
        raise UserError(refused(task, refusal.least)) from None


def _find(task: Task, known: Sequence[Estimate]) -> tuple[Choice, list[ProbeResult]]:
    hardware, search = task.hardware, task.search(known)
    probes: list[ProbeResult] = []
    choices = _in_turn(task, search, probes)
    if hardware.target is not None:
        return next(choices), []
    with Prober(task.config, task.settings, task.load, hardware) as prove:
        for choice in itertools.islice(choices, MAX_PROBES):
            probes.append(prove(choice.plan))
            if probes[-1].fits:
                return _faster(search, choice, probes, prove), probes
    tried = "\n".join(f"  {made.plan.describe()}: {made.why}" for made in probes)
    raise UserError(
        f"{len(probes)} plan(s) that should fit {format_bytes(hardware.budget_bytes)} did not when they "
        f"were tried:\n{tried}\n"
        "Another process may hold the memory, or there may be less than the budget. A lower "
        "hardware.memory_budget makes room on the device, and hardware.host_memory_budget on the host"
    )


def _in_turn(task: Task, search: Search, probes: Sequence[ProbeResult]) -> Iterator[Choice]:
    """Plans to probe, the preferred one first; each takes less of what the last of `probes` lacked."""
    spreads = can_spread(task.params, search.hardware, task.size)
    for choice in _either_way(search) if spreads else search.fitting():
        yield choice
        over = probes[-1].host_over_bytes
        if over is not None:
            less = search.with_host(int(choice.estimate.host_bytes * (1 - STEP_BACK)) - over)
            with suppress(NothingFits):  # what the probes found tells more
                yield from _in_turn(task, less, probes)
            return


def _faster(search: Search, first: Choice, probes: list[ProbeResult], prove: Prove) -> Choice:
    """`first`, which was probed last, or a plan that is faster by `SWITCH`; adds to `probes`.

    Where another plan overflowed before it, estimates are not to be trusted, and no more are tried; of
    layers that are spread over GPUs there is no other plan.
    """
    if len(probes) > 1 or first.plan.layers_per_device:
        return first
    measured = probes[0].tokens_per_second
    assert measured is not None, "it fits"
    best, goal = first, measured * (1 + SWITCH)
    for other in search.instead(first):
        promised = 0.0 if other.forecast is None else other.forecast.tokens_per_second
        if promised <= goal or len(probes) == MAX_PROBES:
            break
        probes.append(prove(other.plan))
        rate = probes[-1].tokens_per_second
        if rate is not None and rate > goal:
            best, goal = other, rate
    return best


def _either_way(parallel: Search) -> Iterator[Choice]:
    """Plans that fit: a part of the batch for each GPU, or a range of the layers, which is faster.

    By forecast; where one way has no plan, the other. parallel: the search of the first. Raises
    UserError as it does, where neither has a plan.
    """
    shared = parallel.fitting()
    mine = _next(shared)
    found = None
    if isinstance(mine, Choice):
        tokens = parallel.tokens(mine.plan.micro_batch_size)
        found = ways(mine.plan, parallel.shape, parallel.hardware.rates, tokens)
        if found is None or found.spread <= found.in_parallel:
            yield from itertools.chain([mine], shared)
            return
    spread = _spread(parallel)
    other = _next(spread)
    together = None if found is None else found.in_parallel
    over_all = _speed(other)
    if isinstance(other, Choice) and (together is None or (over_all or 0.0) > together):
        name, first, rest = "layers_per_device", other, spread
    elif isinstance(mine, Choice):
        name, first, rest = "devices", mine, shared
    else:
        raise mine
    told = {
        "devices": f"a part of the batch for each GPU {_told(mine, together)}",
        "layers_per_device": f"a range of the layers for each GPU {_told(other, over_all)}",
    }
    why = f"{told.pop(name)}; {told.popitem()[1]}"
    for choice in itertools.chain([first], rest):
        yield replace(choice, reasons={**choice.reasons, name: why})


def _speed(found: Choice | UserError) -> float | None:
    forecast = found.forecast if isinstance(found, Choice) else None
    return None if forecast is None else forecast.tokens_per_second


def _told(found: Choice | UserError, tokens_per_second: float | None) -> str:
    if isinstance(found, UserError):
        return "does not fit"
    if tokens_per_second is None:
        return "fits"
    return f"reaches {tokens_per_second:,.0f} tokens/s by forecast"


def _next(choices: Iterator[Choice]) -> Choice | UserError:
    """The next choice, or why there is none."""
    try:
        return next(choices)
    except UserError as error:
        return error


def _spread(parallel: Search) -> Iterator[Choice]:
    """Plans with layers spread over all GPUs that fit, the preferred one first, with their forecast."""
    params, hardware, shape = parallel.params, parallel.hardware, parallel.shape
    assert shape is not None, "what is done by hand has one"
    start = default_plan(
        params,
        hardware,
        parallel.model,
        parallel.tokens,
        sequence_length=parallel.start.sequence_length,
        devices=1,
    )
    counts = spread_layers(shape, len(hardware.gpus), tied=parallel.model.tied)
    search = Search(
        params=params,
        hardware=hardware,
        model=parallel.model,
        start=start.replace(layers_per_device=counts),
        estimator=parallel.estimator,
        tokens=parallel.tokens,
    )
    for choice in search.fitting():
        tokens = parallel.tokens(choice.plan.micro_batch_size)
        told = spread_forecast(choice.plan, shape, hardware.rates, tokens)
        yield replace(choice, forecast=told, limit=None if told is None else told.bound)
