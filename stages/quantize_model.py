"""Stage: the model's weights to 4 bits -> quantized_model/."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.quantize_model import quantize_model


def main() -> None:
    quantize_model(read_params())


if __name__ == "__main__":
    run(main)
