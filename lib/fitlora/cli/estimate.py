"""`fitlora estimate MODEL` and `fitlora probe MODEL`: one plan, predicted and measured.

Each decision of a Plan is an option; `--plan` takes a whole one. Nothing of a project is needed.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fitlora.cli.frame import (
    answers,
    debug_option,
    examples,
    open_project,
    params_option,
    root_option,
    set_option,
)
from fitlora.errors import UserError
from fitlora.plan import KEPT, AttentionKernel, ComputeDtype, Optimizer, Plan
from fitlora.planner.search import MLP_CHUNK_TOKENS
from fitlora.units import GIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    from fitlora.artifacts import Estimate, Hardware
    from fitlora.memory.question import Question
    from fitlora.params import Params
    from fitlora.planner.size import ModelSize

# kinds of options of which there are several
_count = functools.partial(click.option, type=click.IntRange(1), show_default=True)
_some_layers = functools.partial(click.option, metavar="none|all|N|LIST", show_default=True)
_place = functools.partial(
    click.option, type=click.Choice(["device", "host"]), default="device", show_default=True
)

_OPTIONS = (
    click.option("--revision", help="Of a hub id: the full commit."),
    click.option("--gpu-memory", metavar="SIZE", help="Of the card, like 8GiB."),
    click.option(
        "--capability",
        default="8.9",
        show_default=True,
        help="Of the card, as NVIDIA lists it: 8.6 for RTX 30, 8.9 for RTX 40, 9.0 for H100.",
    ),
    click.option("--host-memory", metavar="SIZE", help="That may be used; all of it by default."),
    click.option(
        "--seq-length",
        type=click.IntRange(2),
        default=2048,
        show_default=True,
        help="Tokens of a sequence.",
    ),
    _count("--micro-batch", default=1, help="Sequences that go through the model at once."),
    _count("--accumulation", default=1, help="Micro-batches of an optimizer step."),
    _count(
        "--micro-batches-per-pass",
        default=1,
        help="Of them, how many go through each layer together.",
    ),
    _count(
        "--devices",
        default=1,
        help="GPUs that share a batch, each with --accumulation micro-batches.",
    ),
    click.option(
        "--layers-per-device",
        metavar="N,N",
        help="Of GPUs that one process spreads the layers over, in place of --devices.",
    ),
    click.option("--evaluation-batch", type=click.IntRange(1), help="As --micro-batch by default."),
    _some_layers(
        "--recompute",
        default="all",
        help="Layers whose activations are recomputed: how many of the lowest, or which (0-7,12).",
    ),
    click.option(
        "--keep",
        "keeps",
        multiple=True,
        type=click.Choice(KEPT),
        help="What layers that recompute keep all the same. May be repeated.",
    ),
    _some_layers(
        "--freeze",
        default="none",
        help="Layers whose adapters are not trained: how many of the lowest, or which.",
    ),
    _some_layers(
        "--stream",
        default="none",
        help="Layers whose weights come from host memory: how many, evenly, or which.",
    ),
    _count("--slots", default=2, help="Streamed layers on the device at one time."),
    click.option(
        "--disk",
        default=0,
        type=click.IntRange(0),
        help="Of the streamed layers, how many are read from disk.",
    ),
    _place("--checkpoints", help="Where recomputed layers' inputs wait for the backward pass."),
    _place("--embedding", help="Where the embedding's table is."),
    _place("--head", help="Where the language-model head's table is."),
    _place("--optimizer-device", help="Where the optimizer's state and work are."),
    click.option(
        "--optimizer",
        type=click.Choice(get_args(Optimizer)),
        default="adamw",
        show_default=True,
        help="8-bit and paged ones are bitsandbytes'.",
    ),
    click.option(
        "--compute-dtype",
        type=click.Choice(["auto", *get_args(ComputeDtype)]),
        default="auto",
        show_default=True,
        help="What products are computed in; auto: as plan.compute_dtype has it.",
    ),
    click.option(
        "--layer-dtype",
        type=click.Choice(get_args(ComputeDtype)),
        help="What decoder layers compute in instead, after a switch of precision.",
    ),
    click.option(
        "--attention",
        type=click.Choice(get_args(AttentionKernel)),
        help="What it is done with; by default FlashAttention where the card has it.",
    ),
    click.option("--loss-chunk", type=click.IntRange(1), help="Rows of logits at one time."),
    click.option(
        "--mlp-chunk",
        type=click.IntRange(0),
        default=MLP_CHUNK_TOKENS,
        show_default=True,
        help="Tokens that go through an MLP at one time; 0: all.",
    ),
    _count("--rank", default=16, help="Of the adapters."),
    click.option(
        "--target", "targets", multiple=True, help="Layers with adapters; all by default."
    ),
    click.option(
        "--bits",
        type=click.Choice(["4", "16"]),
        default="4",
        show_default=True,
        help="Of the frozen weights: 4 quantizes them.",
    ),
    click.option(
        "--quant-type", type=click.Choice(["nf4", "fp4"]), default="nf4", help="4-bit code."
    ),
    click.option(
        "--plan",
        "plan_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A plan.json, in place of all decisions above.",
    ),
)


def _asked(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options of a plan; the command gets them as `asked`, by name."""

    @functools.wraps(function)
    def wrapper(**options: Any) -> Any:
        asked = {name: options.pop(name) for name in names}
        return function(asked=asked, **options)

    names = []
    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
        names.append(wrapper.__click_params__[-1].name)  # type: ignore[attr-defined]
    return wrapper


