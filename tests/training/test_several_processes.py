"""Two processes on this host, by gloo: the numbers of one, one copy of weights, and kill -9."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.errors import UserError
from fitlora.training.launch import launch
from fitlora.training.parallel import Ranks
from tests.training.several_worker import figures, make, streamed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

WORKER = "tests.training.several_worker"
ROUNDING = 1e-3  # sums in another order, which later steps enlarge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_processes_share_a_batch_until_one_is_killed(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="process 1 of 2 was ended by SIGKILL"):
        launch(2, WORKER, ["check", str(folder)])
    said = capfd.readouterr()
    assert "this is process 0" in said.out
    assert "this is process 1" not in said.out, "the first one speaks for all"
    assert "another process of the run is gone" in said.err
    assert "goes on from step 3, which is saved" in said.err
    found = [read(folder / f"found{rank}.json") for rank in range(2)]
    for rank in range(2):
        assert found[rank]["place"] == [rank, 2, rank, 2]
        assert found[rank]["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert found[rank]["from_first"] == 0
        assert found[rank]["any"] == [False, True]
    alone = streamed(Ranks())
    for one in found:
        two = one["streamed"]
        assert two["losses"][:2] == pytest.approx(two["losses"][2:], rel=ROUNDING), "as resident"
        assert two["shared"] == alone["shared"] > 2**22
        assert two["Rss"] == pytest.approx(two["shared"], rel=0.02), "all of it is mapped"
        assert two["Pss"] == pytest.approx(two["shared"] / 2, rel=0.02), "and is there once"
    # each process's loss was summed over both
    assert found[0]["streamed"]["losses"] == found[1]["streamed"]["losses"]
    assert found[0]["streamed"]["losses"] == pytest.approx(alone["losses"], rel=ROUNDING)


def test_torchrun_starts_a_lost_process_again_and_the_numbers_are_those_of_one(
    folder: Path, tmp_path: Path
) -> None:
    """Two hosts of a process each, over loopback; from what the first test's run left in step 3."""
    assert (folder / "killed_in_step_4").exists()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test",
        "--max-restarts=2", "-m", WORKER, "lost", str(folder),
    ]  # fmt: skip
    # hosts that share a store count restarts each by itself, and may wait for each other for ever
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    hosts = []
    for host in range(2):
        with (folder / f"host{host}.log").open("w") as log:
            hosts.append(subprocess.Popen(torchrun, env=environment, stdout=log, stderr=log))
    try:
        ends = [host.wait(300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert ends == [0, 0], [(folder / f"host{host}.log").read_text() for host in range(2)]
    assert (folder / "killed_in_step_5").exists()
    whole = make(tmp_path, Ranks())
    whole()
    for rank in range(2):
        assert read(folder / f"figures{rank}.json") == pytest.approx(figures(whole), rel=ROUNDING)


def test_a_run_of_two_processes_goes_on_in_one(folder: Path, tmp_path: Path) -> None:
    """Whatever the number of processes, step n has the same samples: the checkpoint is as good."""
    assert sorted(path.name for path in (folder / "run").glob("checkpoints/*/step-*"))
    again, whole = make(folder / "run", Ranks()), make(tmp_path, Ranks())
    assert again.begin()
    assert again.progress.done > 0
    again()
    whole()
    assert figures(again) == pytest.approx(figures(whole), rel=ROUNDING)
