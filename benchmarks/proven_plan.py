"""How long from a model's folder to a proven plan, and how many probes it takes.

    python -m benchmarks.proven_plan --json benchmarks/results/proven_plan.h200.json      on a GPU
    python -m benchmarks.proven_plan --target H100 --json benchmarks/results/proven_plan.cpu.json
    python -m benchmarks.proven_plan --models tiny --budgets 1 --json /tmp/x.json         on any CPU

The stages up to `find_batch_size`, each a process of its own, as DVC starts it, in a folder that had
nothing: the machine's measurement, the estimate, the search and its probes, Python's start and imports
among all of them. Planning reads of a checkpoint what its files are called and how large they are, so
its weights are a hole in a file here. With --target the GPU is described and not there: no probe.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, SHAPES, device_label, make_hollow_checkpoint, write_result
from benchmarks.pipeline import STAGES, run_stage, write_inputs
from fitlora.artifacts import PLAN, PROBE_LOG, PlanArtifact

LAST = STAGES.index("find_batch_size")


def measured(model: str, budget: float, target: str | None, work: Path) -> dict[str, Any]:
    """The row of a model and a budget (GiB). work: a folder of its own; it is emptied first."""
    shutil.rmtree(work, ignore_errors=True)
    tiny = model == "tiny"
    asked: dict[str, Any] = (
        {"target": {"name": target}} if target is not None else {"device": "cpu"} if tiny else {}
    )
    hardware = {"memory_budget": f"{budget:g}GiB", **asked}
    write_inputs(work, tokens=64 if tiny else 2048, batch=16, hardware=hardware)
    make_hollow_checkpoint(model, work / "model")
    stages = [run_stage(stage, work) for stage in STAGES[: LAST + 1]]
    log = json.loads((work / PROBE_LOG).read_text())
    return {
        "model": model,
        "budget_gib": budget,
        "target": target,
        "seconds": sum(stage["seconds"] for stage in stages),
        **{f"{stage['stage']}_seconds": stage["seconds"] for stage in stages},
        "probes": len(log["probes"]),
        "plan": PlanArtifact.read(work / PLAN).plan.describe(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "llama-3-70b"]
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[8.0, 24.0], help="in GiB")
    parser.add_argument("--target", help="a GPU by name, in place of the one that is there")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "proven_plan")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    path = args.json or ROOT / "benchmarks" / "results" / f"proven_plan.{device_label()}.json"
    rows = []
    for model in args.models:
        for budget in args.budgets:
            start = time.perf_counter()
            rows.append(measured(model, budget, args.target, args.work / f"{model}-{budget:g}"))
            whole = time.perf_counter() - start
            print(f"{json.dumps(rows[-1], indent=1)}\n{whole:.0f} s with the folder", flush=True)
            write_result(path, "proven_plan", rows)


if __name__ == "__main__":
    main()
