"""Stage: QLoRA, as the Plan says -> adapter/, training.jsonl, curves.json."""

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
from fitlora.console import run, say
from fitlora.model import load_config
from fitlora.params import read_params
from fitlora.report.memory import outcome_lines
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train_adapters


def main() -> None:
    params = read_params()
    trusted = params.model.trust_remote_code
    config = load_config(QUANTIZED_MODEL, trust_remote_code=trusted)
    train, validation = load_splits(
        params.data,
        QUANTIZED_MODEL,
        config.get_text_config().vocab_size,
        trust_remote_code=trusted,
    )
    end = train_adapters(
        params,
        PlanArtifact.read(PLAN).plan,
        Hardware.read(HARDWARE),
        config=config,
        checkpoint=QUANTIZED_MODEL,
        train=train,
        validation=validation,
        places=Places(ADAPTER, TRAINING_LOG, CURVES, SCRATCH),
    )
    for line in outcome_lines(end):
        say(line)


if __name__ == "__main__":
    run(main)
