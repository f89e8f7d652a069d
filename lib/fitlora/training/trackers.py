"""accelerate: which process this is, and where its numbers are logged beside our own files."""

import json
from pathlib import Path
from typing import Any

import torch

from fitlora.errors import UserError
from fitlora.params import Params

PROJECT = "fitlora"


def start_accelerator(params: Params, device: torch.device, folder: Path) -> Any:
    """accelerate's view of the processes, with the trackers that params name started.

    folder: where trackers that write files do so. The model is never handed to accelerate, which
    would wrap its forward; gradients are ours. Raises UserError for a tracker that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    wanted = list(params.train.trackers)
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    missing = [tracker for tracker in wanted if tracker not in available]
    if missing:
        raise UserError(
            f"train.trackers has {', '.join(missing)}, not installed here; pip install it, "
            "or take it out"
        )
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=wanted or None, project_dir=str(folder)
    )
    if wanted:
        accelerator.init_trackers(PROJECT, config=_flat(params.model_dump(mode="json")))
    return accelerator


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys with plain values, which every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{key}"] = value
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found
