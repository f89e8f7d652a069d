"""Peak memory of a Plan before anything runs: the real step, traced on fake tensors.

The step is built as it would be to train, its tensors have shapes and no content, and a trace counts
what lives when. Two optimizer steps are run (the second has optimizer states from its start), the
second with two passes over the layers where the Plan has several (its second finds gradients there),
and an evaluation. A pass has one micro-batch, or as many as the Plan has share one.

What the trace cannot see is added by name: library workspaces inside the allocator and the CUDA
context beside it, both measured by the hardware profile. Paged optimizer states are beside the
allocator as well, and are counted apart.

What fails is what the allocator reserves, and that depends on the order of sizes: 1 to 10% beyond what
is allocated. So `Estimator.replayed` runs the whole step through a model of the allocator, at full
depth, and only such an estimate says for certain that a plan fits. An estimate without a replay, which
is quick, sets `FRAGMENTATION` of the peak aside instead: enough to rank plans by.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fitlora.artifacts import Components, Dataset, Estimate, Hardware, SequenceSize
from fitlora.memory.allocator import Overflow, replay
from fitlora.memory.timeline import Level, Segment, Timeline, deepen, levels
from fitlora.memory.trace import MemoryTrace
from fitlora.model import decoder_layers, empty_model
from fitlora.offload.disk import BUFFERS as DISK_BUFFERS
from fitlora.offload.transport import make_transport
from fitlora.plan import PAGED_OPTIMIZERS, Plan
from fitlora.step.batch import PackedSequence, TokenSequence
from fitlora.step.build import step_skeleton
from fitlora.step.devices import Devices
from fitlora.step.network import HandNetwork
from fitlora.step.placement import on_disk
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import EmptyWeights, Weights

# Share of the peak that cached blocks of the wrong size take beside it, where nothing was replayed:
# more than most plans lose, and less than some (benchmarks/results/estimate_accuracy.*.json).
FRAGMENTATION = 0.05
# What a replay may be short of what is reserved: kernels that a trace does not know, and blocks that
# libraries take at another time.
REPLAY_MARGIN = 0.015

# bitsandbytes pages states of parameters from this many elements on (`Optimizer8bit.get_state_buffer`).
PAGED_NUMEL = 100_000

# The stacks of layers that a Plan makes; of the latter two, frozen ones are stacks of their own.
BELOW, RECOMPUTED, KEPT = "layers without a backward", "recomputed layers", "kept layers"


@dataclass(frozen=True)
class Load:
    """The sequences that a plan has to carry: the longest that the data has.

    train, validation: longest first. A micro-batch of m sequences is never heavier than the first m,
    and the first step of a run is made of exactly these, so the bound is reached.
    """

    train: Sequence[SequenceSize]
    validation: Sequence[SequenceSize]

    @classmethod
    def of(cls, dataset: Dataset) -> "Load":
        return cls(dataset.longest_train, dataset.longest_validation)

    @classmethod
    def uniform(cls, sequences: int, tokens: int) -> "Load":
        """`sequences` sequences of `tokens` tokens that are all learned."""
        sizes = [SequenceSize(tokens=tokens, target_tokens=tokens - 1)] * sequences
        return cls(sizes, sizes)

    def cut_to(self, tokens: int) -> "Load":
        """The same rows with no more than `tokens` tokens each."""
        train, validation = (
            [_cut(size, tokens) for size in sizes] for sizes in (self.train, self.validation)
        )
        return Load(train, validation)

    def tokens(self, micro_batch_size: int) -> int:
        """Tokens of the heaviest micro-batch."""
        return sum(size.tokens for size in self.train[:micro_batch_size])


def _cut(size: SequenceSize, tokens: int) -> SequenceSize:
    parts: list[int] = []
    for part in size.parts:
        parts.append(min(part, tokens - sum(parts)))
        if sum(parts) == tokens:
            break
    total = min(size.tokens, tokens)
    return SequenceSize(
        tokens=total,
        target_tokens=min(size.target_tokens, total - max(1, len(parts))),
        parts=tuple(parts) if len(parts) > 1 else (),
    )


def sequences_of(sizes: Sequence[SequenceSize]) -> list[TokenSequence]:
    """Sequences of these sizes with no meaning; the learned tokens are the last that can be."""
    return [_sequence_of(index, size) for index, size in enumerate(sizes)]


def _sequence_of(sample: int, size: SequenceSize) -> TokenSequence:
    left, parts = size.target_tokens, []
    for length in reversed(size.parts or (size.tokens,)):
        count = min(left, length - 1)  # the first token of a part is never predicted
        left -= count
        learned = tuple(i >= length - count for i in range(length))
        parts.append(TokenSequence(sample, (0,) * length, learned))
    return parts[0] if not size.parts else PackedSequence.of(parts[::-1])


@dataclass
class _Booking:
    """Books a rehearsal's trace by step, micro-batch, phase and stack of layers, and by purpose."""

    trace: MemoryTrace
    step: TrainingStep
    gradients: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    steps: int = 0
    micro_batches: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "forward":
            self.micro_batches += 1
            self.trace.enter(step=self.steps, micro_batch=self.micro_batches)
        if name == "optimizer":
            self.gradients |= self.trace.numbers_of(self.step.parts()["gradients"])
        with self.trace.during(name):
            yield
            if name == "forward":
                self.saved |= self.trace.alive()
        if name == "optimizer":
            self.steps, self.micro_batches = self.steps + 1, 0
            self.trace.enter(step=self.steps, micro_batch=0)

    def watch(self, layer: int | None) -> None:
        """Told by the step which decoder layer is at work: the trace learns which stack it is of."""
        part = ""
        if layer is not None:
            plan = self.step.plan
            part = RECOMPUTED if layer in plan.recompute_layers else KEPT
            if layer < plan.lowest_learning:
                part = BELOW
            elif layer in plan.frozen_layers:
                part = f"frozen {part}"
        self.trace.enter(part=part)

    def purposes(self) -> dict[str, set[int]]:
        """Numbers of the timeline's blocks by what they are for, the more particular first."""
        found = {name: self.trace.numbers_of(held) for name, held in self.step.parts().items()}
        return {**found, "gradients": self.gradients, "activations": self.saved}


