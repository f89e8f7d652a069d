"""What benchmarks/results/ has: files that tell how they were made, and no paths of one machine."""

import json
from pathlib import Path

import pytest

from benchmarks.common import called

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_tells_how_it_was_made(path: Path) -> None:
    content = json.loads(path.read_text())
    assert {"command", "device", "versions", "date", "commit"} <= content.keys()
    for folder in ("/tmp/", "/root/", "/home/"):
        assert folder not in content["command"]


def test_where_a_program_writes_is_left_out() -> None:
    arguments = ["/x/benchmarks/a.py", "--json", "/tmp/a.json", "--work=/tmp/w", "--rows", "1", "2"]
    assert called(arguments) == "a.py --rows 1 2"
