"""The `fitlora` command: what one does with a run besides running it.

What the user has to mend is said in one message, without a traceback, and ends with status 2.
Commands import what they need when they run, so that `fitlora --help` answers at once.
"""

import click

from fitlora import __version__, console


class Commands(click.Group):
    """A group whose commands end in the project's way when the user has made a mistake."""

    def invoke(self, ctx: click.Context) -> object:
        result: list[object] = []
        console.run(lambda: result.append(super(Commands, self).invoke(ctx)))
        return result[0]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fitlora")
def main() -> None:
    """Fine-tune the biggest language model that your memory can hold.

    The pipeline itself is run by DVC: dvc repro.
    """


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print it for a program.")
def summary(as_json: bool) -> None:
    """Show what the last run came to: metrics, memory, and where everything is."""
    from fitlora.report.summary import show, summarize

    found = summarize()
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        show(found)
