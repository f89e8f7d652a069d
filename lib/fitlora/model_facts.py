"""Which model the pipeline is about, by content, so that DVC can tell one from another.

`model.id` is a folder or a hub id. DVC can depend on a folder, but a hub id is no path; a params
dependency on these facts serves both. A hub model is its id and full commit. A folder is the hash of
its files, the weights apart from the rest, so that new weights of the same shape are quantized again
without being planned for again.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fitlora.artifacts import ModelFacts, write_text_atomically
from fitlora.model import DEFINITION_FILES, WEIGHT_FILES, resolve_model


def fingerprint(files: Iterable[Path], cache: Path) -> str | None:
    """sha256 over the names and contents of files; None where there are none.

    cache: a JSON file that remembers the sum of a file by its path, size and time of change, so that
    16 GB of weights are read once and not at every run.
    """
    try:
        known = json.loads(cache.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    total = hashlib.sha256()
    found = False
    for file in sorted(files):
        found = True
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            known[key] = _digest(file)
        total.update(f"{file.name}:{known[key]}\n".encode())
    write_text_atomically(cache, json.dumps(known, indent=0))
    return total.hexdigest() if found else None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def model_facts(model_id: str, revision: str | None, cache: Path) -> ModelFacts:
    """Which model `model.id` names, without fetching it."""
    if not Path(model_id).is_dir():
        if revision is None:
            resolve_model(model_id, revision, weights=False)  # says what is missing
        commit = f"{model_id}@{revision}"
        return ModelFacts(source=model_id, revision=revision, definition=commit, weights=commit)
    folder = resolve_model(model_id, revision, weights=False)
    index = set(folder.glob("*.safetensors.index.json"))
    definition = {f for pattern in DEFINITION_FILES for f in folder.glob(pattern)} - index
    weights = {f for pattern in WEIGHT_FILES for f in folder.glob(pattern)} | index
    return ModelFacts(
        source=model_id,
        revision=None,
        definition=fingerprint(definition, cache) or "",
        weights=fingerprint(weights, cache),
    )
