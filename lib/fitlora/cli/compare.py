"""`fitlora compare`: runs side by side."""

from typing import TYPE_CHECKING, Any

import click

from fitlora.cli.frame import answers, debug_option, examples

if TYPE_CHECKING:
    from fitlora.report.comparison import Comparison


def _show(found: "Comparison") -> None:
    from fitlora.report.comparison import show

    show(found)


@click.command(
    epilog=examples(
        "fitlora compare outputs other_outputs",
        "fitlora compare HEAD~1 .             a revision whose artifacts DVC has, and this folder",
        "fitlora compare a b --json",
    )
)
@answers(_show)
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@debug_option
def compare(runs: tuple[str, ...]) -> Any:
    """Show runs side by side.

    Params and plan where they differ, memory, speed and quality. A run is a folder with artifacts, or a
    revision of this repository.
    """
    from fitlora.errors import UserError
    from fitlora.report.comparison import compare_runs

    if len(runs) < 2:
        raise UserError("name at least two runs to compare")
    return compare_runs(runs)
