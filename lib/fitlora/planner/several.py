"""Several GPUs: each with a part of the batch, or one model whose layers are spread over them.

Spread (accelerate's device_map="auto"), the layers of a model too large for one GPU stay resident, and a
micro-batch passes from GPU to GPU: one computes at a time, so that the speed is at most that of one GPU
that held it all. With a part of the batch for each, every GPU computes all the time, on layers that are
streamed where they do not fit; what they wait for is the link. So the first wins only where a link is
slower than products by more than the number of GPUs. FitLoRA does the second, and says what the first
would reach.

Left out: that GPUs may share a link to the host, and the passing on of activations. This module imports
no torch.
"""

from dataclasses import dataclass

from fitlora.artifacts import Rates
from fitlora.plan import Plan
from fitlora.planner.speed import Shape, forecast


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
        streamed_layers=(),
        checkpoints="device",
        embedding="device",
        head="device",
        optimizer_device="device",
    )
    each, whole = (forecast(p, shape, rates, tokens) for p in (plan, resident))
    if each is None or whole is None:
        return None
    share = plan.accumulation * tokens
    seconds = each.step_seconds + _sum_seconds(plan.devices, shape, rates)
    return Ways(plan.devices * share / seconds, whole.tokens_per_second)


def _sum_seconds(devices: int, shape: Shape, rates: Rates) -> float:
    """Summing fp32 gradients around a ring, were it over the link to the host: NVLink is faster."""
    up = rates.host_to_device_bytes_per_second
    return 0.0 if up is None else 2 * (devices - 1) / devices * 4 * shape.adapters / up


def why_in_parallel(plan: Plan, shape: Shape | None, rates: Rates, tokens: int) -> str:
    """The reason for a plan of several devices, in words."""
    if plan.device == "cpu":
        return "as params say"
    found = ways(plan, shape, rates, tokens)
    if found is None:
        return (
            "each has its part of the batch; of layers spread over GPUs one would compute at a time"
        )
    spread = f"layers spread over them at most {found.spread:,.0f}"
    if found.spread > found.in_parallel:
        spread += ", which FitLoRA does not do"
    return (
        f"each has its part of the batch: {found.in_parallel:,.0f} tokens/s by forecast; {spread}"
    )
