"""Checkpoints: what a run needs to go on as if it had never stopped, as safetensors and JSON.

One is a folder `step-00000050` with the adapters, the optimizer's states and the best adapters so far
(`tensors.safetensors`), the log's lines so far (`log.jsonl`), and what is to be known of them
(`checkpoint.json`, with the checksums of all three). It is written beside its place, flushed to the
disk, and renamed, so that it is there as a whole or not at all; the former one is kept until then.

The folders lie in `.fitlora/checkpoints/FINGERPRINT`, named after the run's inputs (`identity`), so
that a run finds its own and no other's. Data position, learning rate and dropout are functions of the
step and the seed and need no state of their own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitlora.artifacts import read_json
from fitlora.errors import ArtifactError, UserError
from fitlora.planner.ladder import Rung
from fitlora.training.identity import Identity
from fitlora.training.precision import PrecisionState
from fitlora.units import format_bytes

FOLDER = "checkpoints"
TENSORS, LOG, MANIFEST = "tensors.safetensors", "log.jsonl", "checkpoint.json"
KIND, VERSION = "checkpoint", 1
KEPT = 2  # the newest, and the one before, should the newest turn out to be damaged

_PARTS = ("adapter", "best", "optimizer")


class Progress(BaseModel):
    """How far a run is, between two steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    done: int = 0
    validated: int = 0  # the last step after which validation was looked at
    best_step: int = 0
    best_loss: float | None = None
    without_better: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps. Tensors are on the CPU, by name in the model; `best` may be the last."""

    progress: Progress
    rung: Rung
    seconds: float
    log: Sequence[str]
    adapter: Mapping[str, Tensor]
    best: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    precision: PrecisionState = field(default_factory=PrecisionState)


class _Manifest(BaseModel):
    """checkpoint.json without its own checksum."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str
    version: int
    fingerprint: str
    inputs: dict[str, Any]
    progress: Progress
    rung: Rung
    precision: PrecisionState = PrecisionState()
    seconds: float
    numbers: dict[str, float | int]
    sha256: dict[str, str]


class Checkpoints:
    """The checkpoints of one run below a scratch folder.

    say: told what is skipped, and why.
    """

    def __init__(self, scratch: Path, identity: Identity, say: Callable[[str], None]) -> None:
        self.root = scratch / FOLDER
        self.identity = identity
        self.folder = self.root / identity.fingerprint
        self._say = say

    def save(self, snapshot: Snapshot) -> Path:
        """Writes a checkpoint and returns its folder; older ones beyond `KEPT` go.

        Raises UserError where the disk is full or cannot be written; what was saved stays good.
        """
        target = self.folder / f"step-{snapshot.progress.done:08d}"
        partial = self.folder / f".{target.name}.partial"
        try:
            for stale in self.folder.glob(".*.partial"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write(partial, snapshot)
            shutil.rmtree(target, ignore_errors=True)  # the same step again, after a step back
            os.replace(partial, target)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise UserError(self._cannot_save(error, snapshot)) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self._saved()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        tensors = {
            f"{part}:{name}": tensor
            for part in _PARTS
            for name, tensor in sorted(getattr(snapshot, part).items())
        }
        save_file(tensors, folder / TENSORS)
        (folder / LOG).write_text("".join(snapshot.log), encoding="utf-8")
        manifest = _Manifest(
            kind=KIND,
            version=VERSION,
            fingerprint=self.identity.fingerprint,
            inputs=dict(self.identity.inputs),
            progress=snapshot.progress,
            rung=snapshot.rung,
            precision=snapshot.precision,
            seconds=snapshot.seconds,
            numbers=dict(snapshot.numbers),
            sha256={name: _digest_of(folder / name) for name in (TENSORS, LOG)},
        )
        body = manifest.model_dump(mode="json")
        content = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
        (folder / MANIFEST).write_text(content, encoding="utf-8")
        for path in (folder / TENSORS, folder / LOG, folder / MANIFEST, folder):
            _flush(path)

    def newest(self) -> Snapshot | None:
        """The newest good checkpoint of this run, if there is one; damaged ones are named."""
        for folder in self._saved():
            try:
                return self.read(folder)
            except ArtifactError as error:
                self._say(f"{error}; it is skipped")
        return None

    def read(self, folder: Path) -> Snapshot:
        """A checkpoint; raises ArtifactError where it is damaged or belongs to other inputs."""
        manifest = read_manifest(folder)
        if manifest.fingerprint != self.identity.fingerprint:
            changed = self.identity.differences(manifest.inputs)
            raise ArtifactError(
                f"{folder} belongs to a run with other inputs: {'; '.join(changed)}"
            )
        for name in (TENSORS, LOG):
            if _digest_of(folder / name) != manifest.sha256.get(name):
                raise ArtifactError(f"{folder / name} is damaged (its checksum is another)")
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name, tensor in load_file(folder / TENSORS).items():
            part, _, rest = name.partition(":")
            parts[part][rest] = tensor
        return Snapshot(
            progress=manifest.progress,
            rung=manifest.rung,
            precision=manifest.precision,
            seconds=manifest.seconds,
            log=(folder / LOG).read_text(encoding="utf-8").splitlines(keepends=True),
            numbers=manifest.numbers,
            **parts,
        )

    def others(self) -> Iterator[str]:
        """Of each other run that was stopped here: where it lies, how far it is, what differs."""
        for folder in sorted(self.root.glob("*/")) if self.root.is_dir() else []:
            if folder == self.folder:
                continue
            for saved in sorted(folder.glob("step-*"), reverse=True)[:1]:
                size = format_bytes(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
                try:
                    manifest = read_manifest(saved)
                except ArtifactError as error:
                    yield str(error)
                    continue
                changed = "; ".join(self.identity.differences(manifest.inputs))
                yield f"{saved} ({size}) is of a run with other inputs: {changed}"

    def clear(self) -> None:
        """Removes this run's checkpoints, when it has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _saved(self) -> list[Path]:
        """The folders of this run's checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def _cannot_save(self, error: OSError | SafetensorError, snapshot: Snapshot) -> str:
        parts = (getattr(snapshot, part).values() for part in _PARTS)
        size = format_bytes(sum(tensor.nbytes for part in parts for tensor in part))
        saved = self._saved()
        kept = f"{saved[0]} stays good" if saved else "none was saved before"
        return (
            f"{self.folder}: a checkpoint of {size} cannot be written ({_reason(error)}); "
            f"{kept}. Make room there (or make it writable) and run the same command again"
        )


def _reason(error: OSError | SafetensorError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_manifest(folder: Path) -> _Manifest:
    """checkpoint.json, checked against its own sum; raises ArtifactError where it is damaged."""
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ArtifactError(f"{path} is not a FitLoRA checkpoint")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise ArtifactError(f"{path} has version {found!r} and this program reads {VERSION}")
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise ArtifactError(f"{path} is damaged (its checksum is another)")
    try:
        return _Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {error.errors()[0]['msg']}") from None


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    """sha256 of a file; raises ArtifactError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Writes a file through to the disk, or a folder's entries: a rename is to outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
