"""What the shipped default came to: the summary of a finished `make run`, kept as a result.

make run && python -m benchmarks.default_run --json benchmarks/results/default_run.cpu.json
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from fitlora.report.summary import summarize


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A model's figures, an interval as its two ends."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if name.endswith("_interval"):
            name = name.removesuffix("_interval")
            found[f"{name}_low"], found[f"{name}_high"] = value
        else:
            found[name] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="where the run's artifacts are")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = summarize(args.root).model_dump()
    run = {key: found[key] for key in ("rows", "device", "plan", "steps", "seconds")}
    memory = {key: found[key] for key in ("predicted_peak_bytes", "measured_peak_bytes")}
    merge = {f"merge_{key}": value for key, value in found["merge"].items()}
    rows = [{"model": name, **flat(metrics)} for name, metrics in found["models"].items()]
    run |= memory | merge
    write_result(args.json, "default_run", rows, run=run, cpu_cores=os.cpu_count())


if __name__ == "__main__":
    main()
