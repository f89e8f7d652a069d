"""Which run it is: what its result depends on, and so whose checkpoints it may go on from.

Two runs are the same when the numbers that they compute are, to summation order: the same rows, the
same weights, the same params. How the step is cut up, on which device, and how often it is saved are
not part of it, so that a run goes on after its Plan was made again, or elsewhere. Nor is the code.

Weights are told apart by samples of their bytes and not by all of them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitlora.adapter import CONFIG, WEIGHTS
from fitlora.fingerprints import sampled
from fitlora.params import LoraParams, Params, QuantizationParams, TrainParams
from fitlora.plan import Plan
from fitlora.training.data import TokenizedSplit

# Params that change no number of the result.
_FREE = {"trackers", "checkpoint_every"}


@dataclass(frozen=True)
class Identity:
    """What a run's result depends on, by name, as JSON has it."""

    inputs: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly when the inputs are."""
        text = json.dumps(dict(self.inputs), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, others: Mapping[str, Any]) -> list[str]:
        """What another run's inputs are in place of these, in words."""
        names = sorted({*self.inputs, *others})
        return [
            f"{name} is {_short(self.inputs.get(name))}, and was {_short(others.get(name))}"
            for name in names
            if self.inputs.get(name) != others.get(name)
        ]


def identity_of(
    params: Params,
    plan: Plan,
    checkpoint: Path,
    rows: TokenizedSplit,
    validation: TokenizedSplit,
) -> Identity:
    """The identity of a training run. checkpoint: the folder of the frozen weights."""
    train: TrainParams = params.train
    quantization: QuantizationParams = params.quantization
    lora: LoraParams = params.lora
    settings = train.model_dump(mode="json", exclude={*_FREE, "from_adapter"})
    found: dict[str, Any] = {f"train.{key}": value for key, value in settings.items()}
    found |= {f"quantization.{k}": v for k, v in quantization.model_dump(mode="json").items()}
    found |= {f"lora.{key}": value for key, value in lora.model_dump(mode="json").items()}
    if train.from_adapter is not None:
        folder = Path(train.from_adapter)
        found["the adapter to go on from"] = sampled(folder / name for name in (CONFIG, WEIGHTS))
    return Identity(
        {
            **found,
            "the training rows": _sequences(rows),
            "the validation rows": _sequences(validation),
            "the model's weights": sampled(
                [checkpoint / "config.json", *checkpoint.glob("*.safetensors")]
            ),
            "the compute dtype": plan.compute_dtype,
        }
    )


def _sequences(split: TokenizedSplit) -> str:
    """The rows' tokens and masks, and how they are packed."""
    lengths = json.dumps([sequence.lengths for sequence in split.sequences])
    text = f"{split.facts.fingerprint}:{hashlib.sha256(lengths.encode()).hexdigest()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: object) -> str:
    """A value for a message; of a sum its beginning is enough."""
    text = json.dumps(value)
    return f"{text[:9]}…" if isinstance(value, str) and len(value) == 64 else text
