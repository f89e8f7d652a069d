"""What every command has in common: its options, how it answers a program, and how it ends.

How a command ends: 0; 2 where the user has something to mend, said in one message without a traceback;
130 after Ctrl-C; 1 for a fault of ours, which is called one. `--debug` adds the traceback.
"""

import contextlib
import errno
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from fitlora.console import COMMANDS, in_commands
from fitlora.errors import UserError
from fitlora.params import PARAMS_FILE, Params, read_params

Command = Callable[..., Any]


@dataclass(frozen=True)
class Project:
    """Params, and the folder under which artifacts are read and written."""

    params: Params
    root: Path


class Commands(click.Group):
    """A group whose commands end in the project's way, and are listed in the order of their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        # bitsandbytes says at import that an optional kernel is missing, which is never used here
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        ctx.obj = {"debug": False, "root": None}
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.exceptions.Abort):
            raise  # click's own ways to end
        # Whatever a command does not foresee is our fault, and has to be said as one.
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe has gone; click ends quietly
            status, message = _ending(error, ctx)
            if ctx.obj["debug"]:
                traceback.print_exception(error)
        click.echo(message, err=True)
        raise SystemExit(status)


def examples(*lines: str) -> str:
    """The end of a help text, as it stands."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _ending(error: BaseException, ctx: click.Context) -> tuple[int, str]:
    """The exit status and the last word."""
    if isinstance(error, KeyboardInterrupt):
        return 130, _stopped(ctx)
    if isinstance(error, UserError):
        return 2, f"error: {in_commands(str(error), ctx.obj['root'])}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {where}{error.strerror or error}"
    if _is_out_of_memory(error):
        return 2, f"error: out of memory: {error}\n{_MORE_MEMORY}"
    return 1, _bug(error)


_MORE_MEMORY = (
    "another process may hold the memory: look at it with nvidia-smi or free; a lower "
    "hardware.memory_budget makes the next plan smaller"
)


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # a command that has not loaded it did not run out there
        return isinstance(error, MemoryError)
    from fitlora.device import is_overflow

    return is_overflow(error)


def _bug(error: BaseException) -> str:
    return (
        f"internal error: {type(error).__name__}: {error}\n"
        "This is a bug in fitlora and not yours to mend; --debug shows where it happened."
    )


def _stopped(ctx: click.Context) -> str:
    if ctx.invoked_subcommand not in (*COMMANDS.values(), "run"):
        return "stopped"
    root = ctx.obj["root"] or Path()
    return (
        f"stopped. Each artifact under {root / 'artifacts'} is whole: what was finished is kept, and "
        "what was being made is as it was before. The log of a training run, training.jsonl, ends "
        "where it was stopped."
    )


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().obj["debug"] = True


def _set_root(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        ctx.find_root().obj["root"] = value
    return value


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show the traceback of an error.",
)
root_option = click.option(
    "--root",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    callback=_set_root,
    help="Where artifacts/ is read and written; here by default.",
)
params_option = click.option(
    "--params",
    "params_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="By default params.yaml in the root, or else the one that is here.",
)
set_option = click.option(
    "--set",
    "changes",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a key of params.yaml for this command: --set lora.r=8. May be repeated.",
)


def project_options(function: Command) -> Command:
    """--params, --root, --set and --debug; the command gets a `Project`."""

    @functools.wraps(function)
    def wrapper(
        *, params_file: Path | None, root: Path | None, changes: tuple[str, ...], **options: Any
    ) -> Any:
        return function(project=open_project(params_file, root, changes), **options)

    for option in (debug_option, set_option, params_option, root_option):
        wrapper = option(wrapper)
    return wrapper


def open_root(root: Path | None) -> Path:
    """The root as a folder that is there; raises UserError otherwise."""
    folder = root or Path()
    if not folder.is_dir():
        raise UserError(f"--root {folder} is not a folder")
    return folder


def open_project(params_file: Path | None, root: Path | None, changes: tuple[str, ...]) -> Project:
    """Reads the params; raises UserError that lists all that is wrong with them."""
    folder = open_root(root)
    return Project(find_params(params_file, folder, changes), folder)


def find_params(params_file: Path | None, root: Path, changes: tuple[str, ...]) -> Params:
    """The params of `params_file`, or of the root, or of this folder, with changes."""
    own = root / PARAMS_FILE
    file = params_file or (own if own.is_file() else PARAMS_FILE)
    if not file.is_file():
        raise UserError(f"{file} is missing; write one with: fitlora init")
    return read_params(file, changes)


def answers(show: Callable[[Any], None] = lambda found: None) -> Callable[[Command], Command]:
    """--json: what the command returns goes to stdout as JSON, and all that it says to stderr.

    show: what is done with the result without --json.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*, as_json: bool, **options: Any) -> None:
            if not as_json:
                show(function(**options))
                return
            with contextlib.redirect_stdout(sys.stderr):
                found = function(**options)
            click.echo(_as_json(found))

        option = click.option(
            "--json", "as_json", is_flag=True, help="Print the result for a program, and only that."
        )
        return option(wrapper)

    return decorate


def _as_json(found: Any) -> str:
    if isinstance(found, BaseModel):
        return found.model_dump_json(indent=2)
    return json.dumps(found, indent=2, ensure_ascii=False)
