"""Which model the pipeline is about, by content, so that DVC can tell one from another.

`model.id` is a folder or a hub id. DVC can depend on a folder, but a hub id is no path; a params
dependency on these facts serves both. A hub model is its id and full commit. A folder is the hash of
its files, the weights apart from the rest, so that new weights of the same shape are quantized again
without being planned for again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fitlora.artifacts import ModelFacts, read_json, write_text_atomically
from fitlora.errors import ArtifactError, UserError
from fitlora.machine import cpu_cores
from fitlora.model import DEFINITION_FILES, WEIGHT_FILES, resolve_model
from fitlora.progress import progress

# As `fitlora.adapter` has them, which reads adapters, and of which a profile needs no more.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
READERS = 8  # files that are hashed at one time, at most
PART_BYTES = 2**22


def fingerprint(files: Iterable[Path], cache: Path) -> str | None:
    """sha256 over the names and contents of files; None where there are none.

    cache: a JSON file that remembers the sum of a file by its path, size and time of change, so that
    16 GB of weights are read once and not at every run. New files are read several at a time, as one
    core hashes less than a disk gives.
    """
    try:
        known = read_json(cache)
    except (FileNotFoundError, ArtifactError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    keys = {file: _identity(file) for file in sorted(files)}
    unread = {file: file.stat().st_size for file, key in keys.items() if key not in known}
    if unread:
        largest_first = sorted(unread, key=lambda file: -unread[file])
        with (
            progress("hashing files", sum(unread.values()), in_bytes=True) as advance,
            ThreadPoolExecutor(min(READERS, cpu_cores())) as pool,
        ):
            digests = pool.map(partial(_digest, advance=advance), largest_first)
            for file, digest in zip(largest_first, digests, strict=True):
                known[keys[file]] = digest
    write_text_atomically(cache, json.dumps(known, indent=0))
    total = hashlib.sha256()
    for file, key in keys.items():
        total.update(f"{file.name}:{known[key]}\n".encode())
    return total.hexdigest() if keys else None


def _identity(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    digest, part = hashlib.sha256(), memoryview(bytearray(PART_BYTES))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(part):
            digest.update(part[:count])
            advance(count)
    return digest.hexdigest()


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
    model_id: str, revision: str | None, cache: Path, *, adapter: str | None = None
) -> ModelFacts:
    """Which model `model.id` names, without fetching it. adapter: what `adapter_fact` found."""
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
    return ModelFacts(
        source=model_id,
        revision=None,
        definition=fingerprint(definition, cache) or "",
        weights=fingerprint(weights, cache),
        adapter=adapter,
    )
