"""The quantizer: how fast, in how much memory, the same bytes where, and at what price in quality.

    python -m benchmarks.quantize speed --model llama-3-8b --work /tmp/w --json OUT
    python -m benchmarks.quantize speed --model llama-3-70b --layers 20 --work /tmp/w --json OUT
    python -m benchmarks.quantize stages --model llama-3-8b --work /tmp/w --json OUT
    python -m benchmarks.quantize bytes --json OUT
    python -m benchmarks.quantize quality --json OUT

`speed` writes a source of random weights in the named shape, one shard a layer (with --layers, as many
as the disk holds), and quantizes it to NF4 with double quantization in a process of its own, from a
cold page cache (its files forgotten by posix_fadvise) and from a warm one. Beside it stands the time in
which the same files are read, in pieces of 8 MiB in order from the same cache and kept nowhere: by one
thread, as a copy reads them, which is what the shares are of, and by eight. From a warm cache the
latter is the rate of memory, and no disk's. Seconds are from the call to the finished folder; the
start of Python and its imports are left out. What is still to be written to the disk is written before
anything is timed. `host_peak_bytes` is anonymous memory and `gpu_peak_bytes` all that the device has
in use, its context included.

With --touch, the memory that a timed piece of work needs is first used once and freed. A virtual
machine may be given memory by its host only when it first uses it, which takes longer than to fill it.

`make` writes the source alone, which `speed` and `stages` then take as it is.

`stages` times each part of the quantizer alone on a source of --layers layers (2), in one thread and in
as many as the quantizer has. All rates count the source's bytes that the work is for, so the least of
them is what binds.

`bytes` quantizes the shipped model by the shipped params and hashes the files; `quality` gives its loss
on the shipped validation rows, and what the exact mean of double quantization changes against the
device's own. Rows are added to the file that is there.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, SHAPES, device_name, make_checkpoint, write_result
from fitlora.checkpoint import Checkpoint
from fitlora.evaluation.models import Contender, Place, load
from fitlora.evaluation.scores import mean_loss, score
from fitlora.model import empty_model, linear_names, load_config
from fitlora.params import Params, QuantizationParams
from fitlora.plan import Plan
from fitlora.quantization import quantize, weight
from fitlora.quantization.codes import quantize_4bit, quantize_8bit
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint, stored_pieces
from fitlora.quantization.reading import read_ahead
from fitlora.quantization.weight import CHUNK_ELEMENTS, quantize_pieces
from fitlora.quantization.writer import Pending, write_safetensors
from fitlora.training.data import load_splits

PIECE_BYTES = 8 << 20
READERS = 8  # threads of the other reading beside the plain one


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


def read_seconds(folder: Path, threads: int) -> float:
    """Reads the folder's weights once; each thread takes the next piece."""
    local = threading.local()
    with contextlib.ExitStack() as stack:
        pieces = []
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(path.open("rb", buffering=0))
            pieces += [
                (file.fileno(), start) for start in range(0, path.stat().st_size, PIECE_BYTES)
            ]

        def read(piece: tuple[int, int]) -> int:
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(PIECE_BYTES)
            return os.preadv(piece[0], [local.buffer], piece[1])

        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            size = sum(pool.map(read, pieces))
            seconds = time.perf_counter() - start
    assert size == weight_bytes(folder)
    return seconds


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def touch(size: int) -> None:
    """Uses `size` bytes of memory once, each page of it, and gives them back."""
    with mmap.mmap(-1, size) as memory, ThreadPoolExecutor(8) as pool:
        pages = np.frombuffer(memory, dtype=np.uint8)[::4096]
        for _ in pool.map(lambda part: part.fill(1), np.array_split(pages, 8)):
            pass
        del pages


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


def measure(source: Path, target: Path, touched: int) -> dict[str, Any]:
    """One run of the quantizer in this process. touched: bytes of memory that are used before."""
    place = device()
    empty_model(load_config(source), dtype=torch.bfloat16)  # what is imported on first use
    if place.type == "cuda":
        torch.zeros(1, device=place)
    if touched:
        touch(touched)
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
    shape = SHAPES[args.model]
    layers = args.layers or shape["num_hidden_layers"]
    SHAPES["benchmark"] = {**shape, "num_hidden_layers": layers}
    make_checkpoint("benchmark", args.work / "source", device())


