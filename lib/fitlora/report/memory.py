"""Data, estimates and plans as lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitlora.artifacts import Dataset, MemoryEstimate, Padding, Split
from fitlora.plan import Plan
from fitlora.planner.probe import ProbeResult
from fitlora.planner.search import RUNNERS_UP, AllLearn, Choice
from fitlora.units import format_bytes


def data_lines(dataset: Dataset) -> Iterator[str]:
    """How many rows there are and how long they come out."""
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if split is not None:
            yield f"{name:<11}{_split(split)}"
    if dataset.padding is not None:
        yield from _padding(dataset.padding)
    if dataset.train is None:
        yield (
            "no tokenizer with the model, so no rows were read: planning for sequences of "
            f"{dataset.longest_train[0].tokens} tokens (data.max_length), all learned"
        )


def _split(split: Split) -> str:
    length = split.length
    cut = f", {split.truncated_rows} cut to the limit" if split.truncated_rows else ""
    cut += f", {split.skipped_rows} bad ones skipped" if split.skipped_rows else ""
    return (
        f"{split.rows:,} rows, {split.tokens:,} tokens ({split.target_tokens:,} learned), "
        f"lengths {length.p50} median, {length.p90} p90, {length.maximum} longest{cut}"
    )


def _padding(found: Padding) -> Iterator[str]:
    """What padding would cost, said beside that there is none."""
    shares = f"{found.rows_share:.1%}"
    if found.packed_share is not None:
        yield f"packed     into {found.sequences:,} sequences, which batch sizes now count"
        shares += f", and {found.packed_share:.1%} when packed"
    yield (
        f"padding    none; padded to the longest of {found.batch} it would be {shares} of all tokens"
    )


def estimate_lines(result: MemoryEstimate) -> Iterator[str]:
    """The default plan by component, and its neighbours."""
    yield (
        f"{result.model}: {result.parameters:,} parameters, "
        f"{result.trainable_parameters:,} of the adapters"
    )
    yield f"default    {result.default.plan.describe()}"
    for name, count in result.default.components.model_dump().items():
        yield f"  {name.replace('_', ' '):<20}{format_bytes(count):>12}"
    yield f"  {'peak allocated':<20}{format_bytes(result.default.peak_allocated_bytes):>12}"
    yield f"  at: {result.default.instant}"
    yield f"whole process, against a budget of {format_bytes(result.budget_bytes)}:"
    for name, found in {"default": result.default, **result.neighbours}.items():
        fits = "fits" if found.fits else "does not fit"
        yield f"  {name:<24}{format_bytes(found.process_bytes):>12}  {fits}"


def plan_lines(choice: Choice, budget_bytes: int, probes: Sequence[ProbeResult]) -> Iterator[str]:
    """The Plan with the reason of each choice, what else there was, and what the probe said of it."""
    found, reasons, plan = choice.estimate, choice.reasons, choice.plan
    decisions = plan.model_dump()
    for name in ("recompute_layers", "streamed_layers", "frozen_layers"):
        decisions[name] = f"{len(getattr(plan, name))} layers"
    decisions["recompute_keeps"] = _kept(plan)
    for name, reason in reasons.items():
        yield f"{name:<22}{decisions[name]!s:<10} {reason}"
    yield f"{'accumulation':<22}{plan.accumulation!s:<10} makes the effective batch"
    yield f"predicted peak {format_bytes(found.peak_allocated_bytes)}"
    yield (
        f"whole process  {format_bytes(found.process_bytes)} of {format_bytes(budget_bytes)}, what the "
        "allocator keeps and a margin included"
    )
    if choice.forecast is not None:
        yield (
            f"predicted      {choice.forecast.tokens_per_second:,.0f} tokens/s, held up by "
            f"{_LIMITS[choice.limit or choice.forecast.bound]}"
            f"{'' if choice.forecast.measured else '; a count of its work that no run has confirmed'}"
        )
    if choice.all_learn is not None:
        yield _bought(choice, choice.all_learn)
    for other in choice.considered[:RUNNERS_UP]:
        rate = other.tokens_per_second
        told = "" if rate is None else f", {rate:,.0f} tokens/s"
        yield f"instead        {_otherwise(other.plan, plan)}{told}: {other.why}"
    if not probes:
        unknown = (
            "" if choice.forecast else "; how fast is not known, of this card or of such layers"
        )
        yield f"not probed: the plan is for a GPU that is not here{unknown}"
    for probe in probes:
        if not probe.fits:
            yield f"probe          {probe.plan.describe()}: {probe.why}"
            continue
        peak, host = probe.peak_allocated_bytes, probe.host_peak_bytes
        assert peak is not None, "it fits"
        there = "" if host is None else f", {format_bytes(host)} of the host"
        which = "" if probe.plan == plan else f" with {_otherwise(probe.plan, plan)}"
        speed = f"{probe.tokens_per_second:,.0f} tokens/s"
        yield f"probed peak    {format_bytes(peak)}{there}, {speed}{which}"


# What holds a plan up, in words.
_LIMITS = {
    "memory": "memory: what is faster does not fit",
    "compute": "the device's work",
    "launches": "the host, which launches that work",
    "link": "the link to the host",
    "disk": "the disk",
    "host": "the optimizer on the host",
}


def _kept(plan: Plan) -> str:
    return ", ".join(plan.recompute_keeps) or "nothing"


def _otherwise(plan: Plan, chosen: Plan) -> str:
    """What a plan has otherwise than the chosen one."""
    words = {
        "micro_batch_size": f"micro-batch {plan.micro_batch_size}",
        "micro_batches_per_pass": f"{plan.micro_batches_per_pass} of them to a pass",
        "recompute_layers": f"{len(plan.recompute_layers)} layers recomputed",
        "recompute_keeps": f"of those kept: {_kept(plan)}",
        "streamed_layers": f"{len(plan.streamed_layers)} layers streamed",
        "disk_layers": f"{plan.disk_layers} layers on disk",
        "checkpoints": f"checkpoints on the {plan.checkpoints}",
        "embedding": f"embedding on the {plan.embedding}",
        "head": f"head on the {plan.head}",
        "optimizer_device": f"optimizer on the {plan.optimizer_device}",
    }
    found = [text for name, text in words.items() if getattr(plan, name) != getattr(chosen, name)]
    return ", ".join(found) or plan.describe()


def _bought(choice: Choice, all_learn: AllLearn) -> str:
    """What freezing buys."""
    more = all_learn.peak_allocated_bytes - choice.estimate.peak_allocated_bytes
    bought, rate = f"{format_bytes(more)} of the peak", all_learn.tokens_per_second
    if choice.forecast is not None and rate is not None:
        bought += f" and {choice.forecast.tokens_per_second / rate - 1:.0%} of speed"
    return f"freezing buys  {bought}, against this plan with all layers trained"


def outcome_lines(end: Mapping[str, Any]) -> Iterator[str]:
    """The last record of a training log."""
    early = ", stopped early" if end["stopped_early"] else ""
    yield f"{end['steps']} steps in {end['seconds']:.0f} s{early}"
    if end["best_validation_loss"] is not None:
        yield f"best validation loss {end['best_validation_loss']:.4f} at step {end['best_step']}"
    predicted, measured = end["predicted_peak_bytes"], end["measured_peak_bytes"]
    yield (
        f"peak memory: predicted {format_bytes(predicted)}, measured {format_bytes(measured)} "
        f"({(predicted - measured) / measured:+.1%})"
    )
    for process in end.get("processes", ()):
        where = f"process {process['rank']} on {process['host']}, {process['device']}"
        yield f"  {where}: {format_bytes(process['measured_peak_bytes'])}"
