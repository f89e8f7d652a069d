"""Stage: QLoRA, as the Plan says -> adapter/, training.jsonl, curves.json."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.train_adapters import train_adapters


def main() -> None:
    train_adapters(read_params())


if __name__ == "__main__":
    run(main)
