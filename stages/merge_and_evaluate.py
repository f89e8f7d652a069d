"""Stage: the merged model, and base, 4-bit base, adapter and merged model on held-out rows."""

import torch

from fitlora import artifacts
from fitlora.artifacts import Hardware, PlanArtifact
from fitlora.console import run
from fitlora.device import give_back_memory, limit_memory, torch_device
from fitlora.evaluation.compare import compare, read_held_out
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import Memory, check_adapter, check_folder, contenders
from fitlora.model import resolve_model
from fitlora.params import read_params


def main() -> None:
    params = read_params()
    plan = PlanArtifact.read(artifacts.PLAN).plan
    hardware = Hardware.read(artifacts.HARDWARE)
    original = resolve_model(params.model.id, params.model.revision, weights=True)
    # All that can be wrong with the inputs is found before the first byte is written.
    check_folder(artifacts.QUANTIZED_MODEL, "quantize_model")
    check_adapter(artifacts.ADAPTER, params.lora)
    held_out = read_held_out(
        original, params.data, params.evaluate, trust_remote_code=params.model.trust_remote_code
    )
    limit_memory(hardware)
    device = torch_device(hardware)
    merge_checkpoint(
        original=original,
        quantized=artifacts.QUANTIZED_MODEL,
        adapter=artifacts.ADAPTER,
        target=artifacts.MERGED_MODEL,
        base=params.merge.base,
        device=device,
        compute_dtype=getattr(torch, plan.compute_dtype),
    )
    give_back_memory()
    models = contenders(
        original=original,
        quantized=artifacts.QUANTIZED_MODEL,
        adapter=artifacts.ADAPTER,
        merged=artifacts.MERGED_MODEL,
        quantization=params.quantization,
        lora=params.lora,
        trust_remote_code=params.model.trust_remote_code,
    )
    memory = Memory(device, hardware.allocator_bytes, hardware.host_budget_bytes)
    evaluation = compare(models, held_out, plan, memory, samples=params.evaluate.samples)
    evaluation.write(artifacts.EVALUATION)


if __name__ == "__main__":
    run(main)
