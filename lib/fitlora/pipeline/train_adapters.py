"""QLoRA, as the Plan says -> adapter/, training.jsonl, curves.json."""

import json
from pathlib import Path
from typing import Any

from fitlora.artifacts import (
    ADAPTER,
    CURVES,
    HARDWARE,
    MEMORY_LOG,
    PLAN,
    PROBE_LOG,
    QUANTIZED_MODEL,
    SCRATCH,
    TRAINING_LOG,
    Hardware,
    PlanArtifact,
    names_remedy,
    write_text_atomically,
)
from fitlora.console import say
from fitlora.errors import ArtifactError, UserError
from fitlora.model import load_config
from fitlora.params import Params, with_found
from fitlora.plan import Plan
from fitlora.report.memory import outcome_lines
from fitlora.training.data import load_splits
from fitlora.training.launch import launch
from fitlora.training.parallel import Ranks, is_launched, joined
from fitlora.training.run import Places, train


@names_remedy
def train_adapters(params: Params, root: Path = Path()) -> dict[str, Any]:
    """Trains the adapter; returns the last record of the training log.

    Where the Plan has several devices it starts a process for each and waits for them, unless this
    process is one of them: one that torchrun or `accelerate launch` has started. How many of those there
    are is what counts then.
    """
    planned = PlanArtifact.read(root / PLAN)
    hardware = Hardware.read(root / HARDWARE)
    if planned.plan.devices > 1 and not is_launched():
        return _launch(params, planned.plan, hardware, root)
    with joined(hardware.device) as ranks:
        return _train(params, planned, hardware, root, ranks)


def _launch(params: Params, plan: Plan, hardware: Hardware, root: Path) -> dict[str, Any]:
    """Trains in processes on this host; raises UserError where it has fewer GPUs than that takes."""
    if hardware.device == "cuda" and plan.devices > len(hardware.gpus):
        raise UserError(
            f"the plan shares a batch among {plan.devices} GPUs, and this host has "
            f"{len(hardware.gpus)}; start the training on every host with torchrun (README, Several "
            "GPUs), or lower train.devices"
        )
    say(f"starting {plan.devices} processes, one for each device")
    given = root / SCRATCH / "launch.json"
    write_text_atomically(given, params.model_dump_json())
    try:
        launch(plan.devices, "fitlora.pipeline.train_rank", [str(given), str(root)])
    finally:
        given.unlink(missing_ok=True)
    lines = (root / TRAINING_LOG).read_text(encoding="utf-8").splitlines()
    end: dict[str, Any] = json.loads(lines[-1])
    return end


def _train(
    params: Params, planned: PlanArtifact, hardware: Hardware, root: Path, ranks: Ranks
) -> dict[str, Any]:
    trusted = params.model.trust_remote_code
    checkpoint = root / QUANTIZED_MODEL
    if planned.plan.layers_per_device and ranks.devices > 1:
        raise UserError(
            f"the plan has one process that spreads its layers over {planned.plan.devices_of_process} "
            f"GPUs, and this is one of {ranks.devices} processes; start the training without a launcher"
        )
    plan = planned.plan.on_devices(ranks.devices)
    params = with_found(params, planned.found, str(root / PLAN))
    if not (checkpoint / "config.json").is_file():
        raise ArtifactError(
            f"{checkpoint} holds no model; make it with: dvc repro --force quantize_model"
        )
    config = load_config(checkpoint, trust_remote_code=trusted)
    rows, validation = load_splits(
        params.data, checkpoint, config.get_text_config().vocab_size, trust_remote_code=trusted
    )
    end = train(
        params,
        plan,
        hardware.among(ranks.devices),
        config=config,
        checkpoint=checkpoint,
        rows=rows,
        validation=validation,
        places=Places(
            adapter=root / ADAPTER,
            log=root / TRAINING_LOG,
            curves=root / CURVES,
            scratch=root / SCRATCH,
            probe_log=root / PROBE_LOG,
            memory_log=root / MEMORY_LOG,
        ),
        ranks=ranks,
    )
    for line in outcome_lines(end):
        say(line)
    return end
