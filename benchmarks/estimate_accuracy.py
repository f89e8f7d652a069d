"""Is the estimate true? Predicted without a GPU, measured on one, for plans that are drawn at random.

    python -m benchmarks.estimate_accuracy --side measured --at-once 8 --json FILE   on a GPU
    python -m benchmarks.estimate_accuracy --side predicted --json FILE       anywhere, of those rows
    python -m benchmarks.estimate_accuracy --plot predicted.svg --json FILE   a picture of them
    python -m benchmarks.estimate_accuracy --cases 20: …     some of them; other rows stay
    python -m benchmarks.estimate_accuracy --fit …           the draw for fitting constants
    python -m benchmarks.estimate_accuracy --tiny …          all of it on the CPU, in seconds

The draw is the seed's: it was fixed before anything was measured. Every choice is dealt from a deck
that is reshuffled when it is empty, so that all of them come equally often; a case that would take
more memory than `MOST_BYTES` or more work than `MOST_OPERATIONS` gets fewer tokens. The fitting draw
has another seed and `FIT_MODELS` only, so that three families are unseen by whatever is fitted on it.

The two sides are apart, as they are in truth. Measuring describes the hardware as the product does. Each
case then has a process of its own, forked before anything is done, which predicts as a run does, builds
the step on noise, runs the very rehearsal that is traced, makes the copies that a run makes, and asks
the allocator, NVML and the kernel what that took. Several processes may share the GPU (`--at-once`): a
case begins when it has room beside those that run. One that dies leaves its last words in its row. What
the file has measured already is left alone, so that the same command goes on where time ran out, and
tries again what failed. Predicting is given the description and the case, and sees no GPU. Rows are
written as they come.

What a process has of the host is its anonymous and its shared memory, pinned or not: all but the pages
of files. Its peak is the kernel's of all, less the pages of files. Who comes to a Triton kernel first
compiles it, as a first run does; the others find it there. Where three cases fail alike, no other
begins.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pynvml
import torch

from benchmarks.common import ROOT, SHAPES, device_label, device_name, shape_config, write_result
from fitlora.artifacts import Hardware, SequenceSize
from fitlora.device import gpu_uuid, limit_memory, nvml_session, process_used_bytes
from fitlora.hardware import profile
from fitlora.memory.estimate import (
    OWN_HOST_MIB,
    Estimator,
    Load,
    own_host_parts,
    rehearse,
    rehearse_save,
    trace_step,
)
from fitlora.offload.host_memory import HostMemory, resident_bytes
from fitlora.offload.residency import spread
from fitlora.offload.transport import make_transport
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.weights import RandomWeights
from fitlora.units import GIB, MIB

SEED, FIT_SEED, COUNT, FIT_COUNT, TINY_COUNT = 20261123, 7, 64, 12, 8
MOST_BYTES = 100 * GIB  # by the formula of `rough_bytes`, on a GPU of 139 GiB
MOST_OPERATIONS = 1.2e15  # of one case: a few seconds
MOST_PINNED_BYTES = 10 * GIB  # of a case with streamed layers
# What a case may take beside them, of the device and of the host: the context, libraries, checkpoints.
BESIDE_BYTES, HOST_BESIDE_BYTES = 1 * GIB, 4 * GIB
SECONDS_BETWEEN_LOOKS = 0.1  # for what children have done

MODELS = tuple(name for name in SHAPES if name not in ("tiny", "benchmark"))
FIT_MODELS = (
    "tinyllama-1.1b",
    "llama-3-8b",
    "mistral-7b",
    "qwen2.5-1.5b",
    "qwen2.5-7b",
    "olmo-2-1b",
)
GENERAL = (
    "olmo2",
)  # families that autograd does: they keep all or nothing, and no checkpoint leaves

CHOICES: dict[str, tuple[Any, ...]] = {
    "micro_batch": (1, 2, 4, 8),
    "accumulation": (1, 2, 3),
    "sequence_length": (512, 1024, 2048, 4096, 8192, 16384),
    "packed": (False, True),
    "evaluation": ("one", "as in training"),
    "learned": (1.0, 0.6, 0.2),
    "recompute": ("none", "some", "all"),
    "keeps": ((), ("attention",)),
    "offload": (
        (),
        ("checkpoints",),
        ("embedding",),
        ("head",),
        ("optimizer_device",),
        ("streamed_layers",),
        ("checkpoints", "embedding", "head", "optimizer_device", "streamed_layers"),
    ),
    "streamed": ("few", "quarter", "most"),
    "slots": (2, 3),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
    "rank": (4, 8, 16, 32, 64, 128),
    "dropout": (0.0, 0.05),
    "targets": ("all-linear", "attention"),
    "storage": ("nf4", "nf4", "fp4", "16 bits"),
}
# Dealt by a seed of its own: what can be computed in fp8 was added when the draw above was fixed.
DTYPES = ("bfloat16", "bfloat16", "bfloat16", "float8")


# --- the draw ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is asked.

    sizes: tokens, learned tokens and parts of each sequence, the longest first. rough_bytes: of the
    device, by a formula.
    """

    number: int
    model: str
    storage: str
    rank: int
    dropout: float
    targets: str
    packed: bool
    sizes: list[tuple[int, int, list[int]]]
    plan: dict[str, Any]
    rough_bytes: int


