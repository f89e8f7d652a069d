"""Weights on disk are the resident ones too, through fewer buffers than there are layers."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.errors import ArtifactError, UserError
from fitlora.offload.disk import DiskRing
from fitlora.offload.residency import Residency, streamed_bytes
from fitlora.offload.transport import HostTransport, TracedTransport
from tests.offload.stacks import WIDTH, Run, make_stack, resident, streamed
from tests.offload.transports import DelayedTransport

LAYERS = 6
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
ALL = tuple(range(LAYERS))


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("buffers", [1, 2, 4])
@pytest.mark.parametrize("on_disk", [ALL, (0, 2, 4), (5,)])
def test_it_is_the_resident_stack(
    tmp_path: Path, slots: int, buffers: int, on_disk: tuple[int, ...]
) -> None:
    plain = Run(resident(LAYERS))
    transport = DelayedTransport(slots)
    run = Run(
        *streamed(
            LAYERS, ALL, transport, slots, on_disk=on_disk, folder=tmp_path, disk_buffers=buffers
        )
    )
    for _ in range(3):
        assert_same(run.train(X), plain.train(X))
    assert torch.equal(run.evaluate(X), plain.evaluate(X))
    assert torch.equal(run.evaluate(X), plain.evaluate(X))
    assert list(tmp_path.iterdir()) == []


def test_only_the_buffers_are_pinned(tmp_path: Path) -> None:
    transport = HostTransport(torch.device("cpu"))
    stack, _ = streamed(
        LAYERS, ALL, transport, 2, on_disk=(1, 2, 3, 4), folder=tmp_path, disk_buffers=2
    )
    sizes = [streamed_bytes(layer) for layer in make_stack(LAYERS)]
    assert len(stack) == LAYERS
    assert transport.pinned_bytes == sizes[0] + sizes[5] + 2 * max(sizes[1:5])
    assert transport.memory.bytes == transport.pinned_bytes


def test_an_estimate_reads_nothing_and_counts_the_same(tmp_path: Path) -> None:
    stack = make_stack(LAYERS)
    with FakeTensorMode():
        transport = TracedTransport(torch.device("cpu"))
        residency = Residency(
            stack, ALL, transport, slots=2, on_disk=(1, 2, 3), folder=tmp_path / "unused"
        )
        residency.start()
        for index in ALL:
            residency.enter(index)
            residency.leave(index)
        transport.pin()
    sizes = [streamed_bytes(layer) for layer in stack]
    assert transport.pinned_bytes == sizes[0] + sizes[4] + sizes[5] + 3 * max(sizes[1:4])
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("backward", [False, True])
def test_after_a_broken_pass_it_goes_on(tmp_path: Path, backward: bool) -> None:
    stack, residency = streamed(
        LAYERS, ALL, DelayedTransport(), 2, on_disk=(0, 2, 4), folder=tmp_path, disk_buffers=2
    )
    run = Run(stack, residency)
    run.fail_at = (3, backward)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.train(X)
    residency.reset()
    run.fail_at = None
    assert_same(run.train(X), Run(resident(LAYERS)).train(X))


def test_what_will_be_wanted_is_read_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    fill = DiskRing._fill

    def noted(self: DiskRing, flat: torch.Tensor, number: int) -> None:
        read.append(number)
        fill(self, flat, number)

    monkeypatch.setattr(DiskRing, "_fill", noted)
    _, residency = streamed(
        LAYERS, ALL, HostTransport(torch.device("cpu")), 1, on_disk=(1, 3, 5), folder=tmp_path,
        disk_buffers=2,
    )  # fmt: skip
    residency.reset()  # waits for what is being read
    assert sorted(read) == [1, 3]
    residency.begin(backward_follows=True)
    for index in range(2):
        residency.enter(index)
        residency.leave(index)
    residency.reset()
    assert sorted(read) == [1, 3, 5]


def test_a_read_that_fails_is_told_where_the_weights_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    _, residency = streamed(
        LAYERS, ALL, HostTransport(torch.device("cpu")), 1, on_disk=(1,), folder=tmp_path
    )
    residency.enter(0)
    residency.leave(0)
    with pytest.raises(ArtifactError, match="ends early"):
        residency.enter(1)


def test_a_full_disk_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"10 B are free.*hardware.host_memory_budget"):
        streamed(LAYERS, ALL, HostTransport(torch.device("cpu")), 1, on_disk=(1,), folder=tmp_path)