def _paged(step: TrainingStep) -> list[torch.Tensor]:
    """States that are in managed memory on a GPU, where the caching allocator does not know them."""
    if step.optimizer is None or step.plan.optimizer not in PAGED_OPTIMIZERS:
        return []
    states = step.optimizer.state.values()
    found = [state[name] for state in states for name in ("state1", "state2") if name in state]
    return [state for state in found if state.numel() >= PAGED_NUMEL]


@dataclass(frozen=True)
class TraceResult:
    """What a trace of the step found."""

    peak_bytes: int
    components: dict[str, int]
    phase_peak_bytes: dict[str, int]
    instant: str


def rehearse(step: TrainingStep, load: Load) -> None:
    """The work whose memory is asked for: two optimizer steps and an evaluation, at their heaviest.

    It is what an estimate traces and what a probe runs.
    """
    plan = step.plan
    heavy = sequences_of(load.train[: plan.sequences_per_pass])
    passes = min(2, plan.passes)
    if step.settings.train.freeze == "memory" and plan.frozen_layers and plan.lowest_learning == 0:
        # which layers to freeze is found by the gradients of all (`fitlora.planner.freezing`)
        step.adopt(plan.replace(frozen_layers=()))
        step.survey(heavy * passes, step=0)
        step.adopt(plan)
    for index, batch in enumerate((heavy, heavy * passes)):
        step.run(batch, step=index, learning_rate=step.settings.train.learning_rate)
    held_out = sequences_of(load.validation[: plan.evaluation_batch_size])
    if held_out:
        step.evaluate(held_out)


@dataclass(frozen=True)
class Traced:
    """The highest level of each segment by purpose, and what there is beside the allocator.

    levels: of each device that the step is on. timelines: every event on each, where the trace is at
    full depth.
    """

    levels: tuple[dict[Segment, Level], ...]
    host_pinned_bytes: int  # by one process
    host_shared_bytes: int  # of them, what processes of a host have one copy of
    paged_bytes: int
    by_hand: bool  # whether one thread does it all, or autograd's has the backward
    timelines: tuple[Timeline, ...] = field(default=(), repr=False, compare=False)


