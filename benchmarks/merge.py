"""What a merge takes of the host, for any model and on any disk.

An adapter is merged into a checkpoint of random weights, in a process of its own. Its peak is the most
of its own memory that was resident (RssAnon); mapped pages of files, which the system drops when it
needs room, are apart. It fails where that is more than the limit: 8 GiB, and 16 for a 70B.

One layer's weights are drawn and quantized, and written as every layer's, under its names: what a merge
takes does not hang on the numbers. Of a 70B only the 4-bit weights (40 GB) need room: with --discard a
file of the merged model is emptied when it is complete, so that 141 GB are written and one file is kept.

    python -m benchmarks.merge --folder /tmp --json benchmarks/results/merge.cpu.json
    python -m benchmarks.merge --model llama-3-70b --base dequantized --discard --device cuda \
        --folder /dev/shm --json benchmarks/results/merge.h200.json
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import device_label, make_checkpoint, shape_config, write_result
from fitlora.adapter import adapter_config, save_adapter
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.model import empty_model, linear_names
from fitlora.params import LoraParams
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.quantization.writer import INDEX
from fitlora.units import GIB

LIMITS_GIB = {"llama-3-70b": 16}  # of the host; for others 8
BITS = {"dequantized": (16,), "original": (16, 4)}  # of the merged model, by the base
_LAYER = "model.layers.0."


def make_folders(
    model: str, folder: Path, device: torch.device, *, layers: int | None, original: bool
) -> int:
    """An original, its 4-bit checkpoint and an adapter of rank 16 on every linear layer.

    layers: of the model; None for as many as it has. original: whether all of its layers are written, or
    one. Returns the number of layers.
    """
    make_checkpoint(model, folder / "original", device, num_hidden_layers=1)
    quantize_checkpoint(folder / "original", folder / "quantized", spec=QuantSpec(), device=device)
    config = shape_config(model, **({} if layers is None else {"num_hidden_layers": layers}))
    for made in ["quantized"] + ["original"] * original:
        deepen(folder / made, config.num_hidden_layers)
    skeleton = empty_model(config, dtype=torch.bfloat16)
    lora = LoraParams(r=16)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in linear_names(skeleton):
        out_features, in_features = skeleton.get_submodule(name).weight.shape
        for side, shape in (("A", (lora.r, in_features)), ("B", (out_features, lora.r))):
            values = torch.randn(shape, generator=generator) * 0.01
            state[f"{name}.lora_{side}.default.weight"] = values
    targets = sorted({name.rpartition(".")[2] for name in linear_names(skeleton)})
    described = adapter_config(lora, targets, base_model=str(folder / "original"), revision=None)
    save_adapter(folder / "adapter", state, described)
    return int(config.num_hidden_layers)


def deepen(folder: Path, layers: int) -> None:
    """Gives a checkpoint of one layer, which has a file of its own, as many as that: all the same."""
    index = json.loads((folder / INDEX).read_text())
    files: dict[str, str] = index["weight_map"]
    (file,) = {file for name, file in files.items() if name.startswith(_LAYER)}
    tensors = load_file(folder / file)
    for layer in range(1, layers):
        renamed = {
            name.replace(_LAYER, f"model.layers.{layer}."): tensor
            for name, tensor in tensors.items()
        }
        files |= dict.fromkeys(renamed, f"layer-{layer:03}.safetensors")
        save_file(renamed, folder / f"layer-{layer:03}.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextlib.contextmanager
def anonymous_peak() -> Iterator[Callable[[], int]]:
    """Samples this process's anonymous memory; gives what returns the most that was seen, in bytes."""
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        ended = False
        while not ended:  # once in any case, however short the work
            ended = done.wait(0.02)
            lines = Path("/proc/self/status").read_text().splitlines()
            found = next(line for line in lines if line.startswith("RssAnon:"))
            peak = max(peak, int(found.split()[1]) * 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def merge_once(folder: Path, base: Any, bits: Any, device: torch.device) -> dict[str, Any]:
    """One merge, in this process."""
    start = time.perf_counter()
    with anonymous_peak() as peak, contextlib.redirect_stdout(sys.stderr):
        merge_checkpoint(
            original=folder / "original",
            quantized=folder / "quantized",
            adapter=folder / "adapter",
            target=folder / "merged",
            base=base,
            bits=bits,
            device=device,
        )
    return {"seconds": round(time.perf_counter() - start, 1), "host_peak_bytes": peak()}


def discard(folder: Path) -> int:
    """Empties the files of the merged model that are complete; returns the bytes that they had."""
    freed = 0
    for place in (folder / ".merged.partial", folder / "merged"):
        for file in place.glob("*.safetensors"):
            freed += file.stat().st_size
            with contextlib.suppress(FileNotFoundError):  # its folder was renamed just now
                file.open("r+b").truncate(0)
    return freed


def measure(args: argparse.Namespace, folder: Path, base: str, bits: int) -> dict[str, Any]:
    """One merge in a process of its own, and what there was to merge."""
    limit = LIMITS_GIB.get(args.model, 8) * GIB
    command = [sys.executable, "-m", "benchmarks.merge", "--folder", str(folder), "--once"]
    command += ["--base", base, "--bits", str(bits), "--device", args.device]
    merged = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while args.discard and child.poll() is None:
            merged += discard(folder)
            time.sleep(0.05)
        output, _ = child.communicate()
        assert child.returncode == 0
    merged += discard(folder) if args.discard else bytes_of(folder / "merged")
    shutil.rmtree(folder / "merged")
    source = folder / ("original" if base == "original" else "quantized")
    row = {
        "measured": "memory", "device": args.device, "base": base,
        "bits": bits, "host_limit_bytes": limit, "file_system": file_system(folder),
        "source_bytes": bytes_of(source),
        "largest_file_bytes": max(f.stat().st_size for f in source.glob("*.safetensors")),
        "adapter_bytes": bytes_of(folder / "adapter"), "merged_bytes": merged,
        "discarded": args.discard, **json.loads(output.splitlines()[-1]),
    }  # fmt: skip
    print(row, flush=True)
    return row


def file_system(folder: Path) -> str:
    """Its type: tmpfs is memory of the host, though not the process's own."""
    found = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(folder)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="of the model; all by default")
    parser.add_argument("--base", choices=list(BITS), help="both by default")
    parser.add_argument("--discard", action="store_true", help="keep nothing of the merged model")
    parser.add_argument("--json", type=Path, help="rows of other models and devices are kept in it")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        found = merge_once(args.folder, args.base, args.bits, torch.device(args.device))
        print(json.dumps(found))
        return
    bases = [args.base] if args.base else list(BITS)
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=args.folder))
    try:
        device = torch.device(args.device)
        original = "original" in bases
        count = make_folders(args.model, folder, device, layers=args.layers, original=original)
        made = {"model": args.model, "layers": count}
        rows = [
            {**made, **measure(args, folder, base, bits)} for base in bases for bits in BITS[base]
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json is not None:
        write_result(args.json, "merge", [*others(args), *rows], label=device_label())
    for row in rows:
        assert row["host_peak_bytes"] <= row["host_limit_bytes"], "above the limit"


def others(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The file's rows of other models and devices, each with the commit that it was measured at."""
    if not args.json.exists():
        return []
    asked = (args.model, args.device)
    found = json.loads(args.json.read_text())
    rows = [row for row in found["rows"] if (row["model"], row["device"]) != asked]
    return [{"commit": found["commit"], **row} for row in rows]


if __name__ == "__main__":
    main()
