"""How stages and commands speak: plain lines, progress with rates, and errors a user can act on."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from fitlora.errors import UserError

# The stages' names, which messages of the library use, as commands.
COMMANDS = {
    "profile_hardware": "profile",
    "estimate_memory": "estimate",
    "find_batch_size": "plan",
    "quantize_model": "quantize",
    "train_adapters": "train",
    "merge_and_evaluate": "evaluate",
}
_STAGE = re.compile(r"dvc repro(?: --force)? (\w+)")


def say(text: str = "") -> None:
    """One line to the user, at once even through a pipe."""
    print(text, flush=True)


def in_commands(message: str, root: Path | None) -> str:
    """A message of the library with `dvc repro STAGE` as the command that does the same here.

    Where DVC keeps the artifacts, its own words stand.
    """
    here = root in (None, Path())
    if here and Path("dvc.yaml").is_file():
        return message
    place = "" if here else f" --root {root}"

    def command(match: re.Match[str]) -> str:
        name = COMMANDS.get(match[1])
        return match[0] if name is None else f"fitlora {name}{place}"

    return _STAGE.sub(command, message)


def run(main: Callable[[], object], root: Path | None = None) -> None:
    """Runs a stage's `main`; the user's mistakes end in a message and status 2, no traceback.

    root: where artifacts are, if not here; the message's way out is then a command.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {in_commands(str(error), root)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
