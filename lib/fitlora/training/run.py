"""A whole training run on this machine: from a Plan and a 4-bit checkpoint to an adapter on disk."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fitlora.adapter import adapter_config, save_adapter
from fitlora.artifacts import Hardware, read_json, write_text_atomically
from fitlora.console import say
from fitlora.data.packing import padding_share
from fitlora.device import limit_memory, torch_device
from fitlora.errors import UserError
from fitlora.memory.advice import Edge, Measured, recommendations
from fitlora.memory.estimate import Estimator, Load
from fitlora.memory.tracker import MemoryTracker
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import make_transport
from fitlora.params import Params
from fitlora.plan import Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.ladder import Ladder, faster
from fitlora.planner.model import size_of
from fitlora.step.build import StepSkeleton, lora_targets, step_skeleton
from fitlora.step.devices import next_devices
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights
from fitlora.training.agreement import Agreement
from fitlora.training.batches import Batches
from fitlora.training.checkpoint import Checkpoints
from fitlora.training.data import TokenizedSplit, longest, sizes
from fitlora.training.identity import Identity, identity_of
from fitlora.training.log import RunLog
from fitlora.training.loop import Outcome, Run
from fitlora.training.parallel import Ranks
from fitlora.training.progress import Expected, TrainingProgress
from fitlora.training.recovery import Recovery, predictor, room_on, shorter_rows
from fitlora.training.start import check_start, read_start
from fitlora.training.trackers import FOLDER as TRACKERS
from fitlora.training.trackers import start_accelerator


@dataclass(frozen=True)
class Places:
    """Where a run writes; and `probe_log`, where the planner's probe left its speed.

    memory_log: what memory came to, phase by phase, with warnings and recommendations.
    """

    adapter: Path
    log: Path
    curves: Path
    scratch: Path
    probe_log: Path | None = None
    memory_log: Path | None = None


ALONE = Ranks()


def train(
    params: Params,
    plan: Plan,
    hardware: Hardware,
    *,
    config: Any,
    checkpoint: Path,
    rows: TokenizedSplit,
    validation: TokenizedSplit,
    places: Places,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains and saves the adapter; returns the log's last record.

    config: the model's transformers config. checkpoint: the folder of its 4-bit (or 16-bit) weights.
    ranks: the processes that share the work, of which this is one. The plan is for so many devices.
    Stopped before its end, it leaves an earlier adapter as it was.
    """
    settings = StepSettings.of(params)
    batches = Batches(rows.sequences, plan.effective_batch_size, params.train.seed)
    load = Load(
        sizes(longest(rows.sequences, plan.sequences_per_device)),
        sizes(longest(validation.sequences, plan.evaluation_batch_size)),
    )
    estimator = Estimator(config, settings, load, hardware)
    predicted = ranks.from_first(lambda: estimator(plan))

    device = torch_device(hardware)
    devices = next_devices(device, plan.devices_of_process)
    limit_memory(hardware, devices)
    agreement = Agreement(ranks)
    # of the first step, and gone with it: what is filled holds the step's memory
    skeletons = [step_skeleton(config, plan, settings)]
    model = size_of(config, skeletons[0])
    if not model.by_hand:
        if params.train.precision == "dynamic":
            raise UserError(
                "train.precision is dynamic, which needs a family of models that FitLoRA does by hand; "
                "set it to fixed"
            )
        if ranks.is_first:
            say(f"taking the general step, which is slower: {skeletons[0].reason}")
    weights = _weights(skeletons[0], params, checkpoint, device)

    def build(plan: Plan) -> TrainingStep:
        host = HostMemory(hardware.host_budget_bytes // ranks.host_devices)
        shared = ranks.shared_memory(agreement.meet) if plan.uses_host else None
        transport = make_transport(device, host, shared)
        transport.folder = places.scratch
        skeleton = skeletons.pop() if skeletons else step_skeleton(config, plan, settings)
        return replace(skeleton, plan=plan).fill(weights, transport)

    identity = identity_of(params, plan, checkpoint, rows, validation)
    _check_alike(identity, ranks)
    tracked = places.scratch / TRACKERS / identity.fingerprint
    accelerator = start_accelerator(params, device, tracked)
    checkpoints = Checkpoints(places.scratch, identity, say)
    first = ranks.is_first  # the others would write over its files
    memory = places.scratch / "memory"
    edge = Edge(
        predicted.peak_allocated_bytes,
        hardware.allocator_bytes if device.type == "cuda" else None,
    )
    tracker = MemoryTracker(
        memory if first else memory / f"rank{ranks.rank}",
        devices[predicted.heaviest_device],
        edge=edge,
    )
    log = RunLog(places.log if first else None)
    room = room_on(devices, hardware)
    ladder = Ladder(
        plan,
        Freedom.most(plan, model),
        predictor(estimator, hardware),
        lambda: agreement.least(room()),
    )
    progress: TrainingProgress | None = None

    def predict_switched() -> None:
        """Takes in the precisions that the run has switched to, which may take more."""
        switched = {plan.in_precision(r["after"]) for r in log.records if r["event"] == "precision"}
        with _disable_current_modes():  # a tracker counts the run's tensors, and not the estimate's
            found = [estimator(other).peak_allocated_bytes for other in switched]
        edge.predicted_bytes = max([predicted.peak_allocated_bytes, *found])

    def record(content: dict[str, Any]) -> None:
        log.write(content)
        if content["event"] == "precision":
            predict_switched()
        if progress is not None:
            progress.show(content)
        track(content)

    def track(content: dict[str, Any]) -> None:
        accelerator.log(_numbers(content), step=content["step"])

    run = Run(
        batches=batches,
        validation=validation.sequences,
        train=params.train,
        tracker=tracker,
        log=log,
        record=record,
        checkpoints=checkpoints,
        recovery=Recovery(
            build, ladder, record, devices, agreement=agreement, suggest=shorter_rows(estimator)
        ),
        ranks=ranks,
    )
    with log, run.stop:
        if run.begin():
            predict_switched()
            say(f"going on after step {run.progress.done} of {run.total_steps}, which was saved")
            for content in log.records:  # trackers begin anew, and want it whole
                track(content)
        elif first:
            for other in checkpoints.others():
                say(f"not going on from {other}")
        forecast = _probed_speed(places.probe_log, plan)
        _announce(run, forecast)
        expected = Expected(hardware.budget_bytes, predicted.peak_allocated_bytes, forecast)
        with TrainingProgress(run.total_steps, run.progress.done, expected) as bar:
            progress = bar if first else None
            outcome = run()
            progress = None
        measured = ranks.gather(_of_this_process(tracker, devices, ranks.rank))
        processes = [on_device for process in measured for on_device in process]
        accelerator.end_training()  # ends the group of processes as well
        end: dict[str, Any] = {
            "event": "end",
            "steps": outcome.steps,
            "seconds": round(run.elapsed(), 3),
            "best_step": outcome.best_step,
            "best_validation_loss": outcome.best_loss,
            "stopped_early": outcome.stopped_early,
            "forecast_tokens_per_second": forecast,
            "predicted_peak_bytes": edge.predicted_bytes,
            "measured_peak_bytes": tracker.peak_allocated_bytes,
            "measured_reserved_bytes": tracker.peak_reserved_bytes,
        }
        if len(processes) > 1:
            end |= _peaks(processes)
        if first:
            budget = hardware.budget_bytes if device.type == "cuda" else None
            end["recommendations"] = _advice(run, estimator, budget, hardware.context_bytes)
            end["warnings"] = tracker.warnings
        if params.model.trust_remote_code:
            end["trust_remote_code"] = True
        log.write(end)
        if first:  # a signal that comes now finds the run done, and lets it end
            write_text_atomically(places.curves, json.dumps(log.curves, indent=1) + "\n")
            _save(outcome, run.step.model, params, places.adapter)
            for line in end["recommendations"]:
                say(f"memory: {line}")
            if places.memory_log is not None:
                _write_memory_log(places.memory_log, end, tracker)
            checkpoints.clear()  # last: what is killed before goes on from its end
    return end


def _weights(
    skeleton: StepSkeleton, params: Params, checkpoint: Path, device: torch.device
) -> CheckpointWeights:
    """What a step is filled with; raises UserError where it is stored otherwise than params say."""
    start_from = None
    if params.train.from_adapter is not None:
        folder = Path(params.train.from_adapter)
        start_from = read_start(folder, params.lora)
        wanted = {n: p for n, p in skeleton.model.named_parameters() if p.requires_grad}
        check_start(folder, start_from, wanted)
        say(f"going on from the adapter in {folder}")
    weights = CheckpointWeights(checkpoint, device, adapter=start_from, seed=params.train.seed)
    spec = skeleton.settings.spec
    if spec is not None:
        weights.check(spec)
    return weights


def _check_alike(identity: Identity, ranks: Ranks) -> None:
    """Raises UserError where processes would not train the same thing: hosts with other files."""
    for rank, inputs in enumerate(ranks.gather(dict(identity.inputs))):
        found = identity.differences(inputs)
        if found:
            raise UserError(
                f"process {rank} has other inputs than process {ranks.rank}: {'; '.join(found)}. Give "
                "every host the same params, data and artifacts"
            )


def _of_this_process(
    tracker: MemoryTracker, devices: Sequence[torch.device], rank: int
) -> list[dict[str, Any]]:
    """What it took of each of its devices. The tracker has one; the allocator knows of the others."""
    found = []
    for device in devices:
        tracked = device == tracker.device
        found.append(
            {
                "rank": rank,
                "host": os.uname().nodename,
                "device": str(device),
                "measured_peak_bytes": (
                    tracker.peak_allocated_bytes
                    if tracked
                    else torch.cuda.max_memory_allocated(device)
                ),
                "measured_reserved_bytes": (
                    tracker.peak_reserved_bytes
                    if tracked
                    else torch.cuda.max_memory_reserved(device)
                ),
            }
        )
    return found


def _peaks(processes: list[dict[str, Any]]) -> dict[str, Any]:
    """The memory of each process, and the highest, which is what the plan is held against.

    A process has one entry for each of its devices.
    """
    highest = {
        key: max((p[key] for p in processes if p[key] is not None), default=None)
        for key in ("measured_peak_bytes", "measured_reserved_bytes")
    }
    return {**highest, "processes": processes}


def _advice(
    run: Run, estimator: Estimator, budget_bytes: int | None, context_bytes: int
) -> list[str]:
    """What memory says about the next run. budget_bytes: None where nothing holds the run to one."""
    tracker, plan = run.tracker, run.step.plan
    reserved = tracker.peak_reserved_bytes
    measured = Measured(
        peak_bytes=tracker.peak_allocated_bytes,
        reserved_bytes=reserved,
        process_bytes=None if reserved is None else reserved + context_bytes,
        budget_bytes=budget_bytes,
        phase_bytes=tracker.phase_peaks,
    )
    larger = faster(plan) if measured.is_idle else {}
    lengths = [len(sequence.tokens) for sequence in run.batches.sequences]
    return list(
        recommendations(
            measured,
            padding_share(lengths, plan.micro_batch_size),
            [(name, estimator(other).process_bytes) for name, other in larger.items()],
        )
    )


def _write_memory_log(path: Path, end: dict[str, Any], tracker: MemoryTracker) -> None:
    content = {
        "predicted_peak_bytes": end["predicted_peak_bytes"],
        "measured_peak_bytes": end["measured_peak_bytes"],
        "measured_reserved_bytes": end["measured_reserved_bytes"],
        "phase_bytes": tracker.phase_peaks,
        "warnings": end["warnings"],
        "recommendations": end["recommendations"],
        "seconds": end["seconds"],
        "tracker_seconds": round(tracker.own_seconds, 3),
        "every_step": str(tracker.path),
    }
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def _announce(run: Run, probed_tokens_per_second: float | None) -> None:
    left = run.total_steps - run.progress.done
    say(f"training {left} steps: {run.step.plan.describe()}")
    if probed_tokens_per_second is None:
        say("expected time: told after the first step, as no probe has measured this plan's speed")
        return
    sequences = run.batches.sequences
    tokens = sum(len(s.tokens) for s in sequences) / len(sequences)
    seconds = tokens * run.batches.size * left / probed_tokens_per_second
    say(f"expected time: {_duration(seconds)}, validation aside, by the probe's speed")


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record a tracker can draw, by name; peaks of phases and of components among it."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in ("phase_bytes", "component_bytes"):
            found |= {f"memory/{name}_bytes": count for name, count in value.items()}
        elif isinstance(value, int | float) and key != "step":
            found[key] = value
    return found


def _probed_speed(probe_log: Path | None, plan: Plan) -> float | None:
    """Tokens per second that the probe of just this plan reached; None where it is not known."""
    if probe_log is None or not probe_log.is_file():
        return None
    try:
        probes = read_json(probe_log)["probes"]
        for found in probes:
            if found["plan"] == plan.model_dump(mode="json") and found["tokens_per_second"]:
                return float(found["tokens_per_second"])
    except (ValueError, KeyError, TypeError):
        pass  # a log for people, which nothing depends on
    return None


def _duration(seconds: float) -> str:
    """`4000` -> `"1 h 7 min"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _save(outcome: Outcome, model: torch.nn.Module, params: Params, folder: Path) -> None:
    """The adapter that goes on in `folder`, the other of best and last in a folder inside.

    It is written beside its place and renamed, so that it is there as a whole or not at all.
    """
    described = adapter_config(
        params.lora,
        lora_targets(model),
        base_model=params.model.id,
        revision=params.model.revision,
    )
    best_goes_on = params.train.keep == "best"
    kept, other = outcome.best, outcome.last
    if not best_goes_on:
        kept, other = other, kept
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_adapter(partial, kept, described)
        save_adapter(partial / ("last" if best_goes_on else "best"), other, described)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