class Deck:
    """Values in random order, each as often as the others."""

    def __init__(self, values: Sequence[Any], draw: random.Random) -> None:
        self._values, self._draw, self._left = values, draw, list[Any]()

    def deal(self) -> Any:
        if not self._left:
            self._left = self._draw.sample(self._values, len(self._values))
        return self._left.pop()


def draw_cases(*, fit: bool, tiny: bool) -> list[Case]:
    """The cases, always the same ones."""
    count = TINY_COUNT if tiny else FIT_COUNT if fit else COUNT
    draw = random.Random(FIT_SEED if fit else SEED)
    models = Deck(FIT_MODELS if fit else MODELS, draw)
    decks = {name: Deck(values, draw) for name, values in CHOICES.items()}
    dtypes = Deck(DTYPES, random.Random(-SEED))
    cases = []
    for number in range(count):
        asked = {name: deck.deal() for name, deck in decks.items()}
        cases.append(_case(number, models.deal(), asked, draw, tiny))
        if dtypes.deal() == "float8" and config_of(cases[-1].model, tiny).model_type not in GENERAL:
            cases[-1].plan["compute_dtype"] = "float8"
    return cases


def _case(number: int, model: str, asked: dict[str, Any], draw: random.Random, tiny: bool) -> Case:
    config = config_of(model, tiny)
    _reconcile(asked, config)
    if model == "llama-3-70b":  # 16-bit weights would fill the device, large adapters the time
        asked["storage"] = "nf4" if asked["storage"] == "16 bits" else asked["storage"]
        asked["rank"] = min(asked["rank"], 32)
    if tiny:
        asked["sequence_length"] //= 32
        asked["optimizer"] = asked["optimizer"].removeprefix("paged_")
    layers = config.num_hidden_layers
    recomputed = {"none": 0, "some": draw.randint(1, layers - 1), "all": layers}[asked["recompute"]]
    while not _fits(config, asked, recomputed):
        key = "micro_batch" if asked["micro_batch"] > 1 else "sequence_length"
        asked[key] //= 2
    micro, accumulation = asked["micro_batch"], asked["accumulation"]
    sizes = _sizes(asked, draw)
    host = {part: "host" for part in asked["offload"] if part != "streamed_layers"}
    plan = {
        "effective_batch_size": micro * accumulation,
        "micro_batch_size": micro,
        "evaluation_batch_size": 1 if asked["evaluation"] == "one" else micro,
        "sequence_length": sizes[0][0],
        "recompute_layers": tuple(range(recomputed)),
        "recompute_keeps": asked["keeps"] if recomputed else (),
        "optimizer": asked["optimizer"],
        "loss_chunk_tokens": loss_chunk(config.vocab_size),
        **host,
    }
    if "streamed_layers" in asked["offload"]:
        plan["streamed_layers"] = spread(layers, _streamed(config, asked))
        plan["streaming_slots"] = asked["slots"]
    return Case(
        number=number,
        model=model,
        storage=asked["storage"],
        rank=asked["rank"],
        dropout=asked["dropout"],
        targets=asked["targets"],
        packed=asked["packed"],
        sizes=sizes,
        plan=plan,
        rough_bytes=rough_bytes(config, asked, recomputed),
    )


