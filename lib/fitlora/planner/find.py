"""From a model and a machine to a proven Plan: search by estimates, then probe what was found."""

from collections.abc import Sequence
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator, Load
from fitlora.params import Params
from fitlora.planner.model import model_size
from fitlora.planner.probe import ProbeResult, probe
from fitlora.planner.search import Choice, Search, default_plan
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
        replay=estimator.replayed,
        tokens=load.tokens,
        seen=[estimate for estimate in known if estimate.plan.frozen_layers == start.frozen_layers],
        shape=Shape.of(
            config,
            bits=params.quantization.bits,
            rank=rank,
            dropout=params.lora.dropout > 0,
            whole=model.trained_whole,
        ),
    )
    probes: list[ProbeResult] = []
    for choice in search.fitting():
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
