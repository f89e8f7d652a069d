"""The model's weights to 4 bits, or to bfloat16 where quantization.bits is 16 -> quantized_model/.

What comes out follows from `model` and `quantization` alone, never from the hardware: a GPU that is
here is used, and nothing more.
"""

from pathlib import Path

import torch

from fitlora.artifacts import QUANTIZED_MODEL
from fitlora.model import resolve_model
from fitlora.params import Params
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint


def quantize_model(params: Params, root: Path = Path()) -> None:
    """Writes the 4-bit checkpoint."""
    model, quantization = params.model, params.quantization
    quantize_checkpoint(
        resolve_model(model.id, model.revision, weights=True),
        root / QUANTIZED_MODEL,
        spec=QuantSpec.of(quantization),
        keep=quantization.keep_in_16_bits,
        trust_remote_code=model.trust_remote_code,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