def _reconcile(asked: dict[str, Any], config: Any) -> None:
    """Makes the choices such that a step can be built of them, changing as few as it takes."""
    offload = set(asked["offload"])
    if config.model_type in GENERAL:
        asked["keeps"] = ()
        offload.discard("checkpoints")
        if "streamed_layers" in offload:
            asked["recompute"] = "all"
    if config.tie_word_embeddings and offload & {"embedding", "head"}:
        offload |= {"embedding", "head"}
    if "checkpoints" in offload and asked["recompute"] == "none":
        asked["recompute"] = "all"
    if "optimizer_device" in offload:
        asked["optimizer"] = "adamw"  # bitsandbytes' work on the device alone
    asked["offload"] = tuple(sorted(offload))


def _layer_parameters(config: Any) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * head
    return int(config.hidden_size * (attended + 3 * config.intermediate_size))


def _weight_bytes(asked: dict[str, Any]) -> float:
    return 2.0 if asked["storage"] == "16 bits" else 0.53


def _streamed(config: Any, asked: dict[str, Any]) -> int:
    layers = config.num_hidden_layers
    wanted = {"few": asked["slots"] + 1, "quarter": layers // 4, "most": layers - 2}
    most = int(MOST_PINNED_BYTES / (_layer_parameters(config) * _weight_bytes(asked)))
    return max(1, min(int(wanted[asked["streamed"]]), most))


def _fits(config: Any, asked: dict[str, Any], recomputed: int) -> bool:
    """Roughly: within the memory and the work that a case may have."""
    parameters = config.num_hidden_layers * _layer_parameters(config) + _table_parameters(config)
    passes = 3 * (1 + min(2, asked["accumulation"])) + 1
    operations = 2 * parameters * asked["micro_batch"] * asked["sequence_length"] * passes
    return rough_bytes(config, asked, recomputed) <= MOST_BYTES and operations <= MOST_OPERATIONS


def _table_parameters(config: Any) -> int:
    return int(config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2))


def rough_bytes(config: Any, asked: dict[str, Any], recomputed: int) -> int:
    """Of the device, with nothing on the host and without what libraries take."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * _layer_parameters(config)
    tokens = asked["micro_batch"] * asked["sequence_length"]
    kept = (layers - recomputed) * 2 * (6 * hidden + 3 * config.intermediate_size)
    activations = tokens * (kept + recomputed * 6 * hidden + 2 * 20 * hidden)
    adapters = 16 * layers * asked["rank"] * (10 * hidden + 3 * config.intermediate_size)
    tables = 2 * _table_parameters(config)
    return int(weights * _weight_bytes(asked) + tables + activations + adapters)


def _sizes(asked: dict[str, Any], draw: random.Random) -> list[tuple[int, int, list[int]]]:
    """A micro-batch of sequences: packed ones are full, others as long as they happen to be."""
    most, found = asked["sequence_length"], []
    for index in range(asked["micro_batch"]):
        tokens = most if index == 0 or asked["packed"] else draw.randint(most // 2, most)
        parts: list[int] = []
        if asked["packed"]:
            cuts = sorted(draw.sample(range(1, tokens // 8), draw.randint(1, 5)))
            edges = [0, *(8 * cut for cut in cuts), tokens]
            parts = [end - start for start, end in pairwise(edges)]
        predicted = tokens - max(1, len(parts))
        found.append((tokens, max(1, int(asked["learned"] * predicted)), parts))
    return sorted(found, key=lambda size: -size[0])


# --- what a case is made of ----------------------------------------------------------------------


def config_of(model: str, tiny: bool) -> Any:
    """The model's config; a tiny one of the same family, window and ties where `tiny`."""
    if not tiny:
        return shape_config(model)
    shape = SHAPES[model]
    changes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 512,
        "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 4 if shape["num_key_value_heads"] == shape["num_attention_heads"] else 2,
    }  # fmt: skip
    if shape.get("sliding_window"):
        changes["sliding_window"] = 32
    return shape_config(model, **changes)


def settings_of(case: Case, config: Any) -> StepSettings:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if config.model_type == "phi3":
        attention = ["qkv_proj", "o_proj"]
    quantization: dict[str, Any] = {"bits": 4, "type": case.storage}
    if case.storage == "16 bits":
        quantization = {"bits": 16}
    targets = case.targets if case.targets == "all-linear" else attention
    lora = {"r": case.rank, "alpha": 2.0 * case.rank, "dropout": case.dropout}
    return StepSettings.of(
        check_params(
            {
                "quantization": quantization,
                "lora": {**lora, "target_modules": targets},
                "train": {"optimizer": case.plan["optimizer"]},
            }
        )
    )


