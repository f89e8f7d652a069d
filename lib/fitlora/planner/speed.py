"""How fast a Plan will be: a roofline over what its step does, by the rates that were measured.

The work of a layer is counted as the step does it (`fitlora.step.layer`, `fitlora.step.group`):
floating-point operations of the frozen products and of attention, and bytes that dequantization,
adapters, norms and activations move. Beside it run the link to the host, with what travels, and the
host itself, which launches the kernels: a pass over the layers takes the longest of the three.

No constant is fitted to a step. What share of a rate a kind of work reaches was measured by itself,
kernel by kernel; the times that are taken from steps, a launch's by hand and by autograd, are those of
steps that wait for nothing else. `benchmarks/speed_model.py` holds the model against every step that was
measured, and benchmarks/results/speed_model.h200.json has the error of each.

Layers that autograd does have the same products, and PyTorch's own operators beside them, which are
counted as well (`OPERATORS`), of layers like Llama's. No step of ours of that kind was measured, and a
Forecast says so by `measured`; peft's, whose adapters are more operators yet, reach 78% to 101% of it.

Left out: the first fetch of a pass; gathering an embedding's rows on the host; that FlashAttention
reaches more of the products' rate before Hopper. This module imports no torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from fitlora.artifacts import Rates
from fitlora.plan import KEPT, Kept, Plan

# How many times as long an operation of FlashAttention 2 takes as one of a product, in forward and in
# backward: a + b / length, as blocks on the diagonal are done whole, and are more of a short sequence.
# From 4 x 2,048 and 1 x 8,192 tokens with 32 heads of 128 (0.500 and 1.492, 1.708 and 4.812 ms a layer;
# benchmarks/results/attention.h200.json), where products reach 770 TFLOP/s.
ATTENTION_TIMES, ATTENTION_BACKWARD_TIMES = (2.25, 1120), (2.48, 1770)
# Attention's backward does five products where its forward does two.
ATTENTION_BACKWARD = 2.5
# Bytes of each score where there is no FlashAttention: what `fitlora.step.attention` reads and writes of
# 16-bit and 32-bit scores; its backward makes them again first.
PLAIN_BYTES, PLAIN_BACKWARD_BYTES = 36, 80
# Shares of a copy's rate: the mean of the step's pointwise kernels, dequantization, and PyTorch's own
# operators (the norm; all in benchmarks/results/kernels.h200.json).
MOVING_SHARE, DEQUANTIZE_SHARE, PLAIN_SHARE = 0.87, 0.82, 0.68
# In fp8 tensor cores do twice the operations of bf16 (NVIDIA's tables, of every card that has it).
FLOAT8_SPEEDUP = 2.0
# What computing loses beside the copies where every layer is streamed and the link keeps up: 8B and 70B
# reach 97.4% and 97.5% of the floor (benchmarks/results/offload.h200.json).
STREAMING_LOSS = 0.025
# Bytes of a logit that the loss moves: written and read by two products, and once more in between; where
# the head comes in slices, fp32 copies, maxima and sums as well.
LOSS_BYTES, SLICED_LOSS_BYTES = 8, 44
# Bytes of an adapter's weight that AdamW reads and writes, and a host's rate for them, which counts what
# comes before and after: a core took 27 ms for the 21 million weights of 16 layers of an 8B, clipped,
# updated, rounded and sent up. Several cores share one memory, so it is not taken times their number.
OPTIMIZER_BYTES = 28
HOST_BYTES_PER_SECOND = 20e9

# The parts of a layer, by what they make: what it may keep, and its output.
Part = Literal["qkv", "attention", "middle", "mlp", "down"]
PARTS: tuple[Part, ...] = (*KEPT, "down")
# Operators that the host launches for each part, and for a layer's backward; one more for each product
# of a pass with dropout, two in backward. tests/planner/test_speed.py counts them in the step.
LAUNCHES: dict[Part, int] = {"qkv": 10, "attention": 1, "middle": 4, "mlp": 8, "down": 7}
BACKWARD_LAUNCHES = 45
# One of them with the Python around it: 2,048 tokens of the 8B shape are so few that the step waits for
# its 2,400 launches and the head, 144 ms (micro-batch 1 of results/step_speed_earlier.h200.json).
LAUNCH_SECONDS = 57e-6


@dataclass(frozen=True)
class Operators:
    """What PyTorch's own operators do in a layer: launches, and features of each token that they move.

    These are so many times a width: the residual's, queries' and keys', and the MLP's.
    """

    launches: int
    hidden: float
    rotated: float
    intermediate: float


# How a layer is done: by hand, or by autograd, without DoRA or with it.
Way = Literal["hand", "autograd", "dora"]
# Forward and backward where autograd does it; what it recomputes is a forward. Norms, rotation and gate
# are many operators, in fp32 and with copies between types; tests/planner/test_speed.py counts them.
OPERATORS: dict[Way, tuple[Operators, Operators]] = {
    "autograd": (Operators(73, 42.3, 10.6, 4.9), Operators(141, 104.6, 20.7, 8.8)),
    "dora": (Operators(199, 46.5, 13.2, 8.9), Operators(183, 117.0, 28.4, 20.6)),
}
# One of these launches: peft's step on one sequence of 2,048 tokens, whose layers are transformers' as
# well, takes no longer for all of them (9,767 tokens/s in results/step_speed_earlier.h200.json).
OPERATOR_SECONDS = 30e-6
# Bytes of each weight that DoRA's norms move in every forward, once it is dequantized.
DORA_NORM_BYTES = 6


@dataclass(frozen=True)
class Shape:
    """What of a model its speed depends on. Widths are features of one token."""

    layers: int
    hidden: int
    qkv: int
    attended: int
    intermediate: int
    vocabulary: int
    heads: int
    dropout: bool
    weight_bytes: float  # of a frozen weight of a layer, as it is stored
    dequantized: bool
    adapters: int  # parameters, with those that are trained beside them
    way: Way = "hand"

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        bits: int,
        rank: int,
        dropout: bool = False,
        whole: int = 0,
        way: Way = "hand",
    ) -> "Shape | None":
        """Of the transformers config of a dense decoder with a gated MLP; None where widths are missing.

        Whether its layers are such is seen in the model (`weights`). whole: parameters that are trained
        beside the adapters.
        """
        text = config.get_text_config()
        hidden, inner = (getattr(text, n, None) for n in ("hidden_size", "intermediate_size"))
        heads = getattr(text, "num_attention_heads", None)
        if not (hidden and inner and heads):
            return None
        size = getattr(text, "head_dim", None) or hidden // heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        qkv, attended = (heads + 2 * kv) * size, heads * size
        ends = (hidden + heads * size) + 2 * (hidden + kv * size) + (attended + hidden)
        return cls(
            layers=text.num_hidden_layers,
            hidden=hidden,
            qkv=qkv,
            attended=attended,
            intermediate=inner,
            vocabulary=text.vocab_size,
            heads=heads,
            dropout=dropout,
            # 4 bits, a scale of 8 bits for 64 weights, and the scales' own: 4.13 bits
            weight_bytes=4.13 / 8 if bits == 4 else 2.0,
            dequantized=bits == 4,
            adapters=text.num_hidden_layers * rank * (ends + 3 * (hidden + inner)) + whole,
            way=way,
        )

    @property
    def rotated(self) -> int:
        """Queries and keys."""
        return (self.qkv + self.attended) // 2

    @cached_property
    def products(self) -> dict[Part, tuple[int, int]]:
        """Inputs and outputs of the frozen products, by what they make."""
        return {
            "qkv": (self.hidden, self.qkv),
            "middle": (self.attended, self.hidden),
            "mlp": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def launch_seconds(self) -> float:
        """Of the host, for an operator."""
        return LAUNCH_SECONDS if self.way == "hand" else OPERATOR_SECONDS

    def launches(self, parts: Collection[Part]) -> int:
        """Operators that make these parts of a layer; where autograd does it, they are made together."""
        dropped = sum(part in self.products for part in parts) if self.dropout else 0
        if self.way != "hand":
            return dropped + OPERATORS[self.way][0].launches
        return dropped + sum(LAUNCHES[part] for part in parts)

    @property
    def backward_launches(self) -> int:
        """Operators of a layer's backward."""
        own = BACKWARD_LAUNCHES if self.way == "hand" else OPERATORS[self.way][1].launches
        return own + 2 * len(self.products) * self.dropout

    @cached_property
    def weights(self) -> int:
        """Frozen weights of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.products.values())

    @cached_property
    def layer_bytes(self) -> int:
        """Of one layer's frozen weights, as they are stored and travel."""
        return int(self.weights * self.weight_bytes)

    @property
    def table_bytes(self) -> int:
        """Of the embedding's table, or the head's, in 16 bits."""
        return 2 * self.vocabulary * self.hidden

    def kept_bytes(self, kept: tuple[Kept, ...]) -> int:
        """Of 16-bit activations that a layer keeps of one token, its input aside."""
        sizes = {
            "qkv": self.qkv,
            "attention": self.attended,
            "middle": self.hidden,
            "mlp": 2 * self.intermediate,
        }
        return 2 * sum(sizes[kind] for kind in kept)

    def working_bytes(self, tokens: int, mlp_tokens: int) -> int:
        """Of activations that a layer in work has, whatever it keeps; mlp_tokens: of them in the MLP."""
        return 2 * (tokens * (4 * self.hidden + self.qkv) + mlp_tokens * 3 * self.intermediate)


