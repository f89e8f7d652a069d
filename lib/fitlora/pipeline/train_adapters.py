"""QLoRA, as the Plan says -> adapter/, training.jsonl, curves.json."""

from pathlib import Path
from typing import Any

from fitlora.artifacts import (
    ADAPTER,
    CURVES,
    HARDWARE,
    PLAN,
    QUANTIZED_MODEL,
    SCRATCH,
    TRAINING_LOG,
    Hardware,
    PlanArtifact,
)
from fitlora.console import say
from fitlora.model import load_config
from fitlora.params import Params
from fitlora.report.memory import outcome_lines
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train


def train_adapters(params: Params, root: Path = Path()) -> dict[str, Any]:
    """Trains the adapter; returns the last record of the training log."""
    trusted = params.model.trust_remote_code
    checkpoint = root / QUANTIZED_MODEL
    config = load_config(checkpoint, trust_remote_code=trusted)
    rows, validation = load_splits(
        params.data, checkpoint, config.get_text_config().vocab_size, trust_remote_code=trusted
    )
    end = train(
        params,
        PlanArtifact.read(root / PLAN).plan,
        Hardware.read(root / HARDWARE),
        config=config,
        checkpoint=checkpoint,
        rows=rows,
        validation=validation,
        places=Places(root / ADAPTER, root / TRAINING_LOG, root / CURVES, root / SCRATCH),
    )
    for line in outcome_lines(end):
        say(line)
    return end