def plan_of(case: Case, device: str) -> Plan:
    dtype = case.plan.get("compute_dtype", "bfloat16") if device == "cuda" else "float32"
    return Plan.model_validate({**case.plan, "device": device, "compute_dtype": dtype})


def load_of(case: Case) -> Load:
    sizes = [SequenceSize(tokens=t, target_tokens=n, parts=tuple(p)) for t, n, p in case.sizes]
    return Load(sizes, sizes)


def asked_of(case: Case, plan: Plan, config: Any) -> dict[str, Any]:
    """The columns that say what the case is."""
    host = [p for p in ("checkpoints", "embedding", "head", "optimizer_device") if case.plan.get(p)]
    return {
        "case": case.number,
        "model": case.model,
        "family": config.model_type,
        "plan": plan.fingerprint(),
        "layers": config.num_hidden_layers,
        "micro_batch": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "evaluation_batch": plan.evaluation_batch_size,
        "sequence_length": plan.sequence_length,
        "tokens": sum(size[0] for size in case.sizes),
        "target_tokens": sum(size[1] for size in case.sizes),
        "packed": case.packed,
        "recomputed_layers": len(plan.recompute_layers),
        "recompute_keeps": " ".join(plan.recompute_keeps),
        "streamed_layers": len(plan.streamed_layers),
        "streaming_slots": plan.streaming_slots,
        "on_host": " ".join(host),
        "optimizer": plan.optimizer,
        "compute_dtype": plan.compute_dtype,
        "storage": case.storage,
        "rank": case.rank,
        "dropout": case.dropout,
        "targets": case.targets,
    }


# --- predicting ----------------------------------------------------------------------------------


def predict_case(case: Case, hardware: Hardware, tiny: bool) -> dict[str, Any]:
    """In a process that sees no GPU."""
    assert not torch.cuda.is_available()
    torch.set_num_threads(1)
    config = config_of(case.model, tiny)
    plan = plan_of(case, hardware.device)
    estimator = Estimator(config, settings_of(case, config), load_of(case), hardware)
    start, cpu = time.perf_counter(), time.process_time()
    found = estimator(plan)
    reserved = found.peak_reserved_bytes or found.peak_allocated_bytes
    return {
        "predicted_allocated_bytes": found.peak_allocated_bytes,
        "predicted_reserved_bytes": reserved,
        "safe_peak_bytes": found.safe_peak_bytes,
        "predicted_paged_bytes": found.paged_bytes,
        # NVML counts managed memory, where paged states are, for no process
        "predicted_process_bytes": reserved + hardware.context_bytes,
        "predicted_host_pinned_bytes": found.host_pinned_bytes,
        "predicted_host_unpinned_bytes": found.host_unpinned_bytes,
        "predicted_host_copies_bytes": found.host_copies_bytes,
        "predicted_host_process_bytes": found.host_bytes,
        "host_own_parts": own_host_parts(plan, by_hand=config.model_type not in GENERAL),
        "instant": found.instant,
        "estimate_seconds": time.perf_counter() - start,
        "estimate_cpu_seconds": time.process_time() - cpu,
    }


def predict(cases: Sequence[Case], hardware: Hardware, work: Path, *, tiny: bool) -> None:
    """Every case, in several processes; a line of `predictions` each."""
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    if tiny or len(cases) == 1:
        workers = 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(predict_case, case, hardware, tiny): case for case in cases}
        for done in as_completed(waiting):
            case, error = waiting[done], done.exception()
            found = done.result() if error is None else {"predict_error": _words(error)}
            _append(work / "predictions", {"case": case.number, **found})


# --- measuring -----------------------------------------------------------------------------------


