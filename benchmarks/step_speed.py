"""Tokens per second of the training step over the memory it takes, ours beside its peers.

    python -m benchmarks.step_speed --json benchmarks/results/step_speed.h100.json

The work is one optimizer step of QLoRA: NF4 with double quantization, LoRA of rank 16 on all linear
layers, AdamW, sequences of --tokens tokens, no dropout, on random weights of the model's shape. Ours is
swept over micro-batch, recomputation and what is on the host; `peft` is transformers with peft and
bitsandbytes as their documentation has it, with gradient checkpointing and without, and `peft+liger` the
same with Liger's kernels where they are installed. Each system runs in a process of its own, with
expandable segments, and gives everything back between two cases. A row of a budget is the fastest case
whose process, context and all, stays within it.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHAPES, device_label, shape_config, write_result
from fitlora.units import GIB

WARM_STEPS, TIMED_STEPS = 2, 5
BUDGETS_GIB = (8, 12, 16, 24, 48, 80)

# micro-batch, layers recomputed (a share), what recomputed layers keep, what is on the host
OURS: tuple[tuple[int, float, tuple[str, ...], tuple[str, ...]], ...] = (
    (2, 1.0, (), ("embedding", "checkpoints")),
    (3, 1.0, (), ("embedding", "checkpoints")),
    (4, 1.0, (), ("embedding", "checkpoints")),
    (4, 1.0, ("attention",), ("embedding",)),
    (6, 1.0, ("attention",), ("embedding",)),
    (1, 0.25, ("attention",), ("embedding",)),
    (2, 0.5, ("attention",), ("embedding",)),
    (1, 0.0, (), ("embedding",)),
    (2, 0.25, ("attention",), ("embedding",)),
    (2, 0.0, (), ("embedding",)),
    (3, 0.0, (), ("embedding",)),
    (4, 0.0, (), ()),
    (6, 0.0, (), ()),
    (8, 0.0, (), ()),
)
FLOAT8 = (
    (2, 0.0, (), ("embedding",)),
    (4, 0.0, (), ()),
    (8, 0.0, (), ()),
)
PEFT = ((1, True), (2, True), (4, True), (8, True), (1, False), (2, False))


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case that was asked for, as a flat record of what is asked."""
    found: list[dict[str, Any]] = []
    for dtype, sweep in (("bfloat16", OURS), ("float8", FLOAT8)):
        for micro_batch, share, keeps, host in sweep:
            found.append(
                {
                    "system": "fitlora",
                    "micro_batch": micro_batch,
                    "compute_dtype": dtype,
                    "recomputed_share": share,
                    "recompute_keeps": list(keeps),
                    "on_the_host": list(host),
                }
            )
    for system in ("peft", "peft+liger"):
        for micro_batch, recompute in PEFT:
            found.append(
                {
                    "system": system,
                    "micro_batch": micro_batch,
                    "compute_dtype": "bfloat16",
                    "recomputed_share": float(recompute),
                }
            )
    return [
        {"model": args.model, "sequence_length": args.tokens, **case}
        for case in found
        if case["system"] in args.systems
        and case["compute_dtype"] in args.dtypes
        and (args.micro_batches is None or case["micro_batch"] in args.micro_batches)
    ]


# --- one case, in its own process ----------------------------------------------------------------


