"""The Plan, proven by a probe -> plan.json (and logs/probe.json, which nothing depends on)."""

from pathlib import Path

from fitlora.artifacts import (
    DATASET,
    HARDWARE,
    MEMORY_ESTIMATE,
    PLAN,
    PROBE_LOG,
    Dataset,
    Hardware,
    MemoryEstimate,
    PlanArtifact,
)
from fitlora.console import say
from fitlora.memory.estimate import Load
from fitlora.model import load_config, resolve_model
from fitlora.params import Params, with_found
from fitlora.planner.find import find_plan
from fitlora.planner.probe import write_log
from fitlora.planner.search import device_count
from fitlora.planner.task import Task
from fitlora.report.frontier import write_frontier
from fitlora.report.memory import plan_lines


def find_batch_size(
    params: Params, root: Path = Path(), *, frontier: Path | None = None
) -> PlanArtifact:
    """Searches for the preferred plan that fits, and proves it on the device.

    frontier: a file for the picture of speed over memory.
    """
    hardware = Hardware.read(root / HARDWARE)
    hardware = hardware.among(device_count(params, hardware))
    known = MemoryEstimate.read(root / MEMORY_ESTIMATE)
    params = with_found(params, known.found, str(root / MEMORY_ESTIMATE), known.STAGE)
    load = Load.of(Dataset.read(root / DATASET))
    folder = resolve_model(params.model.id, params.model.revision, weights=False)
    config = load_config(folder, trust_remote_code=params.model.trust_remote_code)
    task = Task(config, params, load, hardware)
    choice, probes = find_plan(task, known=[known.default, *known.neighbours.values()])
    artifact = PlanArtifact(plan=choice.plan, reasons=choice.reasons, found=known.found)
    artifact.write(root / PLAN)
    write_log(root / PROBE_LOG, choice, probes)
    for line in plan_lines(choice, hardware.budget_bytes, probes):
        say(line)
    if frontier is not None:
        write_frontier(frontier, task, choice)
    return artifact