def measure_case(case: Case, hardware: Hardware, tiny: bool) -> dict[str, Any]:
    """In a process that has done nothing yet, and ends with it."""
    import fitlora.pipeline.train_adapters  # noqa: F401  # all that a run imports

    config = config_of(case.model, tiny)
    settings, load = settings_of(case, config), load_of(case)
    plan = plan_of(case, hardware.device)
    device = torch.device(hardware.device)
    estimator = Estimator(config, settings, load, hardware)  # a run has its own, and keeps it
    estimator(plan)
    host = HostMarks()
    host.mark("predicted")
    start = time.perf_counter()
    if device.type == "cpu":
        peak = trace_step(config, plan, settings, load, RandomWeights(device)).peak_bytes
        host.mark("rehearsed")
        return {
            "measured_allocated_bytes": peak,
            "measured_reserved_bytes": None,
            "measure_seconds": time.perf_counter() - start,
            **host.found(),
        }
    limit_memory(hardware)
    torch.cuda.synchronize(device)
    host.mark("context")
    transport = make_transport(device, HostMemory(hardware.host_budget_bytes))
    step = build_step(config, plan, settings, RandomWeights(device), transport)
    torch.cuda.synchronize(device)
    built = time.perf_counter()
    host.mark("built")
    rehearse(step, load)
    torch.cuda.synchronize(device)
    host.mark("rehearsed")
    found = {
        "measured_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "measured_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "measured_end_allocated_bytes": torch.cuda.memory_allocated(device),
        "nvml_process_bytes": _own_used(),
        "measured_host_pinned_bytes": transport.pinned_bytes,
        "allocator_retries": torch.cuda.memory_stats(device)["num_alloc_retries"],
        "by_hand": bool(getattr(step.network, "layers", None)),
        "build_seconds": built - start,
        "measure_seconds": time.perf_counter() - start,
    }
    torch.cuda.reset_peak_memory_stats(device)
    kept = rehearse_save(step)
    host.mark("copied")
    found["measured_save_device_bytes"] = (
        torch.cuda.max_memory_allocated(device) - found["measured_end_allocated_bytes"]
    )
    del kept
    return {**found, **host.found()}


class HostMarks:
    """What this process has of the host, at marks and at most; nothing where that is not told."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}
        self._levels: list[int] = []

    def mark(self, name: str) -> None:
        now = resident_bytes()
        if now:
            self._found[f"host_{name}_anonymous_bytes"] = now["RssAnon"]
            self._found[f"host_{name}_shared_bytes"] = now["RssShmem"]
            self._levels.append(now["RssAnon"] + now["RssShmem"])

    def found(self) -> dict[str, int]:
        now = resident_bytes()
        if not now:
            return {}
        files = now["RssFile"]  # which only grow, so that they were no more at the peak
        peak = max(now["VmHWM"] - files, *self._levels)
        return {**self._found, "host_file_bytes": files, "measured_host_process_bytes": peak}


def _own_used() -> int | None:
    """What this process has of the GPU; None where NVML does not tell."""
    try:
        with nvml_session() as nvml:
            return process_used_bytes(nvml, gpu_uuid(), os.getpid())
    except pynvml.NVMLError:
        return None


# --- bringing both together ----------------------------------------------------------------------


def _append(path: Path, found: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    """By case. A line that is still being written is not there yet."""
    text = path.read_text() if path.is_file() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["case"]: line for line in found}


def _words(error: BaseException) -> str:
    text = str(error).strip() or "nothing said"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def error_share(predicted: float | None, measured: float | None) -> float | None:
    """(predicted - measured) / measured; None where one of them is not there, or is nothing."""
    if not predicted or not measured:
        return None
    return predicted / measured - 1


def make_row(found: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    """What was asked, measured and predicted, with the errors of what is there of both sides."""
    row = {**found, "context_bytes": hardware.context_bytes}
    row["workspace_bytes"] = hardware.workspace_bytes
    for name in ("allocated", "reserved", "host_pinned", "host_process"):
        row[f"{name}_error"] = error_share(
            row.get(f"predicted_{name}_bytes"), row.get(f"measured_{name}_bytes")
        )
    row["process_error"] = error_share(
        row.get("predicted_process_bytes"), row.get("nvml_process_bytes")
    )
    row["safe_margin"] = error_share(row.get("safe_peak_bytes"), row.get("measured_reserved_bytes"))
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst of each error over the rows that have it, and how safe the safe peak was."""
    summary: dict[str, Any] = {
        "cases": len(rows),
        "measured": sum("measure_seconds" in row for row in rows),
        "failed": sum("error" in row or "predict_error" in row for row in rows),
        "families": len({row["family"] for row in rows}),
    }
    for name in ("allocated", "reserved", "process", "host_pinned", "host_process"):
        errors = [abs(e) for row in rows if (e := row.get(f"{name}_error")) is not None]
        if errors:
            summary[f"{name}_mean_error"] = statistics.fmean(errors)
            summary[f"{name}_worst_error"] = max(errors)
    margins = [row["safe_margin"] for row in rows if row["safe_margin"] is not None]
    if margins:
        summary |= {"safe_least_margin": min(margins), "safe_most_margin": max(margins)}
    summary |= _own_of_host(rows)
    seconds = [row["estimate_cpu_seconds"] for row in rows if "estimate_cpu_seconds" in row]
    if seconds:
        summary["estimate_cpu_seconds_mean"] = statistics.fmean(seconds)
        summary["estimate_cpu_seconds_most"] = max(seconds)
    return summary


