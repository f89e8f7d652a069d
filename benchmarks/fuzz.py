"""Does a broken file break a reader? Thousands of them for each reader, and what came of it.

    python -m benchmarks.fuzz --json benchmarks/results/fuzz.cpu.json

Readers, files and what is asked of them are those of tests/fuzz/test_readers.py: from noise and from
good files with something wrong in them a reader takes what they say, or refuses with an error of ours
that has words; within five seconds, and without opening a file elsewhere. A row is a reader: how many
files it was given (`inputs`), how often something was read and refused (some files are read in several
ways), how many different faults were found (`faults`), and the CPU time of the slowest input.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import seed, settings

from benchmarks.common import write_result
from tests.fuzz import inputs, test_readers

TESTS: dict[str, Any] = {
    name.removeprefix("test_"): test
    for name, test in vars(test_readers).items()
    if name.startswith("test_") and hasattr(test, "hypothesis")
}


class Watched:
    """A test as hypothesis calls it, with each call counted and timed."""

    def __init__(self, test: Callable[..., None]) -> None:
        self.test, self.calls, self.slowest_seconds = test, 0, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> None:
        start = time.process_time()
        self.test(*arguments, **options)
        self.calls += 1
        self.slowest_seconds = max(self.slowest_seconds, time.process_time() - start)


def fuzz(name: str, count: int, number: int) -> dict[str, Any]:
    """A row. count: of inputs. number: the seed that they are drawn with."""
    test = TESTS[name]
    watched = Watched(test.hypothesis.inner_test)
    test.hypothesis.inner_test = lambda *args, **options: watched(*args, **options)
    drawn = seed(number)(settings(max_examples=count, database=None, **inputs.SETTINGS)(test))
    inputs.outcomes.clear()
    faults, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            drawn(tmp_path=Path(folder))
        except Exception as error:  # whatever it is, it was found
            faults = len(getattr(error, "exceptions", (error,)))
            traceback.print_exc()
    return {
        "reader": name.replace("_", " "),
        "inputs": watched.calls,
        "read": inputs.outcomes["read"],
        "refused": inputs.outcomes["refused"],
        "faults": faults,
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_cpu_seconds": round(watched.slowest_seconds, 3),
    }


def rows(count: int, number: int, only: str) -> Iterator[dict[str, Any]]:
    for name in TESTS:
        if only in name:
            row = fuzz(name, count, number)
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            yield row


def others(file: Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a result file that are of other readers, with the commit that they were found at."""
    if not file.is_file():
        return []
    before, again = json.loads(file.read_text()), {row["reader"] for row in found}
    return [
        {"commit": before["commit"], **row} for row in before["rows"] if row["reader"] not in again
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers with this in their name; others stay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = []
    for row in rows(args.inputs, args.seed, args.only):
        found.append(row)
        if args.json is not None:
            write_result(args.json, "fuzz", [*others(args.json, found), *found], seed=args.seed)
    return 1 if any(row["faults"] for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
