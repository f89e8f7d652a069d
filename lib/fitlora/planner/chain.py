"""Ways to make a step smaller, one after another: a chain of plans from the fastest to the smallest.

What costs nothing comes first. The embedding on the host costs a look-up there. Recomputation costs up
to a third of the time; its checkpoints on the host cost nothing, as they travel while layers compute.
Streamed layers cost nothing as long as a layer computes for longer than it travels, and then the link's
time. The head passes the link once for each micro-batch, with little to hide behind; an optimizer on the
host computes there, at the speed of the host's memory.

A chain has one micro-batch size. Its segments each move one thing step by step; within one, memory falls
in a straight line, which is what the search makes use of. This module imports no torch.
"""

from dataclasses import dataclass, replace

from fitlora.params import PlanParams
from fitlora.plan import Plan


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
    def of(
        cls,
        asked: PlanParams,
        start: Plan,
        *,
        layers: int,
        by_hand: bool,
        tied: bool,
        head_moves: bool,
    ) -> "Freedom":
        """start: the plan with all that params fix. head_moves: whether the head can stream."""
        on_gpu = start.device == "cuda"
        recompute = asked.recompute == "auto" and (by_hand or not start.streamed_layers)
        whole = recompute or len(start.recompute_layers) == layers
        embedding, head = asked.embedding == "auto", asked.head == "auto" and head_moves
        if tied:
            embedding = head = embedding and head
        return cls(
            layers=layers,
            recompute=recompute,
            stream=on_gpu and asked.stream_layers == "auto" and (by_hand or whole),
            checkpoints=on_gpu and asked.checkpoints == "auto" and by_hand,
            embedding=on_gpu and embedding,
            head=on_gpu and head,
            # bitsandbytes' optimizers have states of their own kind, and pages of their own
            optimizer=on_gpu and asked.optimizer_device == "auto" and start.optimizer == "adamw",
            by_hand=by_hand,
            tied=tied,
            most_streamed=layers,
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
        rest = [first.replace(recompute_layers=range(n)) for n in range(1, free.layers + 1)]
        add("recompute", [moved, *rest] if moved != plan else rest)
    else:
        if moved != plan:
            add("embedding", [moved])
        if free.checkpoints and plan.recompute_layers:
            add("checkpoints", [plan.replace(checkpoints="host")])
    if free.stream and free.most_streamed:
        from fitlora.offload.residency import spread  # here, as torch comes with it

        counts = range(1, free.most_streamed + 1)
        add("stream", [plan.replace(streamed_layers=spread(free.layers, n)) for n in counts])
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