def _own_of_host(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`OWN_HOST_MIB` by the rows: what processes have of the host beside what a plan puts there."""
    planned = [f"predicted_host_{name}_bytes" for name in ("pinned", "unpinned", "copies")]
    needed = {"measured_host_process_bytes", "host_own_parts", *planned}
    told = [row for row in rows if needed <= row.keys()]
    if len(told) < len(OWN_HOST_MIB):
        return {}
    own = [row["measured_host_process_bytes"] - sum(row[name] for name in planned) for row in told]
    parts = [[float(part in row["host_own_parts"]) for part in OWN_HOST_MIB] for row in told]
    measured = torch.tensor(own, dtype=torch.float64).unsqueeze(1) / MIB
    there = torch.tensor(parts, dtype=torch.float64)
    # what is never there gets nothing
    fitted = torch.linalg.lstsq(there, measured, driver="gelsd").solution.flatten().tolist()
    return {
        "host_own_mib": {part: round(mib) for part, mib in zip(OWN_HOST_MIB, fitted, strict=True)}
    }


def line(row: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return "–" if row[name] is None else f"{row[name]:+.2%}"

    problem = row.get("error") or row.get("predict_error") or ""
    return (
        f"{row['case']:>3} {row['model']:>14} {row['micro_batch']}x{row['sequence_length']:<6} "
        f"allocated {share('allocated_error'):>7}, reserved {share('reserved_error'):>7}, "
        f"process {share('process_error'):>7}, host {share('host_process_error'):>7} {problem}"
    )


class Child:
    """A role of this program in a process of its own; its log is in the work folder."""

    def __init__(self, role: str, cases: Sequence[Case], args: argparse.Namespace) -> None:
        numbers = ",".join(str(case.number) for case in cases)
        self.log = args.work / f"{role}.log"
        command = [sys.executable, "-m", "benchmarks.estimate_accuracy", "--role", role]
        command += ["--work", str(args.work), f"--numbers={numbers}"]
        command += [flag for flag in ("--fit", "--tiny") if getattr(args, flag[2:])]
        changes = {"CUDA_VISIBLE_DEVICES": ""} if role == "predict" else {}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **changes}
            )

    def last_words(self) -> str:
        return _last_words(self.log)


def _last_words(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1][:300] if lines else "nothing said"


_forks = get_context("forkserver")
# Two thirds of the time that imports take. peft and our own import bitsandbytes, which asks CUDA what
# there is, and no process that is forked after that can use CUDA.
IMPORTED_ONCE = ("transformers.modeling_utils", "transformers.generation.utils")
FAILURES_TO_END = 3


class Measuring:
    """A case's measurement in a process of its own, whose imports were made before it was forked."""

    def __init__(self, case: Case, args: argparse.Namespace) -> None:
        self.found = args.work / f"measure-{case.number}.json"
        self.log = self.found.with_suffix(".log")
        self.log.write_text("")
        hardware = args.work / "hardware.json"
        self._process = _forks.Process(
            target=_measure_apart, args=(case, hardware, args.tiny, self.found, self.log)
        )
        self._process.start()

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def result(self) -> dict[str, Any]:
        """What it has found, and what it died of otherwise."""
        if self._process.exitcode != 0:
            return {"error": f"ended with {self._process.exitcode}: {_last_words(self.log)}"}
        found: dict[str, Any] = json.loads(self.found.read_text())
        return found


Found = Iterator[tuple[Case, dict[str, Any]]]


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The hardware and the device's name, found by a process that ends."""
    describing = Child("profile", [], args)
    if describing.process.wait() != 0:
        sys.exit(f"the hardware could not be described: {describing.last_words()}")
    found: dict[str, Any] = json.loads((args.work / "device.json").read_text())
    return found


def measured(cases: Sequence[Case], hardware: Hardware, args: argparse.Namespace) -> Found:
    """Each case when it was measured, the largest first; none begins after the time for it."""
    end = time.perf_counter() + args.limit_seconds
    waiting = sorted(cases, key=lambda case: -case.rough_bytes)
    running: list[tuple[Case, Measuring]] = []
    # an optimizer on the host has threads, which must not spin while the device is waited for
    threads = str(min(8, len(os.sched_getaffinity(0))))
    os.environ.update(OMP_WAIT_POLICY="passive", OMP_NUM_THREADS=threads)
    os.environ["TRITON_CACHE_DIR"] = str(args.work / "triton")
    _forks.set_forkserver_preload(list(IMPORTED_ONCE))
    failures: list[str] = []
    while running or (waiting and time.perf_counter() < end):
        for case in list(waiting):
            if time.perf_counter() < end and _has_room(
                case, [other for other, _ in running], hardware, args.at_once
            ):
                waiting.remove(case)
                running.append((case, Measuring(case, args)))
        for case, measuring in list(running):
            if measuring.ended:
                running.remove((case, measuring))
                found = measuring.result()
                if "error" in found:
                    failures.append(found["error"])
                    if failures.count(found["error"]) == FAILURES_TO_END:
                        waiting.clear()  # the rest would fail alike
                yield case, found
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _has_room(case: Case, running: Sequence[Case], hardware: Hardware, at_once: int) -> bool:
    """Whether a case can be measured beside others; always where there are none."""
    together = [case, *running]
    device_bytes = sum(other.rough_bytes + BESIDE_BYTES for other in together)
    streaming = sum("streamed_layers" in other.plan for other in together)
    host_bytes = streaming * MOST_PINNED_BYTES + len(together) * HOST_BESIDE_BYTES
    return not running or (
        len(together) <= at_once
        and device_bytes <= hardware.budget_bytes
        and host_bytes <= hardware.host_budget_bytes
    )


def _measure_apart(case: Case, hardware: Path, tiny: bool, out: Path, log: Path) -> None:
    with log.open("w") as words:
        for stream in (1, 2):
            os.dup2(words.fileno(), stream)
    out.write_text(json.dumps(measure_case(case, Hardware.read(hardware), tiny)))


def predicted(cases: list[Case], args: argparse.Namespace) -> Found:
    """Each case when it was predicted."""
    path = args.work / "predictions"
    path.unlink(missing_ok=True)
    left = {case.number: case for case in cases}
    child = Child("predict", cases, args)
    running = True
    while running:
        running = child.process.poll() is None
        for number, found in _lines(path).items():
            if number in left:
                yield left.pop(number), found
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for case in left.values():
        yield case, {"predict_error": child.last_words()}


def act(role: str, cases: list[Case], args: argparse.Namespace) -> None:
    """What a child does."""
    described = args.work / "hardware.json"
    if role == "profile":
        asked = {"device": "cpu"} if args.tiny else {}
        profile(check_params({"hardware": asked}).hardware, args.work).write(described)
        named = {"device_label": device_label(), "device": device_name()}
        (args.work / "device.json").write_text(json.dumps(named))
        return
    predict(cases, Hardware.read(described), args.work, tiny=args.tiny)


def chosen(args: argparse.Namespace) -> list[Case]:
    cases = draw_cases(fit=args.fit, tiny=args.tiny)
    if args.numbers is not None:
        wanted = [int(number) for number in args.numbers.split(",") if number]
        return [cases[number] for number in wanted]
    start, _, end = (args.cases or ":").partition(":")
    return cases[int(start or 0) : int(end or len(cases))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--side", choices=("measured", "predicted"), help="the other stays as it is"
    )
    parser.add_argument("--cases", help="A:B, numbers from A up to before B")
    parser.add_argument("--limit-seconds", type=float, default=3600, help="to begin measuring in")
    parser.add_argument(
        "--at-once", type=int, default=1, help="cases that are measured at one time, at most"
    )
    parser.add_argument("--fit", action="store_true", help="the draw that constants are fitted on")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--list", action="store_true", help="print the draw and end")
    parser.add_argument("--plot", type=Path, help="draw the rows that there are, and end")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "estimate_accuracy")
    parser.add_argument("--json", type=Path, help="rows of other cases in it stay")
    parser.add_argument("--role", choices=("profile", "predict"), help=argparse.SUPPRESS)
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot is not None:
        if args.json is None:
            parser.error("--plot needs --json")
        args.plot.write_text(plot(json.loads(args.json.read_text())["rows"]))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    cases = chosen(args)
    if args.role is not None:
        act(args.role, cases, args)
    elif args.list:
        for case in cases:
            print(json.dumps(asdict(case)))
    else:
        compare(cases, args)


