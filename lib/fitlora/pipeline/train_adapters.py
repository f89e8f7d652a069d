"""QLoRA, as the Plan says -> adapter/, training.jsonl, curves.json."""

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
)
from fitlora.console import say
from fitlora.errors import ArtifactError
from fitlora.model import load_config
from fitlora.params import Params, with_found
from fitlora.report.memory import outcome_lines
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train


@names_remedy
def train_adapters(params: Params, root: Path = Path()) -> dict[str, Any]:
    """Trains the adapter; returns the last record of the training log."""
    trusted = params.model.trust_remote_code
    checkpoint = root / QUANTIZED_MODEL
    planned = PlanArtifact.read(root / PLAN)
    plan, params = planned.plan, with_found(params, planned.found, str(root / PLAN))
    hardware = Hardware.read(root / HARDWARE)
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
        hardware,
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
    )
    for line in outcome_lines(end):
        say(line)
    return end
