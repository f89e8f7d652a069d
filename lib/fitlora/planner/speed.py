"""How fast a Plan will be: a roofline over what its step does, by the rates that were measured.

Work is counted from the model's shape: floating-point operations of the frozen products and of
attention, bytes that pointwise kernels and dequantization move, bytes that travel between host and
device. What computes is added up; what travels runs beside it, so a pass over the layers takes the
longer of the two. The trade-off is exactness against having no table of kernels: a few constants say
what share of a rate a kind of work reaches. They were fitted once, to one measurement, and a ratio of
two plans is better than either's seconds.

The measurement: one H200, the Llama-3-8B shape, NF4 with double quantization, rank 16 on all linear
layers, 4 x 2,048 tokens in bf16: 463 ms a step with nothing recomputed, of which frozen products took
286, attention 62 and dequantization 9.5; 608 ms with every layer recomputed.

Left out: launching kernels, which a GPU waits for below about a thousand tokens; the first fetch of a
pass; what is read from disk. This module imports no torch.
"""

from dataclasses import dataclass
from typing import Any

from fitlora.artifacts import Rates
from fitlora.plan import KEPT, Kept, Plan

# Shares of the product rate: frozen products ran at 770 of 768 TFLOP/s, attention's 15.4 TFLOP in 62 ms.
PRODUCT_SHARE = 1.0
ATTENTION_SHARE = 0.32
# Tokens at which a product reaches half of its rate: what others' steps lose from 4 to 1 sequences of
# 2,048 tokens beyond what dequantization explains.
HALF_RATE_TOKENS = 150
# Attention's backward does five products where its forward does two.
ATTENTION_BACKWARD = 2.5
# How often pointwise kernels and skinny adapter products pass over a layer's activations: what is left
# of the measured steps at the rate of a copy (3,700 GB/s).
FORWARD_PASSES, BACKWARD_PASSES, AGAIN_PASSES = 1.7, 5.5, 1.5
# What computing loses beside the copies where every layer is streamed and the link keeps up: 8B and 70B
# reach 97.4% and 97.5% of the floor (benchmarks/results/offload.h200.json).
STREAMING_LOSS = 0.025
# Bytes of an adapter's weight that AdamW reads and writes, and a host's rate for them: a desktop's
# memory with two channels; not measured here.
OPTIMIZER_BYTES = 28
HOST_BYTES_PER_SECOND = 20e9


@dataclass(frozen=True)
class Shape:
    """What of a model its speed depends on. Widths are features of one token."""

    layers: int
    hidden: int
    qkv: int
    attended: int
    intermediate: int
    vocabulary: int
    weight_bytes: float  # of a frozen weight of a layer, as it is stored
    dequantized: bool
    adapters: int  # parameters, with those that are trained beside them

    @classmethod
    def of(cls, config: Any, *, bits: int, rank: int, whole: int = 0) -> "Shape | None":
        """Of a transformers config; None for what is no dense decoder with a gated MLP.

        whole: parameters that are trained beside the adapters.
        """
        text = config.get_text_config()
        hidden, inner = (getattr(text, n, None) for n in ("hidden_size", "intermediate_size"))
        heads = getattr(text, "num_attention_heads", None)
        sparse = any(getattr(text, n, None) for n in ("num_local_experts", "num_experts"))
        if not (hidden and inner and heads) or sparse:
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
            # 4 bits, a scale of 8 bits for 64 weights, and the scales' own: 4.13 bits
            weight_bytes=4.13 / 8 if bits == 4 else 2.0,
            dequantized=bits == 4,
            adapters=text.num_hidden_layers * rank * (ends + 3 * (hidden + inner)) + whole,
        )

    def weights(self, *parts: str) -> int:
        """Frozen weights of one layer's products: by what they make, or "down"; all by default."""
        sizes = {
            "qkv": self.hidden * self.qkv,
            "middle": self.attended * self.hidden,
            "mlp": self.hidden * 2 * self.intermediate,
            "down": self.intermediate * self.hidden,
        }
        return sum(sizes.get(part, 0) for part in (parts or sizes))

    @property
    def layer_bytes(self) -> int:
        """Of one layer's frozen weights, as they are stored and travel."""
        return int(self.weights() * self.weight_bytes)

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
    """Seconds of one optimizer step of full micro-batches, and what holds it up."""

    tokens: int
    micro_batch_seconds: float
    optimizer_seconds: float
    accumulation: int
    bound: str  # compute, link or host

    @property
    def step_seconds(self) -> float:
        return self.accumulation * self.micro_batch_seconds + self.optimizer_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.accumulation * self.tokens / self.step_seconds


