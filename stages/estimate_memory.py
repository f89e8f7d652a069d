"""Stage: the default plan and its neighbours, in bytes -> memory_estimate.json, dataset.json."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.estimate_memory import estimate_memory


def main() -> None:
    estimate_memory(read_params())


if __name__ == "__main__":
    run(main)
