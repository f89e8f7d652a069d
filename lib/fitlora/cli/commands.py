"""The commands: each is one stage, all of them, or a look at what they left.

Commands import what they need when they run, so that `fitlora --help` answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fitlora import __version__
from fitlora.cli.compare import compare
from fitlora.cli.estimate import estimate, probe
from fitlora.cli.frame import (
    Commands,
    Project,
    answers,
    debug_option,
    examples,
    find_params,
    open_root,
    params_option,
    project_options,
    root_option,
    set_option,
)
from fitlora.cli.plan import plan
from fitlora.errors import UserError
from fitlora.presets import PRESETS

if TYPE_CHECKING:
    from fitlora.report.summary import Summary


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "fitlora init --preset 8gb           write a params.yaml to edit",
        "fitlora run --out outputs           everything, without DVC, into a folder",
        "fitlora chat --root outputs         talk to what came out",
    ),
)
@click.version_option(__version__, prog_name="fitlora")
def main() -> None:
    """Fine-tune the biggest language model that your memory can hold.

    In this repository DVC runs the pipeline: `dvc repro` runs what has changed. Without DVC `fitlora
    run` runs everything, and the other commands run one stage each, in this order: profile, estimate,
    plan, quantize, train, evaluate. Relative paths in params.yaml are taken from the current folder.
    """


@main.command(
    epilog=examples(
        "fitlora init                        the defaults: the shipped model and data",
        "fitlora init --preset 8gb --set data.train=mine.jsonl --set data.validation=held.jsonl",
    )
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Start from a template: "
    + "; ".join(f"{name}: {preset.title}" for name, preset in PRESETS.items())
    + ". (An RTX 4090 has 24 GB.)",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option(
    "--params",
    "params_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default="params.yaml",
    show_default=True,
    help="The file to write.",
)
@set_option
@debug_option
def init(preset: str | None, force: bool, params_file: Path, changes: tuple[str, ...]) -> None:
    """Write a params.yaml with every key, its meaning and its value."""
    from fitlora.artifacts import write_text_atomically
    from fitlora.presets import preset_params, preset_text

    if params_file.is_dir():
        raise UserError(f"{params_file} is a folder; name a file")
    if params_file.exists() and not force:
        raise UserError(f"{params_file} is there already; --force replaces it")
    params = preset_params(preset, changes, params_file.parent)
    write_text_atomically(params_file, preset_text(preset, params))
    click.echo(
        f"{params_file} is written; look at model and data in it, then: fitlora run --out outputs"
    )


@main.command(
    epilog=examples("fitlora profile --json", "fitlora profile --set hardware.device=cpu")
)
@answers()
@project_options
def profile(project: Project) -> Any:
    """What the machine is and may use, and which model it is about."""
    from fitlora.pipeline.profile_hardware import profile_hardware

    return profile_hardware(project.params, project.root)


main.add_command(estimate)


main.add_command(plan)


@main.command(epilog=examples("fitlora quantize", "fitlora quantize --set quantization.type=fp4"))
@answers()
@project_options
def quantize(project: Project) -> Any:
    """Write the model's weights as they are trained on. Needs no GPU and no earlier command."""
    from fitlora.artifacts import QUANTIZED_MODEL
    from fitlora.pipeline.quantize_model import quantize_model

    quantize_model(project.params, project.root)
    folder = project.root / QUANTIZED_MODEL
    return {
        "path": str(folder),
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


@main.command(
    epilog=examples(
        "fitlora train",
        "fitlora train --set train.max_steps=20",
        "fitlora train --set train.from_adapter=my/adapter",
    )
)
@answers()
@project_options
def train(project: Project) -> Any:
    """Train the adapter as the plan says. Needs plan and quantize."""
    from fitlora.pipeline.train_adapters import train_adapters

    return train_adapters(project.params, project.root)


@main.command(epilog=examples("fitlora evaluate", "fitlora evaluate --set evaluate.rows=50 --json"))
@answers()
@project_options
def evaluate(project: Project) -> Any:
    """Merge the adapter, and compare four models on the held-out rows. Needs train."""
    from fitlora.pipeline.merge_and_evaluate import merge_and_evaluate

    return merge_and_evaluate(project.params, project.root)


def _show_summary(found: "Summary") -> None:
    from fitlora.report.summary import show

    show(found)


@main.command(
    epilog=examples(
        "fitlora run --out outputs",
        "fitlora run --out outputs --force --set train.max_steps=20",
        "fitlora summary --root outputs",
    )
)
@answers(_show_summary)
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    required=True,
    help="Where artifacts/ and the params go; made if it is not there.",
)
@click.option("--force", is_flag=True, help="Replace the run that the folder holds.")
@params_option
@set_option
@debug_option
def run(out: Path, force: bool, params_file: Path | None, changes: tuple[str, ...]) -> Any:
    """Run all stages without DVC, in any folder.

    Nothing is skipped: in this repository `dvc repro` runs only what has changed.
    """
    params = find_params(params_file, Path(), changes)

    from fitlora.pipeline.everything import open_output, run_stages
    from fitlora.report.summary import summarize

    click.get_current_context().find_root().obj["root"] = out
    open_output(params, out, force=force)
    run_stages(params, out)
    return summarize(out)


@main.command(
    epilog=examples(
        "fitlora chat",
        'fitlora chat --prompt "Ledger line: It cost Ana 3 francs to get 2 metres of rope."',
        "fitlora chat --merged --temperature 0.7 < questions.txt",
    )
)
@click.option("--merged", is_flag=True, help="Ask the merged model, not the base with its adapter.")
@click.option("--prompt", metavar="TEXT", help="Ask this, print the answer, and end.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 10),
    default=0.0,
    show_default=True,
    help="How freely it chooses its words; at 0 it always takes the likeliest.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="The longest answer.",
)
@project_options
def chat(
    project: Project, merged: bool, prompt: str | None, temperature: float, max_new_tokens: int
) -> None:
    """Talk to the fine-tuned model.

    In a terminal it is one conversation: /new begins another, Ctrl-C stops an answer, Ctrl-D ends.
    Otherwise each line of the standard input is a question by itself, and its answer goes to the
    standard output.
    """
    from fitlora.chat import converse, load_chat

    model = load_chat(
        project.params,
        project.root,
        merged=merged,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    converse(model, prompt)


@main.command(epilog=examples("fitlora summary", "fitlora summary --root outputs --json"))
@answers(_show_summary)
@root_option
@debug_option
def summary(root: Path | None) -> Any:
    """Show what the last run came to, and where everything is."""
    from fitlora.report.summary import summarize

    return summarize(open_root(root))


main.add_command(compare)
main.add_command(probe)