def _question(model: str, asked: dict[str, Any], hardware: "Hardware") -> "Question":
    from fitlora.known_models import config_to_plan
    from fitlora.memory.question import Question
    from fitlora.params import check_params
    from fitlora.planner.model import model_size
    from fitlora.planner.search import attention_kernel, check_dtype
    from fitlora.step.settings import StepSettings

    config = config_to_plan(model, asked["revision"])
    given = _read_plan(asked["plan_file"]) if asked["plan_file"] else None
    lora = {"r": asked["rank"], "alpha": 2.0 * asked["rank"], "dropout": 0.0}
    same = ("compute_dtype", "checkpoints", "embedding", "head", "optimizer_device")
    content = {
        "quantization": {"bits": int(asked["bits"]), "type": asked["quant_type"]},
        "lora": {**lora, "target_modules": list(asked["targets"]) or "all-linear"},
        "plan": {
            "micro_batch_size": asked["micro_batch"],
            "evaluation_batch_size": asked["evaluation_batch"] or asked["micro_batch"],
            **{name: asked[name] for name in same},
        },
        "train": {
            "optimizer": given.optimizer if given else asked["optimizer"],
            "devices": asked["devices"],
            "effective_batch_size": asked["micro_batch"] * asked["accumulation"] * asked["devices"],
        },
    }
    params = check_params(content, "options")
    settings = StepSettings.of(params)
    size = model_size(config, settings)
    plan = given or _plan(asked, params, size, hardware)
    for dtype, name in ((plan.compute_dtype, "compute_dtype"), (plan.layer_dtype, "layer_dtype")):
        if dtype is not None:
            check_dtype(dtype, hardware, by_hand=size.by_hand, name=name)
    kernel, reason = attention_kernel(hardware)
    if plan.attention == "flash" and kernel == "plain":
        raise UserError(f"attention is flash, and {reason}; use plain")
    return Question(config, settings, plan, hardware.among(plan.devices), by_hand=size.by_hand)