def run_fitlora(case: dict[str, Any]) -> dict[str, Any]:
    from fitlora.artifacts import SequenceSize
    from fitlora.memory.estimate import sequences_of
    from fitlora.params import check_params
    from fitlora.plan import Plan
    from fitlora.planner.search import loss_chunk
    from fitlora.step.build import build_step
    from fitlora.step.settings import StepSettings
    from fitlora.step.weights import RandomWeights

    config = shape_config(case["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = config.num_hidden_layers
    plan = Plan.model_validate(
        {
            "device": device.type,
            "effective_batch_size": case["micro_batch"],
            "micro_batch_size": case["micro_batch"],
            "evaluation_batch_size": case["micro_batch"],
            "sequence_length": case["sequence_length"],
            "recompute_layers": tuple(range(round(case["recomputed_share"] * layers))),
            "recompute_keeps": tuple(case["recompute_keeps"]),
            "compute_dtype": case["compute_dtype"],
            "optimizer": "adamw",
            "loss_chunk_tokens": loss_chunk(config.vocab_size),
            **dict.fromkeys(case["on_the_host"], "host"),
        }
    )
    settings = StepSettings.of(
        check_params({"lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "train": {}})
    )
    step = build_step(config, plan, settings, RandomWeights(device))
    size = SequenceSize(tokens=case["sequence_length"], target_tokens=case["sequence_length"] - 1)
    batch = sequences_of([size] * case["micro_batch"])
    return timed(lambda index: float(step.run(batch, step=index, learning_rate=1e-5).loss), case)


def run_peft(case: dict[str, Any]) -> dict[str, Any]:
    """transformers + peft + bitsandbytes, as their documentation says to train in 4 bits."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = shape_config(case["model"])
    if case["system"] == "peft+liger":
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            apply_liger_kernel_to_llama,
        )

        apply_liger_kernel_to_llama()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            parent = model.get_submodule(name.rpartition(".")[0])
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            weight = torch.empty(
                module.out_features, module.in_features, dtype=torch.bfloat16, device=device
            ).normal_(0.0, 0.02)
            new.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            setattr(parent, name.rpartition(".")[2], new)
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                filled.normal_(0.0, 0.02) if parameter.dim() > 1 else filled.fill_(1.0)
                module._parameters[leaf] = torch.nn.Parameter(filled, requires_grad=False)
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary.to(device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    recompute = bool(case["recomputed_share"])
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True
    )
    ids = torch.randint(
        0, config.vocab_size, (case["micro_batch"], case["sequence_length"]), device=device
    )

    def step(index: int) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return timed(step, case)


def timed(step: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step after the first ones; the first one's apart."""
    seconds, losses = [], []
    for index in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        losses.append(step(index))  # reading the loss waits for the device
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_STEPS:])
    tokens = case["micro_batch"] * case["sequence_length"]
    found: dict[str, Any] = {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "first_step_seconds": seconds[0],
        "last_loss": losses[-1],
        "peak_reserved_bytes": None,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        # the card is ours alone: what is used and not the allocator's is the context
        found["context_bytes"] = outside
        found["process_bytes"] = found["peak_reserved_bytes"] + outside
    return found


# --- all of them ---------------------------------------------------------------------------------


def run_all(asked: Sequence[dict[str, Any]]) -> None:
    """Runs cases one after another and prints a line of JSON for each."""
    for case in asked:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = (run_fitlora if case["system"] == "fitlora" else run_peft)(case)
        except Exception as error:  # a row that says so, and the next case
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({**case, **found}), flush=True)


def in_process(asked: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a system's cases, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step_speed", "--cases", json.dumps(asked)]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def best_within(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each budget, system and dtype the fastest row that stays within it."""
    found = []
    kinds = sorted({(row["system"], row["compute_dtype"]) for row in rows})
    for budget in BUDGETS_GIB:
        for system, dtype in kinds:
            within = [
                row
                for row in rows
                if (row["system"], row["compute_dtype"]) == (system, dtype)
                and row.get("process_bytes") is not None
                and row["process_bytes"] <= budget * GIB
            ]
            if within:
                best = max(within, key=lambda row: row["tokens_per_second"])
                found.append({"budget_gib": budget, **best})
    return found


def case_of(row: dict[str, Any]) -> dict[str, Any]:
    """What was asked, of a row."""
    keys = (
        "system", "model", "sequence_length", "micro_batch", "compute_dtype", "recomputed_share",
        "recompute_keeps", "on_the_host",
    )  # fmt: skip
    return {key: row.get(key) for key in keys}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--systems", nargs="+", default=["fitlora", "peft", "peft+liger"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8"])
    parser.add_argument("--micro-batches", nargs="+", type=int)
    parser.add_argument("--json", type=Path, help="result file; rows of other cases in it stay")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cases is not None:
        run_all(json.loads(args.cases))
        return
    path = args.json or ROOT / "benchmarks" / "results" / f"step_speed.{device_label()}.json"
    rows: list[dict[str, Any]] = []
    asked = cases(args)
    if path.is_file():
        known = json.loads(path.read_text())["rows"]
        mine = [case_of(case) for case in asked]
        rows = [r for r in known if "budget_gib" not in r and case_of(r) not in mine]
    systems = dict.fromkeys(case["system"] for case in asked)
    each = ([case for case in asked if case["system"] == system] for system in systems)
    for row in chain.from_iterable(map(in_process, each)):
        rows.append(row)
        if "error" in row:
            print(f"{row['system']:>10} {row['micro_batch']}: {row['error']}", flush=True)
        else:
            memory = (row.get("process_bytes") or 0) / GIB
            print(
                f"{row['system']:>10} {row['compute_dtype']:>8} micro-batch {row['micro_batch']}, "
                f"recomputed {row['recomputed_share']:4.0%} {row.get('recompute_keeps', '')} "
                f"{row.get('on_the_host', '')}: {row['tokens_per_second']:9,.0f} tokens/s, "
                f"{memory:5.2f} GiB, first step {row['first_step_seconds']:.1f} s",
                flush=True,
            )
        write_result(path, "step_speed", [*rows, *best_within(rows)])
    for row in best_within(rows):
        print(
            f"{row['budget_gib']:>3} GiB {row['system']:>10} {row['compute_dtype']:>8} "
            f"{row['tokens_per_second']:9,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
