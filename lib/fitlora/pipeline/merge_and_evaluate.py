"""The merged model, four models on the held-out rows, and the report.

-> merged_model/, evaluation.json, run.json, reports/report.html
"""

import os
import shutil
from pathlib import Path

import torch

from fitlora.artifacts import (
    ADAPTER,
    EVALUATION,
    HARDWARE,
    MERGED_MODEL,
    PLAN,
    QUANTIZED_MODEL,
    RUN,
    Evaluation,
    Hardware,
    PlanArtifact,
    names_remedy,
)
from fitlora.console import say
from fitlora.device import give_back_memory, limit_memory, torch_device
from fitlora.evaluation.compare import compare, read_held_out
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import Memory, check_adapter, check_folder, contenders
from fitlora.model import resolve_model
from fitlora.params import Params, with_found
from fitlora.report.page import write_report
from fitlora.report.sections import Trained


@names_remedy
def merge_and_evaluate(params: Params, root: Path = Path()) -> Evaluation:
    """Merges the adapter and compares base, quantized base, adapter and merged model."""
    planned = PlanArtifact.read(root / PLAN)
    plan, params = planned.plan, with_found(params, planned.found, str(root / PLAN))
    hardware = Hardware.read(root / HARDWARE)
    original = resolve_model(params.model.id, params.model.revision, weights=True)
    # All that can be wrong with the inputs is found before the first byte is written.
    trained = Trained.read(params, root)
    if plan.storage_dtype == "float16" and trained.log.layers_left(plan.compute_dtype):
        say("evaluated in float32, as the run had to leave float16")
        plan = plan.replace(compute_dtype="float32")
    check_folder(root / QUANTIZED_MODEL, "quantize_model")
    check_adapter(root / ADAPTER, params.lora)
    held_out = read_held_out(
        original, params.data, params.evaluate, trust_remote_code=params.model.trust_remote_code
    )
    limit_memory(hardware)
    device = torch_device(hardware)
    # It takes its place when it has passed the gate; an earlier adapter's is not left in it.
    candidate = root / MERGED_MODEL.with_name(".merged_model.candidate")
    for folder in (candidate, root / MERGED_MODEL):
        shutil.rmtree(folder, ignore_errors=True)
    merge_checkpoint(
        original=original,
        quantized=root / QUANTIZED_MODEL,
        adapter=root / ADAPTER,
        target=candidate,
        base=params.merge.base,
        bits=params.merge.bits,
        device=device,
        compute_dtype=getattr(torch, plan.storage_dtype),
    )
    give_back_memory()
    models = contenders(
        original=original,
        quantized=root / QUANTIZED_MODEL,
        adapter=root / ADAPTER,
        merged=candidate,
        quantization=params.quantization,
        lora=params.lora,
        merged_bits=params.merge.bits,
        trust_remote_code=params.model.trust_remote_code,
    )
    memory = Memory(device, hardware.allocator_bytes, hardware.host_budget_bytes)
    try:
        evaluation = compare(
            models, held_out, plan, memory, limits=params.merge, samples=params.evaluate.samples
        )
        os.replace(candidate, root / MERGED_MODEL)
    finally:
        shutil.rmtree(candidate, ignore_errors=True)
    evaluation.write(root / EVALUATION)
    trained.log.figures().write(root / RUN)
    say(f"report: {write_report(trained, evaluation, root)}")
    return evaluation
