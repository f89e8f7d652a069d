"""Checkpoints: whole or not there, found by themselves, refused where they belong to another run."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import ArtifactError, UserError
from fitlora.planner.ladder import Rung
from fitlora.training import checkpoint
from fitlora.training.checkpoint import (
    LOG,
    MANIFEST,
    TENSORS,
    Checkpoints,
    Progress,
    Snapshot,
    read_manifest,
)
from fitlora.training.identity import Identity
from fitlora.training.precision import PrecisionState
from tests.step import steps

ROWS = {"train.seed": 0, "the training rows": "a" * 64}


def snapshot(done: int = 4, **changes: Any) -> Snapshot:
    base: dict[str, Any] = {
        "progress": Progress(done=done, validated=done, best_step=2, best_loss=0.1 + 0.2),
        "rung": Rung(top=steps.plan(), plan=steps.plan(micro_batch_size=2), calm_since=3),
        "seconds": 1.5,
        "log": [f'{{"event": "step", "step": {step}}}\n' for step in range(1, done + 1)],
        "adapter": {"q.lora_A": torch.arange(6.0).view(2, 3), "q.lora_B": torch.zeros(2)},
        "best": {"q.lora_A": torch.ones(2, 3)},
        "optimizer": {"q.lora_A/state1": torch.arange(6, dtype=torch.uint8)},
        "numbers": {"q.lora_A/step": 7},
        "precision": PrecisionState(loss_scale=2.0**9, losses=(0.1 + 0.2, 1e-9), spike_at=3),
    }
    return Snapshot(**{**base, **changes})


def checkpoints(folder: Path, said: list[str] | None = None, **inputs: Any) -> Checkpoints:
    told = [] if said is None else said
    return Checkpoints(folder, Identity({**ROWS, **inputs}), told.append)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    assert store.newest() is None
    wanted = snapshot()
    folder = store.save(wanted)
    assert sorted(path.name for path in folder.iterdir()) == sorted([LOG, MANIFEST, TENSORS])
    found = store.newest()
    assert found is not None
    for part in ("progress", "rung", "seconds", "log", "numbers", "precision"):
        assert getattr(found, part) == getattr(wanted, part)
    for part in ("adapter", "best", "optimizer"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor)
            assert ours[name].dtype == tensor.dtype


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    for done in (0, 9, 10, 100):
        store.save(snapshot(done))
    assert [path.name for path in sorted(store.folder.iterdir())] == [
        "step-00000010", "step-00000100",
    ]  # fmt: skip
    found = store.newest()
    assert found is not None
    assert found.progress.done == 100
    store.save(snapshot(100, seconds=9.0))
    again = store.newest()
    assert again is not None
    assert again.seconds == 9.0, "the same step again takes the other's place"
    store.clear()
    assert not store.folder.exists()


def flip(name: str, at: int) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def manifest_with(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, **changes}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (flip(TENSORS, -1), "checksum"),
        (flip(TENSORS, 3), "checksum"),
        (flip(LOG, 10), "checksum"),
        (flip(MANIFEST, 0), "damaged"),
        (lambda folder: os.truncate(folder / TENSORS, 100), "checksum"),
        (lambda folder: os.truncate(folder / MANIFEST, 100), "damaged"),
        (lambda folder: (folder / LOG).unlink(), "cannot be read"),
        (lambda folder: (folder / MANIFEST).unlink(), "cannot be read"),
        (manifest_with(version=2), "version 2"),
        (manifest_with(kind="plan"), "not a FitLoRA checkpoint"),
        (manifest_with(seconds=2.0), "checksum"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "not a FitLoRA checkpoint"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 10000), "damaged"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    spoil: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    said: list[str] = []
    store = checkpoints(tmp_path, said)
    store.save(snapshot(2))
    newest = store.save(snapshot(4))
    spoil(newest)
    found = store.newest()
    assert found is not None
    assert found.progress.done == 2
    (message,) = said
    assert str(newest) in message
    assert says in message
    assert message.endswith("it is skipped")


def test_one_of_other_inputs_is_refused(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path)
    theirs = checkpoints(tmp_path, **{"train.seed": 3, "the training rows": "b" * 64})
    saved = theirs.save(snapshot())
    assert mine.newest() is None
    (line,) = mine.others()
    assert str(saved) in line
    assert "train.seed is 0, and was 3" in line
    assert f'the training rows is "{"a" * 8}…, and was "{"b" * 8}…' in line
    mine.folder.mkdir()
    os.rename(saved, mine.folder / saved.name)
    with pytest.raises(ArtifactError, match=r"other inputs: .*train\.seed"):
        mine.read(mine.folder / saved.name)
    assert mine.newest() is None


def test_a_full_disk_is_told_and_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = checkpoints(tmp_path)
    kept = store.save(snapshot(2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*Make room") as caught:
        store.save(snapshot(4))
    assert f"{kept} stays good" in str(caught.value)
    assert [path.name for path in store.folder.iterdir()] == [kept.name], "no part is left"
    monkeypatch.undo()
    found = store.newest()
    assert found is not None
    assert found.progress.done == 2


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    store.save(snapshot(2))
    part = store.folder / ".step-00000004.partial"
    part.mkdir()
    (part / TENSORS).write_bytes(b"half")
    found = store.newest()
    assert found is not None
    assert found.progress.done == 2
    store.save(snapshot(6))
    assert not part.exists()


def test_the_manifest_names_what_the_run_stood_on(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path).save(snapshot())
    manifest = read_manifest(folder)
    assert manifest.inputs == ROWS
    assert set(manifest.sha256) == {TENSORS, LOG}


def test_fingerprints_are_the_inputs() -> None:
    one = Identity({"a": 1, "b": "x"})
    assert one.fingerprint == Identity({"b": "x", "a": 1}).fingerprint
    assert one.fingerprint != Identity({"a": 2, "b": "x"}).fingerprint
    assert one.differences({"a": 2, "c": 0}) == [
        "a is 1, and was 2", 'b is "x", and was null', "c is null, and was 0",
    ]  # fmt: skip
