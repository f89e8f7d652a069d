"""Peak memory of a Plan before anything runs: the real step, traced on fake tensors.

The step is built as it would be to train, its tensors have shapes and no content, and a trace counts
what lives when. Two optimizer steps are run (the second has optimizer states from its start), the
second with two passes over the layers where the Plan has several (its second finds gradients there),
and an evaluation. A pass has one micro-batch, or as many as the Plan has share one.

What the trace cannot see is added by name: library workspaces inside the allocator and the CUDA
context beside it, both measured by the hardware profile. Paged optimizer states are beside the
allocator as well, and are counted apart.

What fails is what the allocator reserves, and that depends on the order of sizes: 1 to 10% beyond what
is allocated. So every estimate runs the whole step through a model of the allocator, and `REPLAY_MARGIN`
beyond what that reserves is the safe peak, by which a plan fits.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fitlora.artifacts import Components, Dataset, Estimate, Hardware, SequenceSize
from fitlora.memory.allocator import Overflow, replay
from fitlora.memory.timeline import (
    Irregular,
    Level,
    Segment,
    Timeline,
    deepened,
    levels,
    representatives,
)
from fitlora.memory.trace import MemoryTrace
from fitlora.model import decoder_layers, empty_model
from fitlora.offload.disk import BUFFERS as DISK_BUFFERS
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import Transport, make_transport
from fitlora.plan import PAGED_OPTIMIZERS, Plan
from fitlora.step.batch import PackedSequence, TokenSequence
from fitlora.step.build import step_skeleton
from fitlora.step.devices import Devices
from fitlora.step.network import HandNetwork
from fitlora.step.placement import on_disk
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import EmptyWeights, Weights

# Share of the peak that is kept free on the CPU, whose allocator is not modelled.
CPU_MARGIN = 0.05
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
    timeline: Timeline
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
            self.divide()
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
        self.timeline.layer = layer
        self.trace.enter(part=part)

    def divide(self) -> None:
        """Says which layers blocks are for that were not made while one was at work."""
        blocks = self.timeline.blocks
        for tensor, sizes in self.step.network.shared_by_layers():
            for number in self.trace.numbers_of([tensor]):
                blocks[number] = replace(blocks[number], parts=sizes)
        for layer, parameters in enumerate(self.step.by_layer):
            for number in self.trace.numbers_of(self.step.states_of(parameters)):
                if blocks[number].segment.phase == "optimizer":
                    blocks[number] = replace(blocks[number], layer=layer)

    def purposes(self) -> dict[str, set[int]]:
        """Numbers of the timeline's blocks by what they are for, the more particular first."""
        found = {name: self.trace.numbers_of(held) for name, held in self.step.parts().items()}
        return {**found, "gradients": self.gradients, "activations": self.saved}