@dataclass(frozen=True)
class Forecast:
    """Seconds of one optimizer step of a device, and what holds it up. tokens: of the step."""

    tokens: int
    micro_batch_seconds: float  # of a full one
    optimizer_seconds: float
    step_seconds: float
    bound: str  # compute, launches, link, disk or host
    measured: bool = True  # whether forecasts of steps of its kind were held against measured ones

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


@dataclass(frozen=True)
class _Clock:
    """Seconds that the device takes for pieces of a layer's work on a micro-batch of `tokens`."""

    shape: Shape
    tokens: int
    sequence: int
    product_rate: float
    copy_rate: float
    element_bytes: int  # of activations
    float8: bool  # products of frozen weights
    flash: bool

    def moved(self, features: float) -> float:
        """So many features of each token, read or written."""
        moved = self.element_bytes * features * self.tokens
        return moved / (MOVING_SHARE * self.copy_rate)

    def product(self, part: Part) -> float:
        """One pass over frozen weights, which are dequantized for it: the longer of work and traffic."""
        inputs, outputs = self.shape.products[part]
        weights = inputs * outputs
        rate = self.product_rate * (FLOAT8_SPEEDUP if self.float8 else 1)
        operand_bytes = 1 if self.float8 else self.element_bytes
        traffic = operand_bytes * (weights + self.tokens * inputs)
        traffic += self.element_bytes * self.tokens * outputs
        seconds = max(2 * weights * self.tokens / rate, traffic / self.copy_rate)
        if self.shape.dequantized:
            moved = weights * (self.shape.weight_bytes + operand_bytes)
            seconds += moved / (DEQUANTIZE_SHARE * self.copy_rate)
        if self.float8:  # the other operand is quantized, too
            seconds += self.moved(1.5 * inputs)
        return seconds

    def attention(self, *, backward: bool) -> float:
        """Causal attention in one layer."""
        operations = 2 * self.tokens * self.sequence * self.shape.attended
        if self.flash:
            times, more = ATTENTION_BACKWARD_TIMES if backward else ATTENTION_TIMES
            work = (ATTENTION_BACKWARD if backward else 1) * operations
            return (times + more / self.sequence) * work / self.product_rate
        # every score, those of later tokens too; backward makes them again
        scores = self.tokens * self.sequence * self.shape.heads
        moved = (PLAIN_BACKWARD_BYTES if backward else PLAIN_BYTES) * scores
        work = (3 if backward else 1) * 2 * operations
        return moved / (PLAIN_SHARE * self.copy_rate) + work / self.product_rate

    def part(self, part: Part) -> float:
        """What makes one part of a layer in forward, or again in backward."""
        if part == "attention":
            return self.attention(backward=False)
        inputs, outputs = self.shape.products[part]
        shape = self.shape
        by_hand = {
            "qkv": 2 * shape.hidden + 2 * shape.rotated,  # norm, rotation
            "middle": 4 * shape.hidden,  # sum and norm
            "mlp": 0,
            "down": 3 * shape.intermediate + 3 * shape.hidden,  # gate, sum
        }
        beside = by_hand[part] if shape.way == "hand" else 0
        dropped = 2 * inputs if shape.dropout else 0
        # the adapter reads the input and writes the output, to which the frozen product adds
        return self.product(part) + self.moved(inputs + dropped + 2 * outputs + beside)

    def operators(self, done: Operators) -> float:
        """What PyTorch's own operators move in one phase."""
        shape = self.shape
        features = done.hidden * shape.hidden + done.rotated * shape.rotated
        features += done.intermediate * shape.intermediate
        return self.element_bytes * features * self.tokens / (PLAIN_SHARE * self.copy_rate)

    @cached_property
    def forward(self) -> float:
        seconds = sum(self.part(part) for part in PARTS)
        if self.shape.way != "hand":
            seconds += self.operators(OPERATORS[self.shape.way][0])
        if self.shape.way == "dora":
            seconds += self.shape.weights * DORA_NORM_BYTES / (PLAIN_SHARE * self.copy_rate)
        return seconds

    def again(self, kept: tuple[Kept, ...]) -> float:
        """What a layer makes again that has kept this: all but the last product; by autograd, all."""
        if self.shape.way != "hand":
            return self.forward
        return sum(self.part(part) for part in KEPT if part not in kept)

    @cached_property
    def backward(self) -> float:
        shape, seconds = self.shape, self.attention(backward=True)
        for part, (inputs, outputs) in shape.products.items():
            # the adapter's part of the input's gradient, and the sum of both
            dropped = 2 * inputs if shape.dropout else 0
            seconds += self.product(part) + self.moved(2 * inputs + dropped + outputs)
        if shape.way != "hand":
            return seconds + self.operators(OPERATORS[shape.way][1])
        norms, rotation = 12 * shape.hidden, 2 * shape.rotated + 2 * shape.qkv
        return seconds + self.moved(norms + 6 * shape.intermediate + rotation)

    @cached_property
    def gradients(self) -> float:
        """What of a layer's backward makes its adapters' own gradients."""
        sizes = self.shape.products.values()
        read = 3 if self.shape.dropout else 1  # of each input, with what drops of it
        return sum(self.moved(read * inputs + outputs) for inputs, outputs in sizes)

    def head(self, *, sliced: bool) -> float:
        """Loss and gradient of all tokens: logits, what is made of them, and their way back."""
        logits = self.shape.vocabulary * self.tokens
        moved = SLICED_LOSS_BYTES / PLAIN_SHARE if sliced else LOSS_BYTES / MOVING_SHARE
        work = 4 * logits * self.shape.hidden / self.product_rate
        return work + moved * logits / self.copy_rate


