"""Which Plan: the preferred one that fits, found with a handful of traces.

Preference, where the machine's rates are not known: enough tokens in flight to keep the device busy
come first (`BUSY_TOKENS`), then as little recomputation as fits, then a larger micro-batch. Recomputing
a layer costs a third more of its time (one more forward pass beside a forward and a backward); a starved
device costs more. What the host can take is moved there in the order of `fitlora.planner.chain`.

Where rates are known, the preferred plan is where a second search begins: as long as
`fitlora.planner.rivals` names a plan that promises to be `WORTH` faster and to fit, it is traced, up to
`MOST_RIVALS` of them.

Peak memory grows with the micro-batch and falls with the layers that recompute, mostly in straight
lines, with a bend where the peak moves to another instant of the step. So along each of the two the
edge of what fits is guessed by a straight line, looked for beside the guess, and then bisected: a
trace of a large model takes a second, and no plan is believed that was not traced itself.

This module imports no torch: it is handed the function that estimates.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.gpu_facts import has_flash_attention
from fitlora.params import Params
from fitlora.plan import PAGED_OPTIMIZERS, WIDER, AttentionKernel, ComputeDtype, Plan
from fitlora.planner.chain import Freedom, less, segments, smallest
from fitlora.planner.freezing import planned
from fitlora.planner.rivals import WORTH, Rivals
from fitlora.planner.several import why_in_parallel
from fitlora.planner.size import ModelSize
from fitlora.planner.speed import Forecast, Shape
from fitlora.units import MIB, format_bytes

# Tokens of a micro-batch from which a GPU's products run near their best rate: an 8B shape on an
# H100 gained under 3% beyond it (benchmarks/results/three_ways.*.json).
BUSY_TOKENS = 4096
# fp32 logits that exist at one time; rows of a large vocabulary are cut to this.
LOSS_CHUNK_BYTES = 256 * MIB
# Tokens that go through an MLP at one time. Each part dequantizes the MLP's weights again, which takes
# 3% of what its products on so many tokens take; for what is one part, nothing changes.
MLP_CHUNK_TOKENS = 8192

# How much less the next plan should take where one overflowed that should have fitted: about what an
# estimate is off by at most, so that a few probes get out of any error that is still to be expected.
STEP_BACK = 0.03

MOST_RIVALS = 5
RUNNERS_UP = 3
NEAR = 1.25  # times the budget: what takes more is no runner-up

Estimator = Callable[[Plan], Estimate]

_BY_SPEED = "part of the fastest plan within the budget, by forecast"
_BY_PROBE = "part of the fastest plan within the budget, as probes measured it"


class NothingFits(UserError):
    """No plan that params allow fits. least: the smallest that was looked at."""

    def __init__(self, least: Estimate, budget_bytes: int) -> None:
        self.least = least
        super().__init__(
            f"nothing fits {format_bytes(budget_bytes)}: the smallest plan tried "
            f"({least.plan.describe()}) needs {format_bytes(least.process_bytes)}"
        )


@dataclass(frozen=True)
class Choice:
    """The Plan, its estimate, the reason of each decision, and what it was chosen from.

    forecast: None where the machine's rates are not known. limit: what keeps it from being faster.
    considered: the other plans that were traced, the nearest rivals first. all_learn: the same layout
    with no layer frozen; None where none is.
    """

    estimate: Estimate
    reasons: dict[str, str]
    forecast: Forecast | None = None
    limit: str | None = None
    considered: tuple["Considered", ...] = ()
    all_learn: "AllLearn | None" = None

    @property
    def plan(self) -> Plan:
        return self.estimate.plan


@dataclass(frozen=True)
class AllLearn:
    """A plan as it would be with no layer frozen: what freezing buys is the difference."""

    peak_allocated_bytes: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Considered:
    """A plan that was not chosen, and why it lost."""

    plan: Plan
    process_bytes: int
    tokens_per_second: float | None
    fits: bool
    why: str


def compute_dtype(
    params: Params, hardware: Hardware, *, by_hand: bool = True
) -> tuple[ComputeDtype, str]:
    """What products are computed in, and why; raises UserError for what the device lacks."""
    asked = params.plan.compute_dtype
    if asked == "auto":
        if hardware.device == "cpu":
            return "float32", "the CPU computes float32 fastest"
        if all(gpu.bf16 for gpu in hardware.gpus):
            return "bfloat16", "the GPU has it"
        return "float16", "the GPU has no bfloat16; losses are scaled"
    check_dtype(asked, hardware, by_hand=by_hand)
    return asked, "as params say"


def check_dtype(
    dtype: ComputeDtype, hardware: Hardware, *, by_hand: bool, name: str = "plan.compute_dtype"
) -> None:
    """Raises UserError where the device, or the step of the model, lacks what `name` asks for."""
    where = "the CPU" if hardware.device == "cpu" else hardware.gpus[0].name
    if dtype == "bfloat16" and not all(gpu.bf16 for gpu in hardware.gpus):
        raise UserError(f"{name} is bfloat16, which {where} lacks; use float16 or float32")
    if dtype == "float8":
        if hardware.device == "cpu" or not all(gpu.fp8 for gpu in hardware.gpus):
            raise UserError(f"{name} is float8, which {where} lacks; use bfloat16 or auto")
        if not by_hand:
            raise UserError(
                f"{name} is float8, which needs a family of models that FitLoRA does by hand; use "
                "bfloat16 or auto"
            )


def attention_kernel(hardware: Hardware) -> tuple[AttentionKernel, str]:
    """What attention is done with, and why."""
    if hardware.device == "cpu":
        return "flash", "the CPU has a kernel for every type"
    for gpu in hardware.gpus:
        if not has_flash_attention(gpu.compute_capability):
            return "plain", f"{gpu.name} has no FlashAttention"
    return "flash", "the GPU has it for 16-bit types"


def device_count(params: Params, hardware: Hardware) -> int:
    """Devices that share an effective batch: what params say, or every GPU that has a part of it."""
    asked = params.train.devices
    if asked != "auto":
        return asked
    return max(1, min(len(hardware.gpus), params.train.effective_batch_size))


def loss_chunk(vocabulary: int) -> int:
    """Rows of logits at one time: a power of two, so many that they stay in LOSS_CHUNK_BYTES."""
    rows = max(1, LOSS_CHUNK_BYTES // (4 * vocabulary))
    return max(64, 1 << (rows.bit_length() - 1))


def default_plan(
    params: Params,
    hardware: Hardware,
    model: ModelSize,
    tokens: Callable[[int], int],
    *,
    sequence_length: int,
    devices: int | None = None,
) -> Plan:
    """The plan to start from: what the user fixed, and else the fastest that memory might allow.

    That is a micro-batch just large enough to keep the device busy, and nothing recomputed. tokens:
    tokens of the heaviest micro-batch, by its size. devices: None for as many as `device_count` says.
    """
    asked = params.plan
    if hardware.device == "cpu" and params.train.optimizer in PAGED_OPTIMIZERS:
        raise UserError(
            f"train.optimizer {params.train.optimizer} needs a CUDA device, and the device here is the "
            "CPU; use adamw or adamw_8bit"
        )
    dtype, _ = compute_dtype(params, hardware, by_hand=model.by_hand)
    devices = devices or device_count(params, hardware)
    share = -(-params.train.effective_batch_size // devices)
    micro = asked.micro_batch_size
    if micro == "auto":
        micro = enough_sequences(micro_batch_sizes(share), tokens)
    if micro > share:
        raise UserError(
            f"plan.micro_batch_size is {micro}, and each of {devices} devices has {share} sequences "
            "of a step; lower it, or raise train.effective_batch_size"
        )
    evaluation = asked.evaluation_batch_size
    return Plan(
        device=hardware.device,
        devices=devices,
        effective_batch_size=params.train.effective_batch_size,
        micro_batch_size=micro,
        evaluation_batch_size=micro if evaluation == "auto" else evaluation,
        sequence_length=sequence_length,
        recompute_layers=_recomputed(params, model) or (),
        compute_dtype=dtype,
        attention=attention_kernel(hardware)[0],
        frozen_layers=planned(params.train, model.layers),
        optimizer=params.train.optimizer,
        loss_chunk_tokens=loss_chunk(model.vocabulary),
        mlp_chunk_tokens=MLP_CHUNK_TOKENS,
        **_placed(params, model),
    )


def _placed(params: Params, model: ModelSize) -> dict[str, Any]:
    """Where params want the parts of the step; on the device where they say auto."""
    asked = params.plan
    streamed: dict[str, Any] = {"streamed_layers": ()}
    if asked.stream_layers != "auto" and asked.stream_layers:
        from fitlora.offload.residency import streaming  # here, as torch comes with it

        if asked.stream_layers > model.layers:
            raise UserError(
                f"plan.stream_layers is {asked.stream_layers}, and the model has {model.layers} layers"
            )
        streamed = streaming(model.layers, asked.stream_layers)
    sides = {
        name: "device" if getattr(asked, name) == "auto" else getattr(asked, name)
        for name in ("checkpoints", "embedding", "head", "optimizer_device")
    }
    if model.tied and sides["embedding"] != sides["head"]:
        if "auto" not in (asked.embedding, asked.head):
            raise UserError(
                f"plan.embedding is {asked.embedding} and plan.head is {asked.head}, and this model has "
                "one table for both; set them alike, or one of them to auto"
            )
        sides["embedding"] = sides["head"] = "host"
    for side, moves in (("embedding", model.embedding_moves), ("head", model.head_moves)):
        if sides[side] == "host" and not moves:
            raise UserError(
                f"plan.{side} is host, and it has to be on the device where it is trained "
                "(lora.modules_to_save), and a head also where the model caps its logits"
            )
    if sides["optimizer_device"] == "host" and params.train.optimizer != "adamw":
        raise UserError(
            f"plan.optimizer_device is host, and train.optimizer {params.train.optimizer} has kernels "
            "for the device only; use adamw"
        )
    if not model.by_hand and sides["checkpoints"] == "host":
        raise UserError(
            "plan.checkpoints is host, which needs a family of models that FitLoRA does by hand; set it "
            "to auto"
        )
    return {**streamed, **sides}


def enough_sequences(sizes: Sequence[int], tokens: Callable[[int], int]) -> int:
    """The smallest of `sizes` (largest first) that keeps the device busy; the largest if none does."""
    busy = [size for size in sizes if tokens(size) >= BUSY_TOKENS]
    return busy[-1] if busy else sizes[0]


def freedom(params: Params, model: ModelSize, start: Plan) -> Freedom:
    """What params leave open of what may be chosen. start: the plan with all that they fix."""
    asked, most = params.plan, Freedom.most(start, model)
    recompute = most.recompute and asked.recompute == "auto"
    whole = recompute or len(start.recompute_layers) == model.layers
    embedding = most.embedding and asked.embedding == "auto"
    head = most.head and asked.head == "auto"
    if model.tied:
        embedding = head = embedding and head
    return replace(
        most,
        recompute=recompute,
        stream=most.stream and asked.stream_layers == "auto" and (model.by_hand or whole),
        checkpoints=most.checkpoints and asked.checkpoints == "auto",
        embedding=embedding,
        head=head,
        optimizer=most.optimizer and asked.optimizer_device == "auto",
    )


def smallest_plans(params: Params, model: ModelSize, start: Plan, *, host: bool) -> list[Plan]:
    """Plans of which one takes the least memory of all that params allow; which, a trace tells.

    A head on the host comes in slices, with logits and a gradient of them beside each, which may be more
    than its table. host: whether a plan may move anything there that params leave open.
    """
    asked = params.plan
    micro = 1 if asked.micro_batch_size == "auto" else asked.micro_batch_size
    held_out = 1 if asked.evaluation_batch_size == "auto" else asked.evaluation_batch_size
    start = start.replace(micro_batch_size=micro, evaluation_batch_size=held_out)
    free = freedom(params, model, start)
    if not host:
        free = free.without_host()
    plans = [smallest(start, free)]
    if free.head and (model.table_bytes or 0) <= 2 * LOSS_CHUNK_BYTES:
        plans.append(smallest(start, replace(free, head=False)))
    return plans


def least_of(estimates: Iterable[Estimate]) -> Estimate:
    """The one that takes the least of the device."""
    return min(estimates, key=lambda found: found.process_bytes)


def _recomputed(params: Params, model: ModelSize) -> tuple[int, ...] | None:
    """The layers that the user wants recomputed; None where the planner may choose."""
    asked = params.plan.recompute
    if asked == "auto":
        if params.plan.stream_layers not in ("auto", 0) and not model.by_hand:
            return tuple(range(model.layers))  # no others stream
        return None
    count = {"none": 0, "all": model.layers}.get(str(asked), asked)
    assert isinstance(count, int)
    if count > model.layers:
        raise UserError(f"plan.recompute is {count}, and the model has {model.layers} layers")
    return tuple(range(count))


def micro_batch_sizes(share: int) -> list[int]:
    """Sizes worth trying for `share` sequences: each accumulation's smallest, largest first."""
    sizes = {-(-share // count) for count in range(1, share + 1)}
    return sorted(sizes, reverse=True)


@dataclass
class Search:
    """Finds the preferred plan that fits, with a handful of estimates.

    tokens: tokens of the heaviest micro-batch, by its size. shape: what the model's speed depends on,
    None where that is not known. Every estimate that was made is kept in `seen`, in order.
    """

    params: Params
    hardware: Hardware
    model: ModelSize
    start: Plan
    estimator: Estimator
    tokens: Callable[[int], int]
    seen: list[Estimate] = field(default_factory=list)
    shape: Shape | None = None

    def _estimate(self, plan: Plan) -> Estimate:
        for known in self.seen:
            if known.plan == plan:
                return known
        found = self.estimator(plan)
        self.seen.append(found)
        return found

    @cached_property
    def free(self) -> Freedom:
        """What may be chosen beside the micro-batch."""
        return freedom(self.params, self.model, self.start)

    @cached_property
    def _smallest(self) -> Estimate:
        """What takes the least of the device, whatever the host has room for."""
        plans = smallest_plans(self.params, self.model, self.start, host=True)
        return least_of(map(self._estimate, plans))

    @property
    def _worth_moving(self) -> Freedom:
        """The freedom without a head on the host where that takes more than it gives."""
        head = self.free.head and self._smallest.plan.head == "host"
        return replace(self.free, head=head)

    def _plan(self, micro_batch_size: int, base: Plan | None = None) -> Plan:
        evaluation = self.params.plan.evaluation_batch_size
        return (base or self.start).replace(
            micro_batch_size=micro_batch_size,
            # nothing is kept for a backward pass, so what trains also evaluates
            evaluation_batch_size=evaluation if evaluation != "auto" else micro_batch_size,
        )

    def _fits(self, found: Estimate, limit: int) -> bool:
        return found.process_bytes <= limit and self._host_has_room(found)

    def _host_has_room(self, found: Estimate) -> bool:
        return found.host_bytes <= self.hardware.host_budget_bytes

    def fitting(self) -> Iterator[Choice]:
        """Plans that fit, the preferred one first, each traced itself.

        Whoever asks for another one says that the last did not fit in truth: the next takes
        `STEP_BACK` less. Raises NothingFits where nothing does from the start.
        """
        limit = self.hardware.budget_bytes
        best, least = self._best(limit)
        if best is None:
            raise NothingFits(least, limit)
        while best is not None:
            found = self._faster(best, limit)
            yield self._choice(found, _BY_SPEED if found is not best else None)
            limit = int(found.process_bytes * (1 - STEP_BACK))
            best, _ = self._best(limit)

    def within(self, budget_bytes: int) -> Choice | None:
        """The preferred plan of another budget, as a search of its own; None where nothing fits it."""
        hardware = Hardware.model_copy(self.hardware, update={"budget_bytes": budget_bytes})
        try:
            return next(replace(self, hardware=hardware, seen=[]).fitting())
        except NothingFits:
            return None

    def with_host(self, budget_bytes: int) -> "Search":
        """The same where a plan may take no more than so much of the host."""
        hardware = Hardware.model_copy(self.hardware, update={"host_budget_bytes": budget_bytes})
        return replace(self, hardware=hardware)

    @cached_property
    def _rivals(self) -> Rivals | None:
        if self.shape is None:
            return None
        bases = [self._plan(size) for size in self._sizes()]
        return Rivals(self.shape, self.free, self.hardware, bases, self.tokens)

    def _forecast(self, plan: Plan) -> Forecast | None:
        return None if self._rivals is None else self._rivals.forecast(plan)

    def instead(self, chosen: Choice) -> Iterator[Choice]:
        """Plans that lost against `chosen` and fit, as choices: of each kind the fastest by forecast.

        The faster kinds come first, and what is like one that came before it comes last.
        """
        estimates = {estimate.plan: estimate for estimate in self.seen}
        for other in chosen.considered:
            if other.fits and other.tokens_per_second is not None:
                yield self._choice(estimates[other.plan], _BY_PROBE)

    def _choice(self, found: Estimate, by_speed: str | None) -> Choice:
        """by_speed: the reason, where it is not the first in the order of preference."""
        mine = self._forecast(found.plan)
        speed = None if mine is None else mine.tokens_per_second
        seen = (e for e in self.seen if e.plan != found.plan)
        others = [self._considered(e, speed, proven=by_speed is _BY_PROBE) for e in seen]
        worth = (speed or 0.0) * (1 + WORTH)
        held_up = any(not o.fits and (o.tokens_per_second or 0.0) > worth for o in others)
        all_learn = self._all_learn(found.plan)
        reasons = self._reasons(found.plan, by_speed)
        if all_learn is not None:
            reasons["frozen_layers"] = self._reason_of_freezing(
                all_learn.peak_allocated_bytes - found.peak_allocated_bytes
            )
        return Choice(
            found,
            reasons,
            mine,
            ("memory" if held_up else mine.bound) if mine else None,
            _ranked(others, found.plan, self.hardware.budget_bytes),
            all_learn,
        )

    def _all_learn(self, plan: Plan) -> AllLearn | None:
        if not plan.frozen_layers:
            return None
        other = plan.replace(frozen_layers=())
        told = self._forecast(other)
        peak = self.estimator(other).peak_allocated_bytes
        return AllLearn(peak, None if told is None else told.tokens_per_second)

    def _considered(self, found: Estimate, mine: float | None, *, proven: bool) -> Considered:
        """Why the plan lost against one of `mine` tokens/s by forecast, or one that probes preferred."""
        told = self._forecast(found.plan)
        speed = told.tokens_per_second if told else None
        over = found.process_bytes - self.hardware.budget_bytes
        if over > 0:
            why = f"lacks {format_bytes(over)}"
        elif not self._host_has_room(found):
            over = found.host_bytes - self.hardware.host_budget_bytes
            why = f"lacks {format_bytes(over)} of the host's memory"
        elif speed is None or mine is None:
            why = "fits, and comes later in the order of preference"
        elif speed <= mine:
            why = f"{1 - speed / mine:.1%} slower"
        elif proven:
            why = f"{speed / mine - 1:.1%} faster by forecast alone"
        else:
            why = (
                f"only {speed / mine - 1:.1%} faster by a forecast, which tells no such difference"
            )
        fits = found.process_bytes <= self.hardware.budget_bytes and self._host_has_room(found)
        return Considered(found.plan, found.process_bytes, speed, fits, why)

    def _faster(self, best: Estimate, limit: int) -> Estimate:
        """A plan within `limit` that the speed model ranks before `best`; `best` where there is none."""
        rivals = self._rivals
        if rivals is None:
            return best
        for _ in range(MOST_RIVALS):
            rate = rivals.rate(best.plan)
            if rate is None:
                break
            plan = rivals.fastest(self.seen, limit, rate * (1 + WORTH))
            if plan is None:
                break
            found = self._estimate(plan)
            if self._fits(found, limit):
                best = found
        return best

    def _sizes(self) -> list[int]:
        """The micro-batch sizes that params allow, largest first."""
        if self.params.plan.micro_batch_size != "auto":
            return [self.start.micro_batch_size]
        return micro_batch_sizes(self.start.sequences_per_device)

    def _best(self, limit: int) -> tuple[Estimate | None, Estimate]:
        """The preferred plan within `limit` bytes, and the smallest that was looked at."""
        found, least = self._in_memory(limit)
        if found is None and self.free.stream and self._smallest.process_bytes <= limit:
            sizes = self._sizes()
            for micro in dict.fromkeys((enough_sequences(sizes, self.tokens), sizes[-1])):
                found = found or self._from_disk(micro, limit)
        return found, least

    def _in_memory(self, limit: int) -> tuple[Estimate | None, Estimate]:
        """The same with nothing on disk."""
        sizes = self._sizes()
        enough = enough_sequences(sizes, self.tokens)
        larger = [size for size in reversed(sizes) if size >= enough]
        smaller = [size for size in reversed(sizes) if size < enough]

        first = self._estimate(self._plan(enough))
        if self._fits(first, limit):
            if first.plan.recompute_layers:
                return first, first
            # a larger micro-batch is worth having only where it costs no recomputation
            return self._last([self._plan(size) for size in larger], limit), first
        if not self._host_has_room(first):
            return None, first  # what params move there is too much
        if self._smallest.process_bytes > limit:
            return None, self._smallest
        found, least = self._along(enough, limit)
        if found is not None or not smaller:
            return found, least
        ends = [self._plan(size, least.plan) for size in smaller]
        least = self._estimate(ends[0])
        if not self._fits(least, limit):
            return None, least
        micro = self._last(ends, limit).plan.micro_batch_size
        return self._along(micro, limit)

    def _along(self, micro: int, limit: int) -> tuple[Estimate | None, Estimate]:
        """The first plan of the micro-batch's chain that fits, and the last corner looked at."""
        free, start = self._worth_moving, self._plan(micro)
        while True:
            before, parts = start, segments(start, free)
            if not parts:
                corner = self._estimate(start)
                return (corner if self._fits(corner, limit) else None), corner
            for name, part in parts.items():
                corner = self._estimate(part[-1])
                if not self._host_has_room(corner):
                    free = less(free, name, self._most_streamed(before, corner))
                    break
                if corner.process_bytes <= limit:
                    return self._last([*reversed(part), before], limit), corner
                before = part[-1]
            else:
                return None, corner

    def _from_disk(self, micro: int, limit: int) -> Estimate | None:
        """The chain's first plan that fits the device, with the fewest layers on disk that fit the host.

        The slowest of all: a disk gives a fraction of what the link does.
        """
        plans = [self._plan(micro)]
        for part in segments(plans[0], self._worth_moving).values():
            plans = [plans[-1], *part]
            if self._estimate(plans[-1]).process_bytes <= limit:
                break
        plan = _first(plans, lambda plan: self._estimate(plan).process_bytes <= limit)
        if plan is None or not plan.streamed_layers:
            return None
        counts = range(1, len(plan.streamed_layers) + 1)
        read = [plan.replace(disk_layers=count) for count in counts]
        plan = _first(read, lambda plan: self._fits(self._estimate(plan), limit))
        return None if plan is None else self._estimate(plan)

    def _most_streamed(self, before: Plan, corner: Estimate) -> int:
        """How many of the corner's streamed layers the host has room for."""
        streamed = len(corner.plan.streamed_layers) - len(before.streamed_layers)
        others = self._estimate(before).host_bytes
        room = self.hardware.host_budget_bytes - others
        return max(0, streamed * room // max(1, corner.host_bytes - others))

    def _last(self, plans: Sequence[Plan], limit: int) -> Estimate:
        """The last of `plans` within `limit` bytes. They are in order of memory; the first fits."""
        low, high = 0, len(plans) - 1
        if self._fits(self._estimate(plans[high]), limit):
            return self._estimate(plans[high])
        guesses = 0
        while high - low > 1:
            if guesses == 0:
                at = self._guess(plans, limit)
            elif guesses == 1:  # beside the guess, on the side where the edge is
                at = low + 1 if low else high - 1
            else:
                at = (low + high) // 2
            guesses += 1
            if self._fits(self._estimate(plans[at]), limit):
                low = at
            else:
                high = at
        return self._estimate(plans[low])

    def _guess(self, plans: Sequence[Plan], limit: int) -> int:
        """Which of `plans` is the last within `limit`, were memory linear between the ends."""
        ends = [self._estimate(plan).process_bytes for plan in (plans[0], plans[-1])]
        share = (limit - ends[0]) / max(1, ends[1] - ends[0])

        def place(plan: Plan) -> float:
            # along one of these, the others are constant
            moved = len(plan.recompute_layers) + len(plan.streamed_layers)
            return self.tokens(plan.micro_batch_size) - moved

        first, last = place(plans[0]), place(plans[-1])
        within = [
            i for i, plan in enumerate(plans) if place(plan) <= first + share * (last - first)
        ]
        return min(max(1, within[-1] if within else 1), len(plans) - 2)

    def _reasons(self, plan: Plan, by_speed: str | None) -> dict[str, str]:
        asked = self.params.plan
        _, dtype_reason = compute_dtype(self.params, self.hardware)
        if asked.micro_batch_size != "auto":
            micro = "as params say"
        elif by_speed:
            micro = by_speed
        elif plan.micro_batch_size == plan.sequences_per_device:
            micro = "the whole effective batch fits at once"
        elif self.tokens(plan.micro_batch_size) >= BUSY_TOKENS:
            micro = "enough tokens to keep the device busy, within the budget"
        else:
            micro = "the largest that fits the budget"
        if asked.recompute != "auto":
            recompute = "as params say"
        elif not self.free.recompute:
            recompute = "no others of this model stream"
        elif by_speed and plan.recompute_layers:
            recompute = by_speed
        elif not plan.recompute_layers:
            recompute = "all activations fit, so nothing is computed twice"
        elif len(plan.recompute_layers) == self.model.layers:
            recompute = "the budget leaves room for no layer's activations"
        else:
            recompute = "the fewest layers with which the micro-batch fits"
        keeps = "it takes more time to make again than memory to keep"
        shares = "what is streamed comes once for all of them, and is waited for"
        several = {}
        if plan.devices > 1:
            tokens = self.tokens(plan.micro_batch_size)
            several["devices"] = why_in_parallel(plan, self.shape, self.hardware.rates, tokens)
        return {
            **several,
            "micro_batch_size": micro,
            **({"micro_batches_per_pass": shares} if plan.micro_batches_per_pass > 1 else {}),
            "evaluation_batch_size": (
                "as params say" if asked.evaluation_batch_size != "auto" else "as in training"
            ),
            "recompute_layers": recompute,
            **({"recompute_keeps": keeps} if plan.recompute_keeps else {}),
            **self._reasons_of_places(plan, by_speed),
            "compute_dtype": dtype_reason,
            "attention": attention_kernel(self.hardware)[1],
            "optimizer": "as params say",
            "loss_chunk_tokens": f"fp32 logits stay within {format_bytes(LOSS_CHUNK_BYTES)}",
            "mlp_chunk_tokens": "larger parts take memory and are hardly faster",
        }

    def _reason_of_freezing(self, saved_bytes: int) -> str:
        share = f"train.freeze_share, {self.params.train.freeze_share:.0%} of the layers"
        saved = f"the peak is {format_bytes(saved_bytes)} lower than with all trained"
        if self.params.train.freeze == "speed":
            return f"{share}, the lowest: the backward pass ends above them, and {saved}"
        return (
            f"{share}: {saved}; the run takes those with the least gradients, which need no more than "
            "these"
        )

    def _reasons_of_places(self, plan: Plan, by_speed: str | None) -> dict[str, str]:
        asked = self.params.plan
        streamed = len(plan.streamed_layers)
        if asked.stream_layers != "auto":
            streams = "as params say"
        elif plan.device == "cpu":
            streams = "the device is the host"
        elif not streamed:
            streams = "all layers fit the device"
        elif by_speed:
            streams = by_speed
        elif streamed == self.model.layers:
            streams = "the budget leaves room for no layer's weights"
        else:
            streams = "as few as fit the budget"
        found = {"streamed_layers": streams}
        on_host = {
            "checkpoints": "they travel while layers compute",
            "embedding": "a look-up there costs nothing",
            "head": "the budget has no room for its table",
            "optimizer_device": "the budget has no room for its state",
        }
        for name, reason in on_host.items():
            if getattr(asked, name) != "auto":
                found[name] = "as params say"
            elif getattr(plan, name) == "host":
                found[name] = (
                    by_speed if by_speed and name in ("head", "optimizer_device") else reason
                )
            elif plan.device == "cpu":
                found[name] = "the device is the host"
            else:
                found[name] = "there is room"
        if plan.disk_layers:
            found["disk_layers"] = "as few as the host's memory has no room for"
        if not plan.recompute_layers and asked.checkpoints == "auto":
            found["checkpoints"] = "there are none"
        return found


def _first(plans: Sequence[Plan], enough: Callable[[Plan], bool]) -> Plan | None:
    """The first of `plans` that is `enough`, as all behind it are; None where none is."""
    if not enough(plans[-1]):
        return None
    at = bisect_left(range(len(plans) - 1), True, key=lambda index: enough(plans[index]))
    return plans[at]


def _ranked(others: list[Considered], chosen: Plan, budget_bytes: int) -> tuple[Considered, ...]:
    """First what is near enough to have been chosen and of another kind, the fastest first.

    Of a kind are plans that differ by a number of layers alone: one of each says what they all do.
    """

    def kind(plan: Plan) -> Plan:
        one = {
            "recompute_layers": plan.recompute_layers[:1],
            "streamed_layers": plan.streamed_layers[:1],
            "streaming_slots": 1,
        }
        return plan.model_copy(update=one)

    def is_far(other: Considered) -> bool:
        return other.process_bytes > NEAR * budget_bytes

    by_speed = sorted(
        others, key=lambda o: (is_far(o), -(o.tokens_per_second or 0.0), -o.process_bytes)
    )
    first = {kind(chosen): chosen}
    for other in by_speed:
        first.setdefault(kind(other.plan), other.plan)
    return tuple(sorted(by_speed, key=lambda o: (is_far(o), first[kind(o.plan)] != o.plan)))


def neighbours(plan: Plan, layers: int, *, dynamic: bool = False) -> dict[str, Plan]:
    """Plans that differ in one thing, by the name of the change: what else it would cost.

    dynamic: whether its layers' precision may change.
    """
    found: dict[str, Plan] = {}
    dtype = plan.compute_dtype
    while dynamic and dtype in WIDER:
        dtype = WIDER[dtype]
        found[f"layers in {dtype}"] = plan.in_precision(dtype)
    if plan.frozen_layers:
        found["nothing frozen"] = plan.replace(frozen_layers=())
    if plan.micro_batch_size > 1:
        found["half the micro-batch"] = plan.replace(micro_batch_size=plan.micro_batch_size // 2)
    if plan.micro_batch_size * 2 <= plan.sequences_per_device:
        found["twice the micro-batch"] = plan.replace(micro_batch_size=plan.micro_batch_size * 2)
    if plan.recompute_layers:
        found["no layer recomputed"] = plan.replace(recompute_layers=())
    if len(plan.recompute_layers) < layers:
        found["every layer recomputed"] = plan.replace(recompute_layers=tuple(range(layers)))
    return found
