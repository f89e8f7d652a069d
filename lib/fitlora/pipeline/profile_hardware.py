"""What the machine is, and which model it is about -> hardware.json, model.json."""

from pathlib import Path

from fitlora.artifacts import ADAPTER, HARDWARE, MODEL, SCRATCH, Hardware
from fitlora.console import say
from fitlora.errors import ArtifactError
from fitlora.hardware import describe, keep_stable, profile
from fitlora.model_facts import adapter_fact, model_facts
from fitlora.params import Params


def profile_hardware(params: Params, root: Path = Path()) -> Hardware:
    """Profiles the machine under `root`, keeping an earlier profile's figures where they still hold."""
    cache = root / SCRATCH / "fingerprints.json"
    start = params.train.from_adapter
    facts = model_facts(
        params.model.id,
        params.model.revision,
        cache,
        adapter=adapter_fact(None if start is None else Path(start), root / ADAPTER, cache),
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