_clock = lru_cache(maxsize=1024)(_Clock)


def forecast(plan: Plan, shape: Shape, rates: Rates, tokens: int) -> Forecast | None:
    """How long a step of the plan takes; None where a rate that it depends on is not known.

    tokens: of one micro-batch.
    """
    together = min(plan.micro_batches_per_pass, plan.accumulation)
    full = last = _pass(plan, shape, rates, together, tokens)
    if full is None or last is None:
        return None
    step_tokens = plan.sequences_per_device * tokens // plan.micro_batch_size
    left = step_tokens - (plan.passes - 1) * together * tokens
    if left < together * tokens:  # the last pass has fewer micro-batches, or a smaller one
        count = plan.accumulation - (plan.passes - 1) * together
        last = _pass(plan, shape, rates, count, left // count)
        assert last is not None
    seconds = (plan.passes - 1) * full.seconds + last.seconds
    optimizer = _optimizer_seconds(plan, shape, rates, full.phases[0])
    bound = "host" if optimizer > seconds else full.bound
    each = full.seconds / together
    measured = shape.way == "hand"
    return Forecast(step_tokens, each, optimizer, seconds + optimizer, bound, measured)


@dataclass(frozen=True)
class _Pass:
    """phases: seconds of forward, backward and loss. bound: what they waited for the longest."""

    phases: list[float]
    bound: str

    @property
    def seconds(self) -> float:
        return sum(self.phases)


def _pass(plan: Plan, shape: Shape, rates: Rates, count: int, tokens: int) -> _Pass | None:
    """Of so many micro-batches of `tokens` that share it; None where a rate is not known."""
    dtype = plan.activation_dtype
    product = rates.product_flops_per_second.get(dtype)
    copy, disk = rates.device_copy_bytes_per_second, rates.disk_read_bytes_per_second
    up, down = rates.host_to_device_bytes_per_second, rates.device_to_host_bytes_per_second
    if product is None or copy is None or (plan.disk_layers and disk is None):
        return None
    if (plan.uses_host or plan.optimizer_device == "host") and (up is None or down is None):
        return None
    clock = _clock(
        shape=shape,
        tokens=tokens,
        sequence=plan.sequence_length,
        product_rate=product,
        copy_rate=copy,
        element_bytes=4 if dtype == "float32" else 2,
        float8=plan.float8_products,
        flash=dtype in plan.flash_types,
    )
    layers, end, recomputed = shape.layers, plan.lowest_learning, _recomputed(plan)
    slower = 1 + STREAMING_LOSS * len(plan.streamed_layers) / layers
    again = recomputed * clock.again(plan.recompute_keeps)
    missing = [part for part in KEPT if part not in plan.recompute_keeps]
    launches = [
        layers * shape.launches(PARTS),
        (layers - end) * shape.backward_launches + recomputed * shape.launches(missing),
    ]
    # of forward, backward and loss
    compute = [
        slower * layers * clock.forward,
        slower
        * (
            (layers - end) * clock.backward
            + _learning_layers(plan, shape) * clock.gradients
            + again
        ),
        clock.head(sliced=plan.head == "host"),
    ]
    waits = {
        "compute": [count * seconds for seconds in compute],
        "launches": [*(count * shape.launch_seconds * launched for launched in launches), 0.0],
    }
    if plan.uses_host and up is not None and down is not None:
        waits["link"] = _link_seconds(plan, shape, count * tokens, up, down)
    if plan.disk_layers and disk is not None:
        read = plan.disk_layers * shape.layer_bytes / disk
        waits["disk"] = [read, read, 0.0]
    names = [max(waits, key=lambda name: waits[name][i]) for i in range(3)]
    phases = [waits[name][i] for i, name in enumerate(names)]
    total = {
        name: sum(p for p, n in zip(phases, names, strict=True) if n == name) for name in names
    }
    if plan.embedding == "host" and up is not None:  # before anything else can begin
        phases[0] += 2 * count * tokens * shape.hidden / up
    return _Pass(phases, max(total, key=lambda name: total[name]))


def _link_seconds(plan: Plan, shape: Shape, tokens: int, up: int, down: int) -> list[float]:
    """Of what travels beside forward, backward and loss. tokens: of all that share the pass."""
    end = plan.lowest_learning
    counts = len(plan.streamed_layers), _above(end, plan.streamed_layers)
    # at the turns of a pass, as many as there are slots are there already
    first, again = (max(0, n - plan.streaming_slots) * shape.layer_bytes for n in counts)
    inputs = 2 * tokens * shape.hidden
    waiting = _recomputed(plan) * inputs if plan.checkpoints == "host" else 0
    table = shape.table_bytes if plan.head == "host" else 0
    return [max(first / up, waiting / down), (again + waiting) / up, table / up]


def _optimizer_seconds(plan: Plan, shape: Shape, rates: Rates, forward: float) -> float:
    """What a step waits for its update.

    On the host it runs beside the next step's `forward` seconds, but for the lowest layer's.
    """
    learning = _learning(plan, shape)
    if plan.optimizer_device == "device":
        assert rates.device_copy_bytes_per_second is not None
        return learning * OPTIMIZER_BYTES / rates.device_copy_bytes_per_second
    assert rates.host_to_device_bytes_per_second is not None
    each = OPTIMIZER_BYTES / HOST_BYTES_PER_SECOND + 2 / rates.host_to_device_bytes_per_second
    update = learning * each
    return max(update / shape.layers, update - forward)


def _recomputed(plan: Plan) -> int:
    """Layers that recompute and have a backward."""
    return _above(plan.lowest_learning, plan.recompute_layers)


def _above(end: int, layers: Sequence[int]) -> int:
    """How many of `layers` are not below `end`."""
    return sum(layer >= end for layer in layers) if end else len(layers)


def _learning(plan: Plan, shape: Shape) -> int:
    """Parameters of adapters that are trained."""
    return shape.adapters * _learning_layers(plan, shape) // shape.layers


def _learning_layers(plan: Plan, shape: Shape) -> int:
    return shape.layers - len(plan.frozen_layers)


def guess_bytes(plan: Plan, shape: Shape, tokens: int) -> int:
    """About what of the device's memory the plan takes, to tell which of many to trace.

    Left out: contexts, workspaces, logits, slots' rounding. A difference of two plans is closer than
    either. tokens: of one micro-batch.
    """
    recomputed, streamed = _recomputed(plan), len(plan.streamed_layers)
    slots = min(streamed, plan.streaming_slots)
    waiting = 0 if plan.checkpoints == "host" else 2 * shape.hidden
    kept = (shape.layers - plan.lowest_learning - recomputed) * (
        2 * shape.hidden + shape.kept_bytes(KEPT)
    )
    kept += recomputed * (waiting + shape.kept_bytes(plan.recompute_keeps))
    together = min(plan.micro_batches_per_pass, plan.accumulation)
    between = (together - 1) * 2 * shape.hidden  # what the others have between two layers
    tables = (plan.embedding == "device") + (plan.head == "device")
    stored, states = (2, 0) if plan.optimizer_device == "host" else (4, 12)
    return (
        (shape.layers - streamed + slots) * shape.layer_bytes
        + tables * shape.table_bytes
        + tokens * (together * kept + between)
        + shape.working_bytes(tokens, min(tokens, plan.mlp_chunk_tokens or tokens))
        + stored * shape.adapters
        + states * _learning(plan, shape)
    )


def guess_host_bytes(plan: Plan, shape: Shape, tokens: int) -> int:
    """About what of the host's memory the plan takes; layers on disk come through three buffers."""
    waiting = _recomputed(plan) if plan.checkpoints == "host" else 0
    together = min(plan.micro_batches_per_pass, plan.accumulation)
    tables = (plan.embedding == "host") + (plan.head == "host")
    return (
        (len(plan.streamed_layers) - max(0, plan.disk_layers - 3)) * shape.layer_bytes
        + 2 * shape.hidden * together * tokens * waiting
        + tables * shape.table_bytes
        + (20 * shape.adapters if plan.optimizer_device == "host" else 0)
    )
