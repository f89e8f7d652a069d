"""Stage: the Plan, proven by a probe -> plan.json (and logs/probe.json, which nothing depends on)."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.find_batch_size import find_batch_size


def main() -> None:
    find_batch_size(read_params())


if __name__ == "__main__":
    run(main)