def _plan(
    asked: dict[str, Any], params: "Params", model: "ModelSize", hardware: "Hardware"
) -> Plan:
    """The Plan that `params` have, and what they do not tell of it."""
    from pydantic import ValidationError

    from fitlora.offload.residency import spread
    from fitlora.planner.search import default_plan

    tokens = asked["seq_length"]
    plan = default_plan(params, hardware, model, lambda size: size * tokens, sequence_length=tokens)
    recomputed = _layers(asked, "recompute", model.layers, range)
    decided = {
        "micro_batches_per_pass": asked["micro_batches_per_pass"],
        "recompute_layers": recomputed,
        "recompute_keeps": [kind for kind in KEPT if recomputed and kind in asked["keeps"]],
        "frozen_layers": _layers(asked, "freeze", model.layers, range),
        "streamed_layers": _layers(
            asked, "stream", model.layers, lambda count: spread(model.layers, count)
        ),
        "streaming_slots": asked["slots"],
        "disk_layers": asked["disk"],
        "layer_dtype": asked["layer_dtype"],
        "attention": asked["attention"] or plan.attention,
        "loss_chunk_tokens": asked["loss_chunk"] or plan.loss_chunk_tokens,
        "mlp_chunk_tokens": asked["mlp_chunk"] or None,
        "layers_per_device": _counts(asked["layers_per_device"], model.layers),
    }
    try:
        return plan.replace(**decided)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the plan cannot be: {problem}") from None


def _layers(
    asked: dict[str, Any], name: str, count: int, some: Callable[[int], Iterable[int]]
) -> list[int]:
    """Decoder layers: none, all of `count`, `some` of so many, or those that are listed."""
    text = {"none": "0", "all": str(count)}.get(asked[name], asked[name])
    if text.isdigit() and int(text) <= count:
        return list(some(int(text)))
    parts = [part.partition("-") for part in text.split(",")]
    with suppress(ValueError):
        ends = [(int(low), int(high or low)) for low, _, high in parts]
        if not text.isdigit() and all(low <= high < count for low, high in ends):
            return sorted({layer for low, high in ends for layer in range(low, high + 1)})
    raise UserError(
        f"--{name} is none, all, a number up to {count} or some of the layers 0 to {count - 1}, "
        f"like 0-7,12; it is {asked[name]}, and the model has {count} layers"
    )


def _counts(text: str | None, layers: int) -> list[int]:
    """Layers of each device, from `40,40`."""
    parts = (text or "").split(",") if text else []
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(
            f"--layers-per-device is {text}; write it like {layers // 2},{-(-layers // 2)}"
        )
    return [int(part) for part in parts]


def _read_plan(file: Path) -> Plan:
    """A Plan, or the one in a plan.json; raises UserError where there is none."""
    from pydantic import ValidationError

    from fitlora.artifacts import read_json

    try:
        content = read_json(file)
        return Plan.model_validate_json(json.dumps(content.get("plan", content)))
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise UserError(f"--plan {file} has no Plan: {str(error).splitlines()[0]}") from None


def _card(asked: dict[str, Any], memory: str | None) -> "Hardware":
    """A card that need not be here."""
    from fitlora.hardware import profile
    from fitlora.params import check_params

    if memory is None:
        raise UserError("say how much memory the card has: --gpu-memory 8GiB")
    parse_bytes(memory)
    target = {"name": memory, "memory": memory, "compute_capability": asked["capability"]}
    content = {"hardware": {"target": target, "host_memory_budget": asked["host_memory"]}}
    return profile(check_params(content, "options").hardware, Path())


# --- estimate ------------------------------------------------------------------------------------


def _answer(question: "Question", model: str) -> dict[str, Any]:
    found, budget = question.estimate(), question.hardware.budget_bytes
    longest = question.longest()
    way_out = None if found.fits else question.way_out()
    return {
        "model": model,
        "budget_bytes": budget,
        "left_bytes": budget - found.process_bytes,
        "host_left_bytes": question.hardware.host_budget_bytes - found.host_bytes,
        "estimate": found.model_dump(mode="json"),
        "longest_sequence": longest and longest.plan.sequence_length,
        "largest_micro_batch": longest and question.largest_micro_batch(longest),
        "way_out": way_out
        and {"changes": way_out[0], "estimate": way_out[1].model_dump(mode="json")},
    }