def trace_levels(
    config: Any, plan: Plan, settings: StepSettings, load: Load, weights: Weights | None = None
) -> Traced:
    """Builds the step and traces `rehearse`.

    weights: None for an estimate, on tensors without content; a source on the CPU to measure there
    what an estimate predicts.
    """
    skeleton = step_skeleton(config, plan, settings)
    source = weights or EmptyWeights(torch.device("meta"))
    devices = Devices.of(plan, len(decoder_layers(skeleton.model)), source.device)
    timeline = Timeline()
    trace = MemoryTrace(
        skeleton.model,
        timeline=timeline,
        at_work=lambda: devices.here,
        shapes=weights is None,
    )
    with trace:
        transport = make_transport(source.device)
        with trace.during("load"):
            step = skeleton.fill(source, transport, devices)
        if weights is not None:  # buffers that were on the CPU before
            trace.watch([*step.model.parameters(), *step.model.buffers()])
        booking = _Booking(trace, step)
        step.phase = booking.phase
        step.network.watch = booking.watch
        rehearse(step, load)
        paged = 0
        for number in trace.numbers_of(_paged(step)):
            block = timeline.blocks[number]
            paged += block.size
            timeline.blocks[number] = replace(block, size=0)
        purposes = booking.purposes()
        count = len(devices.all)
        by_device = (
            (timeline,) if count == 1 else tuple(timeline.on(number) for number in range(count))
        )
        found = tuple(levels(part, purposes, rest="temporary_buffers") for part in by_device)
    by_hand = isinstance(step.network, HandNetwork)
    pinned, shared = transport.pinned_bytes, transport.shared_bytes
    return Traced(found, pinned, shared, paged, by_hand, by_device)


def _result(found: Mapping[Segment, Level], workspace_bytes: int = 0) -> TraceResult:
    """workspace_bytes: what libraries take at their first product, which is after loading."""

    def workspace(segment: Segment) -> int:
        return 0 if segment.phase == "load" else workspace_bytes

    highest = max(found, key=lambda segment: found[segment].bytes + workspace(segment))
    phases: dict[str, int] = {}
    for segment, level in found.items():
        phases[segment.phase] = max(phases.get(segment.phase, 0), level.bytes)
    components = dict(found[highest].components)
    if workspace_bytes:
        components["library_workspaces"] = workspace(highest)
    return TraceResult(
        peak_bytes=found[highest].bytes + workspace(highest),
        components=components,
        phase_peak_bytes=phases,
        instant=found[highest].instant,
    )


def trace_step(
    config: Any, plan: Plan, settings: StepSettings, load: Load, weights: Weights | None = None
) -> TraceResult:
    """The same at full depth, and of it the highest segment, on the device with the highest."""
    traced = trace_levels(config, plan, settings, load, weights)
    return max(map(_result, traced.levels), key=lambda result: result.peak_bytes)


def layer_kinds(config: Any) -> list[tuple[Any, ...]]:
    """What tells one decoder layer from another, as far as memory is concerned, bottom up."""
    model = empty_model(config, dtype=torch.bfloat16)
    types = getattr(config, "layer_types", None)
    return [
        (
            type(layer).__name__,
            types[index] if types is not None else None,
            tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()),
        )
        for index, layer in enumerate(decoder_layers(model))
    ]


def shallow(config: Any, layers: int) -> Any:
    """The config of the same model with fewer layers; lists with an entry for each are cut as well."""
    content = config.to_dict()
    count = config.num_hidden_layers
    cut = {
        key: value[:layers]
        for key, value in content.items()
        if isinstance(value, list) and len(value) == count
    }
    return type(config).from_dict({**content, **cut, "num_hidden_layers": layers})


@dataclass(frozen=True, order=True)
class _Kind:
    """What tells one layer of a stack from another; those that sort first are traced further down."""

    device: int
    has_backward: bool
    kept: bool
    learns: bool
    resident: bool
    read: bool

    @classmethod
    def of(cls, plan: Plan, layer: int, read: Collection[int]) -> "_Kind":
        """read: the layers that come from disk."""
        has_backward = layer >= plan.lowest_learning
        ends = itertools.accumulate(plan.layers_per_device)
        return cls(
            sum(layer >= end for end in ends),
            has_backward,
            has_backward and layer not in plan.recompute_layers,
            layer not in plan.frozen_layers,
            layer not in plan.streamed_layers,
            layer in read,
        )


