"""What the shipped default came to: the summary of a finished `make run`, kept as a result.

make run && python -m benchmarks.default_run --json benchmarks/results/default_run.cpu.json
"""

import argparse
import os
from pathlib import Path

from benchmarks.common import write_result
from fitlora.report.summary import summarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="where the run's artifacts are")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = summarize(args.root).model_dump()
    run = {key: found[key] for key in ("rows", "device", "plan", "steps", "seconds")}
    memory = {key: found[key] for key in ("predicted_peak_bytes", "measured_peak_bytes")}
    rows = [{"model": name, **metrics} for name, metrics in found["models"].items()]
    write_result(args.json, "default_run", rows, run={**run, **memory}, cpu_cores=os.cpu_count())


if __name__ == "__main__":
    main()