class _ByLayer:
    """A source of weights that tells the timeline which decoder layer each is for.

    layers: the decoder layers' names.
    """

    def __init__(self, source: Weights, timeline: Timeline, layers: Sequence[str]) -> None:
        self.source, self.timeline, self.layers = source, timeline, layers
        self.device, self.fresh = source.device, source.fresh

    def on(self, device: torch.device) -> "_ByLayer":
        return _ByLayer(self.source.on(device), self.timeline, self.layers)

    def _tell(self, name: str) -> None:
        of = (i for i, layer in enumerate(self.layers) if name.startswith(f"{layer}."))
        self.timeline.layer = next(of, None)

    def frozen(self, name: str, like: torch.Tensor) -> torch.Tensor:
        self._tell(name)
        return self.source.frozen(name, like)

    def adapter(self, name: str, like: torch.Tensor) -> torch.Tensor:
        self._tell(name)
        return self.source.adapter(name, like)

    def constant(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self._tell(name)
        return self.source.constant(name, value)


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
class Pinned:
    """What a process pins on the host, in bytes.

    shared: of all, what processes of a host have one copy of. masters: of all, by layer, the
    optimizer's. weights: bytes of each layer where it is streamed, pinned but for those on disk.
    checkpoints: of all, the buffers for layers' inputs.
    """

    all: int
    shared: int
    masters: Sequence[int]
    weights: Sequence[int]
    checkpoints: Sequence[int]

    @classmethod
    def of(cls, step: TrainingStep, transport: Transport) -> "Pinned":
        placement, optimizer, stack = step.network.placement, step.optimizer, step.by_layer
        masters, weights = [0] * len(stack), [0] * len(stack)
        if isinstance(optimizer, CPUOffloadOptimizer):
            masters = [sum(map(optimizer.pinned_bytes, parameters)) for parameters in stack]
        if placement.residency is not None:
            weights = [placement.residency.layer_bytes(index) for index in range(len(stack))]
        buffers = [] if placement.checkpoints is None else placement.checkpoints.buffer_bytes
        return cls(transport.pinned_bytes, transport.shared_bytes, masters, weights, buffers)

    def deepened(self, plan: Plan, shallow: Plan, places: Sequence[int]) -> "Pinned":
        """Of a model with a layer for each of `places`, which is its representative's place.

        plan, shallow: of that model, and of the one that this was found with. Raises Irregular where
        this does not tell it.
        """

        def streamed(plan: Plan, places: Sequence[int]) -> int:
            read = on_disk(plan)
            if read and len(read) < min(DISK_BUFFERS, plan.disk_layers):
                raise Irregular("fewer layers are read from disk than have buffers")
            return sum(self.weights[places[i]] for i in plan.streamed_layers if i not in read)

        def waiting(plan: Plan) -> int:
            return sum(i >= plan.lowest_learning for i in plan.recompute_layers)

        more = streamed(plan, places) - streamed(shallow, range(len(self.weights)))
        own = sum(self.masters[place] for place in places) - sum(self.masters)
        if (
            self.checkpoints
        ):  # of each micro-batch in a pass every layer has one, and the newest none
            layers = waiting(shallow)
            sizes = {size: -(-count // layers) for size, count in Counter(self.checkpoints).items()}
            if len(self.checkpoints) != layers * sum(sizes.values()) - 1:
                raise Irregular("layers that wait on the host have other buffers than one each")
            each = sum(size * count for size, count in sizes.items())
            own += (waiting(plan) - layers) * each
        return replace(self, all=self.all + more + own, shared=self.shared + more)


@dataclass(frozen=True)
class Traced:
    """What a trace has found: what lived when, and what there is beside the allocator.

    devices: how many the step is on. purposes: the timeline's blocks by what they are for. paged: those
    that are beside the allocator, and their bytes.
    """

    timeline: Timeline
    devices: int
    purposes: Mapping[str, Collection[int]]
    paged: Mapping[int, int]
    pinned: Pinned
    by_hand: bool  # whether one thread does it all, or autograd's has the backward

    @cached_property
    def by_device(self) -> list[Timeline]:
        """What happened on each device."""
        if self.devices == 1:
            return [self.timeline]
        return [self.timeline.on(number) for number in range(self.devices)]

    @cached_property
    def levels(self) -> list[dict[Segment, Level]]:
        """The highest level of each segment by purpose, on each device."""
        return [levels(part, self.purposes, rest="temporary_buffers") for part in self.by_device]

    @property
    def paged_bytes(self) -> int:
        origin = self.timeline.origin or range(len(self.timeline.blocks))
        return sum(self.paged.get(number, 0) for number in origin) if self.paged else 0


def trace_run(
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
    stack = decoder_layers(skeleton.model)
    names = {id(module): name for name, module in skeleton.model.named_modules()}
    with trace:
        transport = make_transport(source.device)
        with trace.during("load"):
            told = _ByLayer(source, timeline, [names[id(layer)] for layer in stack])
            step = skeleton.fill(told, transport, devices)
        timeline.layer = None
        if weights is not None:  # buffers that were on the CPU before
            trace.watch([*step.model.parameters(), *step.model.buffers()])
        booking = _Booking(trace, timeline, step)
        booking.divide()
        step.phase = booking.phase
        step.network.watch = booking.watch
        rehearse(step, load)
        booking.divide()
        paged = {}
        for number in trace.numbers_of(_paged(step)):
            paged[number] = timeline.blocks[number].size
            timeline.blocks[number] = replace(timeline.blocks[number], size=0)
        purposes = booking.purposes()
    by_hand = isinstance(step.network, HandNetwork)
    pinned = Pinned.of(step, transport)
    return Traced(timeline, len(devices.all), purposes, paged, pinned, by_hand)


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
    """What `trace_run` finds at the highest level, on the device with the highest."""
    traced = trace_run(config, plan, settings, load, weights)
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


def shallow(config: Any, layers: Sequence[int]) -> Any:
    """The config of the same model with these of its layers; of lists with an entry for each, theirs."""
    content = config.to_dict()
    count = config.num_hidden_layers
    cut = {
        key: [value[layer] for layer in layers]
        for key, value in content.items()
        if isinstance(value, list) and len(value) == count
    }
    return type(config).from_dict({**content, **cut, "num_hidden_layers": len(layers)})


class Estimator:
    """Estimates of many plans for one model, load and machine; shallow traces are made once.

    A few layers are traced, one of each kind between each kinds of neighbours, and the timeline of all
    is written out of theirs (`fitlora.memory.timeline`). Where few do not tell of many, and in models of
    several parts, all are traced.
    """

    FARTHEST = 3  # neighbours on each side that may matter before all layers are traced

    def __init__(self, config: Any, settings: StepSettings, load: Load, hardware: Hardware) -> None:
        self.config, self.settings, self.load, self.hardware = config, settings, load, hardware
        self._kinds = layer_kinds(config)
        self._traces: dict[tuple[Plan, tuple[Any, ...]], Traced] = {}
        self._nearest = 1  # neighbours that are known to matter

    def __call__(self, plan: Plan) -> Estimate:
        """The predicted memory of `plan`, in bytes, on the heaviest device, and whether it fits."""
        traced = self.trace(plan)
        each = [self._on_device(plan, traced, number) for number in range(traced.devices)]
        heaviest = max(each, key=lambda estimate: estimate.process_bytes)
        if len(each) == 1:
            return heaviest
        peaks = tuple(estimate.peak_allocated_bytes for estimate in each)
        return heaviest.model_copy(update={"device_peak_bytes": peaks})

    def _on_device(self, plan: Plan, traced: Traced, number: int) -> Estimate:
        workspace = self.workspace_bytes(traced)
        found = _result(traced.levels[number], workspace)
        reserved = None
        safe = int(found.peak_bytes * (1 + CPU_MARGIN))
        if self.hardware.device != "cpu":
            reserved = self._reserved(traced.by_device[number], workspace)
            safe = int(reserved * (1 + REPLAY_MARGIN))
        process = safe + traced.paged_bytes + self.hardware.context_bytes
        here = self.hardware.processes_here(plan.devices)
        pinned = traced.pinned.shared + here * (traced.pinned.all - traced.pinned.shared)
        fits = process <= self.hardware.budget_bytes and pinned <= self.hardware.host_budget_bytes
        return Estimate(
            plan=plan,
            peak_allocated_bytes=found.peak_bytes,
            safe_peak_bytes=safe,
            peak_reserved_bytes=reserved,
            paged_bytes=traced.paged_bytes,
            process_bytes=process,
            host_pinned_bytes=pinned,
            fits=fits,
            instant=found.instant,
            phase_peak_bytes=found.phase_peak_bytes,
            components=Components(**{"library_workspaces": 0, **found.components}),
        )

    def _reserved(self, timeline: Timeline, workspace_bytes: int) -> int:
        """The most that the allocator will have reserved, in a replay of all events.

        Libraries take their workspaces at the first product. Where the budget is too small it is what
        would be reserved without one.
        """
        blocks, events = timeline.blocks, timeline.events
        first = next(
            at for at, event in enumerate(events)
            if event >= 0 and blocks[event].segment.phase == "forward"
        )  # fmt: skip
        sizes = [*(block.size for block in blocks), workspace_bytes]
        events = [*events[:first], len(blocks), *events[first:]]
        limit = int(self.hardware.allocator_bytes / (1 + REPLAY_MARGIN))
        try:
            return replay(sizes, events, limit_bytes=limit).peak_reserved_bytes
        except Overflow:
            return replay(sizes, events).peak_reserved_bytes

    def workspace_bytes(self, traced: Traced) -> int:
        """What cuBLAS keeps: a workspace for each thread that computes.

        The profile's is that of a forward and of autograd's backward, which has a thread of its own.
        Where layers are done by hand one thread does both.
        """
        whole = self.hardware.workspace_bytes
        return -(-whole // 2) if traced.by_hand else whole

    def trace(self, plan: Plan) -> Traced:
        """What is found at the model's full depth."""
        kinds = [(kind, *_kind(plan, layer)) for layer, kind in enumerate(self._kinds)]
        # what a layer leaves to the host's copies is freed two layers on
        nearest = 2 if "host" in (plan.checkpoints, plan.optimizer_device) else self._nearest
        for reach in range(nearest, self.FARTHEST + 1):
            layers, places = representatives(kinds, reach)
            if len(layers) == len(kinds) or self.config.get_text_config() is not self.config:
                break
            try:
                return self._deepened(plan, layers, places, reach)
            except Irregular:
                self._nearest = reach + 1
        return self._trace(plan, range(len(kinds)))

    def _deepened(
        self, plan: Plan, layers: Sequence[int], places: Sequence[int], reach: int
    ) -> Traced:
        def among(chosen: Collection[int]) -> list[int]:
            return [place for place, layer in enumerate(layers) if layer in chosen]

        streamed = among(plan.streamed_layers)
        few = plan.replace(
            frozen_layers=among(plan.frozen_layers),
            recompute_layers=among(plan.recompute_layers),
            streamed_layers=streamed,
            disk_layers=min(plan.disk_layers, DISK_BUFFERS, len(streamed)),
            layers_per_device=[
                sum(layer in part for layer in layers) for part in _ranges(plan.layers_per_device)
            ],
        )
        traced = self._trace(few, layers)
        pinned = traced.pinned.deepened(plan, few, places)
        return replace(traced, timeline=deepened(traced.timeline, places, reach), pinned=pinned)

    def _trace(self, plan: Plan, layers: Sequence[int]) -> Traced:
        """The plan on a model with these layers alone. Raises Irregular where there is none."""
        kinds = [self._kinds[layer] for layer in layers]
        key = (plan, tuple(kinds))
        if key not in self._traces:
            config = self.config
            if len(layers) < len(self._kinds):
                config = shallow(self.config, layers)
                if layer_kinds(config) != kinds:
                    raise Irregular("the config does not say what its layers are one by one")
            self._traces[key] = trace_run(config, plan, self.settings, self.load)
        return self._traces[key]


def _ranges(counts: Sequence[int]) -> list[range]:
    """The layers of each device that layers are spread over."""
    ends = itertools.accumulate(counts)
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _kind(plan: Plan, layer: int) -> tuple[bool, ...]:
    """What the plan makes of a layer."""
    return (
        *(layer in part for part in _ranges(plan.layers_per_device)),
        layer >= plan.lowest_learning,
        layer in plan.recompute_layers,
        layer in plan.frozen_layers,
        layer in plan.streamed_layers,
    )


def estimate(
    config: Any, plan: Plan, settings: StepSettings, load: Load, hardware: Hardware
) -> Estimate:
    """The predicted memory of `plan` on `hardware`, in bytes."""
    return Estimator(config, settings, load, hardware)(plan)


def count_parameters(config: Any, plan: Plan, settings: StepSettings) -> tuple[int, int]:
    """The model's parameters, adapters aside, and those of the adapters."""
    whole = sum(p.numel() for p in empty_model(config, dtype=torch.bfloat16).parameters())
    model = step_skeleton(config, plan, settings).model
    return whole, sum(p.numel() for p in model.parameters() if p.requires_grad)
