"""`fitlora plan`: the project's Plan, as a stage, or that of any model on any card.

With a model's folder and a card's name nothing of a project is needed, and no GPU.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from fitlora.params import Params


def _params(model: str, gpu: str, seq_length: int, changes: tuple[str, ...]) -> "Params":
    """The defaults for a model, a card and a length, as `changes` have them."""
    from fitlora.params import check_params, with_changes

    content = {
        "model": {"id": model},
        "data": {"max_length": seq_length},
        "hardware": {"target": {"name": gpu}},
    }
    return check_params(with_changes(content, changes), "options")


def _plan_for(params: "Params", frontier: Path | None) -> Any:
    """Finds the plan for sequences that are full and learned throughout, and says it."""
    from fitlora.artifacts import PlanArtifact
    from fitlora.console import say
    from fitlora.hardware import describe, profile
    from fitlora.known_models import config_to_plan
    from fitlora.memory.estimate import Load
    from fitlora.planner.find import find_plan
    from fitlora.planner.search import device_count
    from fitlora.planner.task import Task
    from fitlora.report.frontier import write_frontier
    from fitlora.report.memory import plan_lines

    if "auto" in (params.lora.r, params.lora.alpha, params.data.max_length):
        raise UserError(
            "auto for lora.r, lora.alpha and data.max_length follows from rows; without a project give "
            "numbers (--set lora.r=16)"
        )
    assert params.data.max_length != "auto"
    model = params.model
    config = config_to_plan(model.id, model.revision, trust_remote_code=model.trust_remote_code)
    hardware = profile(params.hardware, Path())
    for line in describe(hardware):
        say(line)
    hardware = hardware.among(device_count(params, hardware))
    load = Load.uniform(params.train.effective_batch_size, params.data.max_length)
    task = Task(config, params, load, hardware)
    choice, probes = find_plan(task)
    for line in plan_lines(choice, hardware.budget_bytes, probes):
        say(line)
    if frontier is not None:
        write_frontier(frontier, task, choice)
    return PlanArtifact(plan=choice.plan, reasons=choice.reasons)


@click.command(
    epilog=examples(
        "fitlora plan                        the project's model and data, proven on the device",
        "fitlora plan --set hardware.memory_budget=6GiB",
        'fitlora plan llama-3-8b --gpu "RTX 3070"',
        'fitlora plan ./model --gpu "RTX 3070" --seq-length 1024',
        'fitlora plan ./model --gpu "RTX 4090" --set lora.r=32 --set plan.stream_layers=0',
        'fitlora plan ./model --gpu "RTX 3070" --frontier speed.svg',
    )
)
@answers()
@click.argument("model", required=False)
@click.option("--gpu", metavar="NAME", help='A card to plan for that is not here, like "RTX 3070".')
@click.option(
    "--seq-length",
    type=click.IntRange(8),
    default=2048,
    show_default=True,
    help="Tokens of a sequence, with --gpu.",
)
@click.option(
    "--frontier",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the speed of the plans for 4 to 80 GiB, the Plan among them: an SVG.",
)
@params_option
@root_option
@set_option
@debug_option
def plan(
    model: str | None,
    gpu: str | None,
    seq_length: int,
    frontier: Path | None,
    params_file: Path | None,
    root: Path | None,
    changes: tuple[str, ...],
) -> Any:
    """Find how a training step is split up to fit, and prove it.

    The step that is found runs once on the device, with noise for weights. Needs estimate. With MODEL
    and --gpu it needs no project and no GPU, and nothing runs: MODEL is a folder with a config.json, a
    hub id, or the name of a known size, like llama-3-8b. `fitlora init` writes a file with every key
    that --set changes.
    """
    if (model is None) != (gpu is None):
        raise UserError(
            'a plan for a card that is not here takes both: fitlora plan ./model --gpu "RTX 3070"; for '
            "a project's own model set hardware.target in params.yaml, and run fitlora profile, "
            "estimate, plan"
        )
    if model is not None and gpu is not None:
        return _plan_for(_params(model, gpu, seq_length, changes), frontier)
    from fitlora.pipeline.find_batch_size import find_batch_size

    project = open_project(params_file, root, changes)
    return find_batch_size(project.params, project.root, frontier=frontier)
