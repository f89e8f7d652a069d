"""Several GPUs: each with a part of the batch, or one model whose layers are spread over them.

Spread (accelerate's device_map="auto"), the layers of a model too large for one GPU stay resident, and a
micro-batch passes from GPU to GPU: one computes at a time, so that the speed is at most that of one GPU
that held it all. With a part of the batch for each, every GPU computes all the time, on layers that are
streamed where they do not fit; what they wait for is the link. So the first wins only where a link is
slower than products by more than the number of GPUs, or where the host has no room for the weights.

Left out: that GPUs may share a link to the host. This module imports no torch.
"""

import itertools
from dataclasses import dataclass, replace

from fitlora.artifacts import Hardware, Rates
from fitlora.params import Params
from fitlora.plan import Plan
from fitlora.planner.size import ModelSize
from fitlora.planner.speed import Forecast, Shape, forecast

_PLACES = ("checkpoints", "embedding", "head", "optimizer_device")


@dataclass(frozen=True)
class Ways:
    """Tokens per second of all GPUs together."""

    in_parallel: float
    spread: float  # at most


def ways(plan: Plan, shape: Shape | None, rates: Rates, tokens: int) -> Ways | None:
    """What either way would reach; None where rates or shape are not known. tokens: of a micro-batch."""
    if shape is None:
        return None
    resident = plan.replace(
        recompute_layers=(),
        recompute_keeps=(),
        streamed_layers=(),
        disk_layers=0,
        **dict.fromkeys(_PLACES, "device"),
    )
    each, whole = (forecast(p, shape, rates, tokens) for p in (plan, resident))
    if each is None or whole is None:
        return None
    seconds = each.step_seconds + _sum_seconds(plan.devices, shape, rates)
    return Ways(plan.devices * each.tokens / seconds, whole.tokens_per_second)


def _sum_seconds(devices: int, shape: Shape, rates: Rates) -> float:
    """Summing fp32 gradients around a ring, were it over the link to the host: NVLink is faster."""
    up = rates.host_to_device_bytes_per_second
    return 0.0 if up is None else 2 * (devices - 1) / devices * 4 * shape.adapters / up


def spread_forecast(plan: Plan, shape: Shape, rates: Rates, tokens: int) -> Forecast | None:
    """How long a step takes whose layers are spread; None where a rate is not known.

    Hidden states and their gradients are handed on over the link to the host: NVLink is faster.
    """
    found, up = forecast(plan, shape, rates, tokens), rates.host_to_device_bytes_per_second
    if found is None or up is None:
        return None
    borders = plan.devices_of_process - 1
    size = 4 if plan.activation_dtype == "float32" else 2
    handing_on = 2 * borders * size * found.tokens * shape.hidden / up
    return replace(found, step_seconds=found.step_seconds + handing_on)


def can_spread(params: Params, hardware: Hardware, model: ModelSize) -> bool:
    """Whether layers may be spread over the GPUs that are here.

    Params leave it open by train.devices auto and by wanting nothing on the host.
    """
    asked = params.plan
    return (
        params.train.devices == "auto"
        and hardware.device == "cuda"
        and 2 <= len(hardware.gpus) <= model.layers
        and model.by_hand
        and params.train.optimizer == "adamw"
        and asked.stream_layers in ("auto", 0)
        and all(getattr(asked, name) in ("auto", "device") for name in _PLACES)
    )


def spread_layers(shape: Shape, devices: int, *, tied: bool) -> tuple[int, ...]:
    """Layers of each device, so that weights and adapters take about as much of each.

    tied: whether embedding and head are one table, which is then with the last layers.
    """
    # an adapter's weight has its gradient and two states of AdamW beside it, all in fp32
    layer = shape.layer_bytes + 16 * shape.adapters / shape.layers
    table = shape.table_bytes / layer
    first = 0.0 if tied else table
    share = (shape.layers + first + table) / devices
    ends = [0]
    for number in range(1, devices):
        most = shape.layers - (devices - number)
        ends.append(max(ends[-1] + 1, min(most, round(number * share - first))))
    ends.append(shape.layers)
    return tuple(end - start for start, end in itertools.pairwise(ends))


def why_in_parallel(plan: Plan, shape: Shape | None, rates: Rates, tokens: int) -> str:
    """The reason for a plan of several devices, in words."""
    if plan.device == "cpu":
        return "as params say"
    found = ways(plan, shape, rates, tokens)
    if found is None:
        return (
            "each has its part of the batch; of layers spread over GPUs one would compute at a time"
        )
    return (
        f"each has its part of the batch: {found.in_parallel:,.0f} tokens/s by forecast; layers spread "
        f"over them at most {found.spread:,.0f}"
    )
