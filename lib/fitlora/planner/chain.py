"""Ways to make a step smaller, one after another: a chain of plans from the fastest to the smallest.

What costs nothing comes first. The embedding on the host costs a look-up there. Recomputation costs up
to a third of the time; its checkpoints on the host cost nothing, as they travel while layers compute.
Streamed layers cost nothing as long as a layer computes for longer than it travels, and then the link's
time. The head passes the link once in each pass, with little to hide behind; an optimizer on the
host computes there, at the speed of the host's memory.

A chain has one micro-batch size. Its segments each move one thing step by step; within one, memory falls
in a straight line, which is what the search makes use of. This module imports no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fitlora.plan import Plan
from fitlora.planner.size import ModelSize


@dataclass(frozen=True)
class Freedom:
    """What may be chosen: what params leave open, less what the model or the device cannot do.

    layers: of the model. by_hand: whether those are done by hand; where not, only recomputed ones
    stream, nothing is kept of these, and checkpoints stay. tied: whether the head's table is the
    embedding's. most_streamed: layers that the host's budget has room for.
    """

    layers: int
    recompute: bool
    stream: bool
    checkpoints: bool
    embedding: bool
    head: bool
    optimizer: bool
    by_hand: bool
    tied: bool
    most_streamed: int

    @classmethod
    def most(cls, start: Plan, model: ModelSize) -> "Freedom":
        """All that the model and the device allow. start: the plan to begin with."""
        # layers that are spread over GPUs are all on them
        on_gpu = start.device == "cuda" and not start.layers_per_device
        head = on_gpu and model.head_moves
        return cls(
            layers=model.layers,
            recompute=model.by_hand or not start.streamed_layers,
            stream=on_gpu,
            checkpoints=on_gpu and model.by_hand,
            embedding=head if model.tied else on_gpu and model.embedding_moves,
            head=head,
            # bitsandbytes' optimizers have states of their own kind, and pages of their own
            optimizer=on_gpu and start.optimizer == "adamw",
            by_hand=model.by_hand,
            tied=model.tied,
            most_streamed=model.layers,
        )

    def without_host(self) -> "Freedom":
        """The same with nothing to be moved to the host."""
        return replace(
            self, stream=False, checkpoints=False, embedding=False, head=False, optimizer=False
        )


def segments(start: Plan, free: Freedom) -> dict[str, list[Plan]]:
    """From `start`, by the freedom that is used, plans in ever less memory; the last is the corner.

    start: a plan with nothing moved that may stay.
    """
    found: dict[str, list[Plan]] = {}
    plan = start

    def add(name: str, plans: list[Plan]) -> None:
        nonlocal plan
        found[name] = plans
        plan = plans[-1]

    moved = plan.replace(embedding="host") if free.embedding and not free.tied else plan
    if free.recompute:
        first = moved.replace(checkpoints="host") if free.checkpoints else moved
        # layers below the lowest that learns keep nothing, so there is nothing to recompute
        counts = range(start.lowest_learning + 1, free.layers + 1)
        rest = [first.replace(recompute_layers=range(n)) for n in counts]
        add("recompute", [moved, *rest] if moved != plan else rest)
    else:
        if moved != plan:
            add("embedding", [moved])
        if free.checkpoints and plan.recompute_layers:
            add("checkpoints", [plan.replace(checkpoints="host")])
    if free.stream and free.most_streamed:
        from fitlora.offload.residency import streaming  # here, as torch comes with it

        counts = range(1, free.most_streamed + 1)
        add("stream", [plan.replace(**streaming(free.layers, n)) for n in counts])
    if free.head:
        add("head", [plan.replace(head="host", embedding="host" if free.tied else plan.embedding)])
    if free.optimizer:
        add("optimizer", [plan.replace(optimizer_device="host")])
    return found


def less(free: Freedom, name: str, streamed: int) -> Freedom:
    """`free`, where the host has no room for the corner of segment `name`, but for `streamed` layers."""
    if name == "stream":
        return replace(free, most_streamed=streamed)
    if name == "recompute":
        return replace(free, checkpoints=False, embedding=free.embedding and free.checkpoints)
    return replace(free, **{name: False})


def smallest(start: Plan, free: Freedom) -> Plan:
    """The end of the chain from `start`."""
    plans = [plan for part in segments(start, free).values() for plan in part]
    return plans[-1] if plans else start


def offloads(plan: Plan, free: Freedom, has_room: Callable[[Plan], bool]) -> Iterator[Plan]:
    """From `plan`, which recomputes what it may, plans with ever more on the host, in the chain's order.

    What is there stays. Layers follow by halves of those that are left, so that the end is near.
    has_room: whether the host can hold such a plan; what it has no room for stays on the device.
    """
    moves: list[dict[str, Any]] = []
    if free.embedding and not free.tied:
        moves.append({"embedding": "host"})
    if free.checkpoints and plan.recompute_layers:
        moves.append({"checkpoints": "host"})
    if free.stream and (free.by_hand or len(plan.recompute_layers) == free.layers):
        from fitlora.offload.residency import streaming  # here, as torch comes with it

        count = len(plan.streamed_layers)
        while count < free.most_streamed:
            count += -(-(free.most_streamed - count) // 2)
            moves.append(streaming(free.layers, count))
    if free.head:
        moves.append({"head": "host", **({"embedding": "host"} if free.tied else {})})
    # several devices sum their gradients much faster among each other than on the host
    if free.optimizer and plan.devices == 1:
        moves.append({"optimizer_device": "host"})
    for move in moves:
        moved = plan.replace(**move)
        if moved != plan and has_room(moved):
            plan = moved
            yield plan
