"""What a test puts in the place of a probe, for another process to find by name; without torch."""

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

from fitlora.errors import UserError


def stand_in(config: Any, plan: Any, settings: Any, load: Any, hardware: Any) -> Any:
    """As the plan says: an answer, with the process's number, or a bad end."""
    if plan == "hang":
        time.sleep(1000)
    if plan == "bug":
        raise AssertionError("the author's")
    if plan == "refusal":
        raise UserError("the user's")
    if isinstance(plan, signal.Signals):
        signal.raise_signal(plan)
    return SimpleNamespace(fits=plan == "fits", pid=os.getpid())
