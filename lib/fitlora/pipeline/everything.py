"""Stages one after the other, without DVC: what `fitlora run` and `MemoryEfficientTrainer` are.

DVC runs what has changed; here everything runs, into a folder of its own. The folder gets the params
too, with paths that hold from anywhere, so that later commands need nothing but the folder.
"""

from pathlib import Path

from fitlora.artifacts import ADAPTER, write_text_atomically
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.params import PARAMS_FILE, Params
from fitlora.pipeline.estimate_memory import estimate_memory
from fitlora.pipeline.find_batch_size import find_batch_size
from fitlora.pipeline.merge_and_evaluate import merge_and_evaluate
from fitlora.pipeline.profile_hardware import profile_hardware
from fitlora.pipeline.quantize_model import quantize_model
from fitlora.pipeline.train_adapters import train_adapters
from fitlora.presets import params_text

STAGES = {
    "profile_hardware": profile_hardware,
    "estimate_memory": estimate_memory,
    "find_batch_size": find_batch_size,
    "quantize_model": quantize_model,
    "train_adapters": train_adapters,
    "merge_and_evaluate": merge_and_evaluate,
}


def open_output(params: Params, root: Path, *, force: bool) -> None:
    """Makes the folder and keeps the params in it.

    Raises UserError where it cannot be made, where it holds a run already and `force` is False, and
    where the params plan for a GPU that is not here, so that nothing could be trained.
    """
    target = params.hardware.target
    if target is not None:
        raise UserError(
            f"hardware.target describes {target.name}, which is not here, so nothing can be trained; "
            "set it to null, or stop after the plan: fitlora profile, estimate, plan"
        )
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; name a folder")
    if not force and (root / ADAPTER).exists():
        raise UserError(f"{root} holds a run already; name another folder, or replace it (--force)")
    if params.train.from_adapter is not None and not Path(params.train.from_adapter).is_dir():
        raise UserError(f"train.from_adapter {params.train.from_adapter} is no folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_text_atomically(root / PARAMS_FILE, params_text(anchored(params)))
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}") from None


def anchored(params: Params) -> Params:
    """The same params with absolute paths, where there is something at the path."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() else path

    start, held_out = params.train.from_adapter, params.data.validation
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"id": absolute(params.model.id)}),
            "data": params.data.model_copy(
                update={
                    "train": absolute(params.data.train),
                    "validation": None if held_out is None else absolute(held_out),
                }
            ),
            "train": params.train.model_copy(
                update={"from_adapter": None if start is None else absolute(start)}
            ),
        }
    )


def run_stages(params: Params, root: Path, *stages: str) -> None:
    """Runs the named stages, in the pipeline's order; all of them where none is named."""
    for number, (name, stage) in enumerate(STAGES.items(), start=1):
        if not stages or name in stages:
            say(f"[{number}/{len(STAGES)}] {name}")
            stage(params, root)
