"""Stage: the merged model, and base, quantized base, adapter and merged model on held-out rows."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.merge_and_evaluate import merge_and_evaluate


def main() -> None:
    merge_and_evaluate(read_params())


if __name__ == "__main__":
    run(main)
