"""What the machine is, and which model and data it is about -> hardware.json, model.json, data.json."""

from pathlib import Path

from fitlora.artifacts import ADAPTER, DATA, HARDWARE, MODEL, SCRATCH, DataFacts, Hardware
from fitlora.console import say
from fitlora.data.sources import Source, fact, find_source, held_out_of
from fitlora.errors import ArtifactError, UserError
from fitlora.fingerprints import fingerprint
from fitlora.hardware import describe, keep_stable, profile
from fitlora.model_facts import adapter_fact, model_facts
from fitlora.params import DataParams, Params


def profile_hardware(params: Params, root: Path = Path()) -> Hardware:
    """Profiles the machine under `root`, keeping an earlier profile's figures where they still hold."""
    cache = root / SCRATCH / "fingerprints.json"
    start = params.train.from_adapter
    facts = model_facts(
        params.model.id,
        params.model.revision,
        cache,
        adapter=adapter_fact(None if start is None else Path(start), root / ADAPTER, cache),
        for_plan_alone=params.hardware.target is not None,
    )
    facts.write(root / MODEL)
    data_facts(params.data, cache).write(root / DATA)
    hardware = profile(params.hardware, root / SCRATCH)
    earlier = _read_earlier(root / HARDWARE)
    if earlier is not None:
        hardware = keep_stable(hardware, earlier)
    hardware.write(root / HARDWARE)
    for line in describe(hardware):
        say(line)
    return hardware


def data_facts(data: DataParams, cache: Path) -> DataFacts:
    """Which data `data` names, without reading rows. cache: as for `fingerprint`."""

    def found(name: str, key: str, split: str) -> Source | None:
        try:
            return find_source(name, key, split, data.revision)
        except UserError:
            return None  # a profile needs no data; the stage that reads it says what is wrong

    train = found(data.train, "data.train", "train")
    if data.validation is not None:
        held_out = found(data.validation, "data.validation", "validation")
    else:
        held_out = train and (held_out_of(train) or train)

    def content(source: Source | None) -> str | None:
        if source is None:
            return None
        return fact(source, lambda files: fingerprint(files, cache))

    return DataFacts(train=content(train), validation=content(held_out))


def _read_earlier(path: Path) -> Hardware | None:
    """The run before's profile, which DVC leaves in place (`persist`); None without a sound one."""
    if not path.exists():
        return None
    try:
        return Hardware.read(path)
    except ArtifactError as error:
        say(f"the earlier profile is set aside: {str(error).partition(';')[0]}")
        return None
