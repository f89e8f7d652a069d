"""Which Plan: few traces, straight lines between them, and the first candidate that fits.

Peak memory is close to linear in the tokens of a micro-batch and in the number of layers that
recompute. Four traces at the corners (one and two micro-batches' worth, no layer and every layer)
give the plane; candidates are ranked by preference, the plane says which should fit, and the one
chosen is traced itself before it is believed.

Preference, until there is a speed model: enough tokens in flight to keep the device busy come first
(`BUSY_TOKENS`), then as little recomputation as fits, then a larger micro-batch. Recomputing a layer
costs a third more of its time (one more forward pass beside a forward and a backward); a starved
device costs more.

This module imports no torch: it is handed the function that estimates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fitlora.artifacts import Estimate, Hardware
from fitlora.errors import UserError
from fitlora.params import Params
from fitlora.plan import ComputeDtype, Plan
from fitlora.units import GIB, MIB, format_bytes

# Tokens of a micro-batch from which a GPU's products run near their best rate: an 8B shape on an
# H100 gained under 3% beyond it (benchmarks/results/three_ways.*.json).
BUSY_TOKENS = 4096
# fp32 logits that exist at one time; rows of a large vocabulary are cut to this.
LOSS_CHUNK_BYTES = 256 * MIB

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
        # float16 without loss scaling would lose small gradients without a word
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
    dtype, _ = compute_dtype(params, hardware)
    share = -(-params.train.effective_batch_size // devices)
    micro = asked.micro_batch_size
    if micro == "auto":
        micro = enough_sequences(micro_batch_sizes(share), tokens)
    evaluation = asked.evaluation_batch_size
    return Plan(
        device=hardware.device,
        devices=devices,
        effective_batch_size=params.train.effective_batch_size,
        micro_batch_size=min(micro, share),
        evaluation_batch_size=min(micro, share) if evaluation == "auto" else evaluation,
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

    def candidates(self) -> Iterator[Plan]:
        """Every plan that the user's settings allow, preferred ones first."""
        share = self.start.sequences_per_device
        fixed_micro = self.params.plan.micro_batch_size
        sizes = micro_batch_sizes(share) if fixed_micro == "auto" else [self.start.micro_batch_size]
        fixed_layers = _recomputed(self.params, self.model)
        counts: Sequence[int] = (
            range(self.model.layers + 1) if fixed_layers is None else [len(fixed_layers)]
        )
        enough = enough_sequences(sizes, self.tokens)
        if 0 in counts:  # a larger micro-batch is worth having only where it costs no recomputation
            for size in (size for size in sizes if size > enough):
                yield self._plan(size, 0)
        for size in (size for size in sizes if size <= enough):
            for count in counts:
                yield self._plan(size, count)

    def _plan(self, micro_batch_size: int, layers: int) -> Plan:
        evaluation = self.params.plan.evaluation_batch_size
        return self.start.replace(
            micro_batch_size=micro_batch_size,
            # nothing is kept for a backward pass, so what trains also evaluates
            evaluation_batch_size=evaluation if evaluation != "auto" else micro_batch_size,
            recompute_layers=tuple(range(layers)),
        )

    def _plane(self) -> Callable[[Plan], float]:
        """Predicted process bytes of a plan, from traces at the corners of the space."""
        sizes = sorted({1, min(2, self.start.sequences_per_device)})
        if self.params.plan.micro_batch_size != "auto":
            sizes = [self.start.micro_batch_size]
        layers = sorted({0, self.model.layers})
        fixed = _recomputed(self.params, self.model)
        if fixed is not None:
            layers = [len(fixed)]
        corner = {
            (s, c): self._estimate(self._plan(s, c)).process_bytes for s in sizes for c in layers
        }

        def at(plan: Plan) -> float:
            x = _share(self.tokens(plan.micro_batch_size), [self.tokens(s) for s in sizes])
            y = _share(len(plan.recompute_layers), layers)
            low = corner[sizes[0], layers[0]] * (1 - x) + corner[sizes[-1], layers[0]] * x
            high = corner[sizes[0], layers[-1]] * (1 - x) + corner[sizes[-1], layers[-1]] * x
            return low * (1 - y) + high * y

        return at

    def fitting(self) -> Iterator[Choice]:
        """Plans that fit, preferred ones first, each traced itself.

        Raises UserError, with figures, where nothing does.
        """
        plane = self._plane()
        found = False
        budget = self.hardware.budget_bytes
        tried: set[str] = set()
        for plan in self.candidates():
            if plan.fingerprint() in tried:
                continue
            tried.add(plan.fingerprint())
            if plane(plan) > 1.02 * budget:  # the plane is not exact; what is near is traced
                continue
            estimate = self._estimate(plan)
            if estimate.fits:
                found = True
                yield Choice(estimate, self._reasons(plan))
        if not found:
            raise UserError(self._nothing_fits())

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

    def _nothing_fits(self) -> str:
        least = min(self.seen, key=lambda e: e.process_bytes)
        asked = self.params.plan
        ways = [
            f"a budget of {-(-least.process_bytes // (GIB // 4)) / 4:.2f} GiB would carry the "
            f"smallest plan tried ({least.plan.describe()})"
        ]
        if asked.micro_batch_size != "auto" or asked.recompute != "auto":
            ways.append("plan.micro_batch_size and plan.recompute: auto leave more choice")
        ways += ["a lower data.max_length", "a lower lora.r", "a smaller model"]
        return (
            f"nothing fits {format_bytes(self.hardware.budget_bytes)}: the smallest plan tried needs "
            f"{format_bytes(least.process_bytes)}, of which weights are "
            f"{format_bytes(least.components.weights)}. Ways out: {'; '.join(ways)}"
        )


def _share(value: float, ends: Sequence[float]) -> float:
    """Where `value` lies between the ends, 0 to 1 and beyond; 0 where they are one point."""
    span = ends[-1] - ends[0]
    return (value - ends[0]) / span if span else 0.0


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