def compare(cases: list[Case], args: argparse.Namespace) -> None:
    """Both sides of every case, or the one that is asked for, into the result file."""
    before: dict[str, Any] = {}
    if args.json is not None and args.json.is_file():
        before = json.loads(args.json.read_text())
    described = args.work / "hardware.json"
    if args.side == "predicted":
        if "hardware" not in before:
            sys.exit("--side predicted needs --json FILE with what was measured")
        about = {name: before[name] for name in ("device", "device_label", "versions")}
        about["measured_commit"] = before.get("measured_commit", before["commit"])
        described.write_text(json.dumps(before["hardware"]))
    else:
        about = describe(args)
    hardware = Hardware.read(described)
    rows = {row["case"]: row for row in before.get("rows", [])}
    name = f"estimate_accuracy{'_fit' if args.fit else ''}.{about['device_label']}.json"
    path = args.json or ROOT / "benchmarks" / "results" / name

    def asked(case: Case) -> dict[str, Any]:
        plan = plan_of(case, hardware.device)
        return asked_of(case, plan, config_of(case.model, args.tiny))

    def is_measured(case: Case) -> bool:
        row = rows.get(case.number, {})
        return row.get("plan") == asked(case)["plan"] and "measured_host_process_bytes" in row

    def keep(case: Case, found: dict[str, Any]) -> None:
        rows[case.number] = make_row({**asked(case), **found}, hardware)
        print(line(rows[case.number]), flush=True)
        ordered = [rows[number] for number in sorted(rows)]
        write_result(
            path,
            "estimate_accuracy",
            ordered,
            **about,
            seed=FIT_SEED if args.fit else SEED,
            summary=summarize(ordered),
            hardware=json.loads(described.read_text()),
        )

    if args.side != "predicted":
        to_measure = [case for case in cases if not is_measured(case)]
        for case, found in measured(to_measure, hardware, args):
            keep(case, found)
        print(f"not measured: {[case.number for case in cases if not is_measured(case)]}")
    if args.side != "measured":
        for case, found in predicted([case for case in cases if is_measured(case)], args):
            row = rows[case.number]
            keep(case, {**{k: v for k, v in row.items() if k != "predict_error"}, **found})
    print(json.dumps(summarize(list(rows.values())), indent=1))