class Estimator:
    """Estimates of many plans for one model, load and machine; shallow traces are made once.

    A model whose layers are all alike is traced with few of them (`fitlora.memory.timeline` has the
    argument); another, or a plan that recomputes other layers than the lowest, at full depth.
    """

    DEPTH = 2  # layers of a stack from which on memory is linear in their number

    def __init__(self, config: Any, settings: StepSettings, load: Load, hardware: Hardware) -> None:
        self.config, self.settings, self.load, self.hardware = config, settings, load, hardware
        self._traces: dict[Plan, Traced] = {}
        kinds = layer_kinds(config)
        self._layers = len(kinds)
        self._by_hand = False
        self._alike = len(set(kinds)) == 1 and config.get_text_config() is config

    def __call__(self, plan: Plan) -> Estimate:
        """The predicted memory of `plan`, in bytes; what is reserved, by its usual share."""
        return self._estimate(plan, self.trace(plan), None)

    def replayed(self, plan: Plan) -> Estimate:
        """The same with what the allocator reserves: whether it fits is decided by that.

        It takes a trace at full depth. On the CPU, which has no such allocator, nothing is replayed.
        """
        if self.hardware.device == "cpu":
            return self(plan)
        traced = trace_levels(self.config, plan, self.settings, self.load)
        self._by_hand = traced.by_hand
        return self._estimate(plan, traced, self._reserved(traced))

    def _estimate(self, plan: Plan, traced: Traced, reserved: Sequence[int] | None) -> Estimate:
        """Of several devices the heaviest. reserved: by each, where it was replayed."""
        by_device = [
            self._on_device(plan, traced, number, None if reserved is None else reserved[number])
            for number in range(len(traced.levels))
        ]
        heaviest = max(by_device, key=lambda estimate: estimate.process_bytes)
        if len(by_device) == 1:
            return heaviest
        each = tuple(estimate.peak_allocated_bytes for estimate in by_device)
        return heaviest.model_copy(update={"device_peak_bytes": each})

    def _on_device(self, plan: Plan, traced: Traced, number: int, reserved: int | None) -> Estimate:
        found = _result(traced.levels[number], self.workspace_bytes)
        components = Components(**{"library_workspaces": 0, **found.components})
        peak = found.peak_bytes
        safe = peak * (1 + FRAGMENTATION) if reserved is None else reserved * (1 + REPLAY_MARGIN)
        process = int(safe) + traced.paged_bytes + self.hardware.context_bytes
        own = traced.host_pinned_bytes - traced.host_shared_bytes
        here = self.hardware.processes_here(plan.devices)
        pinned = traced.host_shared_bytes + here * own
        fits = process <= self.hardware.budget_bytes and pinned <= self.hardware.host_budget_bytes
        return Estimate(
            plan=plan,
            peak_allocated_bytes=peak,
            safe_peak_bytes=int(safe),
            peak_reserved_bytes=reserved,
            paged_bytes=traced.paged_bytes,
            process_bytes=process,
            host_pinned_bytes=pinned,
            fits=fits,
            instant=found.instant,
            phase_peak_bytes=found.phase_peak_bytes,
            components=components,
        )

    def _reserved(self, traced: Traced) -> list[int]:
        """The most that each device's allocator will have reserved, in a replay of all events."""
        return [self._reserved_on(timeline) for timeline in traced.timelines]

    def _reserved_on(self, timeline: Timeline) -> int:
        """The same of one device.

        Libraries take their workspaces at the first product. Where the budget is too small it is what
        would be reserved without one.
        """
        first = next(at for at, segment in timeline.entered if segment.phase == "forward")
        sizes = [block.size for block in timeline.blocks] + [self.workspace_bytes]
        events = [*timeline.events[:first], len(timeline.blocks), *timeline.events[first:]]
        limit = int(self.hardware.allocator_bytes / (1 + REPLAY_MARGIN))
        try:
            return replay(sizes, events, limit_bytes=limit).peak_reserved_bytes
        except Overflow:
            return replay(sizes, events).peak_reserved_bytes

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS keeps: a workspace for each thread that computes.

        The profile's is that of a forward and of autograd's backward, which has a thread of its own.
        Where layers are done by hand one thread does both.
        """
        whole = self.hardware.workspace_bytes
        return -(-whole // 2) if self._by_hand else whole

    def trace(self, plan: Plan) -> Traced:
        """What is found at the model's full depth.

        Layers differ by whether they have a backward, recompute, are frozen, streamed, and from disk.
        Where streamed layers lie makes no difference to the device, whose slots are there from the
        start; so of each kind a few are traced, the recomputed ones below the others as in the plan.
        Frozen ones are traced above the lowest that learns and below the others, where the peak is no
        lower.
        """
        recomputed, read = set(plan.recompute_layers), set(on_disk(plan))
        counts: dict[_Kind, int] = {}
        for layer in range(self._layers):
            kind = _Kind.of(plan, layer, read)
            counts[kind] = counts.get(kind, 0) + 1
        depth = max(self.DEPTH, plan.streaming_slots) + (plan.checkpoints == "host")
        depth += (
            plan.optimizer_device == "host"
        )  # the gradients of one layer leave beside the next's
        if read:
            depth = max(depth, DISK_BUFFERS)
        lowest = plan.recompute_layers == tuple(range(len(recomputed)))
        if not (self._alike and lowest) or max(counts.values()) <= depth:
            return self._trace(plan, self._layers)
        few = {kind: min(count, depth) for kind, count in counts.items()}
        base = self._shallow(plan, few)
        deeper = [
            (self._shallow(plan, {**few, kind: few[kind] + 1}), count - few[kind])
            for kind, count in counts.items()
            if count > few[kind]
        ]

        def grown(of: Callable[[Traced], int]) -> int:
            return of(base) + sum(times * (of(other) - of(base)) for other, times in deeper)

        return Traced(
            tuple(
                deepen(found, [(other.levels[number], times) for other, times in deeper])
                for number, found in enumerate(base.levels)
            ),
            grown(lambda traced: traced.host_pinned_bytes),
            grown(lambda traced: traced.host_shared_bytes),
            grown(lambda traced: traced.paged_bytes),
            base.by_hand,
        )

    def _shallow(self, plan: Plan, counts: Mapping["_Kind", int]) -> Traced:
        """The plan on a model with so many layers of each kind."""
        kinds = sorted(kind for kind, count in counts.items() for _ in range(count))
        below = sum(not kind.has_backward for kind in kinds)
        learns = next(i for i, kind in enumerate(kinds) if kind.learns)
        kinds.insert(below, kinds.pop(learns))
        small = plan.replace(
            frozen_layers=[i for i, kind in enumerate(kinds) if not kind.learns],
            recompute_layers=[i for i, kind in enumerate(kinds) if not kind.kept],
            streamed_layers=[i for i, kind in enumerate(kinds) if not kind.resident],
            disk_layers=sum(kind.read for kind in kinds),
            layers_per_device=[
                sum(kind.device == number for kind in kinds)
                for number in range(len(plan.layers_per_device))
            ],
        )
        return self._trace(small, len(kinds))

    def _trace(self, plan: Plan, layers: int) -> Traced:
        key = plan.replace(recompute_layers=(*plan.recompute_layers, layers))
        if key not in self._traces:
            config = self.config if layers == self._layers else shallow(self.config, layers)
            traced = trace_levels(config, plan, self.settings, self.load)
            self._by_hand = traced.by_hand
            self._traces[key] = replace(traced, timelines=())  # which are long
        return self._traces[key]


def estimate(
    config: Any, plan: Plan, settings: StepSettings, load: Load, hardware: Hardware
) -> Estimate:
    """The predicted memory of `plan` on `hardware`, in bytes, nothing replayed."""
    return Estimator(config, settings, load, hardware)(plan)


def count_parameters(config: Any, plan: Plan, settings: StepSettings) -> tuple[int, int]:
    """The model's parameters, adapters aside, and those of the adapters."""
    whole = sum(p.numel() for p in empty_model(config, dtype=torch.bfloat16).parameters())
    model = step_skeleton(config, plan, settings).model
    return whole, sum(p.numel() for p in model.parameters() if p.requires_grad)
