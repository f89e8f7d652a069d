"""What the user decides about a step. The Plan has the rest."""

from dataclasses import dataclass

from fitlora.params import LoraParams, Params, QuantizationParams, TrainParams
from fitlora.quantization.layout import QuantSpec


@dataclass(frozen=True)
class StepSettings:
    """Quantization, adapters (None: a model without) and the optimizer's numbers."""

    quantization: QuantizationParams
    lora: LoraParams | None
    train: TrainParams
    trust_remote_code: bool = False

    @property
    def spec(self) -> QuantSpec | None:
        return QuantSpec.of(self.quantization)

    @classmethod
    def of(cls, params: Params) -> "StepSettings":
        """As params.yaml has them."""
        return cls(params.quantization, params.lora, params.train, params.model.trust_remote_code)
