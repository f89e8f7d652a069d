"""What the report says, part by part, each a pure function of the run's artifacts."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitlora.artifacts import (
    DATASET,
    HARDWARE,
    MEMORY_ESTIMATE,
    MODEL,
    PLAN,
    TRAINING_LOG,
    Dataset,
    Evaluation,
    Hardware,
    MemoryEstimate,
    Metrics,
    ModelFacts,
    PlanArtifact,
    Split,
)
from fitlora.params import (
    DataParams,
    EvaluateParams,
    HardwareParams,
    LoraParams,
    MergeParams,
    ModelParams,
    Params,
    PlanParams,
    QuantizationParams,
    TrainParams,
    parse_yaml,
)
from fitlora.plan import Plan
from fitlora.report.adaptation import adaptation
from fitlora.report.html import Content, Html, chart, escaped, facts, section, table, tag
from fitlora.report.log import TrainingLog
from fitlora.units import format_bytes

_ON_ORIGINAL = "adapter_on_original"
_MEASURED = (
    "Measured in some of the steps: the first ones, which are the heaviest, and one now and then. "
    "Activations are what a forward pass leaves for its backward; temporary buffers are what the peak "
    "is above that, with what libraries keep."
)
_NOT_HERE = (
    "This run was on a CPU, which says nothing of a GPU. The default plan was asked about again, as a "
    "GPU would compute it and with a CUDA context beside it."
)


@dataclass(frozen=True)
class Trained:
    """What a run has left when it is trained."""

    params: Params
    model: ModelFacts
    hardware: Hardware
    dataset: Dataset
    estimate: MemoryEstimate
    plan: PlanArtifact
    log: TrainingLog

    @classmethod
    def read(cls, params: Params, root: Path) -> "Trained":
        """Raises ArtifactError that names the stage where an artifact is missing or damaged."""
        return cls(
            params=params,
            model=ModelFacts.read(root / MODEL),
            hardware=Hardware.read(root / HARDWARE),
            dataset=Dataset.read(root / DATASET),
            estimate=MemoryEstimate.read(root / MEMORY_ESTIMATE),
            plan=PlanArtifact.read(root / PLAN),
            log=TrainingLog.read(root / TRAINING_LOG),
        )


@dataclass(frozen=True)
class Run(Trained):
    """Everything that the report is made from."""

    evaluation: Evaluation


def head(run: Run) -> Html:
    """What it is about, and how it came out, in five figures."""
    found, end = run.evaluation, run.log.end
    predicted, measured = end["predicted_peak_bytes"], end["measured_peak_bytes"]
    forecast = run.log.forecast_tokens_per_second
    tiles = (
        _tile(
            "exact match",
            f"{found.adapter.exact_match:.1%}",
            f"of {found.rows:,} held-out rows; the base had {found.base.exact_match:.1%}",
        ),
        _tile(
            "perplexity",
            f"{found.adapter.perplexity:.3f}",
            f"of their answers; the base had {found.base.perplexity:,.2f}",
        ),
        _tile(
            "peak memory",
            format_bytes(measured),
            f"predicted {format_bytes(predicted)}: off by {predicted / measured - 1:+.1%}",
        ),
        _tile(
            "speed",
            f"{run.log.tokens_per_second:,.0f}",
            "tokens a second, the median step"
            + ("" if forecast is None else f"; forecast {forecast:,.0f}"),
        ),
        _tile(
            "training",
            _duration(end["seconds"]),
            f"{end['steps']:,} steps"
            + (", stopped early" if end["stopped_early"] else "")
            + f"; best validation at step {end['best_step']:,}",
        ),
    )
    return tag(
        "header",
        tag("p", "FitLoRA run", class_="eyebrow"),
        tag("h1", run.params.model.id),
        tag("p", run.plan.plan.describe(), class_="note"),
        tag("div", *tiles, class_="tiles"),
    )


def _tile(name: str, figure: str, words: str) -> Html:
    return tag(
        "div",
        tag("p", name, class_="name"),
        tag("p", figure, class_="figure"),
        tag("p", words, class_="words"),
        class_="tile",
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# --- quality --------------------------------------------------------------------------------------


def quality(run: Run) -> Html:
    """Four models side by side, by group, and how true the merge is."""
    found = run.evaluation
    pictures = tag(
        "div",
        chart("exact-match", "Answers that equal the expected one, with 95% intervals"),
        chart("loss-by-model", "Loss on the answers (nats a token), with 95% intervals"),
        class_="pair",
    )
    models = table(
        ("model", "exact match", "95% interval", "loss", "95% interval", "perplexity", "where"),
        (_model_row(found, name) for name in found.titles),
        numbers=(1, 2, 3, 4, 5),
    )
    parts = [pictures, models]
    if found.groups:
        kinds = dict.fromkeys(group.by for group in found.groups)
        parts += [tag("h3", f"By {' and '.join(kinds)}"), _groups(found)]
    parts += [tag("h3", "Is the merged model the one that was trained?"), *_gate(found)]
    return section(
        "Quality",
        *parts,
        note=f"The same {found.rows:,} held-out rows for all, answered greedily. Intervals are "
        "bootstrapped over rows, with the same draws for every model; where all rows came out alike, "
        "the exact binomial's.",
    )


def _model_row(found: Evaluation, name: str) -> tuple[Content, ...]:
    metrics: Metrics = getattr(found, name)
    low, high = metrics.loss_interval
    return (
        tag("strong", found.titles[name]),
        f"{metrics.exact_match:.1%}",
        _shares(metrics),
        f"{metrics.loss:.4f}",
        f"{low:.4f} – {high:.4f}",
        f"{metrics.perplexity:,.3f}",
        found.devices[name],
    )


def _shares(metrics: Metrics) -> str:
    low, high = metrics.exact_match_interval
    return f"{low:.1%} – {high:.1%}"


def _groups(found: Evaluation) -> Html:
    shown = ("base", "adapter", "merged")
    head = ["held-out rows", "count"]
    for name in shown:
        head += [f"{found.titles[name]}: exact", "loss"]
    rows = []
    for group in found.groups:
        row: list[Content] = [group.name, f"{group.rows:,}"]
        for name in shown:
            metrics = group.models[name]
            row += [f"{metrics.exact_match:.1%}", f"{metrics.loss:.4f}"]
        rows.append(row)
    return table(head, rows, numbers=range(1, len(head)))


def _gate(found: Evaluation) -> Iterator[Html]:
    gate, merged = found.gate, found.fidelity["merged"]
    lost = found.adapter.exact_match - found.merged.exact_match
    yield tag(
        "p",
        f"The adapter was merged into {gate.into} and stored in {gate.bits} bits. What that predicts "
        f"was compared with what {gate.reference} predicts, unmerged, at {merged.tokens:,} tokens of "
        "the held-out rows, and was within every limit.",
    )
    rows: list[tuple[Content, ...]] = [
        (
            "mean KL divergence (nats a token)",
            f"{merged.kl_divergence:.2g}",
            f"at most {gate.max_kl_divergence:g}",
        ),
        (
            "same likeliest next token",
            f"{merged.top1_agreement:.2%}",
            f"at least {gate.min_top1_agreement:.2%}",
        ),
        (
            "exact answers lost",
            f"{lost:.1%}",
            f"at most {gate.max_exact_match_drop:.2%}, rounded up to a row",
        ),
    ]
    yield table(("measure", "merged", "limit"), rows, numbers=(1,))
    for name, base in (
        ("adapter", "weights it was trained on"),
        (_ON_ORIGINAL, "original weights"),
    ):
        if name in found.fidelity:
            other = found.fidelity[name]
            yield tag(
                "p",
                f"What the other base would change: the adapter on the {base} is "
                f"{other.kl_divergence:.2g} nats a token away, and ranks the same token first at "
                f"{other.top1_agreement:.2%}.",
                class_="note",
            )


def samples(run: Run) -> Html:
    """Answers before and after, side by side."""
    cards = []
    for sample in run.evaluation.samples:
        answers = []
        for name, title in run.evaluation.titles.items():
            answer = sample.answers[name]
            right = answer.strip() == sample.expected.strip()
            mark = tag("span", "✓" if right else "✗", class_="right" if right else "wrong")
            answers.append(
                tag(
                    "div", tag("dt", title, " ", mark), tag("dd", tag("pre", answer or "(nothing)"))
                )
            )
        cards.append(
            tag(
                "article",
                tag("pre", sample.prompt, class_="prompt"),
                tag("p", "expected", class_="name"),
                tag("pre", sample.expected),
                tag("dl", *answers, class_="answers"),
            )
        )
    if not cards:
        return escaped("")
    return section("Before and after", *cards, note="The first held-out rows, as they came.")


# --- training and memory --------------------------------------------------------------------------


def training(run: Run) -> Html:
    """Curves, what happened on the way, and what the run recommends."""
    log = run.log
    parts = [
        tag(
            "div",
            chart("loss", "Training and validation loss"),
            chart("speed", "Tokens per second, step by step"),
            class_="pair",
        ),
        tag("h3", "Fallbacks"),
    ]
    if log.plans:
        rows = [(f"{p['step']:,}", str(p["cause"]), _changes(p)) for p in log.plans]
        parts.append(table(("step", "cause", "what changed of the plan"), rows, numbers=(0,)))
    else:
        parts.append(tag("p", "None was taken: memory never ran short."))
    parts += adaptation(log, run.plan.plan)
    for title, key in (("Warnings", "warnings"), ("Recommendations", "recommendations")):
        lines = log.end.get(key) or []
        if lines:
            parts += [tag("h3", title), tag("ul", *(tag("li", str(words)) for words in lines))]
    return section("Training", *parts)


def _changes(record: Mapping[str, Any]) -> str:
    before, after = record["before"], record["after"]
    return "; ".join(
        f"{key.replace('_', ' ')} {_brief(before[key])} → {_brief(after[key])}"
        for key in before
        if before[key] != after.get(key)
    )


def _brief(value: object) -> str:
    return f"{len(value)} layers" if isinstance(value, list | tuple) else str(value)


def memory(run: Run) -> Html:
    """Predicted and measured, over one step and over the run, and which plans fit."""
    default, end = run.estimate.default, run.log.end
    note = (
        f"The highest instant of a step was predicted at {default.instant}. Over the run "
        f"{format_bytes(end['measured_peak_bytes'])} were measured ("
        + ("the allocator's" if run.plan.plan.device == "cuda" else "live tensors")
        + f"), against {format_bytes(end['predicted_peak_bytes'])} predicted."
    )
    over_step = []
    if run.estimate.over_step:
        over_step.append(chart("over-step", "One step by component, predicted"))
    cards = []
    if run.estimate.cards:
        cards = [tag("h3", "Will it fit on another card?"), *_cards(run.estimate)]
    return section(
        "Memory",
        *over_step,
        chart("memory", "The run by component, measured, and the predicted peak"),
        tag("p", _MEASURED, class_="note"),
        tag(
            "div",
            chart("phases", "One step, phase by phase"),
            chart("components", "What the predicted peak is made of, by plan"),
            class_="pair",
        ),
        *_processes(end.get("processes", ())),
        tag("h3", "Will it fit?"),
        _fits(run.estimate),
        *cards,
        note=note,
    )


def _processes(processes: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    """The memory of each process and device of a run that had several; the note has the highest."""
    if not processes:
        return
    yield tag("h3", "Process by process")
    rows = [
        (str(one["rank"]), one["host"], one["device"], format_bytes(one["measured_peak_bytes"]))
        for one in processes
    ]
    yield table(["process", "host", "device", "measured peak"], rows, numbers=(0, 3))


def _fits(estimate: MemoryEstimate) -> Html:
    """Each plan against the budget."""
    plans = {"default plan": estimate.default, **estimate.neighbours}
    pinned = any(found.host_pinned_bytes for found in plans.values())
    # the verdict is where a narrow screen shows it
    head = ["", f"in {format_bytes(estimate.budget_bytes)}", "peak", "whole process"]
    rows = [
        (
            tag("strong", name),
            _verdict(found.fits),
            format_bytes(found.peak_allocated_bytes),
            format_bytes(found.process_bytes),
            *[format_bytes(found.host_pinned_bytes)] * pinned,
            tag("div", found.plan.describe(), class_="plan"),
        )
        for name, found in plans.items()
    ]
    numbers = (2, 3, 4) if pinned else (2, 3)
    return table([*head, *["pinned on the host"] * pinned, "plan"], rows, numbers=numbers)


def _cards(estimate: MemoryEstimate) -> Iterator[Html]:
    """GPUs of the usual sizes, and the plan that each was found to hold."""
    if estimate.default.plan.device == "cpu":
        yield tag("p", _NOT_HERE, class_="note")
    pinned = any(card.host_pinned_bytes for card in estimate.cards)
    head = ["card", "", "whole process", *["pinned on the host"] * pinned, "plan"]
    rows = [
        (
            tag("strong", f"{card.gib} GiB"),
            _verdict(card.fits),
            _size(card.process_bytes),
            *[_size(card.host_pinned_bytes)] * pinned,
            tag("div", card.plan or "none of those tried", class_="plan"),
        )
        for card in estimate.cards
    ]
    yield table(head, rows, numbers=(2, 3) if pinned else (2,))


def _size(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def _verdict(fits: bool) -> Html:
    return tag("span", "✓ fits" if fits else "✗ does not fit", class_="right" if fits else "wrong")


# --- what went in ---------------------------------------------------------------------------------


def plan(run: Run) -> Html:
    """Each decision and its reason."""
    decisions = Plan.model_dump(run.plan.plan)
    rows = [
        (tag("strong", name.replace("_", " ")), _decision(decisions[name]), reason)
        for name, reason in run.plan.reasons.items()
    ]
    return section(
        "Plan",
        table(("decision", "value", "why"), rows),
        note=f"How a training step was laid out; fingerprint {run.plan.plan.fingerprint()}.",
    )


def _decision(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} layers" if value else "none"
    return str(value)


def ingredients(run: Run) -> Html:
    """Model, data and machine."""
    return section(
        "What went in",
        tag(
            "div",
            tag("div", tag("h3", "Model"), facts(_model(run))),
            tag("div", tag("h3", "Data"), facts(_data(run.dataset))),
            tag("div", tag("h3", "Machine"), facts(_machine(run.hardware))),
            class_="three",
        ),
    )


def _model(run: Run) -> Iterator[tuple[str, Content]]:
    yield "source", run.params.model.id
    if run.params.model.revision is not None:
        yield "revision", run.params.model.revision
    yield "parameters", f"{run.estimate.parameters:,}"
    yield "trained", f"{run.estimate.trainable_parameters:,} of the adapter"
    stored: QuantizationParams = run.params.quantization
    if stored.bits == 4:
        double = ", double quantization" if stored.double else ""
        yield "base stored as", f"{stored.type}, blocks of {stored.block_size}{double}"
    else:
        yield "base stored in", "16 bits"
    lora: LoraParams = run.params.lora
    targets = lora.target_modules
    layers = targets if isinstance(targets, str) else ", ".join(targets)
    yield "LoRA", f"r {lora.r}, alpha {float(lora.alpha):g}, dropout {lora.dropout:g} on {layers}"


def _data(dataset: Dataset) -> Iterator[tuple[str, Content]]:
    for name, split in (("train", dataset.train), ("held out", dataset.validation)):
        if split is not None:
            yield from _split(name, split)


def _split(name: str, split: Split) -> Iterator[tuple[str, Content]]:
    yield name, split.source
    yield (
        "rows",
        f"{split.rows:,}" + (f", {split.skipped_rows:,} skipped" * bool(split.skipped_rows)),
    )
    yield "tokens", f"{split.tokens:,}, {split.target_tokens:,} of them learned"
    length = split.length
    cut = f"; {split.truncated_rows:,} cut" if split.truncated_rows else ""
    yield "lengths", f"median {length.p50}, p90 {length.p90}, longest {length.maximum}{cut}"


def _machine(hardware: Hardware) -> Iterator[tuple[str, Content]]:
    for gpu in hardware.gpus:
        yield "GPU", f"{gpu.name}, {format_bytes(gpu.memory_bytes)}"
    yield "CPU", f"{hardware.cpu_name}, {hardware.cpu_cores} cores"
    yield "host memory", format_bytes(hardware.host_memory_bytes)
    yield "budget", f"{format_bytes(hardware.budget_bytes)} of the {_device(hardware)}"


def _device(hardware: Hardware) -> str:
    return "GPU" if hardware.device == "cuda" else "host's memory"


def reproduce(run: Run) -> Html:
    """Commands, the settings that are not the defaults, and what tells the inputs from others."""
    changed = list(_changed(run.params))
    options = "".join(f" \\\n  --set {shlex.quote(change)}" for change in changed)
    commands = f"dvc repro\n\n# or, without DVC, into a folder:\nfitlora run --out outputs{options}"
    fingerprints: list[tuple[str, Content]] = [
        ("model definition", run.model.definition),
        ("model weights", run.model.weights or "none"),
    ]
    for name, split in (("training rows", run.dataset.train), ("held-out", run.dataset.validation)):
        if split is not None:
            fingerprints.append((name, split.fingerprint))
    fingerprints.append(("plan", run.plan.plan.fingerprint()))
    return section(
        "Reproduce",
        tag("pre", commands, class_="commands"),
        facts(fingerprints),
        note="In the repository, with this run's params.yaml and dvc.lock.",
    )


def _changed(params: Params) -> Iterator[str]:
    """`key=value` of each setting that is not the default's."""
    model: ModelParams = params.model
    data: DataParams = params.data
    devices: HardwareParams = params.hardware
    quantization: QuantizationParams = params.quantization
    lora: LoraParams = params.lora
    plan: PlanParams = params.plan
    train: TrainParams = params.train
    merge: MergeParams = params.merge
    evaluate: EvaluateParams = params.evaluate
    sections = {
        "model": model.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "hardware": devices.model_dump(mode="json"),
        "quantization": quantization.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "merge": merge.model_dump(mode="json"),
        "evaluate": evaluate.model_dump(mode="json"),
    }
    plain = Params().model_dump(mode="json")
    for name, content in sections.items():
        for key, value in content.items():
            if value != plain[name][key]:
                yield f"{name}.{key}={_yaml(value)}"


def _yaml(value: object) -> str:
    """JSON, which is YAML too, or bare text where that is read as the text that it is."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        bare: object = parse_yaml(value, "a setting")
        if bare == value:
            return value
    return json.dumps(value, ensure_ascii=False)
