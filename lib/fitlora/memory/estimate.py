"""Peak memory of a Plan before anything runs: the real step, traced on fake tensors.

The step is built as it would be to train, its tensors have shapes and no content, and a trace counts
what lives when. Two optimizer steps are run (the second has optimizer states from its start), the
second with two micro-batches where the Plan accumulates (its second finds gradients there), and an
evaluation.

What the trace cannot see is added by name: library workspaces inside the allocator and the CUDA
context beside it, both measured by the hardware profile. What is left out: the allocator's
fragmentation, for which `FRAGMENTATION` of the peak is set aside when deciding whether a plan fits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.artifacts import Components, Dataset, Estimate, Hardware, SequenceSize
from fitlora.memory.trace import Block, MemoryTrace
from fitlora.model import empty_model
from fitlora.plan import Plan
from fitlora.step.batch import TokenSequence
from fitlora.step.build import TrainingStep, step_skeleton
from fitlora.step.settings import StepSettings
from fitlora.step.weights import EmptyWeights, Weights

# Share of the peak that cached blocks of the wrong size may take beside it. With expandable segments
# the caching allocator stayed within this in benchmarks/results/three_ways.*.json.
FRAGMENTATION = 0.05


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

    def tokens(self, micro_batch_size: int) -> int:
        """Tokens of the heaviest micro-batch."""
        return sum(size.tokens for size in self.train[:micro_batch_size])


def sequences_of(sizes: Sequence[SequenceSize]) -> list[TokenSequence]:
    """Sequences of these sizes with no meaning; the learned tokens are the last ones."""
    return [
        TokenSequence(
            sample=index,
            tokens=(0,) * size.tokens,
            learned=tuple(i >= size.tokens - size.target_tokens for i in range(size.tokens)),
        )
        for index, size in enumerate(sizes)
    ]


@dataclass
class _Booking:
    """Which blocks of a trace are gradients, and which were kept by a forward pass."""

    trace: MemoryTrace
    step: TrainingStep
    gradients: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "optimizer":
            grads = [p.grad for p in self.step.adapters.values() if p.grad is not None]
            self.gradients |= self.trace.blocks_of(grads)
        with self.trace.during(name):
            yield
            if name == "forward":
                self.saved |= set(self.trace.live)

    def components(self, live: dict[int, Block]) -> dict[str, int]:
        """Bytes by purpose of the blocks alive at the peak."""
        model = self.step.model
        frozen = [p for p in model.parameters() if not p.requires_grad]
        sets = {
            "weights": self.trace.blocks_of([*frozen, *model.buffers()]),
            "adapters": self.trace.blocks_of(self.step.adapters.values()),
            "gradients": self.gradients,
            "optimizer_states": self.trace.blocks_of(_states(self.step)),
            "activations": self.saved,
        }
        found = dict.fromkeys([*sets, "temporary_buffers"], 0)
        for key, block in live.items():
            name = next((n for n, keys in sets.items() if key in keys), "temporary_buffers")
            found[name] += block.size
        return found


def _states(step: TrainingStep) -> list[torch.Tensor]:
    if step.optimizer is None:
        return []
    return [
        value
        for state in step.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


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
    heavy = sequences_of(load.train[: plan.micro_batch_size])
    for index, batch in enumerate((heavy, heavy * min(2, plan.accumulation))):
        step.run(batch, step=index, learning_rate=step.settings.train.learning_rate)
    held_out = sequences_of(load.validation[: plan.evaluation_batch_size])
    if held_out:
        step.evaluate(held_out)


def trace_step(
    config: Any, plan: Plan, settings: StepSettings, load: Load, weights: Weights | None = None
) -> TraceResult:
    """Builds the step and traces `rehearse`.

    weights: None for fake tensors; a source on the CPU to measure there what an estimate predicts.
    """
    skeleton = step_skeleton(config, plan, settings)
    fake = FakeTensorMode() if weights is None else nullcontext()
    trace = MemoryTrace(skeleton.model)
    with fake, trace:
        with trace.during("load"):
            step = skeleton.fill(weights or EmptyWeights(torch.device("cpu")))
        trace.watch([*step.model.parameters(), *step.model.buffers()])
        booking = _Booking(trace, step)
        step.phase = booking.phase
        rehearse(step, load)
        components = booking.components(trace.peak.live)
    peak = trace.peak
    where = f" of {peak.module}" if peak.module else ""
    return TraceResult(
        peak_bytes=peak.bytes,
        components=components,
        phase_peak_bytes=dict(trace.phase_peaks),
        instant=f"{peak.phase}{where}, {peak.operator}",
    )


def estimate(
    config: Any, plan: Plan, settings: StepSettings, load: Load, hardware: Hardware
) -> Estimate:
    """The predicted memory of `plan` on `hardware`, in bytes."""
    found = trace_step(config, plan, settings, load)
    components = Components(**found.components, library_workspaces=hardware.workspace_bytes)
    peak = found.peak_bytes + hardware.workspace_bytes
    process = int(peak * (1 + FRAGMENTATION)) + hardware.context_bytes
    return Estimate(
        plan=plan,
        peak_allocated_bytes=peak,
        process_bytes=process,
        fits=process <= hardware.budget_bytes,
        instant=found.instant,
        phase_peak_bytes=found.phase_peak_bytes,
        components=components,
    )


def count_parameters(config: Any, plan: Plan, settings: StepSettings) -> tuple[int, int]:
    """The model's parameters, adapters aside, and those of the adapters."""
    whole = sum(p.numel() for p in empty_model(config, dtype=torch.bfloat16).parameters())
    model = step_skeleton(config, plan, settings).model
    return whole, sum(p.numel() for p in model.parameters() if p.requires_grad)
