"""Which model the pipeline is about, by content, so that DVC can tell one from another.

`model.id` is a folder or a hub id. DVC can depend on a folder, but a hub id is no path; a params
dependency on these facts serves both. A hub model is its id and full commit. A folder is the hash of
its files, the weights apart from the rest, so that new weights of the same shape are quantized again
without being planned for again.
"""

from pathlib import Path

from fitlora.artifacts import ModelFacts
from fitlora.errors import UserError
from fitlora.fingerprints import fingerprint, sampled
from fitlora.model import DEFINITION_FILES, WEIGHT_FILES, resolve_model

# As `fitlora.adapter` has them, which reads adapters, and of which a profile needs no more.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_fact(folder: Path | None, output: Path, cache: Path) -> str | None:
    """The content of the adapter that training goes on from, which may be no path at all.

    output: where the new adapter goes. Raises UserError where there is no such adapter, or where it
    lies in `output`, which is emptied before training.
    """
    if folder is None:
        return None
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(
            f"train.from_adapter {folder} is where training writes, so it is gone when training "
            "starts; copy the folder elsewhere and name the copy"
        )
    files = [folder / name for name in ADAPTER_FILES]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"train.from_adapter {folder} has no {' and no '.join(missing)}; name the folder of an "
            "adapter in PEFT's format with safetensors, or null to start a new one"
        )
    return fingerprint(files, cache)


def model_facts(
    model_id: str,
    revision: str | None,
    cache: Path,
    *,
    adapter: str | None = None,
    for_plan_alone: bool = False,
) -> ModelFacts:
    """Which model `model.id` names, without fetching it.

    adapter: what `adapter_fact` found. for_plan_alone: nothing is going to be trained here, so samples
    of the weights are enough.
    """
    if not Path(model_id).is_dir():
        if revision is None:
            resolve_model(model_id, revision, weights=False)  # says what is missing
        commit = f"{model_id}@{revision}"
        return ModelFacts(
            source=model_id, revision=revision, definition=commit, weights=commit, adapter=adapter
        )
    folder = resolve_model(model_id, revision, weights=False)
    index = set(folder.glob("*.safetensors.index.json"))
    definition = {f for pattern in DEFINITION_FILES for f in folder.glob(pattern)} - index
    weights = {f for pattern in WEIGHT_FILES for f in folder.glob(pattern)} | index
    if for_plan_alone and weights:
        content: str | None = sampled(weights)
    else:
        content = fingerprint(weights, cache)
    return ModelFacts(
        source=model_id,
        revision=None,
        definition=fingerprint(definition, cache) or "",
        weights=content,
        adapter=adapter,
    )
