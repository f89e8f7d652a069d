"""The quantizer: how fast, in how much memory, the same bytes where, and at what price in quality.

    python -m benchmarks.quantize speed --model llama-3-8b --work /tmp/w --json OUT
    python -m benchmarks.quantize speed --model llama-3-70b --layers 20 --work /tmp/w --json OUT
    python -m benchmarks.quantize bytes --json OUT
    python -m benchmarks.quantize quality --json OUT

`speed` writes a source of random weights in the named shape, one shard a layer (with --layers, as many
as the disk holds), and quantizes it to NF4 with double quantization in a process of its own, from a
cold page cache (its files forgotten by posix_fadvise) and from a warm one. Beside it stands the time in
which one thread reads the same files in order, in 8 MiB pieces, from the same cache. Seconds are from
the call to the finished folder; the start of Python and its imports are left out. `host_peak_bytes` is
anonymous memory and `gpu_peak_bytes` all that the device has in use, its context included.

`bytes` quantizes the shipped model by the shipped params and hashes the files; `quality` gives its loss
on the shipped validation rows, and what the exact mean of double quantization changes against the
device's own. Rows are added to the file that is there.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHAPES, device_name, make_checkpoint, write_result
from fitlora.checkpoint import Checkpoint
from fitlora.evaluation.metrics import mean_loss
from fitlora.evaluation.models import Contender, Place, load
from fitlora.model import empty_model, load_config
from fitlora.params import Params, QuantizationParams
from fitlora.plan import Plan
from fitlora.quantization import weight
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.training.data import load_splits

LLAMA_3_70B = {
    "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
PIECE_BYTES = 8 << 20


def spec_of(params: QuantizationParams) -> QuantSpec:
    return QuantSpec(params.type, params.block_size, params.double)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- speed ---------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    buffer = bytearray(PIECE_BYTES)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The largest anonymous memory of this process, looked up every 5 ms: the list's one number."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            parts = ("RssAnon", "RssShmem")  # pinned memory may count as either
            peak[0] = max(peak[0], 1024 * sum(int(fields[part].split()[0]) for part in parts))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(source: Path, target: Path) -> dict[str, Any]:
    """One run of the quantizer in this process."""
    place = device()
    empty_model(load_config(source), dtype=torch.bfloat16)  # what is imported on first use
    if place.type == "cuda":
        torch.zeros(1, device=place)
    with anonymous_peak() as peak:
        start = time.perf_counter()
        quantize_checkpoint(source, target, spec=QuantSpec(), device=place)
        seconds = time.perf_counter() - start
    gpu = 0
    if place.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = total - free
    return {
        "device": device_name(),
        "seconds": seconds,
        "gpu_peak_bytes": gpu,
        "host_peak_bytes": peak[0],
    }


def make_source(args: argparse.Namespace) -> None:
    """Writes the source of random weights."""
    shape = _shape(args.model)
    layers = args.layers or shape["num_hidden_layers"]
    SHAPES["benchmark"] = {**shape, "num_hidden_layers": layers}
    make_checkpoint("benchmark", args.work / "source", device())


def _shape(model: str) -> dict[str, Any]:
    return {**SHAPES, "llama-3-70b": LLAMA_3_70B}[model]


def _elsewhere(what: str, *options: object) -> str:
    """What another process prints last; this one must hold no memory of the device."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quantize", what, *map(str, options)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1] if done.stdout else ""


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    source, target = args.work / "source", args.work / "quantized"
    shutil.rmtree(source, ignore_errors=True)
    shape = _shape(args.model)
    layers = args.layers or shape["num_hidden_layers"]
    disk = shutil.disk_usage(args.work.parent).total
    _elsewhere("make", "--model", args.model, "--layers", layers, "--work", args.work)
    files = sorted(source.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    largest = max(path.stat().st_size for path in files)
    rows = []
    for cache in ("cold", "warm"):
        times = []
        for what in ("read", "quantize"):
            if cache == "cold":
                forget(source)
            if what == "read":
                times.append(read_seconds(source))
                continue
            shutil.rmtree(target, ignore_errors=True)
            found = json.loads(_elsewhere("measure", "--source", source, "--work", target))
        row = {
            "model": args.model,
            "device": found.pop("device"),
            "layers": layers,
            "layers_of_the_model": shape["num_hidden_layers"],
            "disk_bytes": disk,
            "page_cache": cache,
            "source_bytes": size,
            "largest_shard_bytes": largest,
            "quantized_bytes": sum(p.stat().st_size for p in target.glob("*.safetensors")),
            "disk_read_seconds": round(times[0], 2),
            **{key: round(value, 2) for key, value in found.items()},
            "share_of_read_rate": round(times[0] / found["seconds"], 3),
        }
        rows.append(row)
    shutil.rmtree(source)
    shutil.rmtree(target)
    yield from rows


# --- bytes and quality ---------------------------------------------------------------------------


def default_bytes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The hash of every file of the default's artifact, made on each device that is here."""
    params = Params()
    for place in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "quantized_model"
            quantize_checkpoint(
                ROOT / params.model.id,
                target,
                spec=spec_of(params.quantization),
                device=torch.device(place),
            )
            yield {
                "model": params.model.id,
                "device": device_name() if place == "cuda" else "cpu",
                **{
                    f"sha256 {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in sorted(target.iterdir())
                },
            }


def quality(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Losses on the CPU in float32, so that the weights alone make the difference."""
    params = Params()
    source = ROOT / params.model.id
    _, validation = load_splits(params.data, source, load_config(source).vocab_size)
    plan = Plan.model_validate(
        {
            "device": "cpu",
            "effective_batch_size": 1,
            "micro_batch_size": 1,
            "evaluation_batch_size": 8,
            "sequence_length": params.data.max_length,
            "compute_dtype": "float32",
            "optimizer": "adamw",
            "loss_chunk_tokens": 1024,
        }
    )
    exact = weight.exact_mean
    here = device()
    first = 0.0
    scales: dict[str, dict[str, torch.Tensor]] = {}
    for bits, kind, double, mean in (
        (16, "nf4", False, ""), (4, "nf4", False, ""), (4, "nf4", True, "exact"),
        (4, "nf4", True, here.type), (4, "fp4", False, ""), (4, "fp4", True, "exact"),
    ):  # fmt: skip
        chosen = params.quantization.model_copy(
            update={"bits": bits, "type": kind, "double": double}
        )
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            spec = spec_of(chosen) if bits == 4 else None
            weight.exact_mean = exact if mean in ("", "exact") else _mean_of_the_device
            try:
                quantize_checkpoint(source, target, spec=spec, device=here)
            finally:
                weight.exact_mean = exact
            contender = Contender("base", "", target, chosen)
            step = load(contender, plan, Place(torch.device("cpu"), "float32", 8))
            loss = mean_loss(step, validation.sequences, lambda count: None)
            first = first or loss
            row = {
                "model": params.model.id, "bits": bits, "type": kind if bits == 4 else None,
                "double": double, "offset": mean or None, "quantized_on": device_name(),
                "loss": loss, "over_16_bits": loss - first,
            }  # fmt: skip
            if double and kind == "nf4":
                checkpoint = Checkpoint(target)
                scales[mean] = {
                    name: checkpoint.tensor(name)
                    for name in sorted(checkpoint.shards)
                    if name.endswith(".absmax")
                }
                pairs = zip(scales["exact"].values(), scales[mean].values(), strict=True)
                row["scales"] = sum(len(value) for value in scales[mean].values())
                row["scales_changed"] = sum(int((a != b).sum()) for a, b in pairs)
        yield row


def _mean_of_the_device(values: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes subtracts."""
    return values.to(device()).mean().cpu()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "bytes", "quality", "make", "measure"])
    parser.add_argument("--model", choices=[*SHAPES, "llama-3-70b"], default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="of the shape's, as many as the disk holds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantize")
    parser.add_argument("--json", type=Path, help="result file; its rows are added to")
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.what == "measure":
        print(json.dumps(measure(args.source, args.work)))
        return
    if args.what == "make":
        make_source(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    program = {"speed": speed, "bytes": default_bytes, "quality": quality}[args.what]
    rows = []
    if args.json is not None and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    for row in program(args):
        print(json.dumps(row), flush=True)
        rows.append({"measured": args.what, **row})
        if args.json is not None:
            write_result(args.json, "quantize", rows)


if __name__ == "__main__":
    main()
