"""accelerate: which process this is, and where its numbers are logged beside our own files."""

import json
from pathlib import Path
from typing import Any

import torch

from fitlora.errors import UserError
from fitlora.params import Params

PROJECT = "fitlora"


FOLDER = "trackers"


def start_accelerator(params: Params, device: torch.device, folder: Path) -> Any:
    """accelerate's view of the processes, with the trackers that params name started.

    folder: where trackers that write files do so; what an earlier run left there is replaced. The model
    is never handed to accelerate, which would wrap its forward; gradients are ours. Raises UserError for
    a tracker that is not installed, or does not start.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    wanted = list(params.train.trackers)
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    missing = [tracker for tracker in wanted if tracker not in available]
    if missing:
        raise UserError(
            f"train.trackers has {', '.join(missing)}, not installed here; "
            f"pip install {' '.join(missing)}, or take it out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=wanted or None, project_dir=str(folder)
    )
    if wanted:
        config = _flat(params.model_dump(mode="json"))
        try:
            accelerator.init_trackers(PROJECT, config=config, init_kwargs=_options(folder))
        except Exception as error:  # of its own kind in each of them
            raise UserError(
                f"train.trackers: {', '.join(wanted)} cannot be started ({error}); mend that, take it "
                "out, or for W&B without an account set WANDB_MODE=offline"
            ) from error
    return accelerator


def _options(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each tracker: to write below the folder, and to begin anew there.

    DVCLive would otherwise add itself to dvc.yaml, which is the pipeline's, and save an experiment.
    """
    live = {"dir": str(folder / "dvclive"), "dvcyaml": None, "save_dvc_exp": False, "report": None}
    return {"tensorboard": {"purge_step": 0}, "wandb": {"dir": str(folder)}, "dvclive": live}


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