def _elsewhere(what: str, *options: object) -> str:
    """What another process prints last; this one must hold no memory of the device."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quantize", what, *map(str, options)],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(f"{what}: {time.perf_counter() - start:.0f} s, start included", file=sys.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    source, target = args.work / "source", args.work / "quantized"
    shape = SHAPES[args.model]
    layers = args.layers or shape["num_hidden_layers"]
    args.work.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(args.work.parent).total
    _elsewhere("make", "--model", args.model, "--layers", layers, "--work", args.work)
    size = weight_bytes(source)
    for cache in args.caches:

        def prepare(result: int, cold: bool = cache == "cold") -> list[str]:
            """The cache as it is to be found, and how a process is told what memory to touch."""
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            if cold:
                forget(source)
            return ["--touch", str(result + size * cold)] if args.touch is not None else []

        reads = []
        for threads in (1, READERS):
            more = prepare(0)
            found = _elsewhere("read", "--source", source, "--threads", threads, *more)
            reads.append(float(found))
        more = prepare(size // 2)
        found = json.loads(_elsewhere("measure", "--source", source, "--work", target, *more))
        yield {
            "model": args.model,
            "device": found.pop("device"),
            "layers": layers,
            "layers_of_the_model": shape["num_hidden_layers"],
            "disk_bytes": disk,
            "memory_touched_first": args.touch is not None,
            "page_cache": cache,
            "source_bytes": size,
            "largest_shard_bytes": max(p.stat().st_size for p in source.glob("*.safetensors")),
            "quantized_bytes": weight_bytes(target),
            "disk_read_seconds": round(reads[0], 2),
            f"disk_read_seconds_{READERS}_threads": round(reads[1], 2),
            **{key: round(value, 2) for key, value in found.items()},
            "share_of_read_rate": round(reads[0] / found["seconds"], 3),
            f"share_of_read_rate_{READERS}_threads": round(reads[1] / found["seconds"], 3),
        }
    shutil.rmtree(source)
    shutil.rmtree(target)


# --- stages --------------------------------------------------------------------------------------


def stages(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    source, place, spec = args.work / "source", device(), QuantSpec()
    layers = args.layers or 2
    _elsewhere("make", "--model", args.model, "--layers", layers, "--work", args.work)
    os.sync()
    size, checkpoint = weight_bytes(source), Checkpoint(source)
    rest, *_, layer = checkpoint.files().items()
    names = [name for name in layer[1] if len(checkpoint.info(name).shape) == 2]
    layer_bytes = sum(checkpoint.info(name).bytes for name in names)
    rest_bytes = sum(checkpoint.info(name).bytes for name in rest[1])
    cuda = place.type == "cuda"
    pieces = {
        name: torch.randn(min(CHUNK_ELEMENTS, checkpoint.info(name).bytes // 2)).bfloat16()
        for name in names
    }
    if cuda:
        pieces = {name: piece.pin_memory() for name, piece in pieces.items()}
    piece = max(pieces.values(), key=len)
    there = piece.to(place)
    packed, absmax = quantize_4bit(there, spec.block_size, spec.type)
    scales = torch.cat([absmax] * -(-layer_bytes // piece.nbytes))
    made: list[dict[str, torch.Tensor]] = []
    queues = threading.local()

    def row(stage: str, threads: int, done: int, seconds: float) -> dict[str, Any]:
        return {
            "model": args.model, "device": device_name(), "layers": layers, "stage": stage,
            "threads": threads, "seconds": round(seconds, 4),
            "source_gb_per_second": round(done / seconds / 1e9, 2),
        }  # fmt: skip

    def timed(
        stage: str, done: int, work: Callable[[], object], threads: int = 1, times: int = 1
    ) -> dict[str, Any]:
        """work: what is done for `done` bytes of the source, by each thread so many times."""

        def run(_: int) -> None:
            if cuda:
                if not hasattr(queues, "own"):
                    queues.own = torch.cuda.Stream(place)
                torch.cuda.set_stream(queues.own)
            for _ in range(times):
                work()
            if cuda:
                torch.cuda.current_stream().synchronize()

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))  # what the first time alone takes
            start = time.perf_counter()
            list(pool.map(run, range(threads)))
            return row(stage, threads, done * times * threads, time.perf_counter() - start)

    def prepare() -> None:
        model = empty_model(load_config(source), dtype=torch.bfloat16)
        assert len(list(linear_names(model))) == 7 * layers
        opened = Checkpoint(source)
        assert sum(opened.info(name).bytes for name in opened.shards) < size

    def read_layer() -> None:
        for name in names:
            for _ in read_ahead(checkpoint, name, CHUNK_ELEMENTS, pinned=cuda):
                pass

    def quantize_layer() -> None:
        """From pinned memory to the shard's tensors; nothing is read."""
        tensors = {}
        for name in names:
            info = checkpoint.info(name)
            moved = (
                piece[: min(CHUNK_ELEMENTS, info.bytes // 2 - start)].to(place, non_blocking=True)
                for start in range(0, info.bytes // 2, CHUNK_ELEMENTS)
            )
            tensors.update(quantize_pieces(name, info, moved, spec, place))
        made.append(tensors)

    def write(tensors: Mapping[str, Any]) -> None:
        with tempfile.NamedTemporaryFile(dir=args.work) as file:
            write_safetensors(Path(file.name), tensors)

    def ignore(done: int) -> None:
        """Where progress is told."""

    def copy_rest() -> None:
        infos = {name: checkpoint.info(name) for name in rest[1]}
        write(
            {
                name: Pending(
                    info, functools.partial(stored_pieces, checkpoint, name, info, ignore)
                )
                for name, info in infos.items()
            }
        )

    yield timed("open model and headers", size, prepare)
    for cache in args.caches:
        for threads in (1, 2, 4, READERS, 16):
            if cache == "cold":
                forget(source)
            yield row(f"read, {cache}", threads, size, read_seconds(source, threads))
    yield timed("read ahead into pinned memory", layer_bytes, read_layer)
    workers = quantize.WORKERS[place.type]
    yield timed("read ahead into pinned memory", layer_bytes, read_layer, workers)
    count = 50 if cuda else 1
    yield timed("to the device", piece.nbytes, lambda: piece.to(place, non_blocking=True),
                times=count)  # fmt: skip
    yield timed("codes", piece.nbytes, lambda: quantize_4bit(there, spec.block_size, spec.type),
                times=count)  # fmt: skip
    yield timed("codes", piece.nbytes, lambda: quantize_4bit(there, spec.block_size, spec.type),
                workers, times=count)  # fmt: skip
    yield timed("mean of the scales", layer_bytes, lambda: weight.exact_mean(scales))
    yield timed("codes of the scales", layer_bytes, lambda: quantize_8bit(scales, 256))
    yield timed("codes to the host", piece.nbytes,
                lambda: weight.to_host(torch.empty(len(packed), dtype=torch.uint8), packed),
                times=count)  # fmt: skip
    yield timed("quantize a layer from memory", layer_bytes, quantize_layer)
    yield timed("quantize a layer from memory", layer_bytes, quantize_layer, workers)
    tensors = made[0]
    made.clear()
    yield timed("checksum of a layer", layer_bytes,
                lambda: [zlib.crc32(t.numpy().data) for t in tensors.values()])  # fmt: skip
    for threads in (1, 1, quantize.SHARDS, quantize.SHARDS):
        yield timed("write a layer", layer_bytes, lambda: write(tensors), threads)
    yield timed("check of what stays", piece.nbytes, lambda: weight.require_finite("w", piece))
    yield timed("checksum of what stays", piece.nbytes,
                lambda: zlib.crc32(piece.view(torch.uint8).numpy().data))  # fmt: skip
    yield timed("read, check and write what stays", rest_bytes, copy_rest)
    shutil.rmtree(source)


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
            loss = mean_loss(score(step, validation.sequences, lambda count: None))
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


PROGRAMS = {"speed": speed, "stages": stages, "bytes": default_bytes, "quality": quality}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*PROGRAMS, "make", "read", "measure"])
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="of the shape's, as many as the disk holds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantize")
    parser.add_argument("--json", type=Path, help="result file; its rows are added to")
    parser.add_argument(
        "--touch", type=int, nargs="?", const=0, help="use the memory once before timing"
    )
    parser.add_argument("--caches", choices=["cold", "warm"], nargs="+", default=["cold", "warm"])
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.what == "measure":
        print(json.dumps(measure(args.source, args.work, args.touch or 0)))
        return
    if args.what == "read":
        if args.touch:
            touch(args.touch)
        print(read_seconds(args.source, args.threads))
        return
    if args.what == "make":
        make_source(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    if args.json is not None and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    for row in PROGRAMS[args.what](args):
        print(json.dumps(row), flush=True)
        rows.append({"measured": args.what, **row})
        if args.json is not None:
            write_result(args.json, "quantize", rows)


if __name__ == "__main__":
    main()
