"""Stage: what the machine is, and which model it is about -> hardware.json, model.json."""

from fitlora.artifacts import HARDWARE, MODEL, SCRATCH, Hardware
from fitlora.console import run, say
from fitlora.errors import ArtifactError
from fitlora.hardware import describe, keep_stable, profile
from fitlora.model_facts import model_facts
from fitlora.params import read_params


def main() -> None:
    params = read_params()
    facts = model_facts(params.model.id, params.model.revision, SCRATCH / "fingerprints.json")
    facts.write(MODEL)
    hardware = profile(params.hardware, SCRATCH)
    earlier = read_earlier()
    if earlier is not None:
        hardware = keep_stable(hardware, earlier)
    hardware.write(HARDWARE)
    for line in describe(hardware):
        say(line)


def read_earlier() -> Hardware | None:
    """The run before's profile, which DVC leaves in place (`persist`); None without a sound one."""
    if not HARDWARE.exists():
        return None
    try:
        return Hardware.read(HARDWARE)
    except ArtifactError as error:
        say(f"the earlier profile is set aside: {str(error).partition(';')[0]}")
        return None


if __name__ == "__main__":
    run(main)
