"""What the machine is, and which model it is about -> hardware.json, model.json."""

from pathlib import Path

from fitlora.artifacts import HARDWARE, MODEL, SCRATCH, Hardware
from fitlora.console import say
from fitlora.errors import ArtifactError
from fitlora.hardware import describe, keep_stable, profile
from fitlora.model_facts import model_facts
from fitlora.params import Params


def profile_hardware(params: Params, root: Path = Path()) -> Hardware:
    """Profiles the machine under `root`, keeping an earlier profile's figures where they still hold."""
    facts = model_facts(
        params.model.id, params.model.revision, root / SCRATCH / "fingerprints.json"
    )
    facts.write(root / MODEL)
    hardware = profile(params.hardware, root / SCRATCH)
    earlier = _read_earlier(root / HARDWARE)
    if earlier is not None:
        hardware = keep_stable(hardware, earlier)
    hardware.write(root / HARDWARE)
    for line in describe(hardware):
        say(line)
    return hardware


def _read_earlier(path: Path) -> Hardware | None:
    """The run before's profile, which DVC leaves in place (`persist`); None without a sound one."""
    if not path.exists():
        return None
    try:
        return Hardware.read(path)
    except ArtifactError as error:
        say(f"the earlier profile is set aside: {str(error).partition(';')[0]}")
        return None
