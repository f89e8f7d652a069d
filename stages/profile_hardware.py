"""Stage: what the machine is, and which model it is about -> hardware.json, model.json."""

from fitlora.console import run
from fitlora.params import read_params
from fitlora.pipeline.profile_hardware import profile_hardware


def main() -> None:
    profile_hardware(read_params())


if __name__ == "__main__":
    run(main)