# --- the picture ---------------------------------------------------------------------------------


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted over measured reserved memory as an SVG, both axes logarithmic, a point a case."""
    both = [
        (row["measured_reserved_bytes"] / GIB, row["predicted_reserved_bytes"] / GIB, row["family"])
        for row in rows
        if row.get("reserved_error") is not None
    ]
    families = sorted({family for *_, family in both})
    low, high = 0.5, 128.0
    size, left, top = 360, 56, 16

    def place(gib: float) -> float:
        return size * math.log(gib / low) / math.log(high / low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 190} {size + 64}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    ticks = [low * 2.0**step for step in range(9)]
    for gib in ticks:
        x, y = left + place(gib), top + size - place(gib)
        grid = 'stroke="#dddddd"'
        parts.append(f'<path d="M{x:.1f} {top}V{top + size}M{left} {y:.1f}H{left + size}" {grid}/>')
        label = f"{gib:g}"
        parts.append(
            f'<text x="{x:.1f}" y="{top + size + 16}" text-anchor="middle">{label}</text>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    parts.append(f'<path d="M{left} {top + size}L{left + size} {top}" stroke="#888888"/>')
    for measured_gib, predicted_gib, family in both:
        x, y = left + place(measured_gib), top + size - place(predicted_gib)
        color = _COLORS[families.index(family) % len(_COLORS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}" opacity="0.8"/>')
    for index, family in enumerate(families):
        y = top + 12 + 18 * index
        color = _COLORS[index % len(_COLORS)]
        parts.append(f'<circle cx="{left + size + 18}" cy="{y - 4}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{left + size + 28}" y="{y}">{family}</text>')
    middle = left + size / 2
    parts.append(
        f'<text x="{middle}" y="{top + size + 38}" text-anchor="middle">'
        f"measured, GiB reserved ({len(both)} cases)</text>"
        f'<text transform="translate(14 {top + size / 2}) rotate(-90)" text-anchor="middle">'
        "predicted, GiB reserved</text></svg>"
    )
    return "\n".join(parts) + "\n"


_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")


if __name__ == "__main__":
    main()
