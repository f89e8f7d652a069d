"""A short form of `python -m benchmarks.faults`: each kind of fault once, and what it cost."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Forked processes want a parent that has trained nothing, so it is a process of its own.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from benchmarks.faults import run
torch.set_num_threads(1)
rows = list(run(Path(sys.argv[1]), seed=1, share=0.01))
print("rows", json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each kind of fault, by its name."""
    import json
    import os

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("faults"))],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'lib'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, done.stderr
    assert last
    assert last[0].startswith("rows "), done.stdout
    found = json.loads(last[0].removeprefix("rows "))
    return {row["fault"]: row for row in found}


@pytest.mark.slow
def test_every_kind_of_fault_is_survived(rows: dict[str, dict[str, Any]]) -> None:
    assert len(rows) >= 26
    for name, row in rows.items():
        assert row["injected"] >= 1, name
        assert row["survived"] == row["injected"], name
        assert row["result_differs"] == 0, name


@pytest.mark.slow
def test_no_more_is_lost_than_promised(rows: dict[str, dict[str, Any]]) -> None:
    from benchmarks.faults_bench import CHECKPOINT_EVERY

    for name in ("kill -9", "GPU vanished", "disk full"):
        assert rows[name]["lost_steps"] <= CHECKPOINT_EVERY
    for name in ("SIGTERM", "SIGINT", "overflow in backward", "overflow in optimizer"):
        assert rows[name]["lost_steps"] == 0