def _table(model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Three ways of training the model, and the cards that each fits."""
    import torch

    from fitlora.memory.question import CARDS_GIB
    from fitlora.model import empty_model

    question = _question(model, asked, _card(asked, "1024GiB"))
    whole = empty_model(question.config, dtype=torch.bfloat16).parameters()
    ways = dict(question.ways_out())
    smallest = list(ways.values())[-1] if ways else question.plan
    every = {"recompute_layers": tuple(range(question.layers))}
    resident = {"checkpoints": "device", "embedding": "device", "head": "device"}
    qlora = question.plan.replace(
        **every, **resident, optimizer_device="device", streamed_layers=()
    )
    return {
        "model": model,
        "cards_gib": CARDS_GIB,
        # 16-bit weights and gradients; no step of ours does this, so it is a bound and no estimate
        "standard_fine_tuning_at_least_bytes": sum(4 * p.numel() for p in whole),
        "qlora": question.estimate(qlora).model_dump(mode="json"),
        "qlora_with_offload": question.estimate(smallest).model_dump(mode="json"),
    }


def _show(found: Any) -> None:
    if not isinstance(found, dict):
        return  # a stage says what it found by itself
    for line in _table_lines(found) if "qlora" in found else _lines(found):
        click.echo(line)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from fitlora.artifacts import Estimate

    estimate = Estimate.model_validate_json(json.dumps(found["estimate"]))
    yield f"{found['model']}: {estimate.plan.describe()}"
    yield from _parts(estimate)
    budget, left = found["budget_bytes"], found["left_bytes"]
    verdict = f"fits, {format_bytes(left)} are left" if estimate.fits else "does not fit"
    if left < 0:
        verdict += f", {format_bytes(-left)} are lacking"
    if (host_left := found["host_left_bytes"]) < 0:
        verdict += f", {format_bytes(-host_left)} of the host's memory are lacking"
    yield f"in {format_bytes(budget)}: {verdict}"
    if found["longest_sequence"] is not None:
        yield (
            f"the longest context that fits is {found['longest_sequence']:,} tokens; of "
            f"{estimate.plan.sequence_length:,} tokens the largest micro-batch is "
            f"{found['largest_micro_batch']}"
        )
    if (way_out := found["way_out"]) is None:
        return
    size = format_bytes(way_out["estimate"]["process_bytes"])
    if way_out["estimate"]["fits"]:
        yield f"it fits with {'; '.join(way_out['changes'])}: {size}"
    else:
        yield (
            f"no layout of it fits, the smallest takes {size}; `fitlora plan` tells what shorter "
            "sequences, a lower rank and a smaller model would take"
        )


def _parts(estimate: "Estimate") -> Iterator[str]:
    """The peak's bytes by what they are for, and what comes beside them."""
    rows = {
        **{k.replace("_", " "): v for k, v in estimate.components.model_dump().items()},
        "peak allocated": estimate.peak_allocated_bytes,
        "peak reserved": estimate.peak_reserved_bytes or 0,
        "safe peak": estimate.safe_peak_bytes or 0,
        "paged states": estimate.paged_bytes,
        "whole process": estimate.process_bytes,
        "pinned on the host": estimate.host_pinned_bytes,
        "there, not pinned": estimate.host_unpinned_bytes,
        "there, copies": estimate.host_copies_bytes,
        "there, libraries": estimate.host_own_bytes,
        "whole host": estimate.host_bytes,
    }
    for name, count in rows.items():
        yield f"  {name:<20}{format_bytes(count):>12}"
    yield f"  at: {estimate.instant}"
    yield "  the rows of the data are beside that, on the host"


def _table_lines(found: dict[str, Any]) -> Iterator[str]:
    sizes = {
        "standard fine-tuning": found["standard_fine_tuning_at_least_bytes"],
        "QLoRA": found["qlora"]["process_bytes"],
        "QLoRA + offload": found["qlora_with_offload"]["process_bytes"],
    }
    cards = "".join(f"{card:>5}" for card in found["cards_gib"])
    yield f"{found['model']:<24}{'GPU memory':>14}  cards of{cards} GiB"
    for name, count in sizes.items():
        bound = name.startswith("standard")  # which can say that a card is too small, and no more
        size = f"{'> ' if bound else ''}{format_bytes(count)}"
        yes = "?" if bound else "yes"
        fits = "".join(f"{yes if count <= c * GIB else 'no':>5}" for c in found["cards_gib"])
        yield f"{name:<24}{size:>14}          {fits}"


@click.command(
    epilog=examples(
        "fitlora estimate llama-3-8b --gpu-memory 8GiB",
        "fitlora estimate ./model --gpu-memory 8GiB --seq-length 2048 --micro-batch 2",
        "fitlora estimate ./model --table",
        "fitlora estimate                    the project's model and data, as a stage",
    )
)
@answers(_show)
@click.argument("model", required=False)
@click.option("--table", is_flag=True, help="Three ways of training it, across cards.")
@_asked
@params_option
@root_option
@set_option
@debug_option
def estimate(
    model: str | None,
    table: bool,
    asked: dict[str, Any],
    params_file: Path | None,
    root: Path | None,
    changes: tuple[str, ...],
) -> Any:
    """Predict the memory of a training step, part by part.

    MODEL is a folder with a config.json, a hub id, or the name of a known size, like llama-3-8b.
    Nothing runs: the step is traced on tensors without content. Without MODEL it is the stage: the
    model and data of params.yaml, after profile.
    """
    if model is None:
        from fitlora.pipeline.estimate_memory import estimate_memory

        project = open_project(params_file, root, changes)
        return estimate_memory(project.params, project.root)
    if table:
        return _table(model, asked)
    return _answer(_question(model, asked, _card(asked, asked["gpu_memory"])), model)


# --- probe ---------------------------------------------------------------------------------------


def _show_probe(found: dict[str, Any]) -> None:
    click.echo(found["plan"])
    for name in ("allocated", "reserved", "host"):
        predicted, measured = found[f"predicted_{name}_bytes"], found[f"measured_{name}_bytes"]
        if measured:
            share = f"{predicted / measured - 1:+.2%}"
            click.echo(
                f"peak {name:<10} predicted {format_bytes(predicted)}, measured "
                f"{format_bytes(measured)} ({share})"
            )
    if not found["fits"]:
        click.echo(f"it did not fit: {found['why']}")


@click.command(epilog=examples("fitlora probe ./model --seq-length 2048 --micro-batch 2"))
@answers(_show_probe)
@click.argument("model")
@_asked
@debug_option
def probe(model: str, asked: dict[str, Any]) -> Any:
    """Run a training step, and hold its memory against the estimate.

    Its weights are noise. It takes the options of `fitlora estimate MODEL`. --gpu-memory holds it to
    less than there is.
    """
    from fitlora.hardware import profile
    from fitlora.memory.estimate import Load
    from fitlora.params import check_params
    from fitlora.planner.probe import Prober

    content = {
        "hardware": {
            "memory_budget": asked["gpu_memory"],
            "host_memory_budget": asked["host_memory"],
        }
    }
    hardware = profile(check_params(content, "options").hardware, Path(".fitlora"))
    question = _question(model, asked, hardware)
    plan = question.plan
    count = max(plan.micro_batch_size, plan.evaluation_batch_size)
    load = Load.uniform(count, plan.sequence_length)
    with Prober(question.config, question.settings, load, hardware) as prove:
        predicted, measured = question.estimate(), prove(plan)
    return {
        "plan": plan.describe(),
        "fits": measured.fits,
        "predicted_allocated_bytes": predicted.peak_allocated_bytes,
        "measured_allocated_bytes": measured.peak_allocated_bytes,
        "predicted_reserved_bytes": predicted.peak_reserved_bytes,
        "measured_reserved_bytes": measured.peak_reserved_bytes,
        "predicted_host_bytes": predicted.host_bytes,
        "measured_host_bytes": measured.host_peak_bytes,
        "why": measured.why,
        "tokens_per_second": measured.tokens_per_second,
    }
