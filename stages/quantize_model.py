"""Stage: the model's weights to 4 bits, or to bfloat16 where quantization.bits is 16.

What comes out follows from `model` and `quantization` alone, never from the hardware: a GPU that is
here is used, and nothing more.
"""

import torch

from fitlora import artifacts
from fitlora.console import run
from fitlora.model import resolve_model
from fitlora.params import read_params
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint


def main() -> None:
    params = read_params()
    model, quantization = params.model, params.quantization
    spec = None
    if quantization.bits == 4:
        spec = QuantSpec(quantization.type, quantization.block_size, quantization.double)
    quantize_checkpoint(
        resolve_model(model.id, model.revision, weights=True),
        artifacts.QUANTIZED_MODEL,
        spec=spec,
        keep=quantization.keep_in_16_bits,
        trust_remote_code=model.trust_remote_code,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


if __name__ == "__main__":
    run(main)
