"""From a model and a machine to a proven Plan: search by estimates, then probe what was found."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator, Load
from fitlora.params import Params
from fitlora.plan import Plan
from fitlora.planner.model import model_size
from fitlora.planner.probe import ProbeResult, probe
from fitlora.planner.search import Choice, Search, default_plan
from fitlora.planner.several import can_spread, spread_forecast, spread_layers, ways
from fitlora.planner.speed import Shape
from fitlora.step.settings import StepSettings
from fitlora.units import format_bytes

# Probes that may fail before we say that the estimate does not hold on this machine.
MAX_PROBES = 3


def find_plan(
    config: Any,
    params: Params,
    settings: StepSettings,
    load: Load,
    hardware: Hardware,
    *,
    known: Sequence[Estimate] = (),
) -> tuple[Choice, list[ProbeResult]]:
    """The preferred plan that fits by its estimate and then in truth, and the probes made.

    known: estimates that were made already. A GPU that is described and not here is planned for
    without a probe. Raises UserError where nothing fits, or where probe after probe overflows.
    """
    rank = params.lora.r
    assert rank != "auto", "with_found has the number"
    model = model_size(config, settings)
    start = default_plan(
        params,
        hardware,
        model,
        load.tokens,
        sequence_length=load.train[0].tokens,
    )
    estimator = Estimator(config, settings, load, hardware)
    search = Search(
        params=params,
        hardware=hardware,
        model=model,
        start=start,
        estimator=estimator,
        tokens=load.tokens,
        seen=[estimate for estimate in known if _may_be_chosen(estimate.plan, start)],
        shape=Shape.of(
            config,
            bits=params.quantization.bits,
            rank=rank,
            dropout=params.lora.dropout > 0,
            whole=model.trained_whole,
        ),
    )
    probes: list[ProbeResult] = []
    for choice in _either_way(search) if can_spread(params, hardware, model) else search.fitting():
        if hardware.target is not None:
            return choice, probes
        probes.append(probe(config, choice.plan, settings, load, hardware))
        if probes[-1].fits:
            return choice, probes
        if len(probes) == MAX_PROBES:
            break
    raise UserError(
        f"{len(probes)} plan(s) that should fit {format_bytes(hardware.budget_bytes)} overflowed when "
        "they were tried; another process may hold the memory, or the device has less than its budget. "
        "A lower hardware.memory_budget makes room"
    )


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


def _may_be_chosen(plan: Plan, start: Plan) -> bool:
    """Whether a plan is of the precision and the frozen layers that params ask for."""
    return plan.layer_dtype is None and plan.frozen_layers == start.frozen_layers
