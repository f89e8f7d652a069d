"""Which Plan: the preferred one that fits, found with a handful of traces.

Preference, until there is a speed model: enough tokens in flight to keep the device busy come first
(`BUSY_TOKENS`), then as little recomputation as fits, then a larger micro-batch. Recomputing a layer
costs a third more of its time (one more forward pass beside a forward and a backward); a starved
device costs more.

Peak memory grows with the micro-batch and falls with the layers that recompute, mostly in straight
lines, with a bend where the peak moves to another instant of the step. So along each of the two the
edge of what fits is guessed by a straight line, looked for beside the guess, and then bisected: a
trace of a large model takes seconds, and no plan is believed that was not traced itself.

This module imports no torch: it is handed the function that estimates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.params import Params
from fitlora.plan import PAGED_OPTIMIZERS, ComputeDtype, Plan
from fitlora.units import GIB, MIB, format_bytes

# Tokens of a micro-batch from which a GPU's products run near their best rate: an 8B shape on an
# H100 gained under 3% beyond it (benchmarks/results/three_ways.*.json).
BUSY_TOKENS = 4096
# fp32 logits that exist at one time; rows of a large vocabulary are cut to this.
LOSS_CHUNK_BYTES = 256 * MIB

# How much less the next plan should take where one overflowed that should have fitted: about what an
# estimate is off by at most, so that a few probes get out of any error that is still to be expected.
STEP_BACK = 0.03

Estimator = Callable[[Plan], Estimate]


@dataclass(frozen=True)
class ModelSize:
    """The little of a model that candidates depend on."""

    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "ModelSize":
        """Of a transformers config."""
        text = config.get_text_config()
        return cls(text.num_hidden_layers, text.vocab_size)


@dataclass(frozen=True)
class Choice:
    """The Plan, its estimate, and the reason of each decision."""

    estimate: Estimate
    reasons: dict[str, str]

    @property
    def plan(self) -> Plan:
        return self.estimate.plan


def compute_dtype(params: Params, hardware: Hardware) -> tuple[ComputeDtype, str]:
    """What products are computed in, and why; raises UserError for what the device lacks."""
    asked = params.plan.compute_dtype
    has_bf16 = hardware.device == "cuda" and all(gpu.bf16 for gpu in hardware.gpus)
    if asked == "auto":
        if hardware.device == "cpu":
            return "float32", "the CPU computes float32 fastest"
        if has_bf16:
            return "bfloat16", "the GPU has it"
        return "float32", "the GPU has no bfloat16"
    if asked == "bfloat16" and hardware.device == "cuda" and not has_bf16:
        raise UserError(
            f"plan.compute_dtype is bfloat16, which {hardware.gpus[0].name} lacks; use float32"
        )
    return asked, "as params say"


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
    devices: int = 1,
) -> Plan:
    """The plan to start from: what the user fixed, and else the fastest that memory might allow.

    That is a micro-batch just large enough to keep the device busy, and nothing recomputed. tokens:
    tokens of the heaviest micro-batch, by its size.
    """
    asked = params.plan
    if hardware.device == "cpu" and params.train.optimizer in PAGED_OPTIMIZERS:
        raise UserError(
            f"train.optimizer {params.train.optimizer} needs a CUDA device, and the device here is the "
            "CPU; use adamw or adamw_8bit"
        )
    dtype, _ = compute_dtype(params, hardware)
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
        optimizer=params.train.optimizer,
        loss_chunk_tokens=loss_chunk(model.vocabulary),
    )


def enough_sequences(sizes: Sequence[int], tokens: Callable[[int], int]) -> int:
    """The smallest of `sizes` (largest first) that keeps the device busy; the largest if none does."""
    busy = [size for size in sizes if tokens(size) >= BUSY_TOKENS]
    return busy[-1] if busy else sizes[0]


def _recomputed(params: Params, model: ModelSize) -> tuple[int, ...] | None:
    """The layers that the user wants recomputed; None where the planner may choose."""
    asked = params.plan.recompute
    if asked == "auto":
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

    tokens: tokens of the heaviest micro-batch, by its size. Every estimate that was made is kept in
    `seen`, in order.
    """

    params: Params
    hardware: Hardware
    model: ModelSize
    start: Plan
    estimator: Estimator
    tokens: Callable[[int], int]
    seen: list[Estimate] = field(default_factory=list)

    def _estimate(self, plan: Plan) -> Estimate:
        for known in self.seen:
            if known.plan == plan:
                return known
        found = self.estimator(plan)
        self.seen.append(found)
        return found

    def _plan(self, micro_batch_size: int, layers: int) -> Plan:
        evaluation = self.params.plan.evaluation_batch_size
        return self.start.replace(
            micro_batch_size=micro_batch_size,
            # nothing is kept for a backward pass, so what trains also evaluates
            evaluation_batch_size=evaluation if evaluation != "auto" else micro_batch_size,
            recompute_layers=tuple(range(layers)),
        )

    def fitting(self) -> Iterator[Choice]:
        """Plans that fit, the preferred one first, each traced itself.

        Whoever asks for another one says that the last did not fit in truth: the next takes
        `STEP_BACK` less. Raises UserError, with figures, where nothing fits from the start.
        """
        best, smallest = self._best(self.hardware.budget_bytes)
        if best is None:
            raise UserError(self._nothing_fits(smallest))
        while best is not None:
            yield Choice(best, self._reasons(best.plan))
            best, _ = self._best(int(best.process_bytes * (1 - STEP_BACK)))

    def _best(self, limit: int) -> tuple[Estimate | None, Estimate]:
        """The preferred plan within `limit` bytes, and the smallest that was looked at."""
        fixed = _recomputed(self.params, self.model)
        fewest, most = (0, self.model.layers) if fixed is None else (len(fixed), len(fixed))
        sizes = [self.start.micro_batch_size]
        if self.params.plan.micro_batch_size == "auto":
            sizes = micro_batch_sizes(self.start.sequences_per_device)
        enough = enough_sequences(sizes, self.tokens)
        larger = [size for size in reversed(sizes) if size >= enough]
        smaller = [size for size in reversed(sizes) if size <= enough]

        smallest = self._estimate(self._plan(enough, fewest))
        if smallest.process_bytes <= limit:
            if fewest > 0:
                return smallest, smallest
            # a larger micro-batch is worth having only where it costs no recomputation
            return self._last([self._plan(size, 0) for size in larger], limit), smallest
        micro = enough
        smallest = self._estimate(self._plan(enough, most))
        if smallest.process_bytes > limit:
            smallest = self._estimate(self._plan(smaller[0], most))
            if smallest.process_bytes > limit:
                return None, smallest
            least = self._last([self._plan(size, most) for size in smaller], limit)
            micro = least.plan.micro_batch_size
        plans = [self._plan(micro, count) for count in range(most, fewest - 1, -1)]
        return self._last(plans, limit), smallest

    def _last(self, plans: Sequence[Plan], limit: int) -> Estimate:
        """The last of `plans` within `limit` bytes. They are in order of memory; the first fits."""
        low, high = 0, len(plans) - 1
        if self._estimate(plans[high]).process_bytes <= limit:
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
            if self._estimate(plans[at]).process_bytes <= limit:
                low = at
            else:
                high = at
        return self._estimate(plans[low])

    def _guess(self, plans: Sequence[Plan], limit: int) -> int:
        """Which of `plans` is the last within `limit`, were memory linear between the ends."""
        ends = [self._estimate(plan).process_bytes for plan in (plans[0], plans[-1])]
        share = (limit - ends[0]) / max(1, ends[1] - ends[0])

        def place(plan: Plan) -> float:
            # along one of the two, the other is constant
            return self.tokens(plan.micro_batch_size) - len(plan.recompute_layers)

        first, last = place(plans[0]), place(plans[-1])
        within = [
            i for i, plan in enumerate(plans) if place(plan) <= first + share * (last - first)
        ]
        return min(max(1, within[-1] if within else 1), len(plans) - 2)

    def _reasons(self, plan: Plan) -> dict[str, str]:
        asked = self.params.plan
        _, dtype_reason = compute_dtype(self.params, self.hardware)
        if asked.micro_batch_size != "auto":
            micro = "as params say"
        elif plan.micro_batch_size == plan.sequences_per_device:
            micro = "the whole effective batch fits at once"
        elif self.tokens(plan.micro_batch_size) >= BUSY_TOKENS:
            micro = "enough tokens to keep the device busy, within the budget"
        else:
            micro = "the largest that fits the budget"
        if asked.recompute != "auto":
            recompute = "as params say"
        elif not plan.recompute_layers:
            recompute = "all activations fit, so nothing is computed twice"
        elif len(plan.recompute_layers) == self.model.layers:
            recompute = "the budget leaves room for no layer's activations"
        else:
            recompute = "the fewest layers with which the micro-batch fits"
        return {
            "micro_batch_size": micro,
            "evaluation_batch_size": (
                "as params say" if asked.evaluation_batch_size != "auto" else "as in training"
            ),
            "recompute_layers": recompute,
            "compute_dtype": dtype_reason,
            "optimizer": "as params say",
            "loss_chunk_tokens": f"fp32 logits stay within {format_bytes(LOSS_CHUNK_BYTES)}",
        }

    def _nothing_fits(self, least: Estimate) -> str:
        asked = self.params.plan
        ways = [
            f"a budget of {-(-least.process_bytes // (GIB // 4)) / 4:.2f} GiB would carry the "
            f"smallest plan tried ({least.plan.describe()})"
        ]
        if asked.micro_batch_size != "auto" or asked.recompute != "auto":
            ways.append("plan.micro_batch_size and plan.recompute: auto leave more choice")
        if asked.evaluation_batch_size not in ("auto", 1):
            ways.append("a lower plan.evaluation_batch_size")
        ways += ["a lower data.max_length", "a lower lora.r", "a smaller model"]
        return (
            f"nothing fits {format_bytes(self.hardware.budget_bytes)}: the smallest plan tried needs "
            f"{format_bytes(least.process_bytes)}, of which weights are "
            f"{format_bytes(least.components.weights)}. Ways out: {'; '.join(ways)}"
        )


def neighbours(plan: Plan, layers: int) -> dict[str, Plan]:
    """Plans that differ in one thing, by the name of the change: what else it would cost."""
    found = {}
    if plan.micro_batch_size > 1:
        found["half the micro-batch"] = plan.replace(micro_batch_size=plan.micro_batch_size // 2)
    if plan.micro_batch_size * 2 <= plan.sequences_per_device:
        found["twice the micro-batch"] = plan.replace(micro_batch_size=plan.micro_batch_size * 2)
    if plan.recompute_layers:
        found["no layer recomputed"] = plan.replace(recompute_layers=())
    if len(plan.recompute_layers) < layers:
        found["every layer recomputed"] = plan.replace(recompute_layers=tuple(range(layers)))
    return found