@dataclass(frozen=True)
class _Clock:
    """Seconds of pieces of work for one micro-batch of `tokens`."""

    shape: Shape
    tokens: int
    sequence: int
    product_rate: float
    copy_rate: float

    def products(self, weights: int) -> float:
        """One pass over frozen weights, which are dequantized for it."""
        full = self.tokens + HALF_RATE_TOKENS
        seconds = 2 * weights * full / (PRODUCT_SHARE * self.product_rate)
        if self.shape.dequantized:
            seconds += weights * (self.shape.weight_bytes + 2) / self.copy_rate
        return seconds

    def attention(self) -> float:
        """Causal attention's forward in one layer."""
        operations = 2 * self.tokens * self.sequence * self.shape.attended
        return operations / (ATTENTION_SHARE * self.product_rate)

    def pointwise(self, passes: float) -> float:
        shape = self.shape
        width = 4 * shape.hidden + shape.qkv + shape.attended + 3 * shape.intermediate
        return passes * 2 * self.tokens * width / self.copy_rate

    def again(self, kept: tuple[Kept, ...]) -> float:
        """What a layer makes again that has kept this: all but the last product."""
        missing = [kind for kind in KEPT if kind not in kept]
        if not missing:
            return 0.0
        seconds = self.products(self.shape.weights(*missing)) + self.pointwise(AGAIN_PASSES)
        return seconds + (self.attention() if "attention" in missing else 0.0)


def forecast(plan: Plan, shape: Shape, rates: Rates, tokens: int) -> Forecast | None:
    """How long a step of the plan takes; None where a rate that it depends on is not known.

    tokens: of one micro-batch.
    """
    product = rates.product_flops_per_second.get(plan.activation_dtype)
    copy = rates.device_copy_bytes_per_second
    up, down = rates.host_to_device_bytes_per_second, rates.device_to_host_bytes_per_second
    offloads = plan.uses_host or plan.optimizer_device == "host"
    if product is None or copy is None or (offloads and (up is None or down is None)):
        return None
    clock = _Clock(shape, tokens, plan.sequence_length, product, copy)
    layers, end = shape.layers, plan.lowest_learning
    recomputed = _recomputed(plan)
    attention = clock.attention()
    forward = layers * (
        clock.products(shape.weights()) + attention + clock.pointwise(FORWARD_PASSES)
    )
    backward = (layers - end) * (
        clock.products(shape.weights())
        + ATTENTION_BACKWARD * attention
        + clock.pointwise(BACKWARD_PASSES)
    )
    backward += recomputed * clock.again(plan.recompute_keeps)
    # the head's product and its gradient's
    head = 4 * shape.vocabulary * shape.hidden * tokens / (PRODUCT_SHARE * product)
    optimizer = _learning(plan, shape) * OPTIMIZER_BYTES / copy
    bound = "compute"
    if up is not None and down is not None and offloads:
        streamed = [len(plan.streamed_layers), sum(i >= end for i in plan.streamed_layers)]
        upwards, again = (
            max(0, count - plan.streaming_slots) * shape.layer_bytes for count in streamed
        )
        inputs = 2 * tokens * shape.hidden
        waiting = recomputed * inputs if plan.checkpoints == "host" else 0
        links = [max(upwards / up, waiting / down), (again + waiting) / up]
        if plan.head == "host":
            links.append(shape.table_bytes / up)
        if any(link > work for link, work in zip(links, (forward, backward, head), strict=False)):
            bound = "link"
        slower = 1 + STREAMING_LOSS * len(plan.streamed_layers) / layers
        forward, backward = max(slower * forward, links[0]), max(slower * backward, links[1])
        if plan.head == "host":
            head = max(head, links[2])
        if plan.embedding == "host":
            forward += inputs / up
        if plan.optimizer_device == "host":
            each = OPTIMIZER_BYTES / HOST_BYTES_PER_SECOND + 2 / up
            optimizer = _learning(plan, shape) * each
    micro = forward + head + backward
    if optimizer > plan.accumulation * micro:
        bound = "host"
    return Forecast(tokens, micro, optimizer, plan.accumulation, bound)


def _recomputed(plan: Plan) -> int:
    """Layers that recompute and have a backward."""
    return sum(layer >= plan.lowest_learning for layer in plan.recompute_layers)


def _learning(plan: Plan, shape: Shape) -> int:
    """Parameters of adapters that are trained."""
    return shape.adapters * (shape.layers - len(plan.frozen_layers)) // shape.layers


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
    tables = (plan.embedding == "device") + (plan.head == "device")
    stored, states = (2, 0) if plan.optimizer_device == "host" else (4, 12)
    return (
        (shape.layers - streamed + slots) * shape.layer_bytes
        + tables * shape.table_bytes
        + tokens * kept
        + shape.working_bytes(tokens, min(tokens, plan.mlp_chunk_tokens or tokens))
        + stored * shape.adapters
        + states * _learning(plan, shape)
    )


def guess_host_bytes(plan: Plan, shape: Shape, tokens: int) -> int:
    """About what of the host's memory the plan pins; layers on disk come through three buffers."""
    waiting = _recomputed(plan) if plan.checkpoints == "host" else 0
    tables = (plan.embedding == "host") + (plan.head == "host")
    return (
        (len(plan.streamed_layers) - max(0, plan.disk_layers - 3)) * shape.layer_bytes
        + 2 * shape.hidden * tokens * waiting
        + tables * shape.table_bytes
        + (20 * shape.adapters if plan.optimizer_device == "host" else 0)
    )
