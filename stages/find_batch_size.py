"""Stage: the Plan, proven by a probe -> plan.json (and logs/probe.json, which nothing depends on)."""

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
from fitlora.console import run, say
from fitlora.memory.estimate import Load
from fitlora.model import load_config, resolve_model
from fitlora.params import read_params
from fitlora.planner.find import find_plan
from fitlora.planner.probe import write_log
from fitlora.report.memory import plan_lines
from fitlora.step.settings import StepSettings


def main() -> None:
    params = read_params()
    hardware = Hardware.read(HARDWARE)
    known = MemoryEstimate.read(MEMORY_ESTIMATE)
    load = Load.of(Dataset.read(DATASET))
    folder = resolve_model(params.model.id, params.model.revision, weights=False)
    config = load_config(folder, trust_remote_code=params.model.trust_remote_code)
    choice, probes = find_plan(
        config,
        params,
        StepSettings.of(params),
        load,
        hardware,
        known=[known.default, *known.neighbours.values()],
    )
    PlanArtifact(plan=choice.plan, reasons=choice.reasons).write(PLAN)
    write_log(PROBE_LOG, choice.estimate, probes)
    for line in plan_lines(choice.estimate, choice.reasons, probes):
        say(line)


if __name__ == "__main__":
    run(main)
