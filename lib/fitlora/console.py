"""How stages and commands speak: plain lines, progress with rates, and errors a user can act on."""

import sys
from collections.abc import Callable

from fitlora.errors import UserError


def say(text: str = "") -> None:
    """One line to the user, at once even through a pipe."""
    print(text, flush=True)


def run(main: Callable[[], object]) -> None:
    """Runs a stage's `main`; the user's mistakes end in a message and status 2, no traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
